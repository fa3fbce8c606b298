"""Times the methods of a bench against one another: thread count chosen for each, repeats interleaved, medians with spread.

All methods continue the same prompts to the same length in one process, in the order A B C A B C, so that a machine that slows
down slows all of them. Nothing is subtracted from the wall-clock times.
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

PROBE_TOKENS = 24
"""Tokens that are decoded to compare thread counts."""


@dataclass(frozen=True)
class Generated:
    """The output of one call of a method.

    Attributes:
        tokens: New tokens of each prompt, end token included.
        stats: Rounds and accepted lengths; None for transformers.
        rounds: Rounds run, each over the whole batch; 0 where unknown.
        split: Seconds by part of the work, as `Scheduler.seconds`.
    """

    tokens: list[list[int]]
    stats: Stats | None = None
    rounds: int = 0
    split: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of tokens emitted."""
        return sum(map(len, self.tokens))

    @staticmethod
    def merge(calls: Sequence[Generated]) -> Generated:
        """The outputs of consecutive calls as one."""
        stats = [call.stats for call in calls if call.stats is not None]
        split = {part: sum(call.split[part] for call in calls) for part in calls[0].split}
        tokens = [text for call in calls for text in call.tokens]
        return Generated(tokens, Stats.merge(stats) if stats else None, sum(call.rounds for call in calls), split)


Run = Callable[[Sequence[Sequence[int]], int, int], Generated]
"""(prompts, max_new_tokens, index of the first prompt in the bench) -> output, returned once all tokens are computed."""


@dataclass
class Method:
    """One way to decode, and its measurements.

    Attributes:
        name: Name in tables.
        family: `transformers` or `trainkit`.
        depth: Tokens drafted a round, at most; 0 is plain decoding.
        run: Decodes prompts.
        paths: Rank paths of a fixed draft tree; trainkit only.
        drafter: Name of its drafter; empty for plain decoding.
        policy: Name of the policy that chooses the depth, instead of `paths`.
        threads: CPU threads that it runs with.
        seconds: Wall-clock seconds of each repeat.
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
        """Median wall-clock seconds without prefill; trainkit only."""
        return statistics.median(s - o.split.get("prefill", 0.0) for o, s in zip(self.outputs, self.seconds, strict=True))


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
    """A method that decodes with trainkit's runner: a fixed tree, or a policy, or plain decoding where neither is given.

    Args:
        runner: Runner with a drafter, unless decoding is plain.
        name: Name in tables.
        paths: Rank paths of the draft tree.
        prepare: Called before each run; its time counts as decoding time, so it must be short.
        drafter: Name of the drafter.
        policy: Policy that chooses the depth, instead of `paths`.
        max_depth: Largest depth that the policy may choose.
        **options: Options for `Runner.generate`.
    """

    def run(prompts: Sequence[Sequence[int]], max_new_tokens: int, first: int) -> Generated:
        choose_kernels(runner)
        if prepare is not None:
            prepare()
        draft: dict[str, object] = {"tree": paths} if paths else {"depth": max_depth, "policy": policy or None}
        draws = [(first + index, 0) for index in range(len(prompts))]  # noise of a prompt does not depend on its batch
        outputs = dict(runner.generate_each(prompts, draws, max_new_tokens=max_new_tokens, **draft, **options))
        stats = Stats.merge(output.stats for output in outputs.values())
        tokens = [outputs[index].tokens for index in range(len(prompts))]
        return Generated(tokens, stats, runner.scheduler.rounds_run, dict(runner.scheduler.seconds))

    return Method(name, "trainkit", max(map(len, paths), default=max_depth), run, paths, drafter, policy)


def choose_kernels(runner: Runner) -> None:
    """Chooses the kernels that a process with this runner alone would use; runners that share a target may differ in them."""
    stream_weights(runner.rounds.target, *([] if runner.drafter is None else [runner.drafter]))


def warm_up(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    threads: Sequence[int],
    whole: bool = False,
) -> float:
    """Sets each method's fastest thread count, captures every graph, and returns the estimated seconds of one repeat.

    Each thread count decodes at most `PROBE_TOKENS` tokens of the first prompt, after an untimed run of a few tokens.

    Args:
        methods: Methods; their `threads` are set.
        prompts: Token ids of each prompt.
        max_new_tokens: Length that will be measured.
        threads: Thread counts to choose from.
        whole: Run the whole load once before; on a GPU this captures a graph for every cache size.
    """
    estimate = 0.0
    # largest need of cache slots first: static tensors that grow later would drop the graphs captured before
    for method in sorted(methods, key=lambda method: -max(len(method.paths), method.depth) - 2 * method.depth):
        if whole:
            method.run(prompts, max_new_tokens, 0)
        probe, length = prompts[:1], min(PROBE_TOKENS, max_new_tokens)
        seconds_per_token: dict[int, float] = {}
        for count in threads:
            set_threads(count)
            method.run(probe, min(4, length), 0)
            seconds, output = _timed(method, probe, length)
            seconds_per_token[count] = seconds / max(1, output.count)
        method.threads = min(seconds_per_token, key=lambda count: seconds_per_token[count])
        estimate += seconds_per_token[method.threads] * max_new_tokens * len(prompts)
    return estimate


def measure(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    repeats: int,
    progress: Callable[[str], None] = lambda name: None,
    max_seconds: float = float("inf"),
    turn_size: int | None = None,
) -> int:
    """Times every method `repeats` times, interleaved, appends to its `seconds` and `outputs`, and returns the repeats done.

    These are fewer than `repeats`, but at least one, if another repeat would end after `max_seconds`. With `turn_size` 1 the
    methods alternate prompt by prompt: other load on the machine then affects all of them alike, and the ratios of one repeat
    compare times that lie close together.

    Args:
        methods: Methods whose threads are chosen.
        prompts: Token ids of each prompt.
        max_new_tokens: Maximum number of new tokens for each prompt.
        repeats: Number of times that every method decodes all prompts.
        progress: Called with the name of each method after its turn.
        max_seconds: Limit for the wall-clock seconds of all repeats.
        turn_size: Prompts that a method decodes before the next one's turn; all by default.
    """
    began, turn_size = perf_counter(), turn_size or len(prompts)
    for done in range(repeats):
        if done and (perf_counter() - began) * (done + 1) / done > max_seconds:
            return done
        turns: list[list[tuple[float, Generated]]] = [[] for _ in methods]
        for start in range(0, len(prompts), turn_size):
            for method, timed in zip(methods, turns, strict=True):
                set_threads(method.threads)
                timed.append(_timed(method, prompts[start : start + turn_size], max_new_tokens, start))
                progress(method.name)
        for method, timed in zip(methods, turns, strict=True):
            method.seconds.append(sum(seconds for seconds, _ in timed))
            method.outputs.append(Generated.merge([output for _, output in timed]))
    return repeats


def set_threads(count: int) -> None:
    """Sets the number of torch's CPU threads, if it differs: setting it is slow."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _timed(method: Method, prompts: Sequence[Sequence[int]], max_new_tokens: int, first: int = 0) -> tuple[float, Generated]:
    began = perf_counter()
    output = method.run(prompts, max_new_tokens, first)
    return perf_counter() - began, output


def mbsu(tau: float, c: float, depth: int) -> float:
    """Memory-bound speed-up: tau / (c depth + 1), with c = bytes read per draft step / bytes read per target call."""
    return tau / (c * depth + 1)


def roof(tau: float, plain: float, cost: RoundCost) -> float:
    """Speed-up attainable on this machine: tau / (v + d), in units of a plain step: v to verify, d to draft."""
    return tau * plain / (cost.verify + cost.draft)
