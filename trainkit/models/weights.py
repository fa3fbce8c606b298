"""Lists and reads the weight files of a Hugging Face folder, and checks the tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainkit.bundle import read_json, tensor_entries
from trainkit.errors import UserError, first_lines

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_files(folder: str | Path) -> list[Path]:
    """The files from which transformers reads a model's weights; empty if it finds none.

    The first that exists of: the file that config.json names, model.safetensors, the files in its index, pytorch_model.bin, and
    the files in its index.

    Raises:
        UserError: an index is not readable.
    """
    path = Path(folder)
    named = read_json(path / "config.json").get("transformers_weights") if (path / "config.json").is_file() else None
    names = [f"{stem}{suffix}" for stem in ("model.safetensors", "pytorch_model.bin") for suffix in ("", ".index.json")]
    first = str(named) if named else next((name for name in names if (path / name).is_file()), None)
    if first is None or not first.endswith(".json"):
        return [] if first is None else [path / first]
    try:
        files = json.loads((path / first).read_text())["weight_map"].values()
        return sorted({path / str(file) for file in files})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / first}: lists no weight files ({first_lines(error, 1)}); copy it again") from error


def read_tensors(folder: str | Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor in a folder's safetensors files, or of those named in `only`, one at a time.

    Raises:
        UserError: no safetensors there, or a file is truncated.
    """
    files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    for file in files or [Path(folder) / "model.safetensors"]:
        if not file.is_file():
            raise UserError(f"{file}: not found; give a folder with weights in safetensors files")
        yield from tensors_in(file, only)


def tensors_in(file: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """As `read_tensors`, for one safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  safe_open is not a mapping
                if only is None or name in only:
                    yield name, tensors.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); copy it again") from error


def has_own_head(folder: Path) -> bool:
    """Whether the files hold both an embedding and an output head, and the two differ."""
    files = [file for file in weight_files(folder) if file.suffix == ".safetensors" and file.is_file()]
    holders = {name: file for file in files for name in {EMBEDDING, HEAD} & tensor_entries(file).keys()}
    if len(holders) < 2:
        return False
    embedding, head = (next(tensors_in(holders[name], (name,)))[1] for name in (EMBEDDING, HEAD))
    dtype = torch.promote_types(embedding.dtype, head.dtype)
    return not torch.equal(embedding.to(dtype), head.to(dtype))


@torch.no_grad()
def check_finite(tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuses weights with NaN or infinite values, including those that became infinite in a narrower dtype.

    Taking minimum and maximum costs one read of the weights (7 GB/s on one core) and, on a GPU, one sync for all tensors.

    Raises:
        UserError: a tensor is not finite; the message names the first.
    """
    bounds = [(name, value, torch.stack(value.aminmax())) for name, value in tensors if value.numel()]
    if not bounds or bool(torch.stack([pair.float().isfinite().all() for _, _, pair in bounds]).all()):
        return
    name, value, _ = next(entry for entry in bounds if not bool(entry[2].isfinite().all()))
    dtype = str(value.dtype).removeprefix("torch.")
    raise UserError(f"{source}: tensor {name!r} holds values that are not finite in {dtype}; copy it again or train it again")
