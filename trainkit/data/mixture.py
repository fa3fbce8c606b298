"""Batches from a weighted mixture of sources: stored sets, and texts that are generated during training.

Training is divided into chapters of `refresh` optimiser steps; to Lightning, a chapter is an epoch. All rows of a chapter are
drawn at its start: the next of the shuffled rows of a stored set, and new texts from a generator, by the draft as it then is.
A checkpoint contains the chapter's rows if some were generated, since the draft has changed by the time of a resume; so a
resumed run trains on the same rows.
"""

# N tokens  D documents  R packed rows

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from trainkit.data.loader import Batch, PackedLoader, check_settings
from trainkit.data.text.packing import ARRAYS, PackedSet, join

Generate = Callable[[int, int], tuple[PackedSet, int]]
"""(rows needed, prompts used so far) -> packed rows, at least as many as needed, and the number of prompts used for them."""


class MixedLoader:
    """Micro-batches of `PackedLoader` without `rows_B`, in an endless sequence of chapters.

    Args:
        stored: Packed sets by name.
        generators: Functions that generate texts, by name.
        weights: Relative share of the rows, by name.
        batch_size: Rows per micro-batch and rank.
        refresh: Optimiser steps in a chapter.
        seed: Seed for the order of rows.
        **options: `rank`, `world_size`, `accumulate` and `attach_window` of `PackedLoader`. The generators must return the
            same rows on all ranks.
    """

    def __init__(
        self,
        stored: Mapping[str, PackedSet],
        generators: Mapping[str, Generate],
        weights: Mapping[str, float],
        batch_size: int,
        *,
        refresh: int,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.stored, self.generators = stored, generators
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        assert self.weights and all(name in stored or name in generators for name in self.weights)
        self._options: dict[str, Any] = {"world_size": 1, "accumulate": 1} | options
        self._batch_size, self._refresh, self._seed = batch_size, refresh, seed
        self._chapter = -1
        self._before: dict[str, int] = {}  # rows or prompts of each source that were used before this chapter
        self._used = dict.fromkeys(self.weights, 0)  # ... up to now
        self._loader: PackedLoader | None = None

    def __len__(self) -> int:
        """Number of micro-batches per rank and chapter."""
        return self._refresh * self._options["accumulate"]

    def __iter__(self) -> Iterator[Batch]:
        # A generator function: no text is generated before the first `next`.
        if self._loader is None or self._loader.state_dict()["handed_out"] >= len(self):
            self._chapter += 1
            self._loader = self._open(self._draw())
        for batch in self._loader:
            for part in (batch, *batch.get("window", ())):
                del part["rows_B"]  # indices into this chapter's rows, not into a set
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Chapter and position in it; with the chapter's rows if some of them were generated."""
        state: dict[str, Any] = {"chapter": self._chapter, "before": dict(self._before), "setting": self._settings()}
        if self._loader is not None:
            state["inner"] = self._loader.state_dict()
            if any(name in self.generators for name in self.weights):
                packed = self._loader.packed
                assert isinstance(packed, PackedSet)
                state["rows"] = {name: torch.from_numpy(np.array(getattr(packed, name))) for name in ARRAYS}
                state["rows"] |= {"length": packed.length}
                state["used"] = dict(self._used)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            UserError: sources, weights, batch shape, seed or number of processes differ.
        """
        check_settings(state["setting"], self._settings())
        self._chapter, self._used = state["chapter"], dict(state["before"]) or self._used
        self._loader = None
        if "inner" in state:
            if "rows" in state:
                arrays = {name: state["rows"][name].numpy() for name in ARRAYS}
                packed = PackedSet(**arrays, length=state["rows"]["length"])
                self._before, self._used = dict(state["before"]), dict(state["used"])
            else:
                packed = self._draw()
            self._loader = self._open(packed)
            self._loader.load_state_dict(state["inner"])

    def _settings(self) -> dict[str, Any]:
        sets = {name: self.stored[name].fingerprint for name in self.weights if name in self.stored}
        settings = {"weights": self.weights, "sets": sets, "batch_size": self._batch_size, "refresh": self._refresh}
        return settings | {name: self._options[name] for name in ("world_size", "accumulate")} | {"seed": self._seed}

    def _open(self, packed: PackedSet) -> PackedLoader:
        return PackedLoader(packed, self._batch_size, seed=self._seed * 1_000_003 + self._chapter, **self._options)

    def _draw(self) -> PackedSet:
        """Draws the rows of the next chapter, and counts what they use."""
        self._before, parts = dict(self._used), []
        total = len(self) * self._batch_size * self._options["world_size"]
        for name, count in apportion(self.weights, total).items():
            if not count:
                continue
            if name in self.stored:
                packed = self.stored[name]
                rows = sequence(len(packed), self._used[name], count, self._seed)
                self._used[name] += count
            else:
                packed, used = self.generators[name](count, self._used[name])
                assert len(packed) >= count
                rows = list(range(count))
                self._used[name] += used
            parts.append((packed, rows))
        return join(parts)


def apportion(weights: Mapping[str, float], rows: int) -> dict[str, int]:
    """Splits `rows` by weight into whole numbers; the largest remainders are rounded up, earlier names first among equals."""
    total = sum(weights.values())
    exact = {name: rows * weight / total for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(weights, key=lambda name: counts[name] - exact[name])
    for name in order[: rows - sum(counts.values())]:
        counts[name] += 1
    return counts


def sequence(items: int, start: int, count: int, seed: int) -> list[int]:
    """Entries `start` to `start + count` of an endless sequence of indices: all `items` in random order, again and again."""
    entries: list[int] = []
    while len(entries) < count:
        pass_number, index = divmod(start + len(entries), items)
        order = np.random.default_rng([seed, pass_number]).permutation(items)
        entries.extend(order[index : index + count - len(entries)].tolist())
    return entries
