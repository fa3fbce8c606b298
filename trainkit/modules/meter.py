"""Sums of what is measured, added over chunks, micro-batches and ranks before anything is divided."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainkit.losses.output import LossOutput


class Meter:
    """Named scalar sums in float64; every metric of a `LossOutput` shares the denominator `count`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds `value` to the sum `name`, on the value's device."""
        value = torch.as_tensor(value).detach().double()
        self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def add_output(self, output: LossOutput) -> None:
        """Adds a loss, its count and its metric sums."""
        self.add("loss", output.sum)
        self.add("count", output.count)
        for name, value in output.metrics.items():
            self.add(name, value)

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The sums over all ranks, by name; starts again from zero. Every rank calls it having added the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        total = reduce(torch.stack([self.sums[name].to(device) for name in names]))
        self.sums = {}
        return dict(zip(names, total.tolist(), strict=True))

    def peek(self, gather: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """Every rank's sums, by name, which go on; every rank calls it having added the same names."""
        names = sorted(self.sums)
        if not names:
            return []
        ranks = gather(torch.stack([self.sums[name] for name in names]))
        return [dict(zip(names, rank.tolist(), strict=True)) for rank in ranks]

    def put_back(self, sums: dict[str, float]) -> None:
        """Goes on from sums that `peek` gave."""
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}


def means(sums: dict[str, float], apart: tuple[str, ...] = ()) -> dict[str, float]:
    """Every sum but counts and those in `apart`, per counted token; those of one head per token that it counts."""

    def count(name: str) -> float:
        _, head, number = name.rpartition("_head")
        return max(sums.get(f"count_head{number}" if head else "count", 0.0), 1.0)

    return {name: value / count(name) for name, value in sums.items() if not name.startswith("count") and name not in apart}
