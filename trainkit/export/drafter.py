"""A trained drafter as a bundle: its kind's own files, the tokenizer, the card; checked before it stands.

Outside programs fill what a file lacks with noise, and say nothing. So what a kind wrote is held against the tensors that its
layout asks for, name by name, then reloaded and compared by its logits. Left out on purpose: running those programs.
"""

# B batch  T positions  A taps  D hidden  V vocabulary  K draft vocabulary

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit import bundle
from trainkit.drafters.base import Chunk, Drafter, Frontier, TargetHandle, TargetShape, kind_name, load_kind
from trainkit.errors import UserError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # as safetensors calls them


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer files of a model folder.

    Raises:
        UserError: it has none.
    """
    found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise UserError(f"{source}: no tokenizer files there; name the target's folder with --target")
    for name in found:
        shutil.copyfile(source / name, folder / name)


def export_drafter(
    drafter: Drafter,
    out: str | Path,
    *,
    tokenizer: str | Path,
    target: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    format: str = "native",
    **card: Any,
) -> bundle.Bundle:
    """Writes a drafter as a bundle and returns it; nothing stands at `out` unless its files are those of the format, tensor by
    tensor, and the reloaded drafter gives equal logits.

    Args:
        drafter: Trained, on the CPU.
        out: Folder to write; a bundle there is replaced.
        tokenizer: Folder whose tokenizer files go along.
        target: Folder of its target, for kinds whose files hold weights of it; where the tokenizer comes from by default.
        dtype: Of the weights written.
        format: One of the kind's `formats`.
        card: `metrics`, `runner`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, a format that the drafter does not have, files that are not in it, `out` is
            something else than a bundle, or no tokenizer.
    """
    layout = checked_format(format, drafter.formats, f"drafter of kind {kind_name(drafter)!r}")
    shapes = drafter.layout_shapes(layout)
    if format != "native" and shapes is None:  # such as heads that share the target's
        raise UserError(f"--format {format}: does not carry the parts that this drafter shares with its target; leave it out")
    for name, value in drafter.named_parameters():
        if not value.isfinite().all():
            raise UserError(f"checkpoint: {name} holds values that are not finite; export an earlier checkpoint")
    drafter, kind = drafter.to(dtype).eval(), kind_name(drafter)
    source, mark = Path(target or tokenizer), drafter.target.fingerprint or {}
    if (source / "config.json").is_file() and bundle.fingerprint(source)["config"] == mark.get("config"):
        drafter.use_target_folder(source)

    def fill(folder: Path) -> None:
        drafter.export(folder, dtype, layout)
        if shapes is not None:
            check_tensors(folder, shapes, dtype, str(out))
        copy_tokenizer(Path(tokenizer), folder)
        again = load_kind(kind).load(folder, drafter.target, drafter.config()).to(dtype)
        difference = (first_logits(drafter) - first_logits(again)).abs().max().item()
        # the same code on the same numbers: nothing but equality will do
        if not difference == 0:
            raise UserError(f"{out}: the reloaded export's logits differ by {difference:.3g}; nothing was written")

    return bundle.write(
        out,
        fill,
        kind=kind,
        config=drafter.config(),
        target=drafter.target.to_dict(),
        extra={"taps": list(drafter.taps), "format": format, "layout": layout if shapes is not None else "native"},
        **card,
    )


def checked_format(format: str, formats: Mapping[str, str], what: str) -> str:
    """The layout that serves a format.

    Raises:
        UserError: `what` has no such format; the message lists those it has.
    """
    if format not in formats:
        raise UserError(f"--format {format}: a {what} has no such format; it has {', '.join(formats)}")
    return formats[format]


def check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, out: str) -> None:
    """Holds the header of model.safetensors against the tensors that a layout asks for: names, shapes and dtype.

    Weights are of `dtype`; a vector may be an index map instead (int64 or bool).

    Raises:
        UserError: one is missing, not asked for, or another; names the first.
    """
    found = {path.name: bundle.tensor_entries(path) for path in folder.glob("*.safetensors")}
    tensors = found.pop("model.safetensors", {})
    strays = sorted([*found, *(tensors.keys() - shapes.keys())])
    fault = None
    if missing := sorted(shapes.keys() - tensors.keys()):
        fault = f"{missing[0]!r} is missing"
    elif strays:
        fault = f"{strays[0]!r} is not part of the format"
    for name, entry in tensors.items():
        if fault is None and tuple(entry["shape"]) != tuple(shapes[name]):
            fault = f"{name!r} is {entry['shape']}, the format asks for {list(shapes[name])}"
        index = entry["dtype"] in ("I64", "BOOL") and len(entry["shape"]) == 1
        if fault is None and entry["dtype"] != _DTYPES[dtype] and not index:
            fault = f"{name!r} is {entry['dtype']}, not {_DTYPES[dtype]}"
    if fault is not None:
        raise UserError(f"{out}: of the tensors that would be written {fault}; nothing was written, report this as a bug")


@torch.inference_mode()
def first_logits(drafter: Drafter) -> Tensor:
    """Logits [levels, K] of a drafter's first round after a fixed prompt with random taps, over a stand-in target; float32.

    Two levels, or as many as it has heads. Deterministic, so that two drafters with equal weights give equal logits.
    """
    shape, T = drafter.target.decoder, 8
    parameter = next(drafter.parameters())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (1, T + 1), generator=generator)
    taps = None
    if drafter.taps:
        taps = torch.randn(1, T, len(drafter.taps), shape.hidden_size, generator=generator).to(parameter.dtype)
    state = drafter.init_state(1, 64, parameter.device, parameter.dtype)
    handle, position = stand_in(drafter.target, parameter.dtype), torch.tensor([[T]])
    drafter.prefill(state, Chunk(tokens[:, :T], tokens[:, 1:], torch.arange(T)[None], taps), handle, T)
    token, logits = tokens[:, T:], []
    levels = drafter.max_depth or 2
    for depth in range(levels):
        node = Frontier.chain(token, position + depth, depth, levels + 1)
        logits.append(drafter.step(state, node, handle, 64).logits_BFK[0].float())
        token = logits[-1].argmax(-1, keepdim=True)  # as a column's number, whatever id it stands for
    return torch.cat(logits)


def stand_in(target: TargetShape, dtype: torch.dtype) -> TargetHandle:
    """A handle whose embedding and head are fixed random functions of the right sizes, made only when called."""
    shape = target.decoder

    def embed(ids: Tensor) -> Tensor:
        phase = ids[..., None].double() * 0.618 + torch.arange(shape.hidden_size).double()
        return phase.sin().to(dtype)

    def head(hidden: Tensor) -> Tensor:
        weight = torch.randn(shape.vocab_size, shape.hidden_size, generator=torch.Generator().manual_seed(1)).to(dtype)
        return hidden @ weight.T

    return TargetHandle(embed, head, shape.vocab_size)
