"""`trainkit import`: a drafter that another program trained becomes a bundle, checked against its target."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from trainkit import bundle
from trainkit.card import describe
from trainkit.drafters.base import load_outside
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.target import target_shape


def import_outside(
    folder: str,
    out: str,
    *,
    target: str,
    format: str = "native",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> str:
    """Makes a bundle of a drafter that another program trained: what `generate`, `bench`, `trim` and `inspect` then know whole.

    Which kind it is, and its sizes, are read off its files; vocabulary and width must be the target's. Known are heads of the
    original Medusa code, folders in the formats of `trainkit export`, plain Hugging Face draft models, and whatever else a kind
    claims. Only safetensors are read: a pickle may run code.

    Examples:
        trainkit import medusa-vicuna-7b-v1.3 models/heads --target models/vicuna-7b-v1.3

    Args:
        folder: Folder with the drafter's safetensors and, where its layout has one, its config.json.
        out: Folder to write.
        target: Folder of the target that it was trained for; the bundle carries its tokenizer and fingerprint.
        format: As in `trainkit export`.
        dtype: Of the weights written; as they are stored by default.
    """
    if bundle.is_bundle(folder):
        raise UserError(f"{folder}: a bundle of trainkit already; use it as it is")
    drafter = load_outside(Path(folder), target_shape(target))
    kept = next(drafter.parameters()).dtype if dtype is None else getattr(torch, dtype)
    made = export_drafter(
        drafter.float(), out, tokenizer=target, dtype=kept, format=format, recipe=f"imported from {Path(folder).resolve().name}"
    )
    return describe(made)
