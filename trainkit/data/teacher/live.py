"""What a frozen target says of packed rows, kept while training goes on, so that later epochs and runs need not run it again.

One memory-mapped file of [rows, positions, channels] and one byte a row that says whether it is there yet, filled row by row
as training first meets them. Values are written before their byte, so a kill costs at most the rows in hand; several processes
may share a store. What may be kept together is decided by the key: data, packing, target, precision and what is kept. For what
is kept before training, to be moved or trained on without the target's layers, see `feature_set`.
"""

# R packed rows  B batch rows  T positions  C channels

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainkit.bundle import fingerprint
from trainkit.data.manifest import weights_digest
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError
from trainkit.losses.topk import TopKHead, compress
from trainkit.models.shape import TargetHandle
from trainkit.models.target import FrozenTarget


class FeatureStore:
    """Rows of [T, C] values by their number in a packed set.

    Args:
        folder: Where stores lie, each in a folder of its own named by its key.
        key: All that determines the values, JSON-able.
        rows: R.
        length: T.
        width: C.
        dtype: Of the values.

    Raises:
        UserError: the disk has no room for the whole store.
    """

    def __init__(
        self, folder: str | Path, key: Mapping[str, Any], rows: int, length: int, width: int, dtype: torch.dtype
    ) -> None:
        described = {**key, "rows": rows, "length": length, "width": width, "dtype": str(dtype)}
        text = json.dumps(described, sort_keys=True)
        self.path = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:24]
        self.path.mkdir(parents=True, exist_ok=True)
        self.size = rows * length * width * dtype.itemsize
        values = self.path / "values.bin"
        if not values.exists():
            self._reserve(values)
        description = self.path / f".key.{os.getpid()}"
        description.write_text(text, encoding="utf-8")
        os.replace(description, self.path / "key.json")
        shape = (rows, length, width)
        self._values_RTC = torch.from_file(str(values), shared=True, size=rows * length * width, dtype=dtype).view(shape)
        self._there_R = torch.from_file(str(self.path / "there.bin"), shared=True, size=rows, dtype=torch.uint8)

    def _reserve(self, values: Path) -> None:
        """Takes the room at once: a disk that fills up under a mapped file ends the process without a word."""
        free = shutil.disk_usage(self.path).free
        if self.size > free:
            raise UserError(f"{self.path}: the target's states take {self.size / 1e9:.1f} GB, {free / 1e9:.1f} are left there")
        if hasattr(os, "posix_fallocate"):
            with values.open("ab") as stream:
                os.posix_fallocate(stream.fileno(), 0, self.size)

    @property
    def filled(self) -> int:
        """Rows that are there."""
        return int(self._there_R.sum())

    def get(self, rows_B: Tensor) -> Tensor | None:
        """[B, T, C] values on the CPU, or None unless all rows are there; a number of -1 (padding) gives zeros."""
        given_B = rows_B >= 0
        places = rows_B[given_B]
        if not bool(self._there_R[places].all()):
            return None
        values = torch.zeros(len(rows_B), *self._values_RTC.shape[1:], dtype=self._values_RTC.dtype)
        values[given_B] = self._values_RTC[places]
        return values

    def put(self, rows_B: Tensor, values_BTC: Tensor) -> None:
        """Keeps the rows; those numbered -1 are left out."""
        given_B = rows_B >= 0
        self._values_RTC[rows_B[given_B]] = values_BTC.detach().to("cpu", self._values_RTC.dtype)[given_B]
        self._there_R[rows_B[given_B]] = 1


class Teacher(Protocol):
    """Says what a target says of packed batches: by running it, or from what was kept of it."""

    def handle(self) -> TargetHandle:
        """The target's shared parts."""
        ...

    def stored_head(self) -> TopKHead | None:
        """What reads the top-k rows that `read` gives in place of last hidden states, where it does."""
        ...

    def store(self, name: str, packed: PackedSet, taps: Sequence[int]) -> Any:
        """What is kept of a packed set, opened once; `name` tells sets apart, such as its fingerprint and split."""

    def read(self, batch: Mapping[str, Tensor], taps: Sequence[int], store: Any) -> tuple[Tensor, Tensor | None]:
        """What the target says of a batch of `PackedSet.batch`: last hidden states [B, T, D] (or top-k rows), and its taps."""
        ...


