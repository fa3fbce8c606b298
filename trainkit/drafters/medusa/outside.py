"""Medusa heads that other programs wrote, as the tensors of ours: the original layout, and vLLM's without our card.

The original training code names a head's blocks `{head}.{layer}.linear.weight` and `.bias`, and its projection
`{head}.{layers}.weight`, at times under `medusa_heads.`. How many there are is read off these names: its config.json often says
another number. Left out on purpose: pickles, and whole models with heads among their own weights.
"""

# D hidden  V vocabulary

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainkit.bundle import tensor_entries
from trainkit.errors import UserError

_BLOCK = re.compile(r"(?:medusa_heads\.)?(\d+)\.(\d+)\.linear\.(weight|bias)")
_PROJECTION = re.compile(r"(?:medusa_heads\.)?(\d+)\.(\d+)\.weight")
_OURS = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(?:weight|bias)|lm_heads\.(\d+)\.weight|token_map")


def is_medusa(folder: Path) -> bool:
    """Whether the safetensors files of a folder hold Medusa heads."""
    files = sorted(folder.glob("*.safetensors"))
    return any(_BLOCK.fullmatch(name) or name == "blocks.0.layers.0.weight" for file in files for name in tensor_entries(file))


def read_heads(folder: Path) -> tuple[dict[str, Tensor], int, int]:
    """The tensors of a folder under vLLM's names, the number of heads, and of residual blocks in each.

    Raises:
        UserError: a broken file, or a tensor that is no part of such heads.
    """
    found: dict[str, Tensor] = {}
    last: set[int] = set()  # a projection's place in its head comes after the blocks
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  safe_open is no mapping
                    ours = _renamed(name, file)
                    if ours in found:
                        raise UserError(f"{file}: tensor {name!r} is there twice; give a folder with one checkpoint")
                    found[ours] = tensors.get_tensor(name)
                    if match := _PROJECTION.fullmatch(name):
                        last.add(int(match[2]))
        except SafetensorError as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from error
    parts = [match for name in found if (match := _OURS.fullmatch(name))]
    heads = 1 + max(int(match[1] or match[3] or 0) for match in parts)
    layers = 1 + max(int(match[2] or 0) for match in parts)
    if max(heads, layers) > len(found) or last - {layers}:
        raise UserError(f"{folder}: {len(found)} tensors are not {heads} heads of {layers} blocks each; copy it again")
    return found, heads, layers


def check_heads(found: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Holds what was read against what heads for this target have.

    Raises:
        UserError: they were made for another width or vocabulary, or a tensor is missing, too many or of another size.
    """
    for name, what, axis in (("blocks.0.layers.0.weight", "hidden_size", 1), ("lm_heads.0.weight", "vocab_size", 0)):
        if name in found and (given := found[name].shape[axis]) != (wanted := shapes[name][axis]):
            mend = "give the target that they were trained for"
            raise UserError(f"{folder}: heads for {what} {given}, the target's is {wanted}; {mend}")
    for name in [*(name for name in shapes if name not in found), *(name for name in found if name not in shapes)]:
        fault = "is missing" if name in shapes else "has no head that it belongs to"
        raise UserError(f"{folder}: of its heads {name!r} (as vLLM names it) {fault}; copy the checkpoint again")
    for name, value in found.items():
        if tuple(value.shape) != shapes[name]:
            raise UserError(f"{folder}: {name!r} is {list(value.shape)}, heads have {list(shapes[name])}; copy it again")


def _renamed(name: str, file: Path) -> str:
    if match := _BLOCK.fullmatch(name):
        return f"blocks.{match[1]}.layers.{match[2]}.{match[3]}"
    if match := _PROJECTION.fullmatch(name):
        return f"lm_heads.{match[1]}.weight"
    if _OURS.fullmatch(name):
        return name
    raise UserError(f"{file}: tensor {name!r} is no part of Medusa heads; give a checkpoint of the heads alone")
