"""Runs a bench: chooses threads, times every method, compares every output with plain decoding."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from trainkit.eval.bench.types import Field, Request, Result

if TYPE_CHECKING:
    from trainkit.eval.bench.identity import Identity
    from trainkit.runner.timing import RoundCost


def run(request: Request, field: Field) -> Result:
    """Chooses threads, announces how long it will take, measures, and compares every output with plain decoding."""
    import torch
    from tqdm import tqdm

    from trainkit.eval.bench.hardware import examine
    from trainkit.eval.bench.timing import measure, set_threads, warm_up

    device, every = field.runner.device, torch.get_num_threads()
    try:
        machine = examine(device)
        threads = sorted({1, every}) if device.type == "cpu" else [every]
        once = warm_up(field.contenders, field.prompts, request.max_new_tokens, threads, whole=device.type != "cpu")
        _announce(request, field, _fit(field, once * request.repeats, request.max_seconds))
        piece = 1 if request.batch == 1 else len(field.prompts)
        turns = len(field.contenders) * request.repeats * -(-len(field.prompts) // piece)
        with tqdm(total=turns, unit="run", disable=None) as bar:

            def progress(name: str) -> None:
                bar.set_postfix_str(name, refresh=False)
                bar.update()

            done = measure(
                field.contenders, field.prompts, request.max_new_tokens, request.repeats, progress, request.max_seconds, piece
            )
        if done < request.repeats:
            field.notes.append(f"{done} of {request.repeats} repeats, to stay within max_seconds {request.max_seconds:.0f}")
        costs = _costs(request, field)
    finally:
        set_threads(every)
    identity, tolerance = _identities(request, field)
    return Result(request, field, machine, datetime.now(UTC).isoformat(timespec="seconds"), identity, costs, tolerance)


def chosen_device(name: str) -> str:
    """The torch device of a name; `auto` takes a GPU where there is one."""
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fit(field: Field, estimate: float, most: float) -> float:
    """Drops prompts until the estimate (seconds) is within `most`, and returns what it then is."""
    total = len(field.prompts)
    kept = min(total, max(1, int(total * most / estimate))) if estimate > 0 else total
    if kept < total:
        field.notes.append(f"{kept} of {total} prompts, to stay within max_seconds {most:.0f}")
        del field.prompts[kept:]
    return estimate * kept / total


def _announce(request: Request, field: Field, seconds: float) -> None:
    print(
        f"bench: {len(field.contenders)} contenders x {request.repeats} repeats x {len(field.prompts)} prompts of at most "
        f"{request.max_new_tokens} new tokens: {seconds:.0f} s at most",
        file=sys.stderr,
    )


def _costs(request: Request, field: Field) -> dict[tuple[int, str, Any], RoundCost]:
    """Draft and verify times of each of our contenders, with the threads that it and plain decoding run with."""
    from trainkit.eval.bench.timing import set_threads, settle
    from trainkit.runner.timing import round_costs

    found, batch = {}, min(request.batch, len(field.prompts))
    for draft in field.drafts:
        drafting = [one for one in field.contenders if one.paths and one.drafter == draft.name]
        if drafting:
            for count in sorted({one.threads for one in [field.plain, *drafting]}):
                set_threads(count)
                settle(draft.runner)
                costs = round_costs(draft.runner.rounds, [one.paths for one in drafting], field.mean_length, batch)
                found |= {(count, draft.name, paths): cost for paths, cost in costs.items()}
    return found


def _identities(request: Request, field: Field) -> tuple[dict[str, Identity], float]:
    """Holds every contender that has to give the same text against plain decoding, and says at what tolerance."""
    from trainkit.eval.bench.identity import Judge, tolerance_of
    from trainkit.runner.sampling import Sampling

    target, reference = field.runner.rounds.target, field.plain.last.tokens
    tolerance = tolerance_of(target, [*field.prompts[0], *reference[0]])
    judge = Judge(target, Sampling(request.temperature), request.seed, tolerance)
    held = [one for one in field.contenders if one is not field.plain and request.has_same_draw(one)]
    return {one.name: judge.compare(field.prompts, reference, one.last.tokens) for one in held}, tolerance
