"""Sums of metrics, added over chunks, micro-batches and ranks before anything is divided."""

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
        """Adds a loss sum, its count and its metric sums."""
        for name, value in {"loss": output.sum, "count": output.count, **output.metrics}.items():
            self.add(name, value)

    def merge(self, other: Meter) -> None:
        """Adds the sums of another meter."""
        for name, value in other.sums.items():
            self.add(name, value)

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Sums over all ranks, by name; resets them to zero. All ranks must call it with the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        total = reduce(torch.stack([self.sums[name].to(device) for name in names]))
        self.sums = {}
        return dict(zip(names, total.tolist(), strict=True))

    def gather(self, gather: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """Sums of each rank, by name, without a reset. All ranks must call it with the same names."""
        names = sorted(self.sums)
        if not names:
            return []
        ranks = gather(torch.stack([self.sums[name] for name in names]))
        return [dict(zip(names, rank.tolist(), strict=True)) for rank in ranks]

    def restore(self, sums: dict[str, float]) -> None:
        """Sets the sums to those of one rank from `gather`."""
        self.sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}


def means(sums: dict[str, float], exclude: tuple[str, ...] = ()) -> dict[str, float]:
    """Each sum divided by its number of tokens, without the counts and the names in `exclude`.

    A name that ends in `_headN` is divided by `count_headN`, the number of tokens that count for head N; others by `count`.
    """

    def count(name: str) -> float:
        _, head, number = name.rpartition("_head")
        return max(sums.get(f"count_head{number}" if head else "count", 0.0), 1.0)

    return {name: value / count(name) for name, value in sums.items() if not name.startswith("count") and name not in exclude}
