"""The alternative to trainkit as bench methods: transformers' `generate`, plain and assisted by the same draft model.

Every setting that changes text or speed is set here; none comes from a checkpoint's generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainkit.bundle import read_json
from trainkit.eval.bench.timing import Generated, Method, Prompts
from trainkit.eval.bench.types import BenchArguments
from trainkit.models.load import hf_config, hf_tensors
from trainkit.models.shape import TargetShape
from trainkit.runner.timing import synchronize


def load_model(folder: str | Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The folder's model in transformers, with SDPA attention."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    return model.to(device).requires_grad_(False).eval()


def build_model(decoder: Any) -> Any:
    """A transformers model with the weights of a decoder that has no folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weight = decoder.embed.weight
    values = hf_config(decoder.shape, (), None, weight.dtype)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(weight.device):
        model = AutoModelForCausalLM.from_config(config, dtype=weight.dtype, attn_implementation="sdpa")
    keys = model.load_state_dict(hf_tensors(decoder), strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}, "a tied head has no weight of its own"
    return model.requires_grad_(False).eval()


def why_not_assistant(folder: str | Path, vocab_size: int) -> str:
    """The reason why transformers cannot use the folder as an assistant for this vocabulary size; empty if it can."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (Path(folder) / "config.json").is_file():
        return "the drafter's folder has no config.json"
    # read as plain JSON, because transformers refuses to read the config of draft heads
    config = read_json(Path(folder) / "config.json")
    name = (config.get("architectures") or ["?"])[0]
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return f"transformers has no language model {name}"
    if config.get("vocab_size") != vocab_size:
        return f"the draft's vocabulary has {config.get('vocab_size')} entries, the target's {vocab_size}"
    return ""


def transformers_method(
    name: str, options: BenchArguments, shape: TargetShape, model: Any, assistant: Any = None, depth: int = 0, drafter: str = ""
) -> Method:
    """A method that decodes with transformers' `generate`, or with its assisted generation if there is an assistant.

    Above temperature 0 its text differs from trainkit's, because transformers draws other noise. The temperature, the seed and
    the batch come from `options`, the end and padding ids from `shape`. The assistant, a draft model, drafts `depth` tokens
    per round on a constant schedule, without a confidence threshold; `drafter` is its name.
    """

    def run(prompts: Prompts, max_new_tokens: int, first: int) -> Generated:
        model.generation_config, extra = _generation_config(options.temperature, shape, max_new_tokens), {}
        if assistant is not None:
            assistant.generation_config = _generation_config(options.temperature, shape, max_new_tokens)
            assistant.generation_config.update(
                num_assistant_tokens=depth, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
            )
            extra["assistant_model"] = assistant
        tokens: list[list[int]] = []
        with _quiet():
            for start in range(0, len(prompts), options.batch):
                torch.manual_seed(options.seed + first + start)
                tokens += _generate(model, prompts[start : start + options.batch], shape.end_ids, extra)
            synchronize(model.device)
        return Generated(tokens)

    return Method(name, "transformers", depth, run, drafter=drafter)


def _generation_config(temperature: float, shape: TargetShape, max_new_tokens: int) -> Any:
    """A GenerationConfig that states every setting."""
    from transformers import GenerationConfig

    ends = list(shape.end_ids)
    pad = ends[0] if ends else 0  # masked; the model's own padding id may be outside its vocabulary
    settings: dict[str, Any] = {"num_beams": 1, "use_cache": True, "disable_compile": True, "do_sample": temperature > 0}
    if temperature:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, **settings)


@torch.inference_mode()
def _generate(model: Any, prompts: Prompts, end_ids: tuple[int, ...], extra: dict[str, Any]) -> list[list[int]]:
    """New tokens of each prompt up to its first end token, which is included; prompts of a batch are padded on the left."""
    width = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    rows = model.generate(input_ids=ids, attention_mask=mask, **extra)[:, width:].tolist()
    # rows of a batch that ended early have padding after their end token
    ends = [next((i + 1 for i, token in enumerate(row) if token in end_ids), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and warnings of transformers, which would interrupt the bench's own lines."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
        logging.set_verbosity(level)
