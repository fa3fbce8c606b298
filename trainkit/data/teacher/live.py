"""A teacher that runs the frozen target during training, and can cache its hidden states for later epochs and runs.

A cache is one memory-mapped file of [rows, positions, channels], and one byte per row that is 1 if the row is stored. Training
stores a row when it first reads it. The values are written before that byte, so a kill loses at most the rows in progress, and
several processes may share a cache. The key of a cache (data, packing, target, precision, what is stored) determines its
values. For features that are computed before training, can be moved to another machine and do not need the target's layers, see
`trainkit.data.sets.features`.
"""

# R packed rows  B batch rows  T positions  C channels  D hidden  A taps

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.bundle import fingerprint
from trainkit.data.manifest import weights_digest
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError
from trainkit.files import write_json
from trainkit.losses.topk import TopKHead, compress
from trainkit.models.shape import TargetHandle
from trainkit.models.target import FrozenTarget


class FeatureCache:
    """Values [T, C] of packed rows, by row index.

    Args:
        folder: Folder of all caches; each has a subfolder named by the digest of its key.
        key: Everything that determines the values, JSON-able.
        shape: Number of packed rows (R), tokens in each (T) and values per token (C).
        dtype: Dtype of the values.

    Raises:
        UserError: the disk has no space for the whole cache.
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        described = {**key, **dict(zip(("rows", "length", "width"), shape, strict=True)), "dtype": str(dtype)}
        self.path = Path(folder) / hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]
        self.path.mkdir(parents=True, exist_ok=True)
        self.size = math.prod(shape) * dtype.itemsize
        values = self.path / "values.bin"
        if not values.exists():
            self._reserve(values)
        write_json(self.path / "key.json", described)
        self._values_RTC = torch.from_file(str(values), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        self._stored_R = torch.from_file(str(self.path / "there.bin"), shared=True, size=shape[0], dtype=torch.uint8)

    def _reserve(self, values: Path) -> None:
        """Allocates the whole file: if the disk filled up later, writing to the mapped file would kill the process silently."""
        free = shutil.disk_usage(self.path).free
        if self.size > free:
            raise UserError(
                f"{self.path}: the target's hidden states take {self.size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there; "
                "use a folder on another disk"
            )
        if hasattr(os, "posix_fallocate"):
            with values.open("ab") as stream:
                os.posix_fallocate(stream.fileno(), 0, self.size)

    @property
    def filled(self) -> int:
        """Number of rows stored."""
        return int(self._stored_R.sum())

    def get(self, rows_B: Tensor) -> Tensor | None:
        """[B, T, C] values on the CPU, or None unless all rows are stored; row index -1 (padding) gives zeros."""
        is_row_B = rows_B >= 0
        indices = rows_B[is_row_B]
        if not bool(self._stored_R[indices].all()):
            return None
        values = torch.zeros(len(rows_B), *self._values_RTC.shape[1:], dtype=self._values_RTC.dtype)
        values[is_row_B] = self._values_RTC[indices]
        return values

    def put(self, rows_B: Tensor, values_BTC: Tensor) -> None:
        """Stores the rows; those with index -1 are ignored."""
        is_row_B = rows_B >= 0
        self._values_RTC[rows_B[is_row_B]] = values_BTC.detach().to("cpu", self._values_RTC.dtype)[is_row_B]
        self._stored_R[rows_B[is_row_B]] = 1


class Teacher(ABC):
    """Reads the target's hidden states (or top-k rows) for packed batches, from a running target or from disk."""

    target: FrozenTarget
    top_k: int | None

    def handle(self) -> TargetHandle:
        """The target's embedding, final norm and output head."""
        return self.target.handle()

    def stored_head(self) -> TopKHead | None:
        """The head that reads top-k rows; None if `read` returns last hidden states instead of top-k rows."""
        return None if self.top_k is None else TopKHead(self.top_k, self.target.handle().vocab_size)

    @abstractmethod
    def open_store(self, name: str, packed: PackedSet, taps: Sequence[int]) -> Any:
        """Stored values of a packed set, opened at the first call; `name` identifies the set, e.g. its data and split."""

    @abstractmethod
    def read(self, batch: Mapping[str, Tensor], taps: Sequence[int] = (), store: Any = None) -> tuple[Tensor, Tensor | None]:
        """Last hidden states [B, T, D] (or top-k rows) and taps [B, T, A, D] of a batch of `PackedSet.batch`."""


