"""Writes a language model (target or draft) as a plain Hugging Face folder with a trainkit.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainkit import bundle
from trainkit.bundle import read_json
from trainkit.errors import UserError
from trainkit.export.checks import check_finite, check_reload, check_weights, copy_tokenizer, layout_for
from trainkit.files import write_json
from trainkit.models.load import read_tokenizer, transformers4_rope

FORMATS = {"native": "hf", "hf": "hf", "vllm": "hf", "sglang": "hf"}
"""Requested format -> layout of the files; transformers, vLLM and SGLang load the same folder."""


_SPECIAL_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")


@torch.no_grad()
def export_model(
    model: Any,
    out: str | Path,
    *,
    tokenizer: str | Path,
    dtype: torch.dtype = torch.float32,
    format: str = "native",
    policy: Mapping[str, Any] | None = None,
    **card: Any,
) -> bundle.Bundle:
    """Writes a transformers model with its tokenizer as a bundle and returns it.

    The written files are reloaded, and weights and logits compared with those of `model`, before they are moved to `out`. The
    end ids are the union of the model's and the tokenizer's; start and padding ids are the model's, or else the tokenizer's.
    Settings for generation (generation_config.json) do not change.

    Args:
        model: A transformers causal LM on the CPU.
        out: Folder to write; a bundle there is replaced.
        tokenizer: Folder whose tokenizer files are copied.
        dtype: Dtype of the written weights.
        format: One of `FORMATS`.
        policy: How RL trained it (algorithm, rewards), for its card.
        card: `metrics`, `runner`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, a format that models do not have, no tokenizer, or `out` is something other than
            a bundle.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    # Refuse what cannot be exported, and cast
    layout = layout_for(format, FORMATS, "language model")
    check_finite(model.named_parameters())
    for value in model.parameters():  # not the buffers: rotary frequencies are float32 after a reload
        value.data = value.data.to(dtype)
    model.eval()
    tokens = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits

    # Write to a temporary folder, check it, and only then put it at `out`
    def write_files(folder: Path) -> None:
        copy_tokenizer(Path(tokenizer), folder)
        generation = model.generation_config
        for name, value in _special_ids(read_tokenizer(folder), model.config, generation).items():
            setattr(model.config, name, value)
            setattr(generation, name, value)
        # transformers loads sampling settings next to do_sample false, but refuses to save them
        model.generation_config = GenerationConfig()
        model.save_pretrained(folder)
        model.generation_config = generation
        write_json(folder / "generation_config.json", generation.to_diff_dict())
        rope = getattr(model.config, "rope_parameters", None) or {}
        if "rope_type" in rope:  # not for models with other rotary parameters in each type of layer
            write_json(folder / "config.json", read_json(folder / "config.json") | transformers4_rope(rope))
        result: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        reloaded, report = result[0].eval(), result[1]
        if faults := sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]})):
            raise UserError(f"{out}: tensor {faults[0]} would not reload; nothing was written, report this as a bug")
        check_reload(before, reloaded(tokens).logits, out)
        check_weights(model.state_dict(), reloaded.state_dict(), out)

    extra = {"format": format, "layout": layout} | ({"policy": dict(policy)} if policy else {})
    return bundle.write(out, write_files, kind="model", config={}, target={}, extra=extra, **card)


def _special_ids(tokenizer: Any, *configs: Any) -> dict[str, Any]:
    """`eos_token_id` of all configs and the tokenizer, and for the start and padding ids the first value that is set."""
    values = {name: [getattr(source, name, None) for source in (*configs, tokenizer)] for name in _SPECIAL_IDS}
    ends = dict.fromkeys(id for value in values.pop("eos_token_id") for id in (value if isinstance(value, list) else [value]))
    ends.pop(None, None)
    first = {name: next((value for value in found if value is not None), None) for name, found in values.items()}
    return first | {"eos_token_id": next(iter(ends), None) if len(ends) < 2 else list(ends)}
