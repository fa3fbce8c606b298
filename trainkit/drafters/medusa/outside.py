"""Reads Medusa heads that other programs wrote: the original layout, and vLLM's layout without a trainkit.json.

The original training code names a head's blocks `{head}.{layer}.linear.weight` and `.bias`, and its projection
`{head}.{layers}.weight`, sometimes with the prefix `medusa_heads.`. The number of heads is read from these names, because the
original config.json often has another number. Left out on purpose: pickles, and whole models that contain heads.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from trainkit.bundle import tensor_entries
from trainkit.errors import UserError
from trainkit.models.weights import tensors_in, weight_files

_BLOCK = re.compile(r"(?:medusa_heads\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(?:medusa_heads\.)?(\d+)\.(\d+)\.weight")
_VLLM = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(?:weight|bias)|lm_heads\.(\d+)\.weight|token_map")


def is_medusa(folder: Path) -> bool:
    """Whether the safetensors files of a folder contain Medusa heads."""
    files = _files(folder)
    return any(_BLOCK.fullmatch(name) or name == "blocks.0.layers.0.weight" for file in files for name in tensor_entries(file))


def _files(folder: Path) -> list[Path]:
    """The folder's weight files; if none has a usual name, all safetensors files: the original code uses other names."""
    listed = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    return listed or sorted(folder.glob("*.safetensors"))


def read_heads(folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """The tensors of a folder under vLLM's names, the number of heads, and the number of residual blocks per head.

    Raises:
        UserError: a broken file, or a tensor that does not belong to Medusa heads.
    """
    tensors: dict[str, Tensor] = {}
    projection_layers: set[int] = set()  # in the original layout a projection is numbered as the layer after the blocks
    for file in _files(folder):
        for name, value in tensors_in(file):
            renamed = _vllm_name(name, file)
            if renamed in tensors:
                raise UserError(f"{file}: duplicate tensor {name!r}; give a folder with one checkpoint")
            tensors[renamed] = value
            if match := _PROJECTION.fullmatch(name):
                projection_layers.add(int(match[2]))
    parts = [match for name in tensors if (match := _VLLM.fullmatch(name))]
    heads = 1 + max(int(match[1] or match[3] or 0) for match in parts)
    layers = 1 + max(int(match[2] or 0) for match in parts)
    if max(heads, layers) > len(tensors) or projection_layers - {layers}:
        raise UserError(f"{folder}: {len(tensors)} tensors are not {heads} heads of {layers} blocks each; copy it again")
    return tensors, heads, layers


def check_heads(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Compares the tensors that were read with those that heads for this target have.

    Raises:
        UserError: trained for another hidden size or vocabulary; or a tensor is missing, unexpected or of another shape.
    """
    for name, size, axis in (("blocks.0.layers.0.weight", "hidden_size", 1), ("lm_heads.0.weight", "vocab_size", 0)):
        if name in tensors and (actual := tensors[name].shape[axis]) != (expected := shapes[name][axis]):
            fix = "give the target that they were trained for"
            raise UserError(f"{folder}: these heads have {size} {actual}, the target has {expected}; {fix}")
    for name in [*(name for name in shapes if name not in tensors), *(name for name in tensors if name not in shapes)]:
        fault = "is missing" if name in shapes else "is unexpected"
        raise UserError(f"{folder}: tensor {name!r} (vLLM's name) {fault}; copy the checkpoint again")
    for name, value in tensors.items():
        if tuple(value.shape) != shapes[name]:
            raise UserError(
                f"{folder}: tensor {name!r} has shape {list(value.shape)}, expected {list(shapes[name])}; copy it again"
            )


def _vllm_name(name: str, file: Path) -> str:
    if match := _BLOCK.fullmatch(name):
        return f"blocks.{match[1]}.layers.{match[2]}.{match[3]}"
    if match := _PROJECTION.fullmatch(name):
        return f"lm_heads.{match[1]}.weight"
    if _VLLM.fullmatch(name):
        return name
    raise UserError(f"{file}: tensor {name!r} does not belong to Medusa heads; give a checkpoint with only the heads")
