"""Features: what a target says of packed rows, written once as sharded safetensors, so that training need not run the target.

A folder with `features.json`, which says what made it and which shard holds which rows, and the shards. A shard is written
under another name, synced and renamed: under its own it is whole. So resuming makes the shards that are not there, and any
number of ranks share them out. Each shard bears the digest of what determines the values, so that none is taken for another's.

Tensors of a shard, rows first: `hidden.7` [R, T, D] after 7 layers (the highest is after the final norm); with top-k
`top_ids` [R, T, k] int32 likeliest first, `top_log_p` [R, T, k], `log_rest` [R, T] of all others (`losses.topk`).
Left out on purpose: compression beyond the dtype, and what a kind computes from the states, which changes while it trains.
"""

# R rows of a shard  B batch rows  T positions  D hidden  A states  k stored tokens

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from trainkit.data.manifest import read_manifest
from trainkit.data.sets.writer import begin, write_part
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError

FEATURES = "features.json"
FORMAT = 1
SHARD_BYTES = 2**28
"""Size of a shard unless rows of it are given: what a kill costs at most, and what is held in memory twice."""

Read = Callable[[Mapping[str, Tensor]], tuple[Tensor | None, Tensor | None]]
"""Says of a batch of `PackedSet.batch` the states [B, T, A, D] if any, and with top-k rows of `losses.topk.compress`."""


@dataclass(frozen=True)
class Shard:
    """Rows `first` to `last` of a packed set, in a file."""

    file: str
    set: str
    first: int
    last: int


