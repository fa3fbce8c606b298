"""Every linear layer of a model at several levels of compression, on disk: what an allocation over layers chooses from.

A level of sparsity is a fixed number of weights, the same for all layers, so that one layer a level up and another a level down
prune exactly as many weights as before (EvoPress, Sieberling et al. 2024, arXiv 2410.14649). A level of quantisation is 4 or 8
bits, and costs bytes, scales and packing included. All levels are solved on the inputs that layers have in the dense model, and
those of one input share the factor of its Gram matrix.
"""

# R outputs  K inputs

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainkit.bundle import tensor_entries
from trainkit.compress.blocks import Part, Sequences, walk
from trainkit.compress.layout import Layout
from trainkit.compress.masks import Pattern
from trainkit.compress.oneshot import METHODS, Goal, Plan
from trainkit.compress.quantise import usual_grid
from trainkit.compress.solver import shared_factor, solve
from trainkit.errors import UserError
from trainkit.files import write_file
from trainkit.models.weights import weight_files

BLOCK = 128
"""Inputs that SparseGPT prunes at once; it prunes the same share of each block."""


@dataclass(frozen=True)
class Level:
    """A level of a layer.

    Attributes:
        cost: Weights that are kept, or bytes.
        goal: How the layer is compressed.
    """

    cost: int
    goal: Goal

    def setting(self) -> dict[str, float]:
        """The level as an allocation file has it."""
        return {"sparsity": self.goal.pattern.share} if self.goal.pattern else {"bits": self.goal.grid.bits}  # type: ignore


Levels = Mapping[str, Sequence[Level]]
"""Name of a layer, without `.weight` -> its levels, cheapest first."""


def sparsity_levels(
    layout: Layout, share: float, method: str = "sparsegpt", around: int = 8, step: int | None = None
) -> tuple[Levels, tuple[int, ...]]:
    """Levels up to `around` steps above and below a uniform share, and the level of each layer that is uniform.

    A method prunes a share of some sets of weights, such as each output's; a step and every level are whole numbers of weights
    in each set. A layer has fewer levels where a step would prune all of it, or less than nothing.

    Args:
        layout: The model.
        share: Share of the weights that the uniform level prunes, rounded down to such a number.
        method: A pruning method of `oneshot.METHODS`.
        around: Largest number of steps from the uniform level.
        step: Weights of a step; by default such that `around` steps prune half of the smaller of what a square matrix of the
            hidden size prunes and keeps. Rounded down to a number that all layers can prune.

    Raises:
        UserError: no number of weights up to `step` can be pruned in all layers.
    """
    shapes = layout.shapes()
    units = {name: {"sparsegpt": K // math.gcd(BLOCK, K), "wanda": R}.get(method, 1) for name, (R, K) in shapes.items()}
    common = math.lcm(*units.values())
    step = step or int(0.5 * min(share, 1 - share) / around * layout.config.hidden_size**2)
    if step < common:
        raise UserError(f"--step {step}: {method} prunes multiples of {common} weights alike in all layers; give at least that")
    step -= step % common
    levels, uniform = dict[str, list[Level]](), []
    for name, (R, K) in shapes.items():
        size, unit = R * K, units[name]
        middle = Pattern(share).pruned(size) // unit * unit
        pruned = [middle + number * step for number in range(around, -around - 1, -1)]
        pruned = [count for count in pruned if 0 <= count <= size - unit]
        levels[name] = [Level(size - count, Goal(Pattern(_share(count, size)))) for count in pruned]
        uniform.append(pruned.index(middle))
    return levels, tuple(uniform)


def _share(count: int, size: int) -> float:
    """The share of which `Pattern.pruned(n)` is exactly that of `count` in `size`, for every set of n weights."""
    return math.nextafter(count / size, 1) if count else 0.0


def bit_levels(layout: Layout, group: int | None = None) -> Levels:
    """int4 and int8 of each layer, with their bytes in a file: packed codes, scales in the dtype of the weights, and the shape.

    Args:
        layout: The model.
        group: Consecutive inputs that share a scale; by default 128 with 4 bits, all of an output with 8.

    Raises:
        UserError: the group does not divide the inputs of a layer.
    """
    entries = {name: entry for file in weight_files(layout.folder) for name, entry in tensor_entries(file).items()}
    levels = dict[str, list[Level]]()
    for name, (R, K) in layout.shapes().items():
        levels[name] = []
        start, end = entries[f"{name}.weight"]["data_offsets"]
        scale_bytes = (end - start) // (R * K)
        for bits in (4, 8):
            grid = usual_grid(bits, group)
            grid.check(K, name)
            size = R * math.ceil(K * bits / 32) * 4 + R * (K // (grid.group or K)) * scale_bytes + 2 * 8
            levels[name].append(Level(size, Goal(grid=grid)))
    return levels


def build(
    layout: Layout,
    calibration: Sequences,
    levels: Levels,
    method: str,
    *,
    work: Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Database:
    """Solves every layer at all its levels; the same call with the same folder continues after a kill.

    Args:
        layout: The model.
        calibration: Calibration text.
        levels: The levels.
        method: A method of `oneshot.METHODS`.
        work: Folder of the database.
        dtype: Precision of the forward passes.
        device: Device of forward passes and solver.

    Raises:
        UserError: as `walk`.
    """
    database = Database(work, levels)

    def visit(part: Part) -> None:
        factored, factor = "", None
        for name, linear in part.linears.items():
            dense_RK, source = linear.weight.float(), part.inputs[name]
            sums = part.by_input.get(source)
            gram_KK = sums.gram_KK.float() if sums and sums.gram_KK is not None else None
            if gram_KK is not None and source != factored:
                factored, factor = source, shared_factor(gram_KK)
            solved = dict[str, Tensor]()
            for number, level in enumerate(levels[name]):
                goal, stored = level.goal, part.dtypes[name]
                if goal.grid:  # scales are stored in the dtype of the weights
                    goal = replace(goal, grid=replace(goal.grid, scale_dtype=stored))
                if gram_KK is None:
                    changed = METHODS[method].change(dense_RK, sums, goal, Plan(method, {}))
                else:  # zeros of a model that was pruned before stay zeros in quantisation
                    mask_RK = None if goal.pattern else dense_RK != 0
                    changed = solve(dense_RK, gram_KK, pattern=goal.pattern, grid=goal.grid, mask_RK=mask_RK, factor=factor)
                codes = changed.quantised
                weight_RK = changed.weight_RK.to(stored) if codes is None else codes.dense(stored)
                solved[str(number)] = weight_RK.cpu().contiguous()
            write_file(database.file(name), partial(save_file, solved))

    key = {"method": method, "levels": {name: [str(level) for level in several] for name, several in levels.items()}}
    text, gram = calibration if METHODS[method].calibrated else None, METHODS[method].gram
    options: dict[str, Any] = {"dtype": dtype, "device": device, "title": f"levels by {method}"}
    walk(layout.folder, text, visit, work=work / "walk", gram=gram, key=key, dense=True, **options)
    return database


@dataclass(frozen=True)
class Database:
    """Weights of all levels: a file for each layer, with a tensor for each level, in the dtype of the model's files.

    Attributes:
        work: Their folder.
        levels: The levels.
    """

    work: Path
    levels: Levels

    def file(self, name: str) -> Path:
        """The file of a layer."""
        return self.work / "layers" / f"{name}.safetensors"

    def weight(self, name: str, level: int) -> Tensor:
        """The weight [R, K] of a layer at a level, on the CPU."""
        with safe_open(self.file(name), framework="pt") as file:
            return file.get_tensor(str(level))
