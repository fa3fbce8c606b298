"""Random rows, chat templates and configurations: they work, or one UserError says why not; nothing else is raised.

Random traffic over a session: whatever joins, leaves, is cancelled or shares a prefix, each text is its request's own.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.equality import assert_few
from tests.support.models import SIBLINGS, pair
from tests.support.pauses import Erratic
from tests.support.recipes import small_recipe
from tests.support.targets import make_target, make_tokenizer
from tests.support.traffic import check_traffic, open_session
from trainkit import cli
from trainkit.data.text.formats import FORMATS, PROMPT_FORMATS
from trainkit.data.text.prepare import prepare
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.models.target import FrozenTarget
from trainkit.runner import DynamicTree, Runner
from trainkit.runner.policies.chain import PolicyChain

QUICK = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
SCALARS = st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | JSON,
            "content": st.text(max_size=12) | JSON,
            "from": st.sampled_from(["human", "gpt"]) | JSON,
            "value": st.text(max_size=12) | JSON,
            "tool_calls": JSON,
        },
    ),
    max_size=4,
)
COLUMNS = sorted({name for names in (*FORMATS, *PROMPT_FORMATS) for name in names})
IDS = st.lists(st.integers(-2, 330), max_size=5)
ROWS = st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=5), TURNS | IDS | st.text(max_size=20) | JSON, max_size=4)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@contextmanager
def rows_file(rows: list[Any]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        yield str(path)


def works_or_says_why(call: Callable[[], Any]) -> None:
    with suppress(UserError):
        call()


POLICIES = st.fixed_dictionaries(
    {
        "on_bad_row": st.sampled_from(["error", "skip"]),
        "on_long_row": st.sampled_from(["truncate", "skip", "error"]),
        "validation_share": st.sampled_from([0.0, 0.5]),
    }
)


@QUICK
@given(rows=st.lists(ROWS | JSON, min_size=1, max_size=3), options=POLICIES)
def test_any_rows_are_read_or_refused(tokenizer, rows, options):
    """Any rows are read, or refused by a UserError."""
    with rows_file(rows) as file:
        works_or_says_why(lambda: prepare([file], None, tokenizer, 16, **options))
        works_or_says_why(lambda: read_prompts(file, tokenizer))


FRAGMENTS = st.sampled_from(
    [
        "{% for m in messages %}",
        "{% for message in messages %}",
        "{% endfor %}",
        "{{ m['content'] }}",
        "{{ m.role }}",
        "{% if add_generation_prompt %}",
        "{% endif %}",
        "{% else %}",
        "{% generation %}",
        "{% endgeneration %}",
        "<|assistant|>",
        "<|end|>",
        "{{ raise_exception('no') }}",
        "{{ messages[9]['content'] }}",
        "{{ 1 / 0 }}",
        "{{ m.content.nothing() }}",
        "{{ messages | length }}",
        "{{ undefined_function() }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0] | tojson }}",
        "{% set x = ",
        "{{ messages | map(attribute='content') | join('|') }}",
        "{% break %}",
        "{{ tools | tojson }}",
        "{{ bos_token + eos_token }}",
        "{{ m['content'].split('x')[3] }}",
        "{{ range(10**9) | list }}",
        "{% include 'x' %}",
        "{{ strftime_now('%Y') }}",
        "\n",
        "{#",
        "}}",
    ]
) | st.text(max_size=6)
LOOPS = st.lists(FRAGMENTS, max_size=5).map(lambda parts: "{% for m in messages %}" + "".join(parts) + "{% endfor %}")
TEMPLATES = st.lists(FRAGMENTS, max_size=6).map("".join) | LOOPS
CHATS = [{"messages": [{"role": role, "content": f"{role} says {n}"} for role in ("user", "assistant") * n]} for n in (1, 2)]


@QUICK
@given(template=TEMPLATES)
def test_any_chat_template_works_or_is_refused(tokenizer, template):
    """Any chat template renders, or is refused by a UserError."""
    tokenizer.chat_template = template
    with rows_file(CHATS) as file:
        works_or_says_why(lambda: prepare([file], None, tokenizer, 32, validation_share=0.0))
        works_or_says_why(lambda: read_prompts(file, tokenizer))


FIELDS = (
    "model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim max_position_embeddings rope_parameters rope_theta rope_scaling rms_norm_eps "
    "hidden_act tie_word_embeddings attention_bias mlp_bias eos_token_id pad_token_id dtype sliding_window "
    "use_sliding_window layer_types quantization_config "
    "text_config auto_map unknown"
).split()
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "llama3", "yarn", "longrope", "dynamic"]) | SCALARS,
        "rope_theta": SCALARS,
        "factor": SCALARS,
        "low_freq_factor": SCALARS,
        "original_max_position_embeddings": SCALARS,
        "partial_rotary_factor": SCALARS,
    },
)
KINDS = st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gpt2", "mamba", "t5", "bert", "gemma2"])
VALUES = JSON | ROPE | KINDS | st.sampled_from([16, 32, 64, 128, 320, "silu", "bfloat16", "float8", ["LlamaForCausalLM"]])
CONFIGS = st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("fuzz") / "target", num_hidden_layers=1)


@settings(QUICK, max_examples=50)
@given(changes=CONFIGS | st.fixed_dictionaries({"rope_parameters": ROPE}) | JSON)
def test_any_target_config_loads_or_is_refused(target, tmp_path_factory, changes):
    """Any config of a target loads, or is refused by a UserError."""
    folder = tmp_path_factory.mktemp("model")
    for file in target.iterdir():
        shutil.copyfile(file, folder / file.name)
    config = json.loads((target / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes} if isinstance(changes, dict) else changes))
    works_or_says_why(lambda: Runner.load(folder, max_len=16).generate(["a"], max_new_tokens=2))
    works_or_says_why(lambda: Runner.load(target, folder, max_len=16))
    works_or_says_why(lambda: FrozenTarget(folder).shape())


PLACES = {
    "model": "target drafter divergence optimizer lr_scheduler warmup_steps final_lr depth teacher_top_k syze".split(),
    "data": "length batch_size columns on_bad_row on_long_row validation validation_share limit limit_validation syze".split(),
    "trainer": "max_steps max_epochs val_check_interval precision gradient_clip_val accumulate_grad_batches syze".split(),
}
PATHS = st.sampled_from([(part, name) for part, names in PLACES.items() for name in names])
NO_NAMES = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.lists(st.integers(-1, 9), max_size=2)
"""Of files, which would be looked for on the hub."""


SPOILED = NO_NAMES | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@settings(QUICK, max_examples=16)
@given(changes=st.dictionaries(PATHS, SPOILED, min_size=1, max_size=2))
def test_any_recipe_runs_or_gives_one_line(target, tmp_path_factory, capsys, changes):
    """Any recipe runs, or gives a one-line error."""
    home = tmp_path_factory.mktemp("recipe")
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"{n}."}) + "\n" for n in range(6)))
    values = small_recipe(target, rows, home) | {"trainer.fast_dev_run": True}
    for (part, name), value in changes.items():
        if part == "trainer":
            values[f"trainer.{name}"] = value
        else:
            values[part]["init_args"][name] = value
    (home / "recipe.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    code = cli.main(["fit", "--config", str(home / "recipe.yaml"), "--trainer.default_root_dir", str(home / "run")])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trainkit: error: ")]
    assert (code, len(said)) in ((0, 0), (2, 1))
    assert not (home / "run").exists()


DRAFTS = st.sampled_from([{"depth": 0}, {"depth": 3}, {"tree": SIBLINGS}, {"tree": DynamicTree(4, 3, 8)}, {}])
WAYS = st.sampled_from([(0, False), (1, False), (1, True), (2, True)])


@settings(QUICK, max_examples=12)
@given(
    number=st.integers(0, 2**32), drafts=DRAFTS, way=WAYS, rows=st.integers(1, 6), together=st.integers(1, 4), data=st.data()
)
def test_any_traffic_gives_each_request_its_text(number, drafts, way, rows, together, data):
    """Any arrivals, cancellations, lengths, sampling, shared prefixes, budgets and lags: texts equal plain decoding alone."""
    torch.manual_seed(number)
    draw, (lag, captured) = random.Random(number), way
    runner = pair(max_len=260, ends=draw.choice([(), (7,)]), draft_layers=draw.choice([1, 2]))
    if not drafts:  # a policy, which no captured round can ask
        drafts, captured = {"tree": PolicyChain(Erratic(4), runner.device)}, False
    prefill, sharing = data.draw(st.sampled_from([1, 7, 64, None])), data.draw(st.booleans())
    session = open_session(runner, rows, drafts, lag, captured, prefill=prefill, sharing=sharing, together=together)
    tokens, ties = check_traffic(runner, session, draw, number, count=8, longest=25)
    assert_few(ties, tokens)
