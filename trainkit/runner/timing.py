"""How long the parts of a round take on this machine: drafting a tree, and verifying a number of rows.

Parts are measured apart, over a cache of zeros; what the cache holds does not change what it costs.
"""

# B rows  N tree nodes

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from trainkit.drafters.base import Accepted
from trainkit.layers.attention import Packing
from trainkit.runner.graphs import capture
from trainkit.runner.round import Plan, Rounds, RoundState
from trainkit.runner.sampling import CHOICE, Sampling, gumbel
from trainkit.runner.trees.shape import Draft, RankPath, Shape
from trainkit.runner.trees.static import Tree, build, chain
from trainkit.runner.verify import Coupled


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has done all that was enqueued; a CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def processor(device: torch.device) -> str:
    """Model name of the GPU, or of the CPU as Linux reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class RoundCost:
    """Seconds of the parts of one round.

    Attributes:
        draft: Growing the tree, all levels, and the drafter's commit of what is accepted.
        verify: The target's forward over the tree's nodes, output head included.
    """

    draft: float
    verify: float


@dataclass(frozen=True)
class Part:
    """What to measure.

    Attributes:
        drafted: Shape that is drafted.
        verified: Tree that is verified.
        lengths: Number of nodes verified in each row, packed; empty for all nodes.
    """

    drafted: Shape
    verified: Tree
    lengths: Sequence[int] = ()


def round_costs(
    rounds: Rounds, shapes: Sequence[tuple[RankPath, ...]], length: int, batch: int = 1, repeats: int = 15
) -> dict[tuple[RankPath, ...], RoundCost]:
    """Median costs of drafting and verifying each tree at `length` cached tokens, greedily; on a GPU as captured graphs.

    Plain decoding is the empty tree: its `verify` is the time of one row. Trees are interleaved, and each drafts before it
    verifies, as in a round, so what the target evicts from the processor's cache is evicted here too.
    """
    trees = {paths: build(paths, rounds.device) for paths in dict.fromkeys([chain(0), *shapes])}
    runs = time_parts(rounds, {paths: Part(tree, tree) for paths, tree in trees.items()}, length, batch, repeats)
    return {paths: RoundCost(median(seconds, 0), median(seconds, 1)) for paths, seconds in runs.items()}


@torch.inference_mode()
def time_parts(
    rounds: Rounds, parts: Mapping[Any, Part], length: int, batch: int, repeats: int, sampling: Sampling | None = None
) -> dict[Any, list[list[float]]]:
    """For each part by name and each repeat the seconds of drafting, of verifying, and with `sampling` of the whole round.

    With `sampling`, noise, processing and the target's choice are included: each draft level computes a row of noise, and
    verifying another. The whole round is measured where all nodes are verified.
    """
    device = rounds.device
    slots = max(max(2 * part.drafted.slots, part.verified.size) for part in parts.values())
    span = -(-(length + slots) // 64) * 64
    rounds.target.reserve_positions(span)
    # One state for all parts, as in decoding, and one for whole rounds, which change theirs and store what a pause would.
    state = rounds.new_state(batch, span)
    whole_state = state if sampling is None else rounds.new_state(batch, span, can_pause=True)
    for new in (state, whole_state):
        new.position_B.fill_(length)
        new.limit_B.fill_(1 << 40)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    probes: dict[Hashable, list[Callable[[], object]]] = {}
    for name, part in parts.items():
        probe = [_draft(rounds, part.drafted, state, span, sampling), _verify(rounds, part, state, span, sampling)]
        if sampling is not None and not part.lengths:
            probe.append(_whole(rounds, part.drafted, whole_state, span, sampling))
        probes[name] = [_graphed(step, device, pool) for step in probe]
    # Interleaved repeats; the first two are for warm-up.
    seconds: dict[Hashable, list[list[float]]] = {name: [] for name in probes}
    for _ in range(repeats + 2):
        for name, probe in probes.items():
            times = [perf_counter()]
            for step in probe:
                step()
                synchronize(device)
                times.append(perf_counter())
            seconds[name].append([after - before for before, after in pairwise(times)])
    return {name: runs[2:] for name, runs in seconds.items()}


def median(runs: Sequence[Sequence[float]], part: int) -> float:
    """Median seconds of a part over `time_parts`' repeats."""
    return statistics.median(run[part] for run in runs)


def _draft(rounds: Rounds, shape: Shape, state: RoundState, span: int, sampling: Sampling | None) -> Callable[[], object]:
    """Drafting a shape and committing its root."""
    drafter, plan, weight = rounds.drafter, Plan(sampling or Sampling(), shape), rounds.target.embed.weight
    if drafter is None or not shape.depth:
        return lambda: None
    batch, length = len(state.position_B), shape.depth + 1
    counts_B = torch.ones_like(state.position_B)
    path_BP = None if shape.is_chain else counts_B.new_zeros(batch, length)
    taps = weight.new_zeros(batch, length, len(rounds.taps), weight.shape[1]) if rounds.taps else None

    def draft() -> object:
        drafted = rounds.draft(plan, state, rounds.noise(plan, state), span)
        tokens = drafted.tokens_BN[:, :length]
        accepted = Accepted(path_BP, tokens, tokens, counts_B, state.position_B, taps)
        drafter.commit(state.draft, accepted, rounds.handle, span)
        return drafted

    return draft


def _verify(rounds: Rounds, part: Part, state: RoundState, span: int, sampling: Sampling | None) -> Callable[[], object]:
    """Verifying a tree, or a number of nodes of each row; with `sampling` up to the target's choice."""
    tree = part.verified
    tokens = state.position_B.new_zeros(len(state.position_B), tree.size)
    lengths_B = torch.tensor(part.lengths, device=rounds.device) if part.lengths else None

    def verify() -> object:
        packing = None if lengths_B is None else Packing.from_lengths(lengths_B, tree.size, sum(part.lengths))
        draft = Draft(tree, tokens, tree.topology, tree.depth, packing=packing)
        logits, taps = rounds.evaluate(draft, state, span)
        if sampling is None:
            return logits, taps
        noise = None
        if not sampling.greedy:
            ahead = torch.arange(1 if tree.is_chain else tree.depth + 1, device=rounds.device)
            noise = gumbel(state.keys_B2, state.position_B[:, None] + 1 + ahead, rounds.vocabulary, CHOICE)
        return Coupled().verify(draft, sampling.process(logits), noise, state.keys_B2, state.position_B)

    return verify


def _whole(rounds: Rounds, shape: Shape, state: RoundState, span: int, sampling: Sampling) -> Callable[[], object]:
    """A whole round of this shape, always from the same position."""
    plan, start_B = Plan(sampling, shape, can_pause=True), state.position_B.clone()

    def whole() -> object:
        state.position_B.copy_(start_B)
        state.done_B.fill_(False)
        state.missed["count"].zero_()
        return rounds(plan, state, span)

    return whole


def _graphed(step: Callable[[], object], device: torch.device, pool: Any) -> Callable[[], object]:
    """The step as a CUDA graph; on a CPU the step itself. Its output is not read, so graphs of a pool share its memory."""
    if device.type != "cuda":
        return step
    graph, _ = capture(step, device, pool)

    def replay(alive: object = step) -> None:  # what the graph reads stays alive with the replay
        with torch.cuda.device(device):
            graph.replay()

    return replay
