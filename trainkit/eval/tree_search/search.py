"""Static trees that give the most tokens per second: nodes by their chance of being right, their number by what rows cost here.

For a number of nodes the tree with the most expected tokens holds those whose paths have the largest products of accuracies
(Cai et al. 2024, arXiv 2401.10774): a child's product is at most its parent's and its elder sibling's, so these are a tree.
How many pay is a matter of the machine: where a GPU verifies 64 rows in the time of one, 64; on a CPU a handful. Depth costs as
well, a draft step a level, so the search is repeated for every depth allowed.

Left out on purpose: trees that differ in the nodes of a level though their products are equal, which no figure tells apart.
"""

# D levels  W ranks  N tree nodes, root included  T rows verified  F frontier nodes

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainkit.errors import UserError
from trainkit.eval.bench.timing import set_threads, settle
from trainkit.eval.tree_search.ranks import Accuracies, Ranks, falling, simulated
from trainkit.runner import Runner
from trainkit.runner.timing import round_costs
from trainkit.runner.trees.shape import RankPath
from trainkit.runner.trees.static import chain

Paths = tuple[RankPath, ...]


def chance(path: RankPath, table_DWW: Accuracies) -> float:
    """Probability that a whole path is right: the product of its accuracies, each given the parent's rank."""
    parents = (0, *path)
    return float(np.prod([table_DWW[d, parents[d], rank] for d, rank in enumerate(path)]))


def expected_tau(paths: Iterable[RankPath], table_DWW: Accuracies) -> float:
    """Tokens a round emits: the bonus token, and each node with its chance."""
    return 1.0 + sum(chance(path, table_DWW) for path in paths)


def likeliest(table_DWW: Accuracies, nodes: int, depth: int, widest: int | None = None) -> list[RankPath]:
    """The `nodes - 1` likeliest paths of at most `depth` levels, likeliest first: every beginning of the list is a tree.

    Args:
        table_DWW: Accuracies; rows must not increase with the rank.
        nodes: N, root included.
        depth: At most D.
        widest: Nodes of one level that may have children; one more is passed over for what is next.
    """
    width = table_DWW.shape[2]
    heap: list[tuple[float, RankPath, float]] = [(-table_DWW[0, 0, 0], (0,), 1.0)]  # minus its chance, path, parent's chance
    taken: list[RankPath] = []
    parents = [set[RankPath]() for _ in range(depth)]
    while heap and len(taken) < nodes - 1:
        negative, path, above = heapq.heappop(heap)
        expanded, level = parents[len(path) - 1], len(path)
        if path[:-1] not in expanded and widest is not None and len(expanded) >= widest:
            continue
        expanded.add(path[:-1])
        taken.append(path)
        if path[-1] + 1 < width:
            before = path[-2] if level > 1 else 0
            heapq.heappush(heap, (-above * table_DWW[level - 1, before, path[-1] + 1], (*path[:-1], path[-1] + 1), above))
        if level < depth:
            heapq.heappush(heap, (negative * table_DWW[level, path[-1], 0], (*path, 0), -negative))
    return taken


def full(nodes: int, depth: int, width: int, widest: int | None = None) -> Paths:
    """The first nodes, level by level, of the tree whose every node has as many children as the next.

    As many children as let `nodes` fit into `depth` levels, two at least, at most `width`: the tree of someone who measures
    nothing, to hold a searched one against. `widest` as in `likeliest`.

    Raises:
        UserError: so many nodes do not fit.
    """
    for children in range(min(2, width), width + 1):
        paths: list[RankPath] = []
        level: list[RankPath] = [()]
        for _ in range(depth):
            level = [(*path, rank) for path in level[:widest] for rank in range(children)]
            paths += level
            if len(paths) >= nodes - 1:
                return tuple(paths[: nodes - 1])
    raise UserError(f"nodes {nodes}: {depth} levels of at most {width} ranks hold {len(paths) + 1}; ask for no more")


# ------------------------------------------------------------------------------------------------------ what a round costs here


@dataclass(frozen=True)
class Costs:
    """Seconds of a round's parts, measured where noted and straight lines between; neither falls with size.

    Attributes:
        plain: Plain decoding's step: one row.
        verify_T: By rows T, the target's forward with output head.
        first: The draft's first level.
        level_F: By frontier nodes F, each level after it.
        threads: CPU threads that they were timed with.
    """

    plain: float
    verify_T: dict[int, float]
    first: float
    level_F: dict[int, float]
    threads: int = 1

    def verify(self, rows: int) -> float:
        """Seconds to verify `rows` rows."""
        return _line(self.verify_T, rows)

    def draft(self, paths: Paths) -> float:
        """Seconds to draft a tree: a step for each level with children, over as many nodes as have some."""
        frontiers = Counter(len(parent) for parent in {path[:-1] for path in paths})
        return sum(self.first if depth == 0 else _line(self.level_F, count) for depth, count in frontiers.items())

    def speedup(self, tau: float, paths: Paths) -> float:
        """Times plain decoding that a round of this tree can give: tau / (v(T) + draft time / plain step)."""
        return tau * self.plain / (self.verify(len(paths) + 1) + self.draft(paths))


