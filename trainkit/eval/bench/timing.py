"""Times the methods of a bench against one another: thread count chosen for each, repeats interleaved, medians with spread.

All methods continue the same prompts to the same length in one process, in the order A B C A B C, so that a machine that slows
down slows all of them. Nothing is subtracted from the wall-clock times.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from time import perf_counter

import torch
from tqdm import tqdm

from trainkit.runner import Runner
from trainkit.runner.stats import Stats
from trainkit.runner.trees.shape import RankPath

PROBE_TOKENS, PROBES = 24, 3
"""Number of tokens that are decoded to compare thread counts, and how often."""
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Generated:
    """The output of one call of a method, or of several merged.

    Attributes:
        tokens: New tokens of each prompt, end token included.
        stats: Rounds and accepted lengths; None for transformers.
        rounds: Number of rounds run, each over the whole batch; 0 if unknown.
        split: Seconds by part of the work, as `Scheduler.seconds`.
        seconds: Wall-clock seconds.
    """

    tokens: list[list[int]]
    stats: Stats | None = None
    rounds: int = 0
    split: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Number of tokens emitted."""
        return sum(map(len, self.tokens))

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.count / self.seconds

    @staticmethod
    def merge(calls: Sequence[Generated]) -> Generated:
        """The outputs of consecutive calls as one."""
        stats = [call.stats for call in calls if call.stats is not None]
        split = {part: sum(call.split[part] for call in calls) for part in calls[0].split}
        rounds, seconds = sum(call.rounds for call in calls), sum(call.seconds for call in calls)
        tokens = [text for call in calls for text in call.tokens]
        return Generated(tokens, Stats.merge(stats) if stats else None, rounds, split, seconds)


Run = Callable[[Prompts, int, int], Generated]
"""(prompts, max_new_tokens, index of the first prompt in the bench) -> output, returned once all tokens are computed."""


@dataclass
class Method:
    """One way to decode, and its measurements.

    Attributes:
        name: Name in tables.
        family: `transformers` or `trainkit`.
        depth: Maximum number of tokens drafted per round; 0 is plain decoding.
        run: Decodes prompts; `seconds` of its output is set by the caller.
        paths: Rank paths of a fixed draft tree; trainkit only.
        drafter: Name of its drafter; empty for plain decoding.
        policy: Name of the policy that chooses the depth, instead of `paths`.
        threads: CPU threads that it runs with.
        outputs: Output of each repeat.
    """

    name: str
    family: str
    depth: int
    run: Run
    paths: tuple[RankPath, ...] = ()
    drafter: str = ""
    policy: str = ""
    threads: int = 1
    outputs: list[Generated] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repeat."""
        return [output.rate for output in self.outputs]

    @property
    def rate(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.rates)

    @property
    def last(self) -> Generated:
        """The last repeat's output; all repeats give the same tokens."""
        return self.outputs[-1]

    def timed(self, prompts: Prompts, max_new_tokens: int, first: int = 0) -> Generated:
        """The output of `run`, with its wall-clock seconds."""
        began = perf_counter()
        output = self.run(prompts, max_new_tokens, first)
        return replace(output, seconds=perf_counter() - began)


def trainkit_method(
    runner: Runner,
    name: str,
    paths: tuple[RankPath, ...] = (),
    prepare: Callable[[], None] | None = None,
    drafter: str = "",
    policy: str = "",
    max_depth: int = 0,
    **options: object,
) -> Method:
    """A method that decodes with trainkit's runner: with a fixed tree, with a policy, or plainly if neither is given.

    `prepare` is called before each run; its time counts as decoding time, so it must be short. A policy chooses depths up to
    `max_depth`. `options` are those of `Runner.generate`, all other arguments those of `Method`.
    """

    def run(prompts: Prompts, max_new_tokens: int, first: int) -> Generated:
        if prepare is not None:
            prepare()
        draft: dict[str, object] = {"tree": paths} if paths else {"depth": max_depth, "policy": policy or None}
        draws = [(first + index, 0) for index in range(len(prompts))]  # noise of a prompt does not depend on its batch
        outputs = dict(runner.generate_each(prompts, draws, max_new_tokens=max_new_tokens, **draft, **options))
        stats = Stats.merge(output.stats for output in outputs.values())
        tokens, scheduler = [outputs[index].tokens for index in range(len(prompts))], runner.scheduler
        return Generated(tokens, stats, scheduler.rounds_run, {**scheduler.seconds})

    return Method(name, "trainkit", max(map(len, paths), default=max_depth), run, paths, drafter, policy)


def warm_up(
    methods: Sequence[Method], prompts: Prompts, max_new_tokens: int, threads: Sequence[int], whole: bool = False
) -> float:
    """Sets each method's fastest thread count, captures every graph, and returns the estimated seconds of one repeat.

    Each thread count decodes at most `PROBE_TOKENS` tokens of the first prompt, after an untimed run of a few tokens. The
    thread counts take turns, and medians are compared: where other programs need the cores, threads that wait for each other
    are fast at one moment and many times slower at the next. With `whole` the whole load is run once before; on a GPU this
    captures a graph for every cache size.
    """
    estimate = 0.0
    # largest need of cache slots first: static tensors that grow later would drop the graphs captured before
    for method in sorted(methods, key=lambda method: -max(len(method.paths), method.depth) - 2 * method.depth):
        if whole:
            method.run(prompts, max_new_tokens, 0)
        length = min(PROBE_TOKENS, max_new_tokens)
        rates: dict[int, list[float]] = {count: [] for count in threads}
        for _ in range(PROBES if len(threads) > 1 else 1):
            for count in threads:
                set_threads(count)
                method.run(prompts[:1], min(4, length), 0)
                rates[count].append(method.timed(prompts[:1], length).rate)
        medians = {count: statistics.median(values) for count, values in rates.items()}
        method.threads = max(medians, key=lambda count: medians[count])
        estimate += max_new_tokens * len(prompts) / medians[method.threads]
    return estimate


def measure(
    methods: Sequence[Method], prompts: Prompts, max_new_tokens: int, repeats: int, max_seconds: float = inf, turn_size: int = 0
) -> int:
    """Times every method `repeats` times, interleaved, appends to its `outputs`, and returns the number of repeats done.

    This number is below `repeats`, but at least 1, if another repeat would end after `max_seconds` of wall-clock time. With
    `turn_size` 1 the methods alternate prompt by prompt: other load on the machine then affects all of them alike, and the
    ratios of one repeat compare times that lie close together. With 0 a method decodes all prompts in a turn.
    """
    began, turn_size = perf_counter(), turn_size or len(prompts)
    starts = range(0, len(prompts), turn_size)
    with tqdm(total=len(methods) * repeats * len(starts), unit="run", disable=None) as bar:
        for done in range(repeats):
            if done and (perf_counter() - began) * (done + 1) / done > max_seconds:
                return done
            turns: list[list[Generated]] = [[] for _ in methods]
            for start in starts:
                for method, outputs in zip(methods, turns, strict=True):
                    set_threads(method.threads)
                    outputs.append(method.timed(prompts[start : start + turn_size], max_new_tokens, start))
                    bar.set_postfix_str(method.name, refresh=False)
                    bar.update()
            for method, outputs in zip(methods, turns, strict=True):
                method.outputs.append(Generated.merge(outputs))
    return repeats


def set_threads(count: int) -> None:
    """Sets the number of torch's CPU threads, if it differs: setting it is slow."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
