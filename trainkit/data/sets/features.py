"""Feature sets: hidden states or top-k probabilities of a target over packed rows, so that training need not run the target.

A set is a folder with the manifest `features.json`, which also lists the rows of each shard, and safetensors shards, which are
the parts that `trainkit.data.sets.writer` writes. Each shard carries the set's id, a digest of everything that determines the
values, so that a shard of another set is recognised.

Tensors of a shard: `hidden.7` [R, T, D] after 7 layers (the highest layer: after the final norm); with top-k also `top_ids`
[R, T, k] int32, most probable first, `top_log_p` [R, T, k], and `log_rest` [R, T] of all other tokens together (`losses.topk`).
Left out on purpose: compression beyond the dtype, and what a drafter computes from the states, since it changes in training.
"""

# R rows of a shard  B batch rows  T positions  D hidden  A states  k stored tokens

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.data.manifest import FEATURES
from trainkit.data.sets.writer import SetStats, SetWriter, Worker
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError

SHARD_BYTES = 2**28
"""Default size of a shard. A kill loses at most this much work, and writing a shard takes twice this memory."""

ReadTarget = Callable[[Mapping[str, Tensor]], tuple[Tensor | None, Tensor | None]]
"""For a batch of `PackedSet.batch`: hidden states [B, T, A, D] or None, and rows of `losses.topk.compress` or None."""


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `last` (exclusive) of the packed set `set`, in `file`."""

    file: str
    set: str
    first: int
    last: int


@dataclass(frozen=True)
class FeatureLayout:
    """What is stored for each position, and which shard has which rows.

    Attributes:
        rows: Number of packed rows of each set.
        length: Tokens in a packed row (T).
        states: Layers after which hidden states are stored, ascending.
        hidden_size: Width of a hidden state (D).
        top_k: Number of tokens stored with their probabilities (k), or None.
        dtype: Dtype of states and log-probabilities.
        shard_rows: Rows of a shard; None makes shards of about `SHARD_BYTES`.
    """

    rows: Mapping[str, int]
    length: int
    states: tuple[int, ...]
    hidden_size: int
    top_k: int | None
    dtype: torch.dtype
    shard_rows: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one packed row."""
        return sum(tensor.nbytes for tensor in self.empty(1, "meta").values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors, without the files' headers."""
        return sum(self.rows.values()) * self.row_bytes

    def shards(self) -> list[Shard]:
        """All shards, set by set."""
        step = self.shard_rows or max(1, SHARD_BYTES // self.row_bytes)
        return [
            Shard(f"{name}-{number:05d}.safetensors", name, first, min(first + step, rows))
            for name, rows in self.rows.items()
            for number, first in enumerate(range(0, rows, step))
        ]

    def empty(self, rows: int, device: str = "cpu") -> dict[str, Tensor]:
        """Uninitialised tensors for `rows` rows, by name."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            f"hidden.{layer}": ((self.hidden_size,), self.dtype) for layer in self.states
        }
        if self.top_k is not None:
            shapes |= {"top_ids": ((self.top_k,), torch.int32), "top_log_p": ((self.top_k,), self.dtype)}
            shapes["log_rest"] = ((), self.dtype)
        return {
            name: torch.empty(rows, self.length, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }


def write_features(
    out: Path,
    layout: FeatureLayout,
    sets: Mapping[str, PackedSet],
    read: ReadTarget,
    provenance: Mapping[str, Any],
    batch: int,
    worker: Worker,
) -> SetStats:
    """Writes this process's share of the shards into `out`; continues where an earlier call stopped.

    Args:
        out: Folder of the set.
        layout: What is stored.
        sets: Packed rows by name, as many as the layout has.
        read: Runs the target.
        provenance: Everything else that determines the values, JSON-able; `target`, `weights` and `precision` identify the
            target.
        batch: Rows in each forward pass; the last batch of a shard is filled up with padding to this size.
        worker: This process; with `progress` it also announces the size.

    Raises:
        UserError: too little disk space, a value too large for the dtype, `out` holds another set or something else, or another
            process writes there.
    """
    shards = {shard.file: shard for shard in layout.shards()}
    _check_space(out, layout, (shard for name, shard in shards.items() if not (out / name).exists()), worker.progress)
    sizes = {name: shard.last - shard.first for name, shard in shards.items()}
    with SetWriter(out, FEATURES, _manifest(layout, sets, provenance), sizes, "rows", worker) as writer:
        for name in writer.missing:
            writer.write_tensors(name, lambda name=name: _shard_tensors(shards[name], layout, sets, read, batch, writer))
    return writer.stats


def _manifest(layout: FeatureLayout, sets: Mapping[str, PackedSet], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Contents of `features.json`, causes before consequences; `id` is the digest of everything that determines the values."""
    stored = {
        "states": list(layout.states),
        "hidden_size": layout.hidden_size,
        "top_k": layout.top_k,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "length": layout.length,
    }
    contents = {name: packed.content for name, packed in sets.items()}
    target = {key: provenance[key] for key in ("target", "weights", "precision")}
    text = json.dumps([contents, stored, target | {"target": target["target"]["config"]}], sort_keys=True)
    table: dict[str, list[list[Any]]] = {name: [] for name in sets}
    for shard in layout.shards():
        table[shard.set].append([shard.file, shard.first, shard.last])
    return {
        "format": FEATURES.format,
        **target,
        **stored,
        **provenance,
        "bytes": layout.bytes,
        "id": hashlib.sha256(text.encode()).hexdigest(),
        "sets": {
            name: {"rows": len(packed), "content": contents[name], "shards": table[name]} for name, packed in sets.items()
        },
    }


def _check_space(out: Path, layout: FeatureLayout, missing: Iterable[Shard], announce: bool) -> None:
    parent = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free, needed = shutil.disk_usage(parent).free, sum(shard.last - shard.first for shard in missing) * layout.row_bytes
    if announce:
        rows, shards = sum(layout.rows.values()), len(layout.shards())
        print(
            f"{out}: {rows:,} packed rows of {layout.length:,} tokens, {_size(layout.bytes)} in {shards:,} shards; "
            f"{_size(needed)} to write, {_size(free)} free",
            flush=True,
        )
    if needed > free:
        raise UserError(
            f"--out {out}: {_size(needed)} are needed, {_size(free)} are free there; use another disk, fewer --taps, a "
            "smaller --top_k or a narrower --dtype"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


def _shard_tensors(
    shard: Shard, layout: FeatureLayout, sets: Mapping[str, PackedSet], read: ReadTarget, batch: int, writer: SetWriter
) -> dict[str, Tensor]:
    tensors, packed = layout.empty(shard.last - shard.first), sets[shard.set]
    for start in range(shard.first, shard.last, batch):
        rows = list(range(start, min(start + batch, shard.last)))
        states_BTAD, top_BTR = read(packed.batch(rows, batch))
        span = slice(start - shard.first, start - shard.first + len(rows))
        for index, layer in enumerate(layout.states):
            assert states_BTAD is not None
            stored = tensors[f"hidden.{layer}"][span] = states_BTAD[: len(rows), :, index].to("cpu", layout.dtype)
            if not bool(stored.isfinite().all()):
                name = str(layout.dtype).removeprefix("torch.")
                fix = "use --dtype bfloat16" if name == "float16" else "the target's hidden states are NaN or infinite there"
                raise UserError(f"--dtype {name}: the hidden state after layer {layer} has values out of its range; {fix}")
        if layout.top_k is not None:
            assert top_BTR is not None
            ids, log_p, log_rest = top_BTR[: len(rows)].cpu().split([layout.top_k, layout.top_k, 1], -1)
            tensors["top_ids"][span] = ids.to(torch.int32)
            tensors["top_log_p"][span] = log_p.to(layout.dtype)
            tensors["log_rest"][span] = log_rest.squeeze(-1).to(layout.dtype)
        writer.advance(len(rows), int(packed.tokens_R[rows].sum()))
    return tensors
