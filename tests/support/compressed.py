"""Compressed folders for tests: a model's linear layers rounded to a grid or pruned, and exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.bundle import Bundle
from trainkit.compress.masks import Pattern, mask_from_scores
from trainkit.compress.quantise import Grid, quantise
from trainkit.export.compressed import export_compressed
from trainkit.models.compressed import quantization_config, stored_tensors
from trainkit.models.weights import read_tensors


def is_linear(name: str) -> bool:
    """Whether a Hugging Face name is that of a weight which is compressed."""
    return name.endswith("_proj.weight")


def file_tensors(source: Path, dtype: torch.dtype, grid: Grid | None, pattern: Pattern | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder in `dtype`, its linear layers pruned by magnitude and rounded to the nearest."""
    for name, value in read_tensors(source):
        if is_linear(name) and pattern is not None:
            value = value * mask_from_scores(value.abs(), pattern)
        if is_linear(name) and grid is not None:
            found = quantise(value, grid)
            layer = found.codes_RK, found.scale_RG, found.zero_RG
            yield from stored_tensors(name.removesuffix(".weight"), *layer, grid.bits, grid.kind).items()
        else:
            yield name, value.to(dtype)


def export_tiny(
    source: Path,
    out: Path,
    *,
    bits: int | None = 4,
    group: int | None = 32,
    symmetric: bool = True,
    kind: Any = "int",
    pattern: Pattern | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Bundle:
    """Exports the model in `source` with its linear layers quantised (`bits` None: not) and pruned (`pattern` None: not)."""
    grid = Grid(bits, group, symmetric, kind, scale_dtype=dtype) if bits else None
    columns = {name: value.shape[1] for name, value in read_tensors(source) if is_linear(name)}
    zeros = lambda K: int(K * pattern.share) / K if pattern else 0.0
    config: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if bits:
        config["quantization_config"] = quantization_config(bits, group, symmetric, kind)
    compression: dict[str, Any] = {"method": "rtn" if bits else "magnitude", "layers": {}}
    compression["layers"] = {name: {"sparsity": zeros(K)} | ({"bits": bits} if bits else {}) for name, K in columns.items()}
    compression |= {"pattern": str(pattern)} if pattern else {}
    fields: dict[str, Any] = {
        "source": source,
        "tensors": file_tensors(source, dtype, grid, pattern),
        "config": config,
    } | options
    return export_compressed(out, **{"compression": compression, **fields})
