"""A bench's result as one JSON-able dictionary, the summary: measurements and derived figures, for table, plot and file.

tau: tokens emitted per full round, bonus token included. Prefill is left out, and so are last rounds that the length limit or
    an end token cut; these are counted as cut rounds.
alpha_k: share of rounds that accepted draft position k, among those that accepted k - 1.
c: bytes read per draft step / bytes read per target call.
mbsu: memory-bound speed-up, tau / (c depth + 1).
v: time to verify the draft / time of a plain step.
draft: time to draft / time of a plain step.
roof: tau / (v + draft), the speed-up attainable on this machine.
speedup: tokens per second / tokens per second of plain decoding in trainkit.
efficiency: speedup / tau.
bandwidth: bytes that a step must read / step time / the machine's copy bandwidth.
wasted: drafted tokens that were not accepted, per emitted token.
paused: rounds that drafted nothing because a policy expected no gain.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from trainkit.eval.bench.timing import Method
from trainkit.eval.bench.types import BenchResult
from trainkit.layers.linear import Linear
from trainkit.runner import Runner

Summary = dict[str, Any]


def summarise(result: BenchResult) -> Summary:
    """All measurements and the figures derived from them; format 3."""
    setup, machine = result.setup, asdict(result.machine)
    versions, target = machine.pop("versions"), setup.runner.rounds.target
    methods = [_method(result, method) for method in setup.methods]
    drafting = [values for values in methods if values["family"] == "trainkit" and values["depth"]]
    return {
        "format": 3,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": asdict(result.arguments) | {"device": str(setup.runner.device)},
        "versions": versions,
        "machine": machine,
        "target": _model(target, setup.target_name, target.step_bytes()),
        "drafters": [_model(runner.drafter, name, _draft_bytes(runner)) for name, runner in setup.drafters.items()],
        "prompts": {"count": len(setup.prompts), "tokens": sum(map(len, setup.prompts)), "mean_cached": setup.mean_length},
        "tie_tolerance": result.tolerance,
        "mismatches": result.mismatches,
        "notes": list(setup.notes),
        "best": max(drafting, key=lambda values: values["tokens_per_second"]["median"])["name"] if drafting else None,
        "methods": methods,
    }


def _model(module: Any, name: str, step_bytes: int) -> Summary:
    packed = [part.packed for part in module.modules() if isinstance(part, Linear) and part.packed is not None]
    count = sum(weight.numel() for weight in module.parameters()) + sum(math.prod(weight.shape) for weight in packed)
    grouped = lambda weight: weight.group < weight.shape[1]
    kinds = {weight.kind + (f" in groups of {weight.group}" if grouped(weight) else "") for weight in packed}
    return {"name": name, "parameters": count, "step_bytes": step_bytes, "packed": sorted(kinds)}


def _draft_bytes(runner: Runner) -> int:
    """Bytes of weights that a draft step reads."""
    head = runner.rounds.target.embed.weight  # the output head is as large, tied or not
    assert runner.drafter is not None
    return runner.drafter.step_bytes(head.numel() * head.element_size())


def _method(result: BenchResult, method: Method) -> Summary:
    """Speed and identity of a method; with a fixed draft also `_drafting`'s values, with a policy those of `_policy`."""
    setup = result.setup
    generate = next((other for other in setup.methods if other.family == "transformers" and not other.depth), None)
    identity = result.identity.get(method.name)
    values: Summary = {
        "name": method.name,
        "family": method.family,
        "drafter": method.drafter or None,
        "depth": method.depth,
        "threads": method.threads,
        "tokens": method.last.count,
        "seconds": [output.seconds for output in method.outputs],
        "tokens_per_second": _spread(method.rates),
        "x_plain": method.rate / setup.plain.rate,
        "x_transformers": method.rate / generate.rate if generate else None,
        "identical": identity and identity.to_dict(),
    }
    if method.last.stats is not None:
        values["bandwidth"] = _bandwidth(result, method)
        # median seconds by part; with CUDA graphs only `prefill` and the rest (as `host`) can be told apart
        values["split"] = {part: median(output.split[part] for output in method.outputs) for part in method.last.split}
    if method.paths:
        values |= _drafting(result, method)
    if method.policy:
        values["policy"] = _policy(result, method)
    return values


