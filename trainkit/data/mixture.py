"""Batches from several kinds of text by weight: stored sets, and texts that are written while training goes on.

Training is divided into chapters of `refresh` optimiser steps. At the start of a chapter its rows are drawn: from stored sets
the next of their shuffled rows, and from writers fresh texts, by the draft as it is then. A chapter is one epoch to Lightning.
A checkpoint holds the chapter's rows where some were written, since the draft that wrote them is gone; so a resumed run
trains on the same.
"""

# N tokens  D documents  R packed rows

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from trainkit.data.loader import Batch, PackedLoader
from trainkit.data.text.packing import PackedSet, join
from trainkit.errors import UserError

Writer = Callable[[int, int], tuple[PackedSet, int]]
"""Given how many rows are needed and how many prompts were used before, packed rows (at least as many) and prompts used."""
_ARRAYS = ("tokens_N", "mask_N", "documents_D", "rows_R")


class MixedLoader:
    """Micro-batches as `PackedLoader` gives them (but without `rows_B`), endlessly: chapter after chapter.

    Args:
        stored: Packed sets by name.
        writers: What writes texts, by name.
        weights: Share of the rows, by name; they need not add up to 1.
        batch_size: Rows per micro-batch and rank.
        refresh: Optimiser steps of a chapter.
        rank: This process's number; all ranks must be given the same rows by their writers.
        world_size: Processes that share each chapter.
        accumulate: Micro-batches per optimiser step.
        seed: Of the order of rows.
        attach_window: As in `PackedLoader`.
    """

    def __init__(
        self,
        stored: Mapping[str, PackedSet],
        writers: Mapping[str, Writer],
        weights: Mapping[str, float],
        batch_size: int,
        *,
        refresh: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        attach_window: bool = False,
    ) -> None:
        self.stored, self.writers = stored, writers
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        assert self.weights and all(name in stored or name in writers for name in self.weights)
        self.rows = refresh * accumulate * batch_size * world_size
        self.seed = seed
        self._options = {"rank": rank, "world_size": world_size, "accumulate": accumulate, "attach_window": attach_window}
        self._batch_size, self._refresh = batch_size, refresh
        self._chapter = -1
        self._before: dict[str, int] = {}
        """Rows, or prompts, that each source had given before this chapter."""
        self._used = dict.fromkeys(self.weights, 0)
        self._loader: PackedLoader | None = None

    def __len__(self) -> int:
        """Micro-batches per rank and chapter."""
        return self._refresh * self._options["accumulate"]

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing is written before the first `next`.
        if self._loader is None or self._loader.state_dict()["handed_out"] >= len(self):
            self._chapter += 1
            self._loader = self._open(self._draw())
        for batch in self._loader:
            for part in (batch, *batch.get("window", ())):
                del part["rows_B"]  # they number this chapter's rows, not a set's
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; with the chapter's rows where some of them were written."""
        state: dict[str, Any] = {"chapter": self._chapter, "before": dict(self._before), "setting": self._setting()}
        if self._loader is not None:
            state["inner"] = self._loader.state_dict()
            if self._writes:
                packed = self._loader.packed
                assert isinstance(packed, PackedSet)
                state["rows"] = {name: torch.from_numpy(np.array(getattr(packed, name))) for name in _ARRAYS}
                state["rows"] |= {"length": packed.length, "pad_id": packed.pad_id}
                state["used"] = dict(self._used)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: sources, weights, batch shape, seed or number of processes are others.
        """
        for name, now in self._setting().items():
            then = state["setting"].get(name)
            if then != now:
                raise UserError(f"{name}: the checkpoint has {then}, this run {now}; resume with the same data and settings")
        self._chapter, self._used = state["chapter"], dict(state["before"]) or self._used
        self._loader = None
        if "inner" in state:
            if "rows" in state:
                arrays = {name: state["rows"][name].numpy() for name in _ARRAYS}
                packed = PackedSet(**arrays, length=state["rows"]["length"], pad_id=state["rows"]["pad_id"])
                self._before, self._used = dict(state["before"]), dict(state["used"])
            else:
                packed = self._draw()
            self._loader = self._open(packed)
            self._loader.load_state_dict(state["inner"])

    @property
    def _writes(self) -> bool:
        return any(name in self.writers for name in self.weights)

    def _setting(self) -> dict[str, Any]:
        sets = {name: self.stored[name].fingerprint for name in self.weights if name in self.stored}
        return {
            "weights": self.weights,
            "sets": sets,
            "batch_size": self._batch_size,
            "refresh": self._refresh,
            "world_size": self._options["world_size"],
            "accumulate": self._options["accumulate"],
            "seed": self.seed,
        }

    def _open(self, packed: PackedSet) -> PackedLoader:
        return PackedLoader(packed, self._batch_size, seed=self.seed * 1_000_003 + self._chapter, **self._options)

    def _draw(self) -> PackedSet:
        """The rows of this chapter."""
        self._before = dict(self._used)
        parts = []
        for name, count in apportion(self.weights, self.rows).items():
            if not count:
                continue
            if name in self.stored:
                packed = self.stored[name]
                rows = sequence(len(packed), self._used[name], count, self.seed)
                self._used[name] += count
            else:
                packed, used = self.writers[name](count, self._used[name])
                assert len(packed) >= count
                rows = list(range(count))
                self._used[name] += used
            parts.append((packed, rows))
        return join(parts)


def apportion(weights: Mapping[str, float], rows: int) -> dict[str, int]:
    """Whole rows for each weight, `rows` in all: largest remainders first, earlier names first among equals."""
    total = sum(weights.values())
    exact = {name: rows * weight / total for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in order[: rows - sum(counts.values())]:
        counts[name] += 1
    return counts


def sequence(items: int, start: int, count: int, seed: int) -> list[int]:
    """Entries `start` to `start + count` of an endless sequence that goes through all items, shuffled anew each time."""
    found: list[int] = []
    while len(found) < count:
        round_number, place = divmod(start + len(found), items)
        order = np.random.default_rng([seed, round_number]).permutation(items)
        found.extend(order[place : place + count - len(found)].tolist())
    return found
