"""What a policy decides by: the seconds of a round's parts on this machine, by numbers of texts and of nodes.

Kept in a small file, since a process should not have to measure what the one before has measured.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainkit.files import cache_folder
from trainkit.runner.round import Rounds
from trainkit.runner.sampling import Sampling
from trainkit.runner.timing import median, timed
from trainkit.runner.trees.shape import Shape
from trainkit.runner.trees.static import Tree, build, chain

CACHE = cache_folder("costs")


@dataclass(frozen=True)
class ChainCosts:
    """Seconds of a chain's parts by how many texts are decoded together; straight lines between what was measured.

    Attributes:
        rows: Numbers of texts measured, ascending.
        nodes: Numbers of rows verified for each, ascending.
        verify_RN: The target's forward with output head, by texts, then by nodes.
        first_R: A draft's first level, predictor and taking in what is accepted included.
        level_R: Each level after it.
        pack_R: Packing nodes, where texts have unequally many, beyond what verifying them would take alone.
        pad_R: Each pad that they need beside.
        rest_R: What a round with a draft takes beside its parts: keeping what is accepted, ends, the loop itself; less what
            they have in common, such as noise.
        plain_rest_R: Likewise one without.
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

    def __post_init__(self) -> None:
        lines = (*self.verify_RN, self.first_R, self.level_R, self.pack_R, self.pad_R, self.rest_R, self.plain_rest_R)
        if not all(math.isfinite(value) for line in lines for value in line):
            raise ValueError("costs must be numbers")
        if len(self.verify_RN) != len(self.rows) or {len(line) for line in self.verify_RN} != {len(self.nodes)}:
            raise ValueError("costs must be given for all numbers of texts and nodes")
        if min(self.plain(rows) for rows in self.rows) <= 0:
            raise ValueError("a round must take some time")

    def verify(self, rows: int, nodes: float) -> float:
        """Seconds to verify `nodes` rows of each of so many texts."""
        return interpolate(rows, self.rows, [interpolate(nodes, self.nodes, line) for line in self.verify_RN])

    def packed(self, rows: int, total: int, longest: int) -> float:
        """Seconds to verify `total` nodes of so many texts, at most `longest` of each."""
        pads = rows * longest - total
        more = interpolate(rows, self.rows, self.pack_R) + pads * interpolate(rows, self.rows, self.pad_R) if pads else 0.0
        return self.verify(rows, total / rows) + more

    def level(self, rows: int) -> float:
        """Seconds of a draft level after the first."""
        return interpolate(rows, self.rows, self.level_R)

    def drafted(self, rows: int, levels: int) -> float:
        """Seconds of drafting so many levels."""
        return interpolate(rows, self.rows, self.first_R) + (levels - 1) * self.level(rows) if levels else 0.0

    def round(self, rows: int, levels: int, verified: int) -> float:
        """Seconds of a round that drafts so many levels and verifies so many tokens beside the root."""
        rest = self.rest(rows) if levels else interpolate(rows, self.rows, self.plain_rest_R)
        return self.drafted(rows, levels) + self.verify(rows, verified + 1) + rest

    def rest(self, rows: int) -> float:
        """Seconds of a round with a draft beside drafting and verifying."""
        return interpolate(rows, self.rows, self.rest_R)

    def plain(self, rows: int) -> float:
        """Seconds of a round without a draft."""
        return self.round(rows, 0, 0)


def interpolate(x: float, points: Sequence[int], values: Sequence[float]) -> float:
    """Piecewise-linear value at `x`: constant below the first point, extrapolated from the last two above the last.

    Policies call it many times a round, so it does without `numpy.interp`, which takes five times as long for so few points.

    Args:
        x: Where to interpolate.
        points: Ascending positions of the values.
        values: Value at each point.
    """
    index = min(bisect_left(points, x), len(values) - 1)
    if index == 0:
        return values[0]
    low, high = points[index - 1], points[index]
    return values[index - 1] + (x - low) * (values[index] - values[index - 1]) / (high - low)


