"""One-shot pruning and quantisation of a model's linear layers, block by block, and what was measured of each layer."""

# R outputs  K inputs

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit.compress.blocks import Part, Sequences, Walked, walk
from trainkit.compress.layout import Layout, read_layout
from trainkit.compress.masks import Pattern, Scope, mask_from_scores
from trainkit.compress.quantise import Grid, Quantised, quantise
from trainkit.compress.refine import dsnot, swaps
from trainkit.compress.scores import magnitude, wanda
from trainkit.compress.solver import solve
from trainkit.compress.statistics import Statistics
from trainkit.errors import UserError
from trainkit.models.compressed import stored_tensors

Refine = Literal["swaps", "dsnot", "none"]


@dataclass(frozen=True)
class Goal:
    """How a layer is compressed.

    Attributes:
        pattern: What to prune; None prunes nothing.
        grid: What to round to; None keeps the dtype.
    """

    pattern: Pattern | None = None
    grid: Grid | None = None


@dataclass(frozen=True)
class Plan:
    """How a model is compressed, and by which method.

    Attributes:
        method: One of `METHODS`.
        goals: Layer, by its Hugging Face name without `.weight` -> goal; other layers stay as they are.
        refine: How the mask of `magnitude` or `wanda` is refined afterwards.
        scope: What a share is counted over by `magnitude` and `sparsegpt`.
        order: Order of the inputs in `sparsegpt` and `gptq`.
        static_scales: Whether `sparsegpt` and `gptq` take all scales from the weights before the pass.
        damping: Damping of `sparsegpt` and `gptq`.
        sequential: Whether a block's layers are measured after its earlier layers were changed.
    """

    method: str
    goals: Mapping[str, Goal]
    refine: Refine = "none"
    scope: Scope = "matrix"
    order: Literal["stored", "activation"] = "stored"
    static_scales: bool = False
    damping: float = 0.01
    sequential: bool = False


@dataclass(frozen=True)
class Changed:
    """A layer's new weight: `weight_RK`, or `quantised` if there is a grid; `damping` if a solver ran."""

    weight_RK: Tensor
    quantised: Quantised | None = None
    damping: float | None = None


def _scored(weight_RK: Tensor, score_RK: Tensor, scope: Scope, sums: Statistics | None, goal: Goal, plan: Plan) -> Changed:
    """Pruned by scores, the mask refined; then rounded, with errors compensated where there is a Gram matrix."""
    mask_RK = torch.ones_like(weight_RK, dtype=torch.bool)
    if goal.pattern:
        mask_RK = mask_from_scores(score_RK, goal.pattern, scope)
        if plan.refine == "swaps":
            mask_RK = swaps(weight_RK, mask_RK, _gram(sums), goal.pattern)
        elif plan.refine == "dsnot":
            assert sums
            mask_RK = dsnot(weight_RK, mask_RK, sums, goal.pattern)
    pruned_RK = weight_RK * mask_RK
    if goal.grid is None:
        return Changed(pruned_RK)
    if sums is None or sums.gram_KK is None:
        return Changed(pruned_RK, quantise(pruned_RK, goal.grid))
    return _solved(pruned_RK, sums, replace(goal, pattern=None), plan, mask_RK)


def _solved(weight_RK: Tensor, sums: Statistics | None, goal: Goal, plan: Plan, mask_RK: Tensor | None = None) -> Changed:
    solved = solve(
        weight_RK,
        _gram(sums),
        pattern=goal.pattern,
        grid=goal.grid,
        mask_RK=mask_RK,
        scope=plan.scope,
        damping=plan.damping,
        order=plan.order,
        static_scales=plan.static_scales,
    )
    return Changed(solved.weight_RK, solved.quantised, solved.damping)


def _gram(sums: Statistics | None) -> Tensor:
    assert sums is not None and sums.gram_KK is not None
    return sums.gram_KK.float()


def _magnitude(weight_RK: Tensor, sums: Statistics | None, goal: Goal, plan: Plan) -> Changed:
    return _scored(weight_RK, magnitude(weight_RK), plan.scope, sums, goal, plan)


def _wanda(weight_RK: Tensor, sums: Statistics | None, goal: Goal, plan: Plan) -> Changed:
    assert sums
    return _scored(weight_RK, wanda(weight_RK, sums), "row", sums, goal, plan)


def _gptq(weight_RK: Tensor, sums: Statistics | None, goal: Goal, plan: Plan) -> Changed:
    """Weights that are zero, of a model that was pruned before, stay zero."""
    return _solved(weight_RK, sums, goal, plan, weight_RK != 0)


def _nearest(weight_RK: Tensor, sums: Statistics | None, goal: Goal, plan: Plan) -> Changed:
    assert goal.grid
    return Changed(weight_RK, quantise(weight_RK, goal.grid))


@dataclass(frozen=True)
class Method:
    """A one-shot method.

    Attributes:
        change: Gives a layer's new weight by its statistics, None without calibration text.
        prunes: Whether it needs a pattern; otherwise it refuses one, and needs a grid.
        calibrated: Whether it needs calibration text.
        gram: Whether it needs the Gram matrix of each input, even without refinement.
        scores: Whether it prunes by scores and keeps the other weights, so that the mask can be refined.
    """

    change: Callable[[Tensor, Statistics | None, Goal, Plan], Changed]
    prunes: bool
    calibrated: bool
    gram: bool = False
    scores: bool = False


