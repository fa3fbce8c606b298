"""What the policy `cost` decides by: seconds of a round's parts on this machine, by number of texts and of nodes.

Costs are measured once for a machine and a pair of models, and cached in a small file.
"""

# R numbers of texts  N numbers of nodes

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from trainkit.errors import UserError
from trainkit.files import cache_folder, write_json
from trainkit.layers.linear import Linear
from trainkit.runner.round import Rounds
from trainkit.runner.sampling import Sampling
from trainkit.runner.timing import Part, median, time_parts
from trainkit.runner.trees.shape import Shape
from trainkit.runner.trees.static import build, chain

CACHE = cache_folder("costs")

_LEVER = 4
"""Costs of cached tokens are measured only if there is room for texts this many times as long: the difference of two close
lengths would be mostly the clock's noise."""


@dataclass(frozen=True)
class ChainCosts:
    """Seconds of a chain's parts by the number of texts decoded together; linear between the measured numbers.

    Attributes:
        rows: Numbers of texts that were measured, ascending.
        nodes: Numbers of nodes verified in each text that were measured, ascending.
        verify_RN: The target's forward with output head, by texts and nodes.
        first_R: The draft's first level, with the predictor and the commit of what is accepted.
        level_R: Each level after it.
        pack_R: Packing the nodes where texts have different numbers of them, beyond verifying them.
        pad_R: Each padding node that packing needs.
        rest_R: The rest of a round with a draft: keeping what is accepted, end tokens, the loop itself. Work that parts share,
            such as noise, counts once.
        plain_rest_R: The rest of a plain round.
        length: Number of cached tokens of each text that these costs are for.
        cached_N: Seconds of verifying that each further cached token of a text takes, by nodes; empty for none.
        level_cached: Seconds of a draft level that each further cached token of a text takes.
    """

    rows: tuple[int, ...]
    nodes: tuple[int, ...]
    verify_RN: tuple[tuple[float, ...], ...]
    first_R: tuple[float, ...]
    level_R: tuple[float, ...]
    pack_R: tuple[float, ...] = (0.0,)
    pad_R: tuple[float, ...] = (0.0,)
    rest_R: tuple[float, ...] = (0.0,)
    plain_rest_R: tuple[float, ...] = (0.0,)
    length: float = 0.0
    cached_N: tuple[float, ...] = ()
    level_cached: float = 0.0

    def __post_init__(self) -> None:
        lines = (*self.verify_RN, self.first_R, self.level_R, self.pack_R, self.pad_R, self.rest_R, self.plain_rest_R)
        lines += (self.cached_N, (self.length, self.level_cached))
        if not all(math.isfinite(value) for line in lines for value in line):
            raise ValueError("costs must be numbers")
        if len(self.verify_RN) != len(self.rows) or {len(line) for line in self.verify_RN} != {len(self.nodes)}:
            raise ValueError("costs must be given for all numbers of texts and nodes")
        if len(self.cached_N) not in (0, len(self.nodes)):
            raise ValueError("costs of cached tokens must be given for all numbers of nodes")
        if min(self.plain(rows) for rows in self.rows) <= 0:
            raise ValueError("a round must take some time")

    def at(self, length: float) -> ChainCosts:
        """The costs for texts with this mean number of cached tokens; those of attention grow with it."""
        if not any(self.cached_N) and not self.level_cached:
            return self
        more_R = [rows * (length - self.length) for rows in self.rows]
        slope_N = self.cached_N or (0.0,) * len(self.nodes)
        least = 1e-9  # seconds: extrapolated to fewer tokens than were measured, a cost stays above zero
        verify_RN = tuple(
            tuple(max(least, seconds + more * slope) for seconds, slope in zip(line, slope_N, strict=True))
            for line, more in zip(self.verify_RN, more_R, strict=True)
        )
        first_R, level_R = (
            tuple(
                max(0.0, self._at(rows, line_R) + more * self.level_cached)
                for rows, more in zip(self.rows, more_R, strict=True)
            )
            for line_R in (self.first_R, self.level_R)
        )
        return replace(self, verify_RN=verify_RN, first_R=first_R, level_R=level_R, length=length)

    def _at(self, rows: int, values_R: Sequence[float]) -> float:
        return interpolate(rows, self.rows, values_R)

    def verify(self, rows: int, nodes: float) -> float:
        """Seconds to verify `nodes` nodes in each of `rows` texts."""
        return self._at(rows, [interpolate(nodes, self.nodes, line) for line in self.verify_RN])

    def packed(self, rows: int, total: int, longest: int) -> float:
        """Seconds to verify `total` nodes of `rows` texts, at most `longest` in each."""
        pads = rows * longest - total
        packing = self._at(rows, self.pack_R) + pads * self._at(rows, self.pad_R) if pads else 0.0
        return self.verify(rows, total / rows) + packing

    def level(self, rows: int) -> float:
        """Seconds of a draft level after the first."""
        return self._at(rows, self.level_R)

    def draft(self, rows: int, levels: int) -> float:
        """Seconds of drafting `levels` levels."""
        return self._at(rows, self.first_R) + (levels - 1) * self.level(rows) if levels else 0.0

    def rest(self, rows: int) -> float:
        """Seconds of a round with a draft beside drafting and verifying."""
        return self._at(rows, self.rest_R)

    def round(self, rows: int, levels: int, verified: int) -> float:
        """Seconds of a round that drafts `levels` levels and verifies `verified` tokens beside the root."""
        rest = self.rest(rows) if levels else self._at(rows, self.plain_rest_R)
        return self.draft(rows, levels) + self.verify(rows, verified + 1) + rest

    def plain(self, rows: int) -> float:
        """Seconds of a round without a draft."""
        return self.round(rows, 0, 0)


