"""How long the parts of a round take on this machine: drafting a tree, verifying so many rows.

Measured apart from one another, over a cache of zeros; what it holds does not change what it costs.
"""

# B rows  N tree nodes

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from trainkit.drafters.base import Accepted, State
from trainkit.layers.attention import Packing
from trainkit.runner.round import Plan, Rounds
from trainkit.runner.sampling import CHOICE, Noise, Sampling, gumbel
from trainkit.runner.trees.shape import Draft, RankPath, Shape, grow
from trainkit.runner.trees.static import Tree, build, chain
from trainkit.runner.verify import coupled


def synchronize(device: torch.device) -> None:
    """Waits for all that was asked of a GPU; a CPU has already done it."""
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
    """Seconds that the parts of one round take, apart from one another.

    Attributes:
        draft: Growing the tree, all levels, and taking in what is accepted.
        verify: The target's forward over the tree's nodes, output head included.
    """

    draft: float
    verify: float


def round_costs(
    rounds: Rounds, shapes: Sequence[tuple[RankPath, ...]], length: int, batch: int = 1, repeats: int = 15
) -> dict[tuple[RankPath, ...], RoundCost]:
    """Median costs of drafting and verifying each tree at `length` cached tokens, greedily; on a GPU as captured graphs.

    Plain decoding is the empty tree: its `verify` is the time of one row. Trees are interleaved, and each drafts before it
    verifies, as in a round, so that what the target evicts from the processor's cache is evicted here too.
    """
    device = rounds.target.embed.weight.device
    trees = {paths: build(paths, device) for paths in dict.fromkeys([chain(0), *shapes])}
    parts = {paths: (tree, tree, ()) for paths, tree in trees.items()}
    found = timed(rounds, parts, length, batch, repeats)
    return {paths: RoundCost(median(runs, 0), median(runs, 1)) for paths, runs in found.items()}


@torch.inference_mode()
def timed(
    rounds: Rounds,
    parts: Mapping[Any, tuple[Shape, Tree, Sequence[int]]],
    length: int,
    batch: int,
    repeats: int,
    sampling: Sampling | None = None,
) -> dict[Any, list[list[float]]]:
    """Seconds of drafting the one and verifying the other, all nodes of it or so many in each row, by name; of each repeat.

    With a `sampling`, noise, processing and the target's choice too; each level makes a row of noise, and verifying another.
    Then also, where all nodes are verified, of the whole round that these are parts of.
    """
    device = rounds.target.embed.weight.device
    slots = max(max(2 * drafted.slots, verified.size) for drafted, verified, _ in parts.values())
    span = -(-(length + slots) // 64) * 64
    rounds.target.reserve_positions(span)
    # one for all shapes, as in decoding; whole rounds move on in theirs
    states, moving = _States.of(rounds, batch, span, length), _States.of(rounds, batch, span, length)
    probes: dict[Hashable, list[Callable[[], object]]] = {}
    for name, (drafted, verified, lengths) in parts.items():
        parts_: list[Callable[[], object]] = [*_parts(rounds, drafted, verified, lengths, states, sampling)]
        if sampling is not None and not lengths:
            parts_.append(_whole(rounds, sampling, drafted, moving, length))
        probes[name] = [_graphed(part, device) for part in parts_]
    seconds: dict[Hashable, list[list[float]]] = {name: [] for name in probes}
    for _ in range(repeats + 2):
        for name, probe in probes.items():
            marks = [perf_counter()]
            for part in probe:
                part()
                synchronize(device)
                marks.append(perf_counter())
            seconds[name].append([after - before for before, after in pairwise(marks)])
    return {name: found[2:] for name, found in seconds.items()}


def median(runs: Sequence[Sequence[float]], part: int) -> float:
    """Seconds of a part, of `timed`'s repeats."""
    return statistics.median(run[part] for run in runs)


@dataclass(frozen=True)
class _States:
    """The target's and the drafter's, at `length` cached tokens, for rounds that read `span` slots."""

    target: State
    draft: State
    span: int

    @classmethod
    def of(cls, rounds: Rounds, batch: int, span: int, length: int) -> _States:
        weight, drafter = rounds.target.embed.weight, rounds.drafter
        state = rounds.new_state(batch, span)
        state["position"].fill_(length)
        state["limit"].fill_(1 << 40)
        return cls(state, {} if drafter is None else drafter.init_state(batch, span, weight.device, weight.dtype), span)


def _parts(
    rounds: Rounds, shape: Shape, tree: Tree, lengths: Sequence[int], states: _States, sampling: Sampling | None
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Drafting of one shape, and verifying of a tree, or of so many nodes of each row."""
    drafter, device, state, span = rounds.drafter, rounds.target.embed.weight.device, states.target, states.span
    batch = state["position"].shape[0]
    drafted = Draft(torch.zeros(batch, tree.size, dtype=torch.long, device=device), (), tree.topology)
    lengths_B = torch.tensor(lengths, device=device) if lengths else None

    def verify() -> object:
        packing = None if lengths_B is None else Packing.from_lengths(lengths_B, tree.size, sum(lengths))
        judged = replace(drafted, packing=packing)
        logits, taps = rounds.judge(tree, judged, state, span)
        if sampling is None:
            return logits, taps
        noise = None
        if not sampling.greedy:
            ahead = torch.arange(1 if tree.is_chain else tree.depth + 1, device=device)
            noise = gumbel(state["keys"], state["position"][:, None] + 1 + ahead, rounds.vocabulary, CHOICE)
        return coupled(tree, judged, sampling.process(logits), noise)

    if drafter is None or not shape.depth:
        return lambda: None, verify
    weight = rounds.target.embed.weight
    levels, counts_B = range(shape.depth + 1), torch.ones(batch, dtype=torch.long, device=device)
    path_BP = None if shape.is_chain else torch.zeros(batch, len(levels), dtype=torch.long, device=device)
    taps = weight.new_zeros(batch, len(levels), len(rounds.taps), weight.shape[1]) if rounds.taps else None

    def draft() -> object:
        token, position, process = state["token"], state["position"], sampling or Sampling()
        noise = None if process.greedy else Noise(state["keys"], position, rounds.vocabulary, CHOICE)
        made = grow(shape, drafter, states.draft, rounds.handle, token, position, process, noise, span, False)
        tokens = made.tokens_BN[:, : len(levels)]
        drafter.commit(states.draft, Accepted(path_BP, tokens, tokens, counts_B, position, taps), rounds.handle, span)
        return made

    return draft, verify


def _whole(rounds: Rounds, sampling: Sampling, shape: Shape, states: _States, length: int) -> Callable[[], object]:
    """A round of this shape."""
    state, plan = states.target, Plan(sampling, shape, pauses=True)

    def whole() -> object:
        state["position"].fill_(length)
        state["done"].fill_(False)
        state["missed"].zero_()
        return rounds(plan, state, states.draft, states.span)

    return whole


def _graphed(part: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The part as a CUDA graph; on a CPU the part itself."""
    if device.type != "cuda":
        return part
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            part()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = part()
    return partial(_replay, graph, part, made)


def _replay(graph: torch.cuda.CUDAGraph, *read: object) -> None:
    """`read` is what the graph reads and writes, kept alive for as long as it can be replayed."""
    graph.replay()
