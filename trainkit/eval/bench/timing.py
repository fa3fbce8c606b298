"""Timing of contenders against one another: threads chosen for each, repeats interleaved, medians with their spread.

All contenders continue the same prompts to the same length in one process, in the order A B C A B C, so that a machine that
slows down slows them all. Whoever measures by the wall clock should know: nothing here subtracts anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from trainkit.layers.linear import stream_weights
from trainkit.runner import Runner
from trainkit.runner.stats import Stats
from trainkit.runner.timing import RoundCost
from trainkit.runner.trees.shape import RankPath


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

    @staticmethod
    def of(calls: Sequence[Generated]) -> Generated:
        """What several calls gave, one after the other."""
        stats = [call.stats for call in calls if call.stats is not None]
        split = {part: sum(call.split[part] for call in calls) for part in calls[0].split}
        tokens = [text for call in calls for text in call.tokens]
        return Generated(tokens, Stats.merge(stats) if stats else None, sum(call.rounds for call in calls), split)


Run = Callable[[Sequence[Sequence[int]], int, int], Generated]


@dataclass
class Contender:
    """One way to decode, and what it was measured to do.

    Attributes:
        name: As tables show it.
        family: `transformers` or `trainkit`.
        depth: Levels drafted a round; 0 decodes plainly.
        run: (prompts, max_new_tokens, place of the first prompt) -> what it generated; returns when the tokens are there.
        paths: Rank paths of the draft; only of our contenders.
        drafter: Its drafter's name; empty where nothing drafts.
        policy: What paces its draft, in place of paths.
        threads: CPU threads it runs with.
        seconds: Wall-clock of each repeat.
        outputs: What each repeat generated.
    """

    name: str
    family: str
    depth: int
    run: Run
    paths: tuple[RankPath, ...] = ()
    drafter: str = ""
    policy: str = ""
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
    runner: Runner,
    name: str,
    paths: tuple[RankPath, ...],
    prepare: Callable[[], None] | None = None,
    drafter: str = "",
    policy: str = "",
    most: int = 0,
    **options: object,
) -> Contender:
    """A contender that decodes with our runner and this draft tree; no paths is plain decoding.

    Args:
        runner: With a drafter, unless plain.
        name: As tables show it.
        paths: Rank paths of the tree.
        prepare: Called before each run, untimed work excluded by nobody: keep it small.
        drafter: The drafter's name.
        policy: In place of paths, what paces the draft,
        most: and how many tokens it may draft at most.
        **options: As in `Runner.generate`.
    """

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, first: int) -> Generated:
        settle(runner)
        if prepare is not None:
            prepare()
        tree: dict[str, object] = {"tree": paths} if paths else {"depth": most, "policy": policy or None}
        draws = [(first + place, 0) for place in range(len(prompts))]  # a prompt's own, whichever are decoded with it
        found = dict(runner.generate_each(prompts, draws, max_new_tokens=max_new_tokens, **tree, **options))
        outputs = [found[place] for place in range(len(prompts))]
        stats = Stats.merge(output.stats for output in outputs)
        return Generated([output.tokens for output in outputs], stats, runner.rounds_run, dict(runner.seconds))

    return Contender(name, "trainkit", max(map(len, paths), default=most), run, paths, drafter, policy)


def settle(runner: Runner) -> None:
    """Chooses kernels as a process would that holds this runner alone; others may share its target."""
    drafter = runner.drafter
    stream_weights(runner.rounds.target, *([] if drafter is None else [drafter]))


def warm_up(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    threads: Sequence[int],
    whole: bool = False,
) -> float:
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
    # what needs most slots first: static tensors then never grow again, which would drop the graphs captured before
    for contender in sorted(contenders, key=lambda one: -max(len(one.paths), one.depth) - 2 * one.depth):
        if whole:
            contender.run(prompts, max_new_tokens, 0)
        probe, length = prompts[:1], min(24, max_new_tokens)
        found: dict[int, float] = {}
        for count in threads:
            set_threads(count)
            contender.run(probe, min(4, length), 0)
            seconds, output = _timed(contender, probe, length)
            found[count] = seconds / max(1, output.count)
        contender.threads = min(found, key=lambda count: found[count])
        estimate += found[contender.threads] * max_new_tokens * len(prompts)
    return estimate


def measure(
    contenders: Sequence[Contender],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[str], None] = lambda name: None,
    max_seconds: float = float("inf"),
    piece: int | None = None,
) -> int:
    """Times every contender `repeats` times, interleaved; results go into `seconds` and `outputs` of each.

    Where prompts are decoded one after the other, contenders take turns prompt by prompt (`piece` 1): what else the machine
    does meets all of them alike, and ratios of a repeat are of the same minute.

    Returns how often it did: fewer times, but once at least, if another repeat would end after `max_seconds`.

    Args:
        contenders: With their threads chosen.
        prompts: Token ids.
        max_new_tokens: Most tokens for each prompt.
        repeats: Rounds over all contenders.
        progress: Told the name of a contender that has just been timed.
        max_seconds: Wall-clock for all repeats.
        piece: Prompts of a turn; all by default.
    """
    began = perf_counter()
    for done in range(repeats):
        if done and (perf_counter() - began) * (done + 1) / done > max_seconds:
            return done
        found: list[list[tuple[float, Generated]]] = [[] for _ in contenders]
        for start in range(0, len(prompts), piece or len(prompts)):
            for contender, turns in zip(contenders, found, strict=True):
                set_threads(contender.threads)
                turns.append(_timed(contender, prompts[start : start + (piece or len(prompts))], max_new_tokens, start))
                progress(contender.name)
        for contender, turns in zip(contenders, found, strict=True):
            contender.seconds.append(sum(seconds for seconds, _ in turns))
            contender.outputs.append(Generated.of([output for _, output in turns]))
    return repeats


def set_threads(count: int) -> None:
    """Sets torch's CPU threads if they are not so already: changing them costs."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _timed(
    contender: Contender, prompts: Sequence[Sequence[int]], max_new_tokens: int, first: int = 0
) -> tuple[float, Generated]:
    began = perf_counter()
    output = contender.run(prompts, max_new_tokens, first)
    return perf_counter() - began, output


def mbsu(tau: float, c: float, depth: int) -> float:
    """Memory-bound speed-up: tau / (c depth + 1), c the bytes a draft step reads over those a target call reads."""
    return tau / (c * depth + 1)


def roof(tau: float, plain: float, cost: RoundCost) -> float:
    """What is attainable on this machine: tau / (v(T) + draft time / plain step time), v(T) = verify time / plain step time."""
    return tau * plain / (cost.verify + cost.draft)
