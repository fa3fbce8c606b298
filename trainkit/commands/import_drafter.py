"""`trainkit import`: a drafter that another program trained becomes a bundle, checked against its target."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from trainkit import bundle
from trainkit.drafters.base import load_outside
from trainkit.errors import UserError
from trainkit.export.checks import export_report
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
    """Writes a drafter that another program trained as a bundle, for `generate`, `bench`, `trim` and `inspect`.

    Its kind and sizes are read from its files; vocabulary and hidden size must be the target's. Supported are heads of the
    original Medusa code, folders in the formats of `trainkit export`, plain Hugging Face draft models, and whatever else a
    drafter kind loads. Only safetensors are read: a pickle may run code.

    Examples:
        trainkit import medusa-vicuna-7b-v1.3 models/heads --target models/vicuna-7b-v1.3

    Args:
        folder: Folder with the drafter's safetensors and, if its layout has one, its config.json.
        out: Folder to write.
        target: Folder of the target that it was trained for; the bundle gets its tokenizer and fingerprint.
        format: Format of the bundle, as in `trainkit export`.
        dtype: Dtype of the written weights; that of the files by default.
    """
    if bundle.is_bundle(folder):
        raise UserError(f"{folder}: already a trainkit bundle; use it as it is")
    drafter, recipe = load_outside(Path(folder), target_shape(target), target), f"imported from {Path(folder).resolve().name}"
    torch_dtype = next(drafter.parameters()).dtype if dtype is None else getattr(torch, dtype)
    return export_report(
        export_drafter(drafter.float(), out, tokenizer=target, dtype=torch_dtype, format=format, recipe=recipe)
    )
