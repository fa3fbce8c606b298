"""Packed batches for one rank: sharded, shuffled per epoch, resumable to the batch, with the optimiser step's label count.

Stands in for a torch DataLoader in Lightning, which asks for `__iter__`, `__len__`, `state_dict` and `load_state_dict`
(`loops/fetchers.py`, `loops/fit_loop.py` of 2.6). Three of its habits shape this file. A sized loader is never asked for more
than `len` batches, so an epoch ends when its last batch is handed out, not with StopIteration. It is never read ahead, so what
was handed out is what was trained on. Only rank 0's state reaches the checkpoint, so the state is the same on all ranks.
Checkpoints belong into `on_train_batch_end`: from one made after an epoch's end Lightning takes the next epoch's first batch
for its last, and steps there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError

Batch = dict[str, Any]
Rows = PackedSet | AcceptanceSet
"""What is loaded. Of its `batch` padding is where `document_BT` is -1."""


class PackedLoader:
    """Micro-batches of a packed set, as its `batch` gives them, plus `window_count` (and `window`).

    `window_count` is a scalar tensor: the labels that count in the whole optimiser step, over all ranks and their `accumulate`
    micro-batches, known without communication; int64, since precision plugins round floats to bf16. The last window of an epoch
    may have fewer micro-batches. All ranks yield equally many batches of equal shape; where rows run out, padding fills in.

    With `shuffle`, each `iter` goes on where the last one stopped, and a finished epoch is followed by the next one. Without,
    each `iter` starts over, except the first after `load_state_dict`. To train on less, prepare fewer rows (`limit`):
    Lightning's `limit_train_batches` knows nothing of windows and may end an epoch inside one.

    Args:
        packed: The rows.
        batch_size: Rows per micro-batch and rank.
        rank: This process's number.
        world_size: Processes that share each epoch.
        accumulate: Micro-batches per optimiser step; Lightning's `accumulate_grad_batches`.
        shuffle: New row order each epoch, from `seed` and the epoch's number.
        seed: Seed of the order.
        attach_window: The first micro-batch of each window carries `window`: the list of this rank's micro-batches of the
            window, itself first, for losses with statistics over the whole step.
    """

    def __init__(
        self,
        packed: Rows,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        attach_window: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
            if value < 1:
                raise UserError(f"{name}: {value} must be at least 1")
        assert 0 <= rank < world_size
        self.packed = packed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.accumulate = accumulate
        self.shuffle = shuffle
        self.seed = seed
        self.attach_window = attach_window
        self._epoch = 0
        self._handed_out = 0
        self._resuming = False

    def __len__(self) -> int:
        """Micro-batches per rank and epoch, also just after a resume."""
        return -(-len(self.packed) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing changes before the first `next`, so that a mere check by `iter(loader)` has no effect.
        if not self.shuffle and not self._resuming:
            self._handed_out = 0
        self._resuming = False
        if self._handed_out >= len(self):
            self._epoch, self._handed_out = self._epoch + 1, 0
        order = self._order()
        while self._handed_out < len(self):
            batch = self._batch(order, self._handed_out)
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches handed out in it, with what must be equal for them to mean the same; integers and strings only."""
        return {"epoch": self._epoch, "handed_out": self._handed_out, "setting": self._setting()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on after the batches that `state` counts.

        Raises:
            UserError: the data, the batch shape, the seed or the number of processes is another one.
        """
        for name, now in self._setting().items():
            then = state["setting"].get(name)
            if then != now:
                raise UserError(f"{name}: the checkpoint has {then}, this run {now}; resume with the same data and settings")
        self._epoch, self._handed_out = state["epoch"], state["handed_out"]
        self._resuming = True

    def _setting(self) -> dict[str, Any]:
        return {
            "data_fingerprint": self.packed.fingerprint,
            "packed_rows": len(self.packed),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "accumulate": self.accumulate,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }

    def _order(self) -> np.ndarray:
        rows = np.arange(len(self.packed))
        return np.random.default_rng([self.seed, self._epoch]).permutation(rows) if self.shuffle else rows

    def _batch(self, order: np.ndarray, micro: int) -> Batch:
        batch = self._micro_batch(order, micro)
        if self.attach_window and micro % self.accumulate == 0:
            others = range(micro + 1, min(micro + self.accumulate, len(self)))
            window = [dict(batch), *(self._micro_batch(order, other) for other in others)]
            batch["window"] = window
        return batch

    def _micro_batch(self, order: np.ndarray, micro: int) -> Batch:
        step = self.batch_size * self.world_size  # rows that all ranks take at once
        start = micro * step + self.rank * self.batch_size
        first = micro // self.accumulate * self.accumulate * step
        labels = self.packed.labels_R[order[first : first + self.accumulate * step]].sum()
        batch: Batch = dict(self.packed.batch(order[start : start + self.batch_size].tolist(), self.batch_size))
        batch["window_count"] = torch.tensor(int(labels))
        return batch