class LiveTeacher(Teacher):
    """A frozen target over packed batches; with a cache folder, it runs only once for each row.

    Args:
        target: The target.
        folder: Folder of the caches; None caches nothing.
        top_k: Number of most probable tokens whose log-probabilities (`losses.topk`) replace the last hidden state; None uses
            the hidden state, which is exact.

    Raises:
        UserError: `top_k` is out of range.
    """

    def __init__(self, target: FrozenTarget, folder: str | None = None, top_k: int | None = None) -> None:
        if top_k is not None and not 1 <= top_k <= target.handle().vocab_size:
            raise UserError(
                f"teacher_top_k is {top_k}; it must be between 1 and the vocabulary size, {target.handle().vocab_size}"
            )
        self.target, self.folder, self.top_k = target, folder, top_k
        self._digests = [weights_digest(target.folder), fingerprint(target.folder)["config"]] if folder else []
        self._caches: dict[tuple[str, tuple[int, ...]], FeatureCache] = {}

    def _other_taps(self, taps: Sequence[int]) -> list[int]:
        """The taps that are stored separately: all but the last hidden state, which is stored anyway unless `top_k` is set."""
        last = None if self.top_k is not None else self.target.num_layers
        return [tap for tap in taps if self.target.layer(tap) != last]

    def open_store(self, name: str, packed: PackedSet, taps: Sequence[int]) -> FeatureCache | None:
        """The cache of a packed set; None without a cache folder."""
        if self.folder is None:
            return None
        if (name, tuple(taps)) not in self._caches:
            others, hidden, device = self._other_taps(taps), self.target.hidden_size, self.target.device.type
            autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
            key = {"set": name, "target": self._digests, "taps": others, "top_k": self.top_k}
            key["precision"] = [str(self.target.dtype), autocast]
            if self.target.one_document_per_row:  # only then, so that existing caches of other targets stay valid
                key["apart"] = True
            width = (hidden if self.top_k is None else 2 * self.top_k + 1) + hidden * len(others)
            dtype = self.target.dtype if self.top_k is None else torch.float32
            cache = FeatureCache(self.folder, key, (len(packed), packed.length, width), dtype)
            print(
                f"hidden states of {len(packed):,} packed rows: {cache.size / 1e9:.2f} GB in {cache.path}, "
                f"{cache.filled:,} rows already cached"
            )
            self._caches[name, tuple(taps)] = cache
        return self._caches[name, tuple(taps)]

    def read(
        self, batch: Mapping[str, Tensor], taps: Sequence[int] = (), store: FeatureCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        others = self._other_taps(taps)
        # From the cache, if it has all rows of the batch.
        cached = None if store is None else store.get(batch["rows_B"].cpu())
        if cached is not None:
            cached, width = cached.to(batch["tokens_BT"].device), self.target.hidden_size
            first, *states = cached.split([cached.shape[-1] - width * len(others), *[width] * len(others)], -1)
            by_tap = dict(zip(others, states, strict=True))
            return first, torch.stack([by_tap.get(tap, first) for tap in taps], 2).to(self.target.dtype) if taps else None
        # Otherwise from the target.
        hidden_BTD, taps_BTAD = self.target.forward(batch["tokens_BT"], batch["positions_BT"], batch["document_BT"], taps)
        if self.top_k is not None:
            head, chunks = self.target.handle().head, hidden_BTD.flatten(0, 1).split(1024)
            rows = torch.cat([compress(head(chunk), self.top_k) for chunk in chunks])
            hidden_BTD = rows.unflatten(0, hidden_BTD.shape[:2])
        if store is not None:
            by_tap = dict(zip(taps, taps_BTAD.unbind(2), strict=True)) if taps_BTAD is not None else {}
            store.put(batch["rows_B"].cpu(), torch.cat([hidden_BTD, *(by_tap[tap].to(hidden_BTD) for tap in others)], -1))
        return hidden_BTD, taps_BTAD
