"""A bench's result as one JSON-able dictionary: what was measured and the figures of merit that follow; table and plot read it.

Each name has one meaning. tau: tokens a full round emits, bonus token included; prefills, and a last round cut by length or
end, are left out and counted beside. alpha_k: share of rounds in which draft position k was accepted, given k - 1 were.
mbsu: tau / (c depth + 1). roof: tau / (v(T) + draft time / plain step time). speedup: wall-clock of our plain decoding / that
with the drafter (as tokens per second; equal where the texts are). efficiency: speedup / tau. bandwidth: bytes that must be
read per step / step time / copy bandwidth of the machine.
"""

# T rows verified in a round

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import median
from typing import Any

from trainkit.eval.bench.timing import Contender, mbsu, roof
from trainkit.eval.bench.types import Draft, Result

Summary = dict[str, Any]


def summarise(result: Result) -> Summary:
    """Everything measured and derived; format 2."""
    field, request, machine = result.field, result.request, asdict(result.machine)
    versions = machine.pop("versions")
    contenders = [_contender(result, one) for one in field.contenders]
    drafting = [one for one in contenders if one["family"] == "trainkit" and one["depth"]]
    return {
        "format": 2,
        "date": result.date,
        "arguments": asdict(request),
        "versions": versions,
        "machine": machine,
        "target": _model(field.runner.rounds.target, field.target, _target_bytes(result)),
        "drafters": [_model(draft.runner.drafter, draft.name, _draft_bytes(draft)) for draft in field.drafts],
        "prompts": {"count": len(field.prompts), "tokens": sum(map(len, field.prompts)), "mean_cached": field.mean_length},
        "tie_tolerance": result.tolerance,
        "mismatches": result.mismatches,
        "notes": list(field.notes),
        "best": max(drafting, key=lambda one: one["tokens_per_second"]["median"])["name"] if drafting else None,
        "contenders": contenders,
    }


def _model(module: Any, name: str, step_bytes: int) -> Summary:
    return {"name": name, "parameters": sum(p.numel() for p in module.parameters()), "step_bytes": step_bytes}


def _contender(result: Result, one: Contender) -> Summary:
    field = result.field
    transformers = [other for other in field.contenders if other.family == "transformers" and not other.depth]
    rates = one.rates
    values: Summary = {
        "name": one.name,
        "family": one.family,
        "drafter": one.drafter or None,
        "depth": one.depth,
        "threads": one.threads,
        "tokens": one.last.count,
        "seconds": one.seconds,
        "tokens_per_second": {"median": one.rate, "min": min(rates), "max": max(rates)},
        "x_plain": one.rate / field.plain.rate,
        "x_transformers": one.rate / transformers[0].rate if transformers else None,
        "identical": _identity(result, one),
    }
    if one.last.stats is not None:
        values |= {"bandwidth": _bandwidth(result, one), "split": _split(one)}
    if one.paths:
        values |= _drafting(result, one)
    if one.policy:
        values["paced"] = _paced(result, one)
    return values


def _identity(result: Result, one: Contender) -> Summary | None:
    found = result.identity.get(one.name)
    if found is None:
        return None
    return {
        "of": found.total,
        "equal": found.equal,
        "ties": found.ties,
        "mismatches": found.mismatches,
        "differences": [asdict(difference) for difference in found.differences],
    }


def _paced(result: Result, one: Contender) -> Summary:
    """What came of a policy, beside the fastest fixed depth of the same drafter; ratios are of runs next to one another."""
    stats, plain = one.last.stats, result.field.plain
    assert stats is not None
    drafting = [other for other in result.field.contenders if other.drafter == one.drafter and other.paths]
    chains = [other for other in drafting if len(other.paths) == other.depth]
    best = max(chains, key=lambda other: other.rate, default=None)
    values: Summary = {
        "policy": one.policy,
        "most": one.depth,
        "tau": stats.tau,
        "accepted": list(stats.accepted),
        "rounds": stats.rounds,
        "cut_rounds": stats.cut_rounds,
        "drafted_per_round": stats.drafted / max(1, stats.rounds),
        "wasted": stats.wasted,
        "paused": stats.paused,
        "alpha_k": stats.alpha_k,
        "speedup": one.rate / plain.rate,
        "over_plain": _paired(one, plain),
        "over_best_fixed": None,
    }
    if best is not None:
        assert best.last.stats is not None
        values["over_best_fixed"] = _paired(one, best) | {"depth": best.depth, "wasted": best.last.stats.wasted}
    return values


