"""Runs a bench: chooses thread counts, times every method, and compares every output with plain decoding."""

from __future__ import annotations

import sys
from typing import Any

import torch

from trainkit.eval.bench.hardware import examine
from trainkit.eval.bench.identity import IdentityChecker, tie_tolerance
from trainkit.eval.bench.timing import measure, set_threads, warm_up
from trainkit.eval.bench.types import BenchArguments, BenchResult, BenchSetup
from trainkit.runner.sampling import Sampling
from trainkit.runner.timing import RoundCost, round_costs


def run(arguments: BenchArguments, setup: BenchSetup) -> BenchResult:
    """Measures every method of the setup; prints the expected duration and a progress bar to stderr."""
    device, all_threads = setup.runner.device, torch.get_num_threads()
    methods, prompts, max_new_tokens, max_seconds = (
        setup.methods,
        setup.prompts,
        arguments.max_new_tokens,
        arguments.max_seconds,
    )
    try:
        # warm up, and leave prompts out if all of them would take too long
        machine = examine(device)
        threads = sorted({1, all_threads}) if device.type == "cpu" else [all_threads]
        seconds = arguments.repeats * warm_up(methods, prompts, max_new_tokens, threads, whole=device.type != "cpu")
        total = len(prompts)
        if (count := max(1, int(total * max_seconds / seconds))) < total:
            setup.notes.append(f"{count} of {total} prompts, to stay within max_seconds {max_seconds:.0f}")
            del prompts[count:]
        print(
            f"bench: {len(methods)} methods x {arguments.repeats} repeats x {len(prompts)} prompts of at most "
            f"{max_new_tokens} new tokens: {seconds * len(prompts) / total:.0f} s at most",
            file=sys.stderr,
        )
        # time whole decodings, and the parts of a round
        turn_size = 1 if arguments.batch == 1 else 0
        done = measure(methods, prompts, max_new_tokens, arguments.repeats, max_seconds, turn_size)
        if done < arguments.repeats:
            setup.notes.append(f"{done} of {arguments.repeats} repeats, to stay within max_seconds {max_seconds:.0f}")
        costs = _costs(setup, min(arguments.batch, len(prompts)))
    finally:
        set_threads(all_threads)
    # compare texts with plain decoding; above temperature 0, only coupled verification in trainkit gives the same tokens
    target, reference = setup.runner.rounds.target, setup.plain.last.tokens
    tolerance = tie_tolerance(target, [*prompts[0], *reference[0]])
    checker = IdentityChecker(target, Sampling(arguments.temperature), arguments.seed, tolerance)
    greedy, coupled = arguments.temperature == 0, arguments.verify == "coupled"
    others = [method for method in methods if method is not setup.plain]
    compared = [method for method in others if greedy or (coupled and method.family == "trainkit")]
    identity = {method.name: checker.compare(prompts, reference, method.last.tokens) for method in compared}
    return BenchResult(arguments, setup, machine, identity, costs, tolerance)


def _costs(setup: BenchSetup, batch: int) -> dict[tuple[int, str, Any], RoundCost]:
    """Drafting and verifying times of each fixed draft, with the thread counts of all fixed drafts and plain decoding."""
    costs = {}
    for name, runner in setup.drafters.items():
        fixed = [method for method in setup.methods if method.paths and method.drafter == name]
        for threads in sorted({method.threads for method in [setup.plain, *fixed]}) if fixed else ():
            set_threads(threads)
            timed = round_costs(runner.rounds, [method.paths for method in fixed], setup.mean_length, batch)
            costs |= {(threads, name, paths): cost for paths, cost in timed.items()}
    return costs
