"""`trainkit compress` with methods that remove whole parts: bundles that other programs and the runner load, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.targets import make_target
from trainkit import bundle
from trainkit.commands.compress import compress
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.target import target_shape
from trainkit.runner import Runner

ROWS = [f"Tom has {n} apples and eats {n // 3} of them. He keeps {n - n // 3}." for n in range(40, 140)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return [str(path)]


SHORT = {"samples": 4, "length": 32}
BOTH = SHORT | {"dimensions": ["neurons", "heads"]}


def test_flap_writes_a_smaller_bundle(corpus, tmp_path):
    """The bundle has fewer bytes and biases, its card says what is gone, and speculative decoding of it is plain decoding."""
    source, out = make_target(tmp_path / "in"), tmp_path / "out"
    report = compress(str(source), str(out), method="flap", ratio=0.5, calibration=corpus, multiple=16, **BOTH)
    made = bundle.read(out)
    found, config = made.extra["compression"], json.loads((out / "config.json").read_text())
    assert found["removed"] in report and found["removed"].startswith("64 of 128 neurons of each block, 2 of 4 query heads")
    assert found["removed"] in (out / "README.md").read_text() and "## By kind" not in (out / "README.md").read_text()
    assert config["attention_bias"] and config["mlp_bias"] and config["num_key_value_heads"] == 1
    assert found["bytes"]["disk"] < 0.7 * found["bytes"]["dense"]
    assert load_file(out / "model.safetensors")["model.layers.3.mlp.down_proj.bias"].abs().max() > 0
    assert not (tmp_path / "out.work").exists()
    runner = Runner.load(out, source, max_len=64)
    plain, drafted = (runner.generate([[5, 6, 7]], max_new_tokens=20, depth=depth)[0].tokens for depth in (0, 3))
    assert plain == drafted


def test_a_draft_model_loses_blocks_and_heads(corpus, tmp_path):
    """A drafter's bundle becomes a smaller drafter's bundle, whose speculative decoding is the target's plain decoding."""
    target = make_target(tmp_path / "target")
    export_drafter(LMDraft(target_shape(target), num_layers=2), tmp_path / "draft", tokenizer=target)
    compress(str(tmp_path / "draft"), str(tmp_path / "one"), method="flap", ratio=0.5, calibration=corpus, multiple=8, **BOTH)
    compress(str(tmp_path / "one"), str(tmp_path / "two"), method="depth", ratio=0.5, calibration=corpus, **SHORT)
    sizes = bundle.read(tmp_path / "two").config
    assert (sizes["num_layers"], sizes["num_heads"], sizes["num_kv_heads"]) == (1, 2, 1)
    runner = Runner.load(target, tmp_path / "two", max_len=64)
    plain, drafted = (runner.generate([[5, 6, 7]], max_new_tokens=20, depth=depth)[0].tokens for depth in (0, 3))
    assert plain == drafted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "flap"}, "--method flap: removes parts of the model, so give --ratio"),
        ({"method": "flap", "ratio": 0.2, "sparsity": "2:4"}, "--sparsity: --method flap has no such option"),
        ({"method": "depth", "ratio": 0.5, "multiple": 8}, "--multiple: --method depth has no such option"),
        ({"method": "depth", "ratio": 0.5, "dimensions": ["heads"]}, "--dimensions: --method depth has no such option"),
        ({"method": "wanda", "sparsity": "2:4", "ratio": 0.2}, "--ratio: --method wanda has no such option"),
        ({"method": "flap", "ratio": 1.5}, "--ratio 1.5: give the share"),
        ({"method": "width", "ratio": 0.9, "dimensions": ["heads"]}, "--ratio 0.9: leaves none of 2 query heads"),
        ({"method": "structured-random", "ratio": 0.2}, "--calibration: --method structured-random"),
        ({"method": "slim", "ratio": 0.2}, "unknown method; choose from magnitude, .*flap"),
    ],
)
def test_mistakes_of_options_are_one_line(options, message, tiny_target, corpus, tmp_path):
    """Options of other methods and impossible ratios are refused, and nothing is left behind."""
    with pytest.raises(UserError, match=message) as caught:
        compress(str(tiny_target), str(tmp_path / "out"), calibration=corpus, **SHORT, **options)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))
    assert torch.is_grad_enabled()