def _paired(one: Contender, other: Contender) -> Summary:
    """Tokens per second of one over the other's, repeat by repeat."""
    ratios = [a / b for a, b in zip(one.rates, other.rates, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def _drafting(result: Result, one: Contender) -> Summary:
    """What only a contender with a draft has: acceptance, and the speed that it could and does give."""
    stats = one.last.stats
    assert stats is not None
    plain = result.field.plain
    cost = result.costs[one.threads, one.drafter, one.paths]
    step = result.costs[plain.threads, one.drafter, ()].verify  # timed beside this drafter's trees
    c, tau, speedup = _draft_bytes(_draft(result, one)) / _target_bytes(result), stats.tau, one.rate / plain.rate
    attainable = roof(tau, step, cost)
    return {
        "nodes": len(one.paths) + 1,
        "accepted": list(stats.accepted),
        "rounds": stats.rounds,
        "cut_rounds": stats.cut_rounds,
        "tau": tau,
        "wasted": stats.wasted,
        "alpha_k": stats.alpha_k,
        "c": c,
        "mbsu": mbsu(tau, c, one.depth),
        "v": cost.verify / step,
        "draft": cost.draft / step,
        "plain_step_seconds": step,
        "roof": attainable,
        "speedup": speedup,
        "speedup_over_roof": speedup / attainable,
        "efficiency": speedup / tau,
    }


def _bandwidth(result: Result, one: Contender) -> Summary:
    """Bytes a round must read (weights once each level, the cache once), the time it takes, and the share of copy bandwidth."""
    draft_bytes = _draft_bytes(_draft(result, one)) if one.drafter else 0
    request, field, machine = result.request, result.field, result.machine
    batch = min(request.batch, len(field.prompts))
    levels = one.depth
    if one.policy and one.last.stats is not None:
        levels = one.last.stats.drafted / max(1, one.last.stats.rounds)
    needed = _target_bytes(result) + levels * draft_bytes + batch * field.mean_length * _cache_bytes(result)
    seconds = one.decode_seconds / max(1, one.last.rounds)
    cache = machine.last_level_cache
    return {
        "bytes": needed,
        "step_seconds": seconds,
        "share": needed / seconds / machine.copy_bandwidth,
        "in_cache": cache is not None and 4 * needed <= cache,
    }


def _draft(result: Result, one: Contender) -> Draft:
    return next(draft for draft in result.field.drafts if draft.name == one.drafter)


def _target_bytes(result: Result) -> int:
    """Bytes of weights that a target call reads."""
    return result.field.runner.rounds.target.step_bytes()


def _draft_bytes(draft: Draft) -> int:
    """Bytes of weights that a draft step reads."""
    head = draft.runner.rounds.target.embed.weight  # as large as the head, whether or not they are one
    assert draft.runner.drafter is not None
    return draft.runner.drafter.step_bytes(head.numel() * head.element_size())


def _cache_bytes(result: Result) -> int:
    """Bytes of the target's keys and values for one cached token."""
    weight, shape = result.field.runner.rounds.target.embed.weight, result.field.runner.rounds.target.shape
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * weight.element_size()


def _split(one: Contender) -> Mapping[str, float]:
    """Median seconds by part; under CUDA graphs only `prefill` and the rest, as `host`, are told apart."""
    return {part: median(output.split[part] for output in one.outputs) for part in one.last.split}