def measure_chain_costs(
    rounds: Rounds, drafted: Callable[[int], Shape], most: int, batch: int, length: int, sampling: Sampling, repeats: int = 15
) -> ChainCosts:
    """Times chains of up to `most` levels for 1, 2, 4 ... `batch` texts at `length` cached tokens.

    Args:
        rounds: Of a target and a drafter.
        drafted: The shape that drafts a number of levels as decoding will. As many rows as it has nodes are verified, a chain
            or a root with children: how they hang does not change what they cost.
        most: Levels.
        batch: Texts.
        length: Cached tokens.
        sampling: Of drafting and verifying; noise and top-p take their time.
        repeats: Of each.
    """
    device = rounds.target.embed.weight.device
    sizes = sorted({1 << power for power in range(batch.bit_length()) if 1 << power < batch} | {batch})
    depths = sorted({depth for depth in (1, 2, 3, 4, 6, 8, 12, 16) if depth < most} | {most})
    shapes = {depth: drafted(depth) for depth in depths}
    nodes = (1, *(_judged(shape, device).size for shape in shapes.values()))
    found = []
    for rows in sizes:
        plain = build(chain(0), device)
        parts: dict[Any, tuple[Shape, Tree, Sequence[int]]] = {0: (plain, plain, ())}
        parts |= {depth: (shape, _judged(shape, device), ()) for depth, shape in shapes.items()}
        # packed though equal, which costs packing alone; and every other text without a draft
        ragged = [1 if row % 2 else most + 1 for row in range(rows)]
        unequal = {"full": [most + 1] * rows, "half": ragged} if rows > 1 and shapes[most].is_chain else {}
        parts |= {name: (*parts[most][:2], lengths) for name, lengths in unequal.items()}
        runs = timed(rounds, parts, length, rows, repeats, sampling)
        found.append(_fitted(runs, depths, nodes, sum(ragged) / rows, rows * (most + 1) - sum(ragged)))
    verify, first, level, pack, pad, rest, plain_rest = zip(*found, strict=True)
    return ChainCosts(tuple(sizes), nodes, verify, first, level, pack, pad, rest, plain_rest)


def _fitted(
    runs: Mapping[Any, Sequence[Sequence[float]]],
    depths: Sequence[int],
    nodes: Sequence[int],
    half_nodes: float,
    half_pads: int,
) -> tuple[tuple[float, ...], float, float, float, float, float, float]:
    """The costs of so many rows, from `timed`: of verifying by nodes, first level, level, packing, pad, rest, plain rest.

    What a repeat says counts by its own plain round, since what slows the machine for a while slows both; and the parts add up
    to what whole rounds took.
    """
    plain = median(runs[0], 2)

    def took(name: Any, part: int) -> float:
        return plain * statistics.median(run[part] / beside[2] for run, beside in zip(runs[name], runs[0], strict=True))

    verify = isotonic([took(depth, 1) for depth in (0, *depths)])
    first = took(1, 0)
    steps = [(took(depth, 0) - first) / (depth - 1) for depth in depths if depth > 1]
    level = max(0.0, statistics.median(steps)) if steps else first
    pack = pad = 0.0
    if "full" in runs:
        pack = max(0.0, took("full", 1) - took(depths[-1], 1))
        pad = max(0.0, took("half", 1) - interpolate(half_nodes, nodes, verify) - pack) / half_pads
    parts = [first + (depth - 1) * level + judged for depth, judged in zip(depths, verify[1:], strict=True)]
    rest = statistics.median(took(depth, 2) - part for depth, part in zip(depths, parts, strict=True))
    return verify, first, level, pack, pad, rest, plain - verify[0]


def _judged(shape: Shape, device: torch.device) -> Tree:
    """A tree to verify of as many nodes."""
    return build(chain(shape.depth) if shape.is_chain else [(rank,) for rank in range(shape.size - 1)], device)


def isotonic(values: Sequence[float]) -> tuple[float, ...]:
    """The closest non-decreasing values in least squares, by pooling neighbours that decrease (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # sum and number of the values in each block
    for value in values:
        total, size = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            previous_total, previous_size = blocks.pop()
            total, size = total + previous_total, size + previous_size
        blocks.append((total, size))
    return tuple(total / size for total, size in blocks for _ in range(size))


def kept_costs(setting: Mapping[str, Any], measure: Callable[[], ChainCosts]) -> ChainCosts:
    """The costs measured under a setting, from a file where they were measured before; TRAINKIT_COSTS names its folder.

    Args:
        setting: All that costs depend on, JSON-able: machine, threads, versions, sizes.
        measure: Measures them.
    """
    text = json.dumps(setting, sort_keys=True)
    folder = Path(os.environ.get("TRAINKIT_COSTS") or CACHE)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["setting"] == json.loads(text):
            costs = values["costs"]
            verify = tuple(tuple(line) for line in costs.pop("verify_RN"))
            return ChainCosts(verify_RN=verify, **{name: tuple(value) for name, value in costs.items()})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # not measured yet, or by another version
    costs = measure()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial_ = path.with_suffix(f".{os.getpid()}")
        try:
            partial_.write_text(json.dumps({"setting": setting, "costs": asdict(costs)}, indent=1) + "\n", encoding="utf-8")
            partial_.replace(path)
        finally:
            partial_.unlink(missing_ok=True)
    except OSError:
        pass  # a read-only home costs a second at each start, no more
    return costs


def sizes_of(module: nn.Module | None) -> str:
    """Digest of a module's class and the shapes of its weights: what of it costs depend on."""
    shapes = {} if module is None else {name: list(value.shape) for name, value in module.named_parameters()}
    return hashlib.sha256(json.dumps([type(module).__name__, shapes]).encode()).hexdigest()[:16]
