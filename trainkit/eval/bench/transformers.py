"""The alternative to trainkit as bench methods: transformers' `generate`, plain and assisted by the same draft model.

Every setting that changes text or speed is set here; none comes from a checkpoint's generation_config.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainkit.bundle import read_json
from trainkit.eval.bench.timing import Generated, Method
from trainkit.models.load import hf_config, hf_views
from trainkit.models.shape import TargetShape
from trainkit.runner.timing import synchronize


@dataclass(frozen=True)
class TransformersSettings:
    """Settings that transformers decodes with; the same as trainkit's runner.

    Attributes:
        shape: Target whose end and padding ids apply.
        temperature: Sampling temperature; 0 is greedy. Above 0 the text differs from trainkit's, whose noise is another.
        seed: Seed of torch's generator.
        batch: Prompts decoded together, padded on the left.
    """

    shape: TargetShape
    temperature: float
    seed: int
    batch: int

    def generation_config(self, max_new_tokens: int) -> Any:
        """A GenerationConfig that states every setting."""
        from transformers import GenerationConfig

        ends = list(self.shape.end_ids)
        pad = self.shape.pad_id if self.shape.pad_id is not None else (ends[0] if ends else 0)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0} if self.temperature else {}
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            num_beams=1,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=pad,
            disable_compile=True,
            **({"do_sample": False} | sampling),
        )


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
    keys = model.load_state_dict(hf_views(decoder), strict=False)
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
    name: str, settings: TransformersSettings, model: Any, assistant: Any = None, depth: int = 0, drafter: str = ""
) -> Method:
    """A method that decodes with transformers' `generate`, or with its assisted generation if there is an assistant.

    Args:
        name: Name in tables.
        settings: Sampling and batching settings.
        model: Target, a transformers model.
        assistant: Draft model; it drafts `depth` tokens a round on a constant schedule, without a confidence threshold.
        depth: Tokens drafted a round; 0 without an assistant.
        drafter: Name of the draft model; empty without an assistant.
    """

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, first: int) -> Generated:
        model.generation_config = settings.generation_config(max_new_tokens)
        extra = {}
        if assistant is not None:
            assistant.generation_config = settings.generation_config(max_new_tokens)
            assistant.generation_config.update(
                num_assistant_tokens=depth, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
            )
            extra["assistant_model"] = assistant
        tokens: list[list[int]] = []
        with _quiet():
            for start in range(0, len(prompts), settings.batch):
                torch.manual_seed(settings.seed + first + start)
                tokens += _generate(model, prompts[start : start + settings.batch], settings, extra)
            synchronize(model.device)
        return Generated(tokens)

    return Method(name, "transformers", depth, run, drafter=drafter)


@torch.inference_mode()
def _generate(
    model: Any, prompts: Sequence[Sequence[int]], settings: TransformersSettings, extra: dict[str, Any]
) -> list[list[int]]:
    """New tokens of each prompt up to its first end token, which is included; batched rows have padding behind it."""
    width = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    rows = model.generate(input_ids=ids, attention_mask=mask, **extra)[:, width:].tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in settings.shape.end_ids), len(row)) for row in rows]
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
