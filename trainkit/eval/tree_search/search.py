"""Static trees with the most tokens per second on this machine: nodes by their probability, their number by measured cost.

Among trees of one size, the most expected tokens come from the paths with the largest products of accuracies (Cai et al. 2024,
arXiv 2401.10774). These paths form a tree, because a child's product is at most that of its parent and of its lower-ranked
siblings. The best size depends on the machine: 64 nodes where a GPU verifies 64 rows in the time of one, a handful on a CPU.
Depth also costs, one draft step per level, so the search is repeated for every allowed depth.

Left out on purpose: trees that differ only in nodes with equal products, which no figure can tell apart.
"""

# D levels  W ranks  N tree nodes, root included  T rows verified  F frontier nodes

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainkit.errors import UserError
from trainkit.eval.bench.timing import set_threads
from trainkit.eval.tree_search.ranks import Accuracies, Ranks, simulate_decoding
from trainkit.runner import Runner
from trainkit.runner.policies.cost_model import interpolate, isotonic
from trainkit.runner.timing import round_costs
from trainkit.runner.trees.shape import RankPath
from trainkit.runner.trees.static import chain

Paths = tuple[RankPath, ...]


def path_probability(path: RankPath, table_DWW: Accuracies) -> float:
    """Probability that every node of a path is correct: the product of its accuracies, each given the parent's rank."""
    parents = (0, *path)
    return math.prod(float(table_DWW[d, parents[d], rank]) for d, rank in enumerate(path))


def expected_tau(paths: Iterable[RankPath], table_DWW: Accuracies) -> float:
    """Expected tokens per round: the bonus token, plus the probability of each node."""
    return 1.0 + sum(path_probability(path, table_DWW) for path in paths)


def best_paths(table_DWW: Accuracies, nodes: int, depth: int, max_frontier: int | None = None) -> list[RankPath]:
    """The `nodes - 1` most probable paths of at most `depth` levels, best first; every prefix of the list is a tree.

    Args:
        table_DWW: Accuracies; rows must not increase with the rank.
        nodes: Tree nodes, root included, N.
        depth: Maximum depth, at most D.
        max_frontier: Maximum number of nodes per level that have children; paths beyond it are skipped. None for no limit.
    """
    width = table_DWW.shape[2]
    heap: list[tuple[float, RankPath]] = [(-path_probability((0,), table_DWW), (0,))]
    paths: list[RankPath] = []
    expanded_by_level = [set[RankPath]() for _ in range(depth)]
    while heap and len(paths) < nodes - 1:
        _, path = heapq.heappop(heap)
        parent, rank = path[:-1], path[-1]
        expanded = expanded_by_level[len(parent)]
        if parent not in expanded and max_frontier is not None and len(expanded) >= max_frontier:
            continue
        expanded.add(parent)
        paths.append(path)
        # its next sibling and its first child are at most as probable
        next_paths = ([(*parent, rank + 1)] if rank + 1 < width else []) + ([(*path, 0)] if len(path) < depth else [])
        for next_path in next_paths:
            heapq.heappush(heap, (-path_probability(next_path, table_DWW), next_path))
    return paths


def full_tree(nodes: int, depth: int, width: int, max_frontier: int | None = None) -> Paths:
    """A tree of `nodes` nodes, root included, built without measurements: a baseline for searched trees.

    Every node has the same number of children, at least two and at most `width`: the smallest number with which `nodes` nodes
    fit into `depth` levels. Nodes are taken level by level. `max_frontier` as in `best_paths`.

    Raises:
        UserError: so many nodes do not fit.
    """
    for children in range(min(2, width), width + 1):
        paths: list[RankPath] = []
        level: list[RankPath] = [()]
        for _ in range(depth):
            level = [(*path, rank) for path in level[:max_frontier] for rank in range(children)]
            paths += level
            if len(paths) >= nodes - 1:
                return tuple(paths[: nodes - 1])
    raise UserError(f"nodes {nodes}: {depth} levels of at most {width} ranks hold {len(paths) + 1}; lower nodes")


@dataclass(frozen=True)
class Costs:
    """Seconds of a round's parts at the measured sizes, non-decreasing in size; linear in between.

    Attributes:
        plain_step_seconds: Time of a plain decoding step, one row.
        verify_seconds: Time of the target's forward pass with output head, by number of rows T.
        first_level_seconds: Time of the first draft level.
        level_seconds: Time of each later draft level, by number of frontier nodes F.
        threads: CPU threads of the measurement.
    """

    plain_step_seconds: float
    verify_seconds: dict[int, float]
    first_level_seconds: float
    level_seconds: dict[int, float]
    threads: int = 1

    def verify(self, rows: int) -> float:
        """Seconds to verify `rows` rows."""
        return interpolate(rows, list(self.verify_seconds), list(self.verify_seconds.values()))

    def draft(self, paths: Paths) -> float:
        """Seconds to draft a tree: one step for each level that has children, over the nodes that have some."""
        frontiers = Counter(len(parent) for parent in {path[:-1] for path in paths})
        sizes, seconds, first = list(self.level_seconds), list(self.level_seconds.values()), self.first_level_seconds
        return sum(interpolate(count, sizes, seconds) if depth else first for depth, count in frontiers.items())

    def speedup(self, tau: float, paths: Paths) -> float:
        """Speed-up over plain decoding that a round of this tree can reach: tau / (v(T) + draft time / plain step time)."""
        return tau * self.plain_step_seconds / (self.verify(len(paths) + 1) + self.draft(paths))


