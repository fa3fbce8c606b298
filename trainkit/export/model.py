"""A language model (target or draft) as a plain Hugging Face folder with our card beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainkit import bundle
from trainkit.errors import UserError
from trainkit.export.drafter import checked_format, copy_tokenizer

KIND = "model"
FORMATS = {"native": "hf", "hf": "hf", "vllm": "hf", "sglang": "hf"}
"""Format asked for -> the layout that serves it: transformers, vLLM and SGLang load the same folder."""


@torch.no_grad()
def export_model(
    model: Any,
    out: str | Path,
    *,
    tokenizer: str | Path,
    dtype: torch.dtype = torch.float32,
    format: str = "native",
    own_ids: bool = False,
    **card: Any,
) -> bundle.Bundle:
    """Writes a transformers model with its tokenizer; nothing stands at `out` unless it reloads whole, with equal logits.

    Args:
        model: A transformers causal LM on the CPU.
        out: Folder to write; a bundle there is replaced.
        tokenizer: Folder whose tokenizer files go along.
        dtype: Of the weights written.
        format: One of `FORMATS`.
        own_ids: Keep the end, start and padding ids that the model came with; otherwise the tokenizer's are written.
        card: `metrics`, `runner`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, a format that models do not have, `out` is something else than a bundle, or no
            tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    layout = checked_format(format, FORMATS, "language model")
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise UserError(f"checkpoint: {name} holds values that are not finite; export an earlier checkpoint")
    for value in model.parameters():  # not buffers: a reload keeps rotary frequencies in float32
        value.data = value.data.to(dtype)
    model.eval()

    def fill(folder: Path) -> None:
        copy_tokenizer(Path(tokenizer), folder)
        loaded = AutoTokenizer.from_pretrained(folder)
        if not own_ids:
            model.config.eos_token_id = model.generation_config.eos_token_id = loaded.eos_token_id
            model.config.bos_token_id = model.generation_config.bos_token_id = loaded.bos_token_id
            model.config.pad_token_id = model.generation_config.pad_token_id = loaded.pad_token_id
        model.save_pretrained(folder)
        loaded_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        again, report = loaded_model[0].eval(), loaded_model[1]
        if strays := sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]})):
            raise UserError(f"{out}: {strays[0]} would not be written as it is read; nothing was written, report this as a bug")
        tokens = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
        difference = (model(tokens).logits - again(tokens).logits).abs().max().item()
        if not difference == 0:
            raise UserError(f"{out}: the reloaded export's logits differ by {difference:.3g}; nothing was written")

    extra = {"format": format, "layout": layout}
    return bundle.write(out, fill, kind=KIND, config={}, target={}, extra=extra, **card)
