"""What users have without us: transformers' `generate`, and its assisted generation with the same draft, as bench contenders.

Every setting that changes text or speed is stated here rather than left to a checkpoint's generation_config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainkit.bundle import read_json
from trainkit.eval.bench.timing import Contender, Generated, Run
from trainkit.models.load import hf_config, hf_tensors
from trainkit.models.shape import TargetShape
from trainkit.runner.timing import synchronize


@dataclass(frozen=True)
class Settings:
    """What transformers is asked for: the same as our runner.

    Attributes:
        shape: Whose end ids and padding apply.
        temperature: 0 is greedy; above, it samples with its own generator, so the text is another.
        seed: Of that generator.
        batch: Prompts at once, padded on the left.
    """

    shape: TargetShape
    temperature: float
    seed: int
    batch: int

    def generation_config(self, max_new_tokens: int) -> Any:
        """The explicit generation config."""
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
    """A transformers model as a user loads it: SDPA attention, the same precision."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
        )
    return _plain(model.to(device))


def model_of(decoder: Any, end_ids: Sequence[int] = ()) -> Any:
    """The transformers model with a decoder's weights, for a target that has no folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weight = decoder.embed.weight
    values = hf_config(decoder.shape, end_ids, None, weight.dtype)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(weight.device):
        model = AutoModelForCausalLM.from_config(config, dtype=weight.dtype, attn_implementation="sdpa")
    keys = model.load_state_dict(hf_tensors(decoder), strict=False)
    assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}, "a tied head has no weight of its own"
    return _plain(model)


def can_assist(folder: str | Path, vocab_size: int) -> str:
    """Empty where transformers loads the folder as an assistant of a target with this vocabulary; otherwise why not."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not (Path(folder) / "config.json").is_file():
        return "the drafter's folder has no config.json"
    # as it stands: transformers knows no config of heads, and would refuse to read one
    config = read_json(Path(folder) / "config.json")
    name = (config.get("architectures") or ["?"])[0]
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return f"transformers has no language model {name}"
    if config.get("vocab_size") != vocab_size:
        return f"the draft's vocabulary has {config.get('vocab_size')} entries, the target's {vocab_size}"
    return ""


def plain_contender(model: Any, settings: Settings) -> Contender:
    """The `generate` of transformers, without a draft."""
    return Contender("transformers generate", "transformers", 0, _runner(model, None, 0, settings))


def assisted_contender(name: str, model: Any, assistant: Any, depth: int, settings: Settings, drafter: str) -> Contender:
    """Assisted generation with the same draft: `depth` tokens a round, constant schedule, no confidence threshold."""
    return Contender(name, "transformers", depth, _runner(model, assistant, depth, settings), drafter=drafter)


def _runner(model: Any, assistant: Any, depth: int, settings: Settings) -> Run:
    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, first: int) -> Generated:
        model.generation_config = settings.generation_config(max_new_tokens)
        extra = {}
        if assistant is not None:
            assistant.generation_config = settings.generation_config(max_new_tokens)
            assistant.generation_config.num_assistant_tokens = depth
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            extra["assistant_model"] = assistant
        tokens: list[list[int]] = []
        for start in range(0, len(prompts), settings.batch):
            torch.manual_seed(settings.seed + first + start)
            tokens += _generate(model, prompts[start : start + settings.batch], settings, extra)
        synchronize(model.device)
        return Generated(tokens)

    return run


@torch.inference_mode()
def _generate(model: Any, prompts: Sequence[Sequence[int]], settings: Settings, extra: dict[str, Any]) -> list[list[int]]:
    width = max(map(len, prompts))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    rows = model.generate(input_ids=ids, attention_mask=mask, **extra)[:, width:].tolist()
    return [_cut(row, settings.shape.end_ids) for row in rows]


def _cut(tokens: list[int], end_ids: Sequence[int]) -> list[int]:
    """Up to the first end token, it included: what follows in a batch is padding."""
    for place, token in enumerate(tokens):
        if token in end_ids:
            return tokens[: place + 1]
    return tokens


def _plain(model: Any) -> Any:
    return model.requires_grad_(False).eval()


class _quiet:
    """Without transformers' progress bars, which would tear ours."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._before = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        shown, level = self._before
        if shown:
            logging.enable_progress_bar()
        logging.set_verbosity(level)