@dataclass(frozen=True)
class FeatureLayout:
    """What is kept of each position, and which shard holds which rows.

    Attributes:
        rows: Packed rows of each set.
        length: T.
        states: Layers whose hidden states are kept, ascending.
        hidden_size: D.
        top_k: k, or None.
        dtype: Of states and log-probabilities.
        shard_rows: Rows of a shard; None for `SHARD_BYTES`.
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
        """Bytes of a packed row."""
        return sum(tensor.nbytes for tensor in self.empty(1, "meta").values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors; the files have a header each on top."""
        return sum(self.rows.values()) * self.row_bytes

    def shards(self) -> list[Shard]:
        """All shards, set after set."""
        step = self.shard_rows or max(1, SHARD_BYTES // self.row_bytes)
        return [
            Shard(f"{name}-{number:05d}.safetensors", name, first, min(first + step, rows))
            for name, rows in self.rows.items()
            for number, first in enumerate(range(0, rows, step))
        ]

    def empty(self, rows: int, device: str = "cpu") -> dict[str, Tensor]:
        """Unwritten tensors of so many rows, by name."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            f"hidden.{layer}": ((self.hidden_size,), self.dtype) for layer in self.states
        }
        if self.top_k is not None:
            shapes |= {"top_ids": ((self.top_k,), torch.int32), "top_log_p": ((self.top_k,), self.dtype)}
            shapes["log_rest"] = ((), self.dtype)
        return {
            name: torch.empty(rows, self.length, *shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }


@dataclass
class Written:
    """What a call of `write_features` did: shards made by it and found there, tokens read, bytes written, seconds."""

    shards: int = 0
    found: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0


def read_features(folder: Path) -> dict[str, Any] | None:
    """What `features.json` says, or None where there is none.

    Raises:
        UserError: it is not readable.
    """
    return read_manifest(folder / FEATURES, FORMAT, "sets", dict, "a feature set")


def write_features(
    out: Path,
    layout: FeatureLayout,
    sets: Mapping[str, PackedSet],
    read: Read,
    provenance: Mapping[str, Any],
    *,
    batch: int = 8,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Written:
    """Writes this rank's share of the shards into `out`, going on where an earlier call stopped.

    Args:
        out: Folder of the features.
        layout: What is kept.
        sets: Packed rows by name, as many as the layout says.
        read: Where it comes from.
        provenance: What else determines the values, JSON-able; `target`, `weights` and `precision` name the target.
        batch: Rows read at once, always so many: the last ones of a shard are filled up with padding.
        rank: This process's number; it makes every `world_size`-th shard.
        world_size: Processes that share the work.
        progress: Announce the size, and show a bar with tokens per second and the time left.

    Raises:
        UserError: the disk lacks room, a value is too large for the dtype, `out` holds other features or something else, or
            another process writes there.
    """
    values = _described(layout, sets, provenance)
    shards = layout.shards()
    missing = [shard for shard in shards if not (out / shard.file).exists()]
    _check_room(out, layout, missing, progress)
    begun = begin(out, FEATURES, values, read_features, "trainkit features")
    mine = [shard for shard in shards[rank::world_size] if shard in missing]
    written, began = Written(found=len(shards[rank::world_size]) - len(mine)), perf_counter()
    tokens = {shard: int(sets[shard.set].tokens_R[shard.first : shard.last].sum()) for shard in shards[rank::world_size]}
    bar = _bar(sum(tokens.values()), sum(tokens.values()) - sum(tokens[shard] for shard in mine)) if progress else None
    try:
        for shard in mine:
            _write(out, shard, layout, sets[shard.set], read, values["id"], batch, bar)
            written.shards, written.tokens = written.shards + 1, written.tokens + tokens[shard]
            written.bytes += (out / shard.file).stat().st_size
    except BaseException:
        if begun and not written.shards and world_size == 1:  # nothing in it to go on with
            (out / FEATURES).unlink(missing_ok=True)
            with suppress(OSError):  # something else lies there
                out.rmdir()
        raise
    finally:
        written.seconds = perf_counter() - began
        if bar is not None:
            bar.close()
    return written


def _described(layout: FeatureLayout, sets: Mapping[str, PackedSet], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What `features.json` says, causes before what follows from them; `id` is the digest of what determines the values."""
    kept = {
        "states": list(layout.states),
        "hidden_size": layout.hidden_size,
        "top_k": layout.top_k,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "length": layout.length,
    }
    contents = {name: packed.content for name, packed in sets.items()}
    whose = {key: provenance[key] for key in ("target", "weights", "precision")}
    text = json.dumps([contents, kept, whose | {"target": whose["target"]["config"]}], sort_keys=True)
    table: dict[str, list[list[Any]]] = {name: [] for name in sets}
    for shard in layout.shards():
        table[shard.set].append([shard.file, shard.first, shard.last])
    return {
        "format": FORMAT,
        **whose,
        **kept,
        **provenance,
        "bytes": layout.bytes,
        "id": hashlib.sha256(text.encode()).hexdigest(),
        "sets": {
            name: {"rows": len(packed), "content": packed.content, "shards": table[name]} for name, packed in sets.items()
        },
    }


def _check_room(out: Path, layout: FeatureLayout, missing: list[Shard], announce: bool) -> None:
    place = next(parent for parent in (out.resolve(), *out.resolve().parents) if parent.exists())
    free, left = shutil.disk_usage(place).free, sum(shard.last - shard.first for shard in missing) * layout.row_bytes
    rows = sum(layout.rows.values())
    if announce:
        whole = f"{_size(layout.bytes)} in {len(layout.shards()):,} shards"
        room = f"{_size(left)} to write, {_size(free)} free"
        print(f"{out}: {rows:,} packed rows of {layout.length:,} tokens, {whole}; {room}", flush=True)
    if left > free:
        raise UserError(
            f"--out {out}: {_size(left)} are to be written, {_size(free)} are free there; give another disk, fewer --taps, a "
            "smaller --top_k or a narrower --dtype"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


def _write(
    out: Path, shard: Shard, layout: FeatureLayout, packed: PackedSet, read: Read, mark: str, batch: int, bar: Any
) -> None:
    # one metadata key: of several the library writes any order
    write_part(
        out / shard.file, lambda: safetensors.torch.save(_filled(shard, layout, packed, read, batch, bar), {"features": mark})
    )


def _filled(shard: Shard, layout: FeatureLayout, packed: PackedSet, read: Read, batch: int, bar: Any) -> dict[str, Tensor]:
    tensors = layout.empty(shard.last - shard.first)
    for start in range(shard.first, shard.last, batch):
        rows = list(range(start, min(start + batch, shard.last)))
        states_BTAD, top_BTR = read(packed.batch(rows, batch))
        place = slice(start - shard.first, start - shard.first + len(rows))
        for index, layer in enumerate(layout.states):
            assert states_BTAD is not None
            tensors[f"hidden.{layer}"][place] = states_BTAD[: len(rows), :, index].to("cpu", layout.dtype)
            if not bool(tensors[f"hidden.{layer}"][place].isfinite().all()):
                name = str(layout.dtype).removeprefix("torch.")
                mend = "give --dtype bfloat16" if name == "float16" else "the target gives NaN or infinity there"
                raise UserError(f"--dtype {name}: the state after layer {layer} has values that it does not hold; {mend}")
        if layout.top_k is not None:
            assert top_BTR is not None
            ids, log_p, log_rest = top_BTR[: len(rows)].cpu().split([layout.top_k, layout.top_k, 1], -1)
            tensors["top_ids"][place] = ids.to(torch.int32)
            tensors["top_log_p"][place] = log_p.to(layout.dtype)
            tensors["log_rest"][place] = log_rest.squeeze(-1).to(layout.dtype)
        if bar is not None:
            bar.update(int(packed.tokens_R[rows].sum()))
    return tensors


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="features", unit=" tokens", unit_scale=True, smoothing=0.05, disable=None)
