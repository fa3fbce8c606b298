"""Packed batches for one rank: sharded, shuffled in each epoch, resumable at any batch, with the label count of each step.

Takes the place of a torch DataLoader: Lightning 2.6 calls `__iter__`, `__len__`, `state_dict` and `load_state_dict`
(`loops/fetchers.py`, `loops/fit_loop.py`), and its behaviour matters here in four ways:
- It requests exactly `len` batches of a loader with a length, so an epoch ends with its last batch, not by StopIteration.
- It does not prefetch from such a loader, so every batch that was returned has been trained on.
- It saves the state of rank 0 only, so the state must be the same on all ranks.
- After a resume from a checkpoint that was saved after the end of an epoch, it treats the first batch of the next epoch as the
  last one of that epoch, and runs an optimiser step there. So save checkpoints in `on_train_batch_end`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError

Batch = dict[str, Any]
Rows = PackedSet | AcceptanceSet
"""The rows to load; in the result of their `batch`, `document_BT` is -1 at padding."""


@dataclass(eq=False)
class PackedLoader:
    """Micro-batches of a set: the tensors of its `batch`, plus `window_count` (and `window`).

    A window is the `accumulate` micro-batches of one optimiser step; the last window of an epoch may have fewer. `window_count`
    is a scalar tensor: the number of labels in the whole step, over all ranks and micro-batches, computed without
    communication. It is int64, since precision plugins round floats to bfloat16. All ranks yield the same number of batches of
    the same shape; padding replaces missing rows.

    With `shuffle`, each `iter` continues where the last one stopped, and a finished epoch is followed by the next one. Without
    it, each `iter` starts from the beginning, except the first after `load_state_dict`. To train on less data, prepare fewer
    rows (`limit`): Lightning's `limit_train_batches` ignores windows and may end an epoch inside one.

    Attributes:
        packed: The rows.
        batch_size: Rows per micro-batch and rank.
        rank: Rank of this process.
        world_size: Number of processes that share each epoch.
        accumulate: Micro-batches per optimiser step; Lightning's `accumulate_grad_batches`.
        shuffle: Whether each epoch has a new row order, drawn from `seed` and the epoch's number.
        seed: Seed for the row order.
        attach_window: Whether the first micro-batch of each window has a key `window`: the list of this rank's micro-batches of
            the window, itself first, for losses with statistics over the whole step.
    """

    packed: Rows
    batch_size: int
    _: KW_ONLY
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    shuffle: bool = True
    seed: int = 0
    attach_window: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1")
        assert 0 <= self.rank < self.world_size
        self._epoch, self._returned, self._resuming = 0, 0, False

    def __len__(self) -> int:
        """Number of micro-batches per rank and epoch, also just after a resume."""
        return -(-len(self.packed) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing changes before the first `next`, so calling `iter(loader)` alone has no effect.
        if not self.shuffle and not self._resuming:
            self._returned = 0
        self._resuming = False
        if self._returned >= len(self):
            self._epoch, self._returned = self._epoch + 1, 0
        order = np.arange(len(self.packed))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self._epoch]).permutation(order)
        while self._returned < len(self):
            batch = self._batch(order, self._returned)
            self._returned += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches returned in it, and the settings that a resumed run must share; integers and strings only."""
        return {"epoch": self._epoch, "handed_out": self._returned, "setting": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the batches that `state` counts.

        Raises:
            UserError: the data, the batch shape, the seed or the number of processes differs.
        """
        check_settings(state["setting"], self._settings())
        self._epoch, self._returned = state["epoch"], state["handed_out"]
        self._resuming = True

    def _settings(self) -> dict[str, Any]:
        data = {"data_fingerprint": self.packed.fingerprint, "packed_rows": len(self.packed)}
        return data | {name: getattr(self, name) for name in ("batch_size", "world_size", "accumulate", "shuffle", "seed")}

    def _batch(self, order: np.ndarray, micro: int) -> Batch:
        batch = self._micro_batch(order, micro)
        if self.attach_window and micro % self.accumulate == 0:
            others = range(micro + 1, min(micro + self.accumulate, len(self)))
            batch["window"] = [dict(batch), *(self._micro_batch(order, other) for other in others)]
        return batch

    def _micro_batch(self, order: np.ndarray, micro: int) -> Batch:
        step = self.batch_size * self.world_size  # rows of one micro-batch over all ranks
        start = micro * step + self.rank * self.batch_size
        first = micro // self.accumulate * self.accumulate * step
        labels = self.packed.labels_R[order[first : first + self.accumulate * step]].sum()
        batch: Batch = dict(self.packed.batch(order[start : start + self.batch_size].tolist(), self.batch_size))
        batch["window_count"] = torch.tensor(int(labels))
        return batch


def check_settings(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError that names the first setting which the checkpoint and this run do not share."""
    for name, value in current.items():
        if saved.get(name) != value:
            raise UserError(
                f"{name}: the checkpoint has {saved.get(name)}, this run {value}; resume with the same data and settings"
            )
