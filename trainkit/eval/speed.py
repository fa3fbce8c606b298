"""Timing of contenders against one another: threads chosen for each, repeats interleaved, medians with their spread.

All contenders continue the same prompts to the same length in one process, in the order A B C A B C, so that a machine that
slows down slows them all. Whoever measures by the wall clock should know: nothing here subtracts anything.
"""

# B batch  N tree nodes

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch

from trainkit.eval.machine import synchronize
from trainkit.layers.linear import stream_weights
from trainkit.runner import Runner
from trainkit.runner.sampling import Sampling
from trainkit.runner.stats import Stats
from trainkit.runner.tree import Draft, RankPath, Tree, build, chain, grow


@dataclass(frozen=True)
class Generated:
    """What one call of a contender gave.

    Attributes:
        tokens: New tokens of each prompt, the end token included.
        stats: Rounds and accepted lengths, from our runner.
        rounds: Rounds run, over all rows of the batch at once; 0 where they are not known.
        split: Seconds by part of the work, as `Runner.seconds`.
    """

    tokens: list[list[int]]
    stats: Stats | None = None
    rounds: int = 0
    split: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens emitted."""
        return sum(map(len, self.tokens))


@dataclass
class Contender:
    """One way to decode, and what it was measured to do.

    Attributes:
        name: As tables show it.
        family: `transformers` or `trainkit`.
        depth: Levels drafted a round; 0 decodes plainly.
        run: (prompts, max_new_tokens) -> what it generated; returns when the tokens are there.
        paths: Rank paths of the draft; only of our contenders.
        drafter: Its drafter's name; empty where nothing drafts.
        threads: CPU threads it runs with.
        seconds: Wall-clock of each repeat.
        outputs: What each repeat generated.
    """

    name: str
    family: str
    depth: int
    run: Callable[[Sequence[Sequence[int]], int], Generated]
    paths: tuple[RankPath, ...] = ()
    drafter: str = ""
    threads: int = 1
    seconds: list[float] = field(default_factory=list)
    outputs: list[Generated] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [output.count / seconds for output, seconds in zip(self.outputs, self.seconds, strict=True)]

    @property
    def rate(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.rates)

    @property
    def last(self) -> Generated:
        """The last repeat's output; all repeats give the same tokens."""
        return self.outputs[-1]

    @property
    def decode_seconds(self) -> float:
        """Median wall-clock without the prefills, of our contenders."""
        return statistics.median(s - o.split.get("prefill", 0.0) for o, s in zip(self.outputs, self.seconds, strict=True))


def ours(
    runner: Runner, name: str, paths: tuple[RankPath, ...], prepare: Callable[[], None] | None = None, drafter: str = "",
    **options: object,
) -> Contender:  # fmt: skip
    """A contender that decodes with our runner and this draft tree; no paths is plain decoding.

    Args:
        runner: With a drafter, unless plain.
        name: As tables show it.
        paths: Rank paths of the tree.
        prepare: Called before each run, untimed work excluded by nobody: keep it small.
        drafter: The drafter's name.
        **options: As in `Runner.generate`.
    """

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Generated:
        settle(runner)
        if prepare is not None:
            prepare()
        tree: dict[str, object] = {"tree": paths} if paths else {"depth": 0}
        outputs = runner.generate(prompts, max_new_tokens=max_new_tokens, **tree, **options)  # type: ignore[arg-type]
        stats = Stats.merge(output.stats for output in outputs)
        return Generated([output.tokens for output in outputs], stats, runner.rounds_run, dict(runner.seconds))

    return Contender(name, "trainkit", max(map(len, paths), default=0), run, paths, drafter)


def settle(runner: Runner) -> None:
    """Chooses kernels as a process would that holds this runner alone; others may share its target."""
    drafter = runner.drafter
    stream_weights(runner.rounds.target, *([] if drafter is None else [drafter]))


def warm_up(
    contenders: Sequence[Contender], prompts: Sequence[Sequence[int]], max_new_tokens: int, threads: Sequence[int],
    whole: bool = False,
) -> float:  # fmt: skip
    """Sets each contender's faster number of threads, captures every graph, and returns the seconds one repeat will take.

    With several numbers of threads, a short text (at most 24 tokens of the first prompt) is timed with each, after a few
    tokens for warmth alone.

    Args:
        contenders: Their `threads` are set.
        prompts: Token ids.
        max_new_tokens: As will be measured.
        threads: Numbers to choose from.
        whole: Run the whole load once before: on a GPU every cache bucket has a graph to capture.
    """
    estimate = 0.0
    # the deepest first: static tensors then never grow again, which would drop the graphs captured before
    for contender in sorted(contenders, key=lambda one: -len(one.paths)):
        if whole:
            contender.run(prompts, max_new_tokens)
        probe, length = prompts[:1], min(24, max_new_tokens)
        found: dict[int, float] = {}
        for count in threads:
            set_threads(count)
            contender.run(probe, min(4, length))
            seconds, output = _timed(contender, probe, length)
            found[count] = seconds / max(1, output.count)
        contender.threads = min(found, key=lambda count: found[count])
        estimate += found[contender.threads] * max_new_tokens * len(prompts)
    return estimate


