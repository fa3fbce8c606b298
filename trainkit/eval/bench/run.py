"""Runs a bench: chooses thread counts, times every method, and compares every output with plain decoding."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Any

import torch
from tqdm import tqdm

from trainkit.eval.bench.hardware import examine
from trainkit.eval.bench.identity import Identity, IdentityChecker, tie_tolerance
from trainkit.eval.bench.timing import choose_kernels, measure, set_threads, warm_up
from trainkit.eval.bench.types import BenchArguments, BenchResult, BenchSetup
from trainkit.runner.sampling import Sampling
from trainkit.runner.timing import RoundCost, round_costs


def run(arguments: BenchArguments, setup: BenchSetup) -> BenchResult:
    """Measures every method of the setup; prints the expected duration and a progress bar to stderr."""
    device, all_threads = setup.runner.device, torch.get_num_threads()
    try:
        # warm up, and leave prompts out if all of them would take too long
        machine = examine(device)
        threads = sorted({1, all_threads}) if device.type == "cpu" else [all_threads]
        repeat = warm_up(setup.methods, setup.prompts, arguments.max_new_tokens, threads, whole=device.type != "cpu")
        seconds = _limit_prompts(setup, repeat * arguments.repeats, arguments.max_seconds)
        print(
            f"bench: {len(setup.methods)} methods x {arguments.repeats} repeats x {len(setup.prompts)} prompts of at most "
            f"{arguments.max_new_tokens} new tokens: {seconds:.0f} s at most",
            file=sys.stderr,
        )
        # time whole decodings
        turn_size = 1 if arguments.batch == 1 else len(setup.prompts)
        turns = len(setup.methods) * arguments.repeats * -(-len(setup.prompts) // turn_size)
        with tqdm(total=turns, unit="run", disable=None) as bar:

            def progress(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            limits = arguments.max_new_tokens, arguments.repeats
            done = measure(setup.methods, setup.prompts, *limits, progress, arguments.max_seconds, turn_size)
        if done < arguments.repeats:
            limit = f"max_seconds {arguments.max_seconds:.0f}"
            setup.notes.append(f"{done} of {arguments.repeats} repeats, to stay within {limit}")
        # time the parts of a round
        costs = _costs(arguments, setup)
    finally:
        set_threads(all_threads)
    identity, tolerance = _identities(arguments, setup)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return BenchResult(arguments, setup, machine, date, identity, costs, tolerance)


def _limit_prompts(setup: BenchSetup, estimate: float, max_seconds: float) -> float:
    """Drops the last prompts until the estimated seconds are within `max_seconds`, and returns the new estimate."""
    total = len(setup.prompts)
    count = min(total, max(1, int(total * max_seconds / estimate))) if estimate > 0 else total
    if count < total:
        setup.notes.append(f"{count} of {total} prompts, to stay within max_seconds {max_seconds:.0f}")
        del setup.prompts[count:]
    return estimate * count / total


def _costs(arguments: BenchArguments, setup: BenchSetup) -> dict[tuple[int, str, Any], RoundCost]:
    """Drafting and verifying times of each fixed draft, with the thread counts of all fixed drafts and plain decoding."""
    costs, batch = {}, min(arguments.batch, len(setup.prompts))
    for drafter in setup.drafters:
        fixed = [method for method in setup.methods if method.paths and method.drafter == drafter.name]
        for threads in sorted({method.threads for method in [setup.plain, *fixed]}) if fixed else ():
            set_threads(threads)
            choose_kernels(drafter.runner)
            timed = round_costs(drafter.runner.rounds, [method.paths for method in fixed], setup.mean_length, batch)
            costs |= {(threads, drafter.name, paths): cost for paths, cost in timed.items()}
    return costs


def _identities(arguments: BenchArguments, setup: BenchSetup) -> tuple[dict[str, Identity], float]:
    """Comparison with plain decoding of every method that must match it, by name; and the tolerance for ties."""
    target, reference = setup.runner.rounds.target, setup.plain.last.tokens
    tolerance = tie_tolerance(target, [*setup.prompts[0], *reference[0]])
    checker = IdentityChecker(target, Sampling(arguments.temperature), arguments.seed, tolerance)
    compared = [method for method in setup.methods if method is not setup.plain and arguments.must_match_plain(method)]
    return {method.name: checker.compare(setup.prompts, reference, method.last.tokens) for method in compared}, tolerance