def measure_costs(runner: Runner, length: int, batch: int, nodes: int, depth: int, width: int) -> Costs:
    """Times trees of up to `nodes` rows and frontiers of up to `width` nodes at `length` cached tokens, interleaved.

    On a CPU with one thread and with all, and the faster at plain decoding is taken, as `bench` does.
    """
    every = torch.get_num_threads()
    found = []
    try:
        for count in sorted({1, every}) if runner.device.type == "cpu" else [every]:
            set_threads(count)
            found.append(_measure_costs(runner, length, batch, nodes, depth, width))
    finally:
        set_threads(every)
    return min(found, key=lambda costs: costs.plain)


def _measure_costs(runner: Runner, length: int, batch: int, nodes: int, depth: int, width: int) -> Costs:
    assert runner.drafter is not None
    widest = min(width, runner.drafter.max_width or width)
    sizes = sorted({size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if size < nodes} | {nodes})
    shapes = {size: full(size, depth, width, widest) for size in sizes}
    brooms: dict[int, Paths] = {}
    if depth > 1:
        for count in sorted({c for c in (1, 2, 4, 8, 16) if c < widest} | {widest}):
            brooms[count] = tuple((rank,) for rank in range(count)) + tuple((rank, 0) for rank in range(count))
    settle(runner)
    found = round_costs(runner.rounds, [chain(1), *brooms.values(), *shapes.values()], length, batch)
    first = found[chain(1)].draft
    verify = _rising({1: found[()].verify} | {size: found[paths].verify for size, paths in shapes.items()})
    level = _rising({count: max(0.0, found[paths].draft - first) for count, paths in brooms.items()})
    return Costs(found[()].verify, verify, first, level, torch.get_num_threads())


def _rising(seconds: dict[int, float]) -> dict[int, float]:
    if not seconds:
        return {}
    values = falling(np.array([seconds[size] for size in sorted(seconds)])[::-1])[::-1]
    return {size: float(value) for size, value in zip(sorted(seconds), values, strict=True)}


def _line(seconds: dict[int, float], size: int) -> float:
    """Between two sizes measured, or on from the last two."""
    sizes = sorted(seconds)
    if size <= sizes[-1] or len(sizes) == 1:
        return float(np.interp(size, sizes, [seconds[s] for s in sizes]))
    low, high = sizes[-2:]
    return seconds[high] + (size - high) * (seconds[high] - seconds[low]) / (high - low)


# ----------------------------------------------------------------------------------------------------------------- the search


@dataclass(frozen=True)
class Candidate:
    """The best tree of a size.

    Attributes:
        paths: Its nodes after the root.
        expected_tau: Tokens per round by its accuracies, over all places alike.
        tau: Tokens per round on the very texts that were walked, as decoding them shows it.
        speedup: Times plain decoding, by `tau` and what its round costs.
    """

    paths: Paths
    expected_tau: float
    tau: float
    speedup: float

    @property
    def nodes(self) -> int:
        """Rows verified, root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Levels drafted."""
        return max(map(len, self.paths))


def search(
    table_DWW: Accuracies, ranks: Sequence[Ranks], costs: Costs, nodes: int, widest: int | None = None
) -> list[Candidate]:
    """For each size from 2 to `nodes`, root included, the tree with the most expected tokens per second over all depths.

    Which nodes and how many levels is settled by expected tau; across sizes, trees are held against one another by their tau on
    the texts: a round begins after a rejection more often than a place does, which costs large trees more than small ones.
    """
    best: dict[int, tuple[float, Paths]] = {}
    for depth in range(1, len(table_DWW) + 1):
        paths = likeliest(table_DWW, nodes, depth, widest)
        tau = 1.0
        for size, path in enumerate(paths, 2):
            tau += chance(path, table_DWW)
            tree = tuple(paths[: size - 1])
            speedup = costs.speedup(tau, tree)
            if size not in best or speedup > best[size][0]:
                best[size] = speedup, tree
    candidates = []
    for _, (_, tree) in sorted(best.items()):
        tau, expected = simulated(ranks, tree).tau, expected_tau(tree, table_DWW)
        shown = expected if math.isnan(tau) else tau  # texts too short for a whole round
        candidates.append(Candidate(tree, expected, tau, costs.speedup(shown, tree)))
    return candidates


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """The one with the largest speed-up; of equals the smallest."""
    return max(candidates, key=lambda one: (one.speedup, -one.nodes))