class TargetReader:
    """A frozen target over packed batches, each row read once where a folder to keep its states is given.

    Args:
        target: The target.
        folder: Where to keep what it says; None keeps nothing.
        top_k: Keep and hand out its k likeliest tokens with their log-probabilities (`losses.topk`) in place of its last
            hidden state; None for the hidden state, which is exact.
    """

    def __init__(self, target: FrozenTarget, folder: str | None = None, top_k: int | None = None) -> None:
        if top_k is not None and not 1 <= top_k <= target.handle().vocab_size:
            raise UserError(f"teacher_top_k is {top_k}; it must be between 1 and the vocabulary, {target.handle().vocab_size}")
        self.target, self.folder, self.top_k = target, folder, top_k
        self._mark = [weights_digest(target.folder), fingerprint(target.folder)["config"]] if folder else []
        self._stores: dict[tuple[str, tuple[int, ...]], FeatureStore] = {}

    def handle(self) -> TargetHandle:
        return self.target.handle()

    def stored_head(self) -> TopKHead | None:
        return None if self.top_k is None else TopKHead(self.top_k, self.target.handle().vocab_size)

    def _beside(self, taps: Sequence[int]) -> list[int]:
        """The taps that are kept beside what stands first: not the last hidden state where that is the one that does."""
        last = None if self.top_k is not None else self.target.num_layers
        return [tap for tap in taps if self.target.layer(tap) != last]

    def store(self, name: str, packed: PackedSet, taps: Sequence[int]) -> FeatureStore | None:
        """The store of a packed set, opened once; `name` tells sets apart, such as its fingerprint and split."""
        if self.folder is None:
            return None
        if (name, tuple(taps)) not in self._stores:
            rows, length, beside = len(packed), packed.length, self._beside(taps)
            hidden, device = self.target.hidden_size, self.target.device.type
            first = hidden if self.top_k is None else 2 * self.top_k + 1
            autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
            key = {
                "set": name,
                "target": self._mark,
                "taps": beside,
                "top_k": self.top_k,
                "precision": [str(self.target.dtype), autocast],
            }
            width, dtype = first + hidden * len(beside), self.target.dtype if self.top_k is None else torch.float32
            store = FeatureStore(self.folder, key, rows, length, width, dtype)
            print(f"target's states of {rows:,} packed rows: {store.size / 1e9:.2f} GB in {store.path}, {store.filled:,} there")
            self._stores[name, tuple(taps)] = store
        return self._stores[name, tuple(taps)]

    def read(
        self, batch: Mapping[str, Tensor], taps: Sequence[int] = (), store: FeatureStore | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the target says of a batch of `PackedSet.batch`: last hidden states [B, T, D] (or top-k rows), and its taps."""
        said = None if store is None else store.get(batch["rows_B"].cpu())
        width, beside = self.target.hidden_size, self._beside(taps)
        if said is not None:
            said = said.to(batch["tokens_BT"].device)
            first, *others = said.split([said.shape[-1] - width * len(beside), *[width] * len(beside)], -1)
            states = dict(zip(beside, others, strict=True))
            return first, torch.stack([states.get(tap, first) for tap in taps], 2).to(self.target.dtype) if taps else None
        hidden_BTD, taps_BTAD = self.target.forward(batch["tokens_BT"], batch["positions_BT"], batch["document_BT"], taps)
        if self.top_k is not None:
            head, chunks = self.target.handle().head, hidden_BTD.flatten(0, 1).split(1024)
            kept = torch.cat([compress(head(chunk), self.top_k) for chunk in chunks])
            hidden_BTD = kept.unflatten(0, hidden_BTD.shape[:2])
        if store is not None:
            states = dict(zip(taps, taps_BTAD.unbind(2), strict=True)) if taps_BTAD is not None else {}
            store.put(batch["rows_B"].cpu(), torch.cat([hidden_BTD, *(states[tap].to(hidden_BTD) for tap in beside)], -1))
        return hidden_BTD, taps_BTAD