METHODS = {
    "magnitude": Method(_magnitude, prunes=True, calibrated=False, scores=True),
    "wanda": Method(_wanda, prunes=True, calibrated=True, scores=True),
    "sparsegpt": Method(_solved, prunes=True, calibrated=True, gram=True),
    "rtn": Method(_nearest, prunes=False, calibrated=False),
    "gptq": Method(_gptq, prunes=False, calibrated=True, gram=True),
}
"""One-shot methods by name; `rtn` rounds to nearest."""


def check_plan(layout: Layout, plan: Plan) -> None:
    """Refuses a plan that a layer's size does not allow, before anything is computed.

    Raises:
        UserError: names the option, layer or remedy.
    """
    layout.check_names(plan.goals, "--allocation")
    shapes = layout.shapes()
    for name, goal in plan.goals.items():
        for part in (goal.pattern, goal.grid):
            if part:
                part.check(shapes[name][1], name)
        if goal.pattern and goal.pattern.share and not goal.pattern.pruned(prod(shapes[name])):
            raise UserError(f"--sparsity {goal.pattern}: prunes none of the {prod(shapes[name])} weights of {name}; raise it")
        if goal.pattern and goal.grid and goal.pattern.group and (goal.grid.group or 0) % goal.pattern.group:
            size, pattern = goal.grid.group, goal.pattern
            raise UserError(f"--group {size}: not a multiple of {pattern.group}, the M of --sparsity {pattern}")


def oneshot(
    folder: str | Path,
    calibration: Sequences | None,
    plan: Plan,
    *,
    work: Path,
    key: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Walked:
    """Compresses the layers that a plan names; inputs are measured with the compressed blocks before.

    Its reports have for each changed layer, by name: `sparsity`, the measured share of zeros; `bits`; `error`, the squared
    error of its outputs relative to the outputs, over the calibration tokens (None where no Gram matrix was measured);
    `weight_error`, the same of the weights; and `damping`, if a solver ran.

    Args:
        folder: Hugging Face folder.
        calibration: Calibration text; None for methods that need none.
        plan: How each layer is compressed.
        work: Work folder, as in `walk`.
        key: Further values that determine the result, such as how the calibration text was made.
        dtype: Precision of the computation.
        device: Device of the computation.

    Raises:
        UserError: the plan does not fit the model; see `walk`.
    """
    layout, method = read_layout(folder), METHODS[plan.method]
    check_plan(layout, plan)

    def visit(part: Part) -> dict[str, Any]:
        return {name: _change(part, name, goal, plan) for name in part.linears if (goal := plan.goals.get(name))}

    values = {name: getattr(plan, name) for name in ("method", "refine", "scope", "order", "static_scales", "damping")}
    goals = {name: [str(goal.pattern), str(goal.grid)] for name, goal in plan.goals.items()}
    return walk(
        folder,
        calibration,
        visit,
        work=work,
        gram=method.gram or plan.refine == "swaps",
        key={**values, "goals": goals, **(key or {})},
        sequential=plan.sequential,
        dtype=dtype,
        device=device,
        title=plan.method,
    )


def _change(part: Part, name: str, goal: Goal, plan: Plan) -> dict[str, Any]:
    """Changes one layer; returns what was measured."""
    dense_RK = part.linears[name].weight.to(torch.float32, copy=True)  # because `replace` overwrites the layer's weight
    stored = part.dtypes[name]
    sums = part.statistics(name) if part.by_input else None
    if goal.grid:  # scales are stored in the dtype of the weights
        goal = replace(goal, grid=replace(goal.grid, scale_dtype=stored))
    changed = METHODS[plan.method].change(dense_RK, sums, goal, plan)
    if (codes := changed.quantised) is None:
        weight_RK, bits = changed.weight_RK.to(stored), stored.itemsize * 8
        part.replace(name, weight_RK)
    else:
        weight_RK, bits = codes.dense(stored), codes.grid.bits
        tensors = stored_tensors(name, codes.codes_RK, codes.scale_RG, codes.zero_RG, bits, codes.grid.kind)
        part.replace(name, weight_RK, tensors)
    lost_RK, error = dense_RK - weight_RK.float(), None
    if sums is not None and sums.gram_KK is not None:
        gram_KK = _gram(sums)
        outputs = float(((dense_RK @ gram_KK) * dense_RK).sum(dtype=torch.float64))
        error = float(((lost_RK @ gram_KK) * lost_RK).sum(dtype=torch.float64)) / max(outputs, 1e-30)
    # counted, because a mean in float32 may round up beyond what the file has
    report = {"sparsity": int((weight_RK == 0).sum()) / weight_RK.numel(), "bits": bits, "error": error}
    report["weight_error"] = float(lost_RK.square().sum() / dense_RK.square().sum().clamp(min=1e-30))
    return report | ({} if changed.damping is None else {"damping": changed.damping})