def interpolate(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """The line through `values` at ascending `at`: constant before the first, continued from the last two after the last."""
    right = min(bisect_left(at, x), len(values) - 1)  # np.interp takes five times as long, and policies call this often
    if right == 0:
        return values[0]
    left = right - 1
    return values[left] + (x - at[left]) * (values[right] - values[left]) / (at[right] - at[left])


def isotonic(values: Sequence[float]) -> list[float]:
    """The nearest values (least squares) that do not decrease: neighbours that do are averaged (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        total, size = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            before, count = blocks.pop()
            total, size = total + before, size + count
        blocks.append((total, size))
    return [total / size for total, size in blocks for _ in range(size)]


@dataclass(frozen=True)
class CostMeasurement:
    """Times chains of up to `max_depth` levels.

    Attributes:
        rounds: Rounds of a target and a drafter.
        shape_at: The chain that drafts a number of levels as decoding will.
        max_depth: Largest number of levels.
        batch: Largest number of texts.
        length: Number of cached tokens of each text.
        longer: A larger number of cached tokens, to measure the cost of each further one.
        sampling: Sampling of drafting and verifying; noise and top-p take their time.
    """

    rounds: Rounds
    shape_at: Callable[[int], Shape]
    max_depth: int
    batch: int
    length: int
    longer: int
    sampling: Sampling

    @property
    def depths(self) -> list[int]:
        """The numbers of levels that are measured."""
        return sorted({depth for depth in (1, 2, 3, 4, 6, 8, 12, 16) if depth < self.max_depth} | {self.max_depth})

    def measure(self) -> ChainCosts:
        """The costs for 1, 2, 4 ... `batch` texts."""
        sizes = sorted({1 << power for power in range(self.batch.bit_length()) if 1 << power < self.batch} | {self.batch})
        verify, first, level, pack, pad, rest, plain_rest = zip(*map(self._of_rows, sizes), strict=True)
        nodes = tuple(depth + 1 for depth in (0, *self.depths))
        cached_N, level_cached = self._of_cached_tokens()
        lines = (verify, first, level, pack, pad, rest, plain_rest, float(self.length), cached_N, level_cached)
        return ChainCosts(tuple(sizes), nodes, *lines)

    def again(self, costs: ChainCosts, rows: int) -> ChainCosts:
        """The costs with those for this number of texts measured again, or those of the measured numbers around it.

        Has fewer repeats than the first measurement, because the call that finds the drift waits for it.
        """
        names = ("verify_RN", "first_R", "level_R", "pack_R", "pad_R", "rest_R", "plain_rest_R")
        right = min(bisect_left(costs.rows, rows), len(costs.rows) - 1)
        for index in {right if costs.rows[right] <= rows else max(0, right - 1), right}:
            lines = {name: list(getattr(costs, name)) for name in names}
            for name, value in zip(names, self._of_rows(costs.rows[index], repeats=5), strict=True):
                lines[name][index] = value
            costs = replace(costs, **{name: tuple(line) for name, line in lines.items()})
        return costs

    def _of_rows(self, rows: int, repeats: int = 15) -> tuple[tuple[float, ...], float, float, float, float, float, float]:
        """As `_fit`."""
        device, max_depth, depths = self.rounds.device, self.max_depth, self.depths
        shapes = {depth: self.shape_at(depth) for depth in depths}
        trees = {depth: build(chain(depth), device) for depth in (0, *depths)}
        parts: dict[Any, Part] = {0: Part(trees[0], trees[0])}
        parts |= {depth: Part(shape, trees[depth]) for depth, shape in shapes.items()}
        # Packed though all rows are equal, which costs packing alone; and with every other text without a draft.
        ragged = [1 if row % 2 else max_depth + 1 for row in range(rows)]
        if rows > 1:
            parts["full"] = Part(shapes[max_depth], trees[max_depth], [max_depth + 1] * rows)
            parts["half"] = Part(shapes[max_depth], trees[max_depth], ragged)
        runs = time_parts(self.rounds, parts, self.length, rows, repeats, self.sampling)
        return _fit(runs, depths, sum(ragged) / rows, rows * (max_depth + 1) - sum(ragged))

    def _of_cached_tokens(self) -> tuple[tuple[float, ...], float]:
        """Seconds of each further cached token of one text: of verifying, by nodes, and of a draft level; never below zero.

        Short and long texts alternate, so that a machine that slows down slows both.
        """
        if self.longer < _LEVER * self.length:
            return (), 0.0
        deepest, device = self.max_depth, self.rounds.device
        parts = {depth: Part(self.shape_at(depth), build(chain(depth), device)) for depth in {1, deepest}}
        parts[0] = Part(build(chain(0), device), build(chain(0), device))
        runs: dict[tuple[int, int], list[Sequence[float]]] = {}
        for length in (self.length, self.longer) * 3:
            for depth, times in time_parts(self.rounds, parts, length, 1, repeats=3).items():
                runs.setdefault((length, depth), []).extend(times)

        def slope(depth: int, part: int) -> float:
            seconds = [median(runs[length, depth], part) for length in (self.length, self.longer)]
            return (seconds[1] - seconds[0]) / (self.longer - self.length)

        by_nodes = isotonic([max(0.0, slope(depth, 1)) for depth in sorted(parts)])
        at = [depth + 1 for depth in sorted(parts)]
        cached_N = tuple(interpolate(depth + 1, at, by_nodes) for depth in (0, *self.depths))
        return cached_N, max(0.0, slope(deepest, 0) / deepest)


def _fit(
    runs: Mapping[Any, Sequence[Sequence[float]]], depths: Sequence[int], half_nodes: float, half_pads: int
) -> tuple[tuple[float, ...], float, float, float, float, float, float]:
    """Costs for one number of texts: verifying by nodes, first level, level, packing, pad, rest, rest of a plain round.

    Each repeat counts relative to its own plain round, since what slows the machine for a while slows both; and the parts add
    up to what whole rounds took.
    """
    plain = median(runs[0], 2)

    def seconds(name: Any, part: int) -> float:
        return plain * statistics.median(run[part] / beside[2] for run, beside in zip(runs[name], runs[0], strict=True))

    verify = isotonic([seconds(depth, 1) for depth in (0, *depths)])
    first = seconds(1, 0)
    steps = [(seconds(depth, 0) - first) / (depth - 1) for depth in depths if depth > 1]
    level = max(0.0, statistics.median(steps)) if steps else first
    pack = pad = 0.0
    if "full" in runs:
        pack = max(0.0, seconds("full", 1) - seconds(depths[-1], 1))
        pad = (
            max(0.0, seconds("half", 1) - interpolate(half_nodes, [1, *(depth + 1 for depth in depths)], verify) - pack)
            / half_pads
        )
    sums = [first + (depth - 1) * level + verified for depth, verified in zip(depths, verify[1:], strict=True)]
    rest = statistics.median(seconds(depth, 2) - total for depth, total in zip(depths, sums, strict=True))
    return tuple(verify), first, level, pack, pad, rest, plain - verify[0]


def cached_costs(setting: Mapping[str, Any], measure: Callable[[], ChainCosts]) -> ChainCosts:
    """The costs under a setting, from the cache if they were measured before; TRAINKIT_COSTS names its folder.

    Args:
        setting: All that costs depend on, JSON-able: machine, threads, versions, sizes.
        measure: Measures them.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # not measured yet, or by another version
        values = json.loads(_path(setting).read_text(encoding="utf-8"))
        if values["setting"] == json.loads(json.dumps(setting)):
            costs = values["costs"]
            verify = tuple(tuple(line) for line in costs.pop("verify_RN"))
            length, level_cached = float(costs.pop("length")), float(costs.pop("level_cached"))
            lines: dict[str, Any] = {name: tuple(value) for name, value in costs.items()}
            return ChainCosts(verify_RN=verify, length=length, level_cached=level_cached, **lines)
    costs = measure()
    store_costs(setting, costs)
    return costs


def store_costs(setting: Mapping[str, Any], costs: ChainCosts) -> None:
    """Writes the costs of a setting to the cache; a folder that cannot be written costs some seconds at each start, no more."""
    with suppress(OSError, UserError):
        write_json(_path(setting), {"setting": setting, "costs": asdict(costs)})


def _path(setting: Mapping[str, Any]) -> Path:
    folder = Path(os.environ.get("TRAINKIT_COSTS") or CACHE)
    return folder / f"{hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:24]}.json"


def shapes_digest(module: nn.Module | None) -> str:
    """Digest of a module's class and the shapes of its weights, on which its costs depend."""
    shapes: dict[str, list[Any]] = (
        {} if module is None else {name: list(value.shape) for name, value in module.named_parameters()}
    )
    for name, part in () if module is None else module.named_modules():
        if isinstance(part, Linear) and (stored := part.packed):
            shapes[name] = [type(stored).__name__, stored.nbytes, part.in_features, part.out_features]
    return hashlib.sha256(json.dumps([type(module).__name__, shapes]).encode()).hexdigest()[:16]