def measure(
    contenders: Sequence[Contender], prompts: Sequence[Sequence[int]], max_new_tokens: int, repeats: int,
    progress: Callable[[str], None] = lambda name: None, max_seconds: float = float("inf"),
) -> int:  # fmt: skip
    """Times every contender `repeats` times, interleaved; results go into `seconds` and `outputs` of each.

    Returns how often it did: fewer times, but once at least, if another repeat would end after `max_seconds`.

    Args:
        contenders: With their threads chosen.
        prompts: Token ids.
        max_new_tokens: Most tokens for each prompt.
        repeats: Rounds over all contenders.
        progress: Told the name of a contender that has just been timed.
        max_seconds: Wall-clock for all repeats.
    """
    began = perf_counter()
    for done in range(repeats):
        if done and (perf_counter() - began) * (done + 1) / done > max_seconds:
            return done
        for contender in contenders:
            set_threads(contender.threads)
            seconds, output = _timed(contender, prompts, max_new_tokens)
            contender.seconds.append(seconds)
            contender.outputs.append(output)
            progress(contender.name)
    return repeats


def set_threads(count: int) -> None:
    """Sets torch's CPU threads if they are not so already: changing them costs."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _timed(contender: Contender, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> tuple[float, Generated]:
    began = perf_counter()
    output = contender.run(prompts, max_new_tokens)
    return perf_counter() - began, output


@dataclass(frozen=True)
class RoundCost:
    """Seconds that the parts of one round take, apart from one another.

    Attributes:
        draft: Growing the tree, all levels, and taking in what is accepted.
        verify: The target's forward over the tree's nodes, output head included.
    """

    draft: float
    verify: float


@torch.inference_mode()
def round_costs(
    runner: Runner, shapes: Sequence[tuple[RankPath, ...]], length: int, batch: int = 1, repeats: int = 15
) -> dict[tuple[RankPath, ...], RoundCost]:
    """Median costs of drafting and verifying each tree at `length` cached tokens, greedily; on a GPU as captured graphs.

    Plain decoding is the empty tree: its `verify` is the time of one row. Trees are interleaved, and each drafts before it
    verifies, as in a round, so that what the target evicts from the processor's cache is evicted here too.
    """
    device = runner.device
    settle(runner)
    probes: dict[tuple[RankPath, ...], tuple[Callable[[], object], Callable[[], object]]] = {}
    for paths in dict.fromkeys([chain(0), *shapes]):
        probes[paths] = tuple(_graphed(part, device) for part in _parts(runner, build(paths, device), length, batch))  # type: ignore[assignment]
    seconds: dict[tuple[RankPath, ...], list[tuple[float, float]]] = {paths: [] for paths in probes}
    for _ in range(repeats + 2):
        for paths, (draft, verify) in probes.items():
            marks = [perf_counter()]
            for part in (draft, verify):
                part()
                synchronize(device)
                marks.append(perf_counter())
            seconds[paths].append((marks[1] - marks[0], marks[2] - marks[1]))
    return {
        paths: RoundCost(statistics.median(d for d, _ in found[2:]), statistics.median(v for _, v in found[2:]))
        for paths, found in seconds.items()
    }


def _parts(runner: Runner, tree: Tree, length: int, batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Drafting and verifying of one tree over a cache of zeros; what it holds does not change what it costs."""
    rounds, drafter, device = runner.rounds, runner.drafter, runner.device
    span = -(-(length + tree.size) // 64) * 64
    state = rounds.new_state(batch, span)
    state["position"].fill_(length)
    drafted = Draft(torch.zeros(batch, tree.size, dtype=torch.long, device=device), (), tree.topology)

    def verify() -> object:
        return rounds.judge(tree, drafted, state, span)

    if drafter is None or not tree.depth:
        return lambda: None, verify
    weight = rounds.target.embed.weight
    draft_state = drafter.init_state(batch, span, device, weight.dtype)
    levels, counts_B = range(tree.depth + 1), torch.ones(batch, dtype=torch.long, device=device)
    path_BP = None if tree.is_chain else torch.zeros(batch, len(levels), dtype=torch.long, device=device)
    taps = weight.new_zeros(batch, len(levels), len(rounds.taps), weight.shape[1]) if rounds.taps else None

    def draft() -> object:
        token, position = state["token"], state["position"]
        made = grow(tree, drafter, draft_state, rounds.handle, token, position, Sampling(), None, span, False)
        drafter.commit(draft_state, path_BP, made.tokens_BN[:, : len(levels)], counts_B, position, taps, rounds.handle, span)
        return made

    return draft, verify


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


def mbsu(tau: float, c: float, depth: int) -> float:
    """Memory-bound speed-up: tau / (c depth + 1), c the bytes a draft step reads over those a target call reads."""
    return tau / (c * depth + 1)


def roof(tau: float, plain: float, cost: RoundCost) -> float:
    """What is attainable on this machine: tau / (v(T) + draft time / plain step time), v(T) = verify time / plain step time."""
    return tau * plain / (cost.verify + cost.draft)
