"""Feature sets: hidden states or top-k probabilities of a target over packed rows, so that training need not run the target.

A set is a folder with the manifest `features.json`, which also lists the rows of each shard, and safetensors shards, which are
the parts that `trainkit.data.sets.writer` writes. Each shard carries the set's id, a digest of everything that determines the
values, so that a shard of another set is recognised.

Tensors of a shard: `hidden.7` [R, T, D] after 7 layers (after the last layer: after the final norm); with top-k also `top_ids`
[R, T, k] int32, most probable first, `top_log_p` [R, T, k], and `log_rest` [R, T] of all other tokens together (`losses.topk`).
Left out on purpose: compression beyond the dtype, and what a drafter computes from the states, since it changes in training.
"""

# R rows of a shard  B batch rows  T positions  D hidden  A states  k stored tokens

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.data.manifest import FEATURES
from trainkit.data.sets.writer import SetJob, SetStats, SetWriter
from trainkit.data.teacher.live import LiveTeacher
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError

SHARD_BYTES = 2**28
"""Default size of a shard. A kill loses at most this much work, and writing a shard takes twice this memory."""


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

    def shards(self) -> dict[str, tuple[str, range]]:
        """File name of each shard, with the name of its packed set and the rows of the set that it has."""
        step = self.shard_rows or max(1, SHARD_BYTES // self.row_bytes)
        return {
            f"{name}-{number:05d}{FEATURES.suffix}": (name, range(rows)[first : first + step])
            for name, rows in self.rows.items()
            for number, first in enumerate(range(0, rows, step))
        }

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
    job: SetJob, layout: FeatureLayout, sets: Mapping[str, PackedSet], teacher: LiveTeacher, batch: int
) -> SetStats:
    """Writes this process's share of the shards; continues where an earlier call stopped.

    Args:
        job: Folder, provenance and process; with `progress` it also announces the size. `target`, `weights` and `precision` in
            the provenance identify the target.
        layout: What is stored.
        sets: Packed rows by name, as many as the layout has.
        teacher: Runs the target; its top-k is that of the layout.
        batch: Rows in each forward pass; the last batch of a shard is filled up with padding to this size.

    Raises:
        UserError: too little disk space, a value too large for the dtype, the folder holds another set or something else, or
            another process writes there.
    """
    shards = layout.shards()
    sizes = {file: len(rows) for file, (_, rows) in shards.items()}
    _check_space(job, layout, sizes)
    with SetWriter(job, FEATURES, _manifest(job, layout, sets), sizes, "rows") as writer:

        def tensors(file: str) -> dict[str, Tensor]:
            name, rows = shards[file]
            return _shard_tensors(sets[name], rows, layout, teacher, batch, writer)

        writer.write_tensors(tensors)
    return writer.stats


def _manifest(job: SetJob, layout: FeatureLayout, sets: Mapping[str, PackedSet]) -> dict[str, Any]:
    """Contents of `features.json`, causes before consequences; `id` is the digest of everything that determines the values."""
    stored = {
        "states": list(layout.states),
        "hidden_size": layout.hidden_size,
        "top_k": layout.top_k,
        "dtype": str(layout.dtype).removeprefix("torch."),
        "length": layout.length,
    }
    target = {key: job.provenance[key] for key in ("target", "weights", "precision")}
    contents = {name: packed.content for name, packed in sets.items()}
    text = json.dumps([contents, stored, target | {"target": target["target"]["config"]}], sort_keys=True)
    shards = [(name, [file, rows.start, rows.stop]) for file, (name, rows) in layout.shards().items()]
    return {
        "format": FEATURES.format,
        **target,
        **stored,
        **job.provenance,
        "bytes": layout.bytes,
        "id": hashlib.sha256(text.encode()).hexdigest(),
        "sets": {
            name: {"rows": rows, "content": contents[name], "shards": [shard for owner, shard in shards if owner == name]}
            for name, rows in layout.rows.items()
        },
    }


def _check_space(job: SetJob, layout: FeatureLayout, sizes: Mapping[str, int]) -> None:
    """Prints how much space the set takes; raises UserError if the disk has less than the missing shards need."""
    parent = next(folder for folder in (job.out.resolve(), *job.out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    needed = sum(rows for file, rows in sizes.items() if not (job.out / file).exists()) * layout.row_bytes
    if job.progress:
        print(
            f"{job.out}: {sum(sizes.values()):,} packed rows of {layout.length:,} tokens, {_size(layout.bytes)} in "
            f"{len(sizes):,} shards; {_size(needed)} to write, {_size(free)} free",
            flush=True,
        )
    if needed > free:
        raise UserError(
            f"--out {job.out}: {_size(needed)} are needed, {_size(free)} are free there; use another disk, fewer --taps, a "
            "smaller --top_k or a narrower --dtype"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.3f} MB"


@torch.inference_mode()
def _shard_tensors(
    packed: PackedSet, rows: range, layout: FeatureLayout, teacher: LiveTeacher, batch: int, writer: SetWriter
) -> dict[str, Tensor]:
    tensors = layout.empty(len(rows))
    for start in range(0, len(rows), batch):
        # Run the target.
        span = slice(start, min(start + batch, len(rows)))
        inputs = {name: value.to(teacher.target.device) for name, value in packed.batch(rows[span], batch).items()}
        teacher_BTR, states_BTAD = (None if x is None else x[: len(rows[span])] for x in teacher.read(inputs, layout.states))
        # Store its hidden states.
        for index, layer in enumerate(layout.states):
            assert states_BTAD is not None
            stored = tensors[f"hidden.{layer}"][span] = states_BTAD[:, :, index].to("cpu", layout.dtype)
            if not bool(stored.isfinite().all()):
                name = str(layout.dtype).removeprefix("torch.")
                fix = "use --dtype bfloat16" if name == "float16" else "the target's hidden states are NaN or infinite there"
                raise UserError(f"--dtype {name}: the hidden state after layer {layer} has values out of its range; {fix}")
        # Store its most probable tokens.
        if layout.top_k is not None:
            assert teacher_BTR is not None
            ids, log_p, log_rest = teacher_BTR.cpu().split([layout.top_k, layout.top_k, 1], -1)
            tensors["top_ids"][span] = ids.to(torch.int32)
            tensors["top_log_p"][span] = log_p.to(layout.dtype)
            tensors["log_rest"][span] = log_rest.squeeze(-1).to(layout.dtype)
        writer.advance(len(rows[span]), int(packed.tokens_R[rows[span]].sum()))
    return tensors