def _acceptance(method: Method) -> Summary:
    """Acceptance counts of a method with a draft."""
    names = ("tau", "accepted", "rounds", "cut_rounds", "wasted", "alpha_k")
    return {name: getattr(method.last.stats, name) for name in names}


def _policy(result: BenchResult, method: Method) -> Summary:
    """Results of a policy, beside the fastest fixed depth of the same drafter; ratios compare runs of the same repeat."""
    stats, plain = method.last.stats, result.setup.plain
    assert stats is not None
    chains = [m for m in result.setup.methods if m.drafter == method.drafter and m.paths and len(m.paths) == m.depth]
    best = max(chains, key=lambda chain: chain.rate, default=None)
    over_best = best and _ratios(method, best) | {"depth": best.depth, "wasted": _acceptance(best)["wasted"]}
    return {
        "name": method.policy,
        "max_depth": method.depth,
        **_acceptance(method),
        "drafted_per_round": stats.drafted / max(1, stats.rounds),
        "paused": stats.paused,
        "goodput": stats.goodput,
        "speedup": method.rate / plain.rate,
        "over_plain": _ratios(method, plain),
        "over_best_fixed": over_best,
    }


def _ratios(method: Method, other: Method) -> Summary:
    """Tokens per second of a method over the other's, repeat by repeat."""
    return _spread([a / b for a, b in zip(method.rates, other.rates, strict=True)])


def _spread(values: list[float]) -> Summary:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _drafting(result: BenchResult, method: Method) -> Summary:
    """Acceptance of a fixed draft, the speed-up that it allows, and the one that was measured."""
    plain, cost = result.setup.plain, result.costs[method.threads, method.drafter, method.paths]
    step = result.costs[plain.threads, method.drafter, ()].verify  # timed together with this drafter's trees
    c = _draft_bytes(result.setup.drafters[method.drafter]) / result.setup.runner.rounds.target.step_bytes()
    acceptance, speedup, v, draft = _acceptance(method), method.rate / plain.rate, cost.verify / step, cost.draft / step
    tau = acceptance["tau"]
    roof = tau / (v + draft)
    return acceptance | {
        "nodes": len(method.paths) + 1,
        "c": c,
        "mbsu": tau / (c * method.depth + 1),
        "v": v,
        "draft": draft,
        "plain_step_seconds": step,
        "roof": roof,
        "speedup": speedup,
        "speedup_over_roof": speedup / roof,
        "efficiency": speedup / tau,
    }


def _bandwidth(result: BenchResult, method: Method) -> Summary:
    """Bytes that a round must read (weights at each level, the cache once), its time, and the share of copy bandwidth."""
    setup, machine, target = result.setup, result.machine, result.setup.runner.rounds.target
    draft_bytes = _draft_bytes(setup.drafters[method.drafter]) if method.drafter else 0
    levels = method.depth
    if method.policy and method.last.stats is not None:
        levels = method.last.stats.drafted / max(1, method.last.stats.rounds)
    weight, shape = target.embed.weight, target.shape
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * weight.element_size()  # keys and values
    cache_bytes = min(result.arguments.batch, len(setup.prompts)) * setup.mean_length * token_bytes
    step_bytes = target.step_bytes() + levels * draft_bytes + cache_bytes
    decode_seconds = median(output.seconds - output.split["prefill"] for output in method.outputs)
    seconds = decode_seconds / max(1, method.last.rounds)
    return {
        "bytes": step_bytes,
        "step_seconds": seconds,
        "share": step_bytes / seconds / machine.copy_bandwidth,
        "in_cache": machine.last_level_cache is not None and 4 * step_bytes <= machine.last_level_cache,
    }