def measure_costs(runner: Runner, length: int, batch: int, nodes: int, depth: int, width: int) -> Costs:
    """Times trees of up to `nodes` nodes and frontiers of up to `width` nodes at `length` cached tokens, interleaved.

    On a CPU, with one thread and with all; the result is that of the thread count with the faster plain step, as in `bench`.
    """
    assert runner.drafter is not None
    frontier = min(width, runner.drafter.max_width or width)
    # trees that time verifying, by number of rows
    sizes = sorted({size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if size < nodes} | {nodes})
    trees = [full_tree(size, depth, width, runner.drafter.max_width) for size in sizes]
    # trees of two levels that time the second level, by number of frontier nodes; the first level is that of a chain
    counts = sorted({count for count in (1, 2, 4, 8, 16) if count < frontier} | {frontier}) if depth > 1 else []
    two_levels = [(*((rank,) for rank in range(n)), *((rank, 0) for rank in range(n))) for n in counts]
    # time them with each number of threads
    all_threads, by_threads = torch.get_num_threads(), []
    try:
        for threads in sorted({1, all_threads}) if runner.device.type == "cpu" else [all_threads]:
            set_threads(threads)
            costs = round_costs(runner.rounds, [chain(1), *two_levels, *trees], length, batch)
            plain, first = costs[()].verify, costs[chain(1)].draft
            verify = isotonic([plain, *(costs[paths].verify for paths in trees)])
            level = isotonic([max(0.0, costs[paths].draft - first) for paths in two_levels])
            by_rows, by_frontier = dict(zip((1, *sizes), verify, strict=True)), dict(zip(counts, level, strict=True))
            by_threads.append(Costs(plain, by_rows, first, by_frontier, threads))
    finally:
        set_threads(all_threads)
    return min(by_threads, key=lambda costs: costs.plain_step_seconds)


@dataclass(frozen=True)
class Candidate:
    """The best tree of a size.

    Attributes:
        paths: Rank paths of its nodes, without the root.
        expected_tau: Tokens per round according to its accuracies, averaged over all positions.
        tau: Tokens per round of simulated decoding of the replayed texts.
        speedup: Speed-up over plain decoding, from `tau` and the costs of a round.
    """

    paths: Paths
    expected_tau: float
    tau: float
    speedup: float

    @property
    def nodes(self) -> int:
        """Number of rows verified, root included."""
        return len(self.paths) + 1

    @property
    def depth(self) -> int:
        """Number of levels drafted."""
        return max(map(len, self.paths))

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-able."""
        figures = {"nodes": self.nodes, "depth": self.depth, "expected_tau": self.expected_tau, "tau": self.tau}
        return figures | {"expected_speedup": self.speedup}


def search(
    table_DWW: Accuracies, ranks: Sequence[Ranks], costs: Costs, nodes: int, max_frontier: int | None = None
) -> list[Candidate]:
    """For each size from 2 to `nodes`, root included, the tree with the most expected tokens per second over all depths.

    Expected tau decides the nodes and the depth of each size. Trees of different sizes are compared by their tau in simulated
    decoding: rounds start after a rejection more often than positions in general do, which lowers large trees' tau more.
    """
    best: dict[int, tuple[float, Paths]] = {}  # by size: expected speed-up, tree
    for depth in range(1, len(table_DWW) + 1):
        paths = best_paths(table_DWW, nodes, depth, max_frontier)
        tau = 1.0
        for size, path in enumerate(paths, 2):
            tau += path_probability(path, table_DWW)
            tree = tuple(paths[: size - 1])
            speedup = costs.speedup(tau, tree)
            if size not in best or speedup > best[size][0]:
                best[size] = speedup, tree
    candidates = []
    for _, (_, tree) in sorted(best.items()):
        tau, expected = simulate_decoding(ranks, tree).tau, expected_tau(tree, table_DWW)
        reached = expected if math.isnan(tau) else tau  # nan: the texts are too short for a full round
        candidates.append(Candidate(tree, expected, tau, costs.speedup(reached, tree)))
    return candidates
