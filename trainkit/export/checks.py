"""Checks of an export before it is written to its destination, and the tokenizer files that every export contains."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainkit import bundle
from trainkit.card import describe
from trainkit.errors import UserError
from trainkit.files import write_json

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    *bundle.VOCABULARY_FILES,
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # safetensors' names


class ReloadError(UserError):
    """Written files are not those of their format, or do not reload to the same logits: a fault of the exporter."""


def layout_for(format: str, formats: Mapping[str, str], network: str) -> str:
    """The layout of files for a format, from a table of format -> layout; `network` names the exported network in the error.

    Raises:
        UserError: the table does not have the format; the message lists its formats.
    """
    if format not in formats:
        raise UserError(f"--format {format}: a {network} has no such format; it has {', '.join(formats)}")
    return formats[format]


def check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuses weights with NaN or infinite values.

    Raises:
        UserError: names the first such tensor.
    """
    for name, value in tensors:
        if not value.isfinite().all():
            raise UserError(f"checkpoint: {name} holds values that are not finite; export an earlier checkpoint")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer files of a model folder, with all its chat templates.

    Raises:
        UserError: the folder has none.
    """
    names = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not names:
        raise UserError(f"{source}: has no tokenizer files; name the target's folder with --target")
    for name in names:
        shutil.copyfile(source / name, folder / name)
    for template in (source / "additional_chat_templates").glob("*.jinja"):
        (folder / template.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / template.parent.name / template.name)
    config = bundle.read_json(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    if (
        config.get("tokenizer_class") == "TokenizersBackend"
    ):  # the name in transformers 5; transformers 4 knows only the old one
        write_json(path, config | {"tokenizer_class": "PreTrainedTokenizerFast"})


def export_report(exported: bundle.Bundle) -> str:
    """Text that a command prints after an export that passed its checks: the card, and the folder."""
    return f"{describe(exported)}\nwritten to {exported.path}; the reloaded files compute exactly what was exported"


def check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, out: str) -> None:
    """Compares the header of model.safetensors with the tensors of a layout: names, shapes and dtype.

    Other programs read every safetensors file of a folder and leave missing tensors uninitialised without a warning. Weights
    must have `dtype`; a vector may be an index map instead (int64 or bool).

    Raises:
        ReloadError: a tensor or file is missing, unexpected, or of another shape or dtype; names the first.
    """
    files = {path.name: bundle.tensor_entries(path) for path in folder.glob("*.safetensors")}
    tensors = files.pop("model.safetensors", {})
    faults = [f"{name!r} is missing" for name in sorted(shapes.keys() - tensors.keys())]
    faults += [f"{name!r} is not part of the format" for name in sorted([*files, *(tensors.keys() - shapes.keys())])]
    for name, entry in tensors.items():
        if tuple(entry["shape"]) != tuple(shapes.get(name, entry["shape"])):
            faults.append(f"{name!r} has shape {entry['shape']}, the format requires {list(shapes[name])}")
        is_index_map = entry["dtype"] in ("I64", "BOOL") and len(entry["shape"]) == 1
        if entry["dtype"] != _DTYPES[dtype] and not is_index_map:
            faults.append(f"{name!r} is {entry['dtype']}, not {_DTYPES[dtype]}")
    if faults:
        raise ReloadError(f"{out}: tensor {faults[0]}; nothing was written, report this as a bug")


def check_weights(before: Mapping[str, Tensor], after: Mapping[str, Tensor], out: str | Path) -> None:
    """Compares the weights of a network with those of its reloaded files.

    Raises:
        ReloadError: a tensor is missing, unexpected or not exactly equal; names the first.
    """
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise ReloadError(
                f"{out}: tensor {name!r} of the reloaded files differs; nothing was written, report this as a bug"
            )


def check_reload(before: Tensor, after: Tensor, out: str | Path, network: str = "export") -> None:
    """Compares outputs before the export with those of the reloaded files; equal weights give exactly equal outputs.

    Raises:
        ReloadError: they are not exactly equal.
    """
    difference = (before - after).abs().max().item()
    if not difference == 0:  # also refuses NaN
        raise ReloadError(f"{out}: the logits of the reloaded {network} differ by {difference:.3g}; nothing was written")
