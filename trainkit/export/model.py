"""A trained language model (target or draft) as a plain Hugging Face folder with our card beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainkit import bundle
from trainkit.errors import UserError
from trainkit.export.drafter import copy_tokenizer

KIND = "model"


@torch.no_grad()
def export_model(
    model: Any, out: str | Path, *, tokenizer: str | Path, dtype: torch.dtype = torch.float32, **card: Any
) -> bundle.Bundle:
    """Writes a transformers model with its tokenizer; nothing stands at `out` unless it reloads with equal logits.

    Args:
        model: A transformers causal LM on the CPU.
        out: Folder to write; a bundle there is replaced.
        tokenizer: Folder whose tokenizer files go along.
        dtype: Of the weights written.
        card: `metrics`, `runner`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, `out` is something else than a bundle, or no tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise UserError(f"checkpoint: {name} holds values that are not finite; export an earlier checkpoint")
    for value in model.parameters():  # not buffers: a reload keeps rotary frequencies in float32
        value.data = value.data.to(dtype)
    model.eval()

    def fill(folder: Path) -> None:
        copy_tokenizer(Path(tokenizer), folder)
        loaded = AutoTokenizer.from_pretrained(folder)
        model.config.eos_token_id = model.generation_config.eos_token_id = loaded.eos_token_id
        model.config.bos_token_id = model.generation_config.bos_token_id = loaded.bos_token_id
        model.config.pad_token_id = model.generation_config.pad_token_id = loaded.pad_token_id
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        tokens = torch.randint(model.config.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
        difference = (model(tokens).logits - again(tokens).logits).abs().max().item()
        if not difference == 0:
            raise UserError(f"{out}: the reloaded export's logits differ by {difference:.3g}; nothing was written")

    return bundle.write(out, fill, kind=KIND, config={}, target={}, **card)
