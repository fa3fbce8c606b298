"""From the options of `trainkit compress` to a plan: which options a method has, and how each layer is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainkit.bundle import read_json
from trainkit.compress.blocks import Walked
from trainkit.compress.layout import Layout
from trainkit.compress.masks import Pattern, parse_pattern
from trainkit.compress.oneshot import METHODS, Goal, Plan, check_plan
from trainkit.compress.quantise import Grid, usual_grid
from trainkit.compress.structured import prune as structured
from trainkit.errors import UserError
from trainkit.models.compressed import quantization_config

SPECIFIC = {
    *("sparsity", "scope", "refine", "bits", "kind", "group", "zero_points", "order", "static_scales", "sequential"),
    *("python", "allocation", "ratio", "bias", "dimensions", "multiple"),
}
"""Options that only some methods have."""


def check_options(name: str, given: set[str]) -> None:
    """Refuses options that a method does not have.

    Raises:
        UserError: names the first, or the method is unknown.
    """
    if name in structured.METHODS:
        allowed = {"ratio"} | ({"bias", "multiple", "dimensions"} if name != "depth" else set())
        allowed -= {"bias"} if name == "width" else set()
    elif name == "awq":
        allowed = {"bits", "group", "zero_points", "python"}
    elif name in METHODS:
        method = METHODS[name]
        allowed = {"bits", "kind", "group", "zero_points", "sequential", "allocation", "order", "static_scales"}
        allowed |= ({"sparsity", "scope"} if method.prunes else set()) | ({"refine"} if method.scores else set())
        allowed -= {"wanda": {"scope"}, "rtn": {"order", "static_scales", "sequential"}}.get(name, set())
    else:
        raise UserError(f"--method {name}: unknown method; choose from {', '.join([*METHODS, 'awq', *structured.METHODS])}")
    if wrong := sorted(given & SPECIFIC - allowed):
        remedy = "leave it out"
        if wrong[0] == "sparsity":
            pruning = "prune by magnitude, wanda or sparsegpt, with --bits to quantise as well"
            remedy = "give --ratio instead" if name in structured.METHODS else pruning
        raise UserError(f"--{wrong[0]}: --method {name} has no such option; {remedy}")


def awq_grid(layout: Layout, given: set[str], options: Mapping[str, Any]) -> Grid:
    """The grid that the options ask of AWQ.

    Raises:
        UserError: as `make_plan`.
    """
    check_options("awq", given)
    if options["bits"] not in (4, 8):
        raise UserError("--method awq: quantises, so give --bits 4 or 8")
    if "calibration" not in given:
        raise UserError("--method awq: needs calibration text; give --calibration FILE")
    grid = usual_grid(options["bits"], options["group"], not options["zero_points"])
    for name, (_, inputs) in layout.shapes().items():
        grid.check(inputs, name)
    return grid


def make_goal(kind: str, name: str, given: set[str], options: Mapping[str, Any]) -> Goal:
    """What the options ask of a drafter of another kind than `lm`, of which all layers are compressed alike.

    Raises:
        UserError: as `make_plan`; or an option that such a drafter does not have.
    """
    if name not in ("magnitude", "rtn"):
        raise UserError(f"--method {name}: not for drafters of kind {kind!r}; give magnitude or rtn")
    allowed = {"method", "sparsity", "scope", "bits", "kind", "group", "zero_points", "device", "dtype"}
    unused = given - allowed | ({"dtype"} if options["dtype"] != "float32" else set())
    _refuse(unused, f"drafters of kind {kind!r} are compressed without it; leave it out")
    check_options(name, given)
    pattern, grid = _pattern_and_grid(name, given, options, options["group"])
    if "scope" in given and pattern and pattern.group:
        raise UserError(f"--scope: --sparsity {pattern} compares the weights of its groups; leave it out")
    if not options["bits"]:
        _refuse(given & {"kind", "group", "zero_points"}, "only for quantised weights; give --bits, or leave it out")
    return Goal(pattern, grid(options["bits"]))


def make_plan(layout: Layout, name: str, given: set[str], options: Mapping[str, Any]) -> Plan:
    """The plan that the options ask for.

    Raises:
        UserError: an option is missing, does not fit the method, or has a bad value.
    """
    check_options(name, given)
    method = METHODS[name]
    # How each layer is compressed
    bits, group, allocation = options["bits"], options["group"], options["allocation"]
    if allocation is not None and group is None:  # the budget counted the scales of these groups
        group = read_json(Path(allocation)).get("group")
        if group is not None and (type(group) is not int or group < 1):
            raise UserError(f"{allocation}: group is {group!r}; allocate again")
    pattern, grid = _pattern_and_grid(name, given, options, group)
    goals = {layer: Goal(pattern, grid(bits)) for layer in layout.all_linears()}
    if allocation is not None:
        goals = {
            layer: Goal(Pattern(share) if share else None, grid(count or bits))
            for layer, (share, count) in _allocated(allocation, name, given).items()
            if share or count or bits
        }
        if not goals:
            raise UserError(f"{allocation}: compresses no layer; allocate again")
    if not any(goal.grid for goal in goals.values()):
        unused = given & {"kind", "group", "zero_points", "static_scales"}
        _refuse(unused, "only for quantised weights; give --bits, or leave it out")
        if options["order"] and not method.gram:
            raise UserError("--order: only for a pass that changes weights; give --bits, or leave it out")
    if options["order"] == "activation" and options["static_scales"] is False:
        raise UserError("--static_scales false: --order activation takes scales before the pass; leave one of them out")
    if "scope" in given and all(goal.pattern and goal.pattern.group for goal in goals.values()):
        raise UserError(f"--scope: --sparsity {pattern} compares the weights of its groups; leave it out")
    if options["order"] == "activation" and any(goal.pattern and goal.pattern.group for goal in goals.values()) and method.gram:
        raise UserError("--order activation: N:M groups are pruned in stored order; leave it out")
    # What calibration text is for
    calibrated = "calibration" in given
    if options["sequential"] and not calibrated:
        raise UserError("--sequential: measures layers on calibration text; give --calibration FILE, or leave it out")
    if method.calibrated and not calibrated:
        raise UserError(f"--method {name}: needs calibration text; give --calibration FILE")
    refine = options["refine"] or ("swaps" if method.scores and calibrated else "none")
    if refine != "none" and not calibrated:
        raise UserError(f"--refine {refine}: needs calibration text; give --calibration FILE")
    if calibrated and not method.calibrated and refine == "none":
        raise UserError(f"--calibration: --method {name} without --refine reads no text; leave it out")
    if not (method.gram or refine == "swaps"):
        unused = given & {"order", "static_scales"}
        _refuse(unused, "only for a pass that compensates rounding; take --refine swaps, or leave it out")
    chosen = {key: options[key] for key in ("scope", "order", "static_scales", "sequential") if options[key] is not None}
    plan = Plan(name, goals, refine, **chosen)
    check_plan(layout, plan)
    return plan


def quantisation(layout: Layout, plan: Plan) -> dict[str, Any]:
    """Fields of config.json that a plan changes."""
    grids = {name: goal.grid for name, goal in plan.goals.items() if goal.grid}
    if not grids:
        return {}
    first = next(iter(grids.values()))
    sizes: tuple[Any, Any] = first.bits, first.group
    if len(grids) < len(layout.all_linears()) or len(set(grids.values())) > 1:
        sizes = {name: grid.bits for name, grid in grids.items()}, {name: grid.group for name, grid in grids.items()}
    return {"quantization_config": quantization_config(*sizes, first.symmetric, first.kind)}


def described(plan: Plan, walked: Walked) -> dict[str, Any]:
    """What a one-shot method did, for the card."""
    patterns, grids = ({getattr(goal, part) for goal in plan.goals.values()} for part in ("pattern", "grid"))
    grid = next(iter(grids)) if len(grids) == 1 else None
    return {
        "method": plan.method,
        "pattern": str(next(iter(patterns))) if patterns != {None} and len(patterns) == 1 else None,
        "grid": {name: getattr(grid, name) for name in ("bits", "group", "symmetric", "kind")} if grid else None,
        **{name: getattr(plan, name) for name in ("refine", "scope", "order", "static_scales", "sequential")},
        "layers": {f"{name}.weight": values for report in walked.reports for name, values in report.items()},
    }


def _refuse(names: set[str], reason: str) -> None:
    """Refuses the first of these options, if there are any."""
    if names:
        raise UserError(f"--{min(names)}: {reason}")


def _pattern_and_grid(
    name: str, given: set[str], options: Mapping[str, Any], group: int | None
) -> tuple[Pattern | None, Callable[[int | None], Grid | None]]:
    """The pattern that is pruned, and the grid of a number of bits; refuses values that do not fit the method."""
    method, bits = METHODS[name], options["bits"]
    if bits not in (None, 4, 8):
        raise UserError(f"--bits {bits}: weights are stored with 4 or 8 bits; give one of these")
    pattern = parse_pattern(options["sparsity"]) if "sparsity" in given else None
    if options["allocation"] is None and method.prunes and pattern is None:
        raise UserError(f"--method {name}: prunes, so give --sparsity, such as 2:4 or 0.5")
    if options["allocation"] is None and not method.prunes and bits is None:
        raise UserError(f"--method {name}: quantises, so give --bits 4 or 8")
    symmetric, kind = not options["zero_points"], options["kind"] or "int"
    if kind == "float" and bits != 8:
        raise UserError("--kind float: stores float8, so give --bits 8")
    if kind == "float":
        _refuse(
            given & {"group", "zero_points"}, "--kind float has one scale for each output, without zero points; leave it out"
        )

    def grid(count: int | None) -> Grid | None:
        if not count:
            return None
        # Where weights are pruned in the same pass, searched scales were worse: KL 0.029 instead of 0.026 on a 14M target.
        return usual_grid(count, group, symmetric, kind, search=pattern is None)

    return pattern, grid


def _allocated(file: str, method: str, given: set[str]) -> dict[str, tuple[float | None, int | None]]:
    """Layer -> share to prune and bits, from a file of `trainkit allocate`.

    Raises:
        UserError: it is not such a file, or does not fit the method or the options.
    """
    prunes, layers = METHODS[method].prunes, read_json(Path(file)).get("layers")
    field, option = ("sparsity", "sparsity") if prunes else ("bits", "bits")
    if option in given:
        raise UserError(f"--{option}: is given for each layer by --allocation; leave one of them out")
    if not isinstance(layers, dict) or not layers or not all(isinstance(values, dict) for values in layers.values()):
        raise UserError(f"{file}: has no layers; give a file of trainkit allocate")
    found: dict[str, tuple[float | None, int | None]] = {}
    for layer, values in layers.items():
        value = values.get(field)
        fits = isinstance(value, (int, float)) and (0 <= value < 1 if prunes else value in (4, 8))
        if not fits:
            raise UserError(f"{file}: {layer} has {field} {value!r}, which --method {method} cannot give; allocate again")
        found[layer.removesuffix(".weight")] = (float(value), None) if prunes else (None, int(value))
    return found
