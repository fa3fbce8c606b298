"""Integer and float8 grids: scales, codes, and the weights that they stand for.

The conventions are those of compressed-tensors 0.19 and 0.20, so that a folder in its format holds these very codes and scales.
A scale is rounded to its storage dtype before codes are chosen by it.
"""

# R outputs  K inputs  G groups of a row

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainkit.errors import UserError

Kind = Literal["int", "float"]


def _computed(values: Tensor) -> Tensor:
    """The values in the dtype to compute in: float64 if they are, otherwise float32."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class Grid:
    """The values that a quantised weight can take: (code - zero) * scale.

    Attributes:
        bits: 4 or 8; 8 with kind `float` is float8_e4m3fn.
        group: Consecutive inputs that share a scale; None: one scale per output.
        symmetric: Whether zero is 0; otherwise each group has a zero point.
        kind: Integer or floating-point codes.
        rule: Divisor of the largest magnitude that gives the scale. `half`: (2^bits - 1) / 2, the rule of compressed-tensors,
            by which a positive extreme is half a step out of range; `full`: 2^(bits - 1) - 1, by which nothing is clipped.
        scale_dtype: Storage dtype of the scales.
        search: Whether a smaller scale is taken where that lowers the squared error; see `scales`.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    kind: Kind = "int"
    rule: Literal["half", "full"] = "half"
    scale_dtype: torch.dtype = torch.float32
    search: bool = False

    @property
    def low(self) -> float:
        """Smallest code."""
        return -448.0 if self.kind == "float" else -(2 ** (self.bits - 1))

    @property
    def high(self) -> float:
        """Largest code."""
        return 448.0 if self.kind == "float" else 2 ** (self.bits - 1) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        """Storage dtype of the codes."""
        return torch.float8_e4m3fn if self.kind == "float" else torch.int8

    def check(self, columns: int, name: str) -> None:
        """Raises UserError if a matrix of so many inputs has no whole number of groups; `name` is the tensor's."""
        if self.group and columns % self.group:
            raise UserError(f"--group {self.group}: {name} has {columns} inputs, not a multiple of it; take another group size")

    def scales(self, weight_RK: Tensor, importance_K: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Scales [R, G] in `scale_dtype`, and zero points int8 [R, G] (None if symmetric), by smallest and largest value.

        With `search`, each group's range is shrunk, in 20 steps of the same size, to where the squared error of its weights is
        least, weighted by `importance_K`, the mean square of each input up to a factor, if given.
        """
        R, K = weight_RK.shape
        weight_RK = _computed(weight_RK)
        grouped = weight_RK.reshape(R, -1, self.group or K)
        low_RG, high_RG = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        best_RG, best = torch.full_like(low_RG, torch.inf), self._scales(low_RG, high_RG)
        for factor in torch.linspace(1, 0.5 if self.bits == 4 else 0.85, 20).tolist() if self.search else ():
            new = self._scales(low_RG * factor, high_RG * factor)
            change_RK = quantise(weight_RK, self, *new).dense(weight_RK.dtype) - weight_RK
            square_RK = change_RK.square() if importance_K is None else change_RK.square() * importance_K.to(change_RK)
            error_RG = square_RK.view(grouped.shape).sum(2)
            better_RG, best_RG = error_RG < best_RG, torch.minimum(error_RG, best_RG)
            scale_RG = torch.where(better_RG, new[0], best[0])
            best = scale_RG, None if new[1] is None or best[1] is None else torch.where(better_RG, new[1], best[1])
        return best

    def _scales(self, low_RG: Tensor, high_RG: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of ranges that hold 0."""
        if self.symmetric:
            divisor = 448.0 if self.kind == "float" else (2**self.bits - 1) / 2 if self.rule == "half" else self.high
            scale_RG = torch.maximum(-low_RG, high_RG) / divisor
        else:
            scale_RG = (high_RG - low_RG) / (2**self.bits - 1)
        floor = torch.finfo(self.scale_dtype).tiny
        scale_RG = torch.where(scale_RG == 0, 1.0, scale_RG).to(self.scale_dtype).clamp(min=floor)
        if self.symmetric:
            return scale_RG, None
        return scale_RG, (self.low - low_RG / _computed(scale_RG)).round().clamp(self.low, self.high).to(torch.int8)

    def codes(self, weight_RK: Tensor, scale_RG: Tensor, zero_RG: Tensor | None = None) -> Tensor:
        """The nearest codes [R, K], as whole numbers (or float8 values) in float32 or float64; halves go to the even code."""
        scaled = _computed(weight_RK) / self.spread(scale_RG, weight_RK.shape[1])
        if zero_RG is not None:
            scaled = scaled + self.spread(zero_RG, weight_RK.shape[1])
        scaled = scaled if self.kind == "float" else scaled.round()
        scaled = scaled.clamp(self.low, self.high)
        return scaled.to(torch.float8_e4m3fn).to(scaled) if self.kind == "float" else scaled

    def spread(self, values_RG: Tensor, columns: int) -> Tensor:
        """Values of groups [R, G] repeated for each of their columns, [R, K]; [R, 1] for one group."""
        return values_RG if values_RG.shape[1] == 1 else values_RG.repeat_interleave(columns // values_RG.shape[1], dim=1)


@dataclass(frozen=True)
class Quantised:
    """A quantised matrix.

    Attributes:
        codes_RK: Codes, int8 or float8_e4m3fn.
        scale_RG: Scales, in the grid's storage dtype.
        zero_RG: Zero points, int8; None if symmetric.
        grid: Their grid.
    """

    codes_RK: Tensor
    scale_RG: Tensor
    zero_RG: Tensor | None
    grid: Grid

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [R, K] as transformers decompresses it when it loads in `dtype`: codes times scales in that dtype.

        Loaded in another dtype than that of the scales, the product is rounded differently, by up to half a unit in the last
        place.
        """
        codes = self.codes_RK.to(dtype)
        if self.zero_RG is not None:
            codes = codes - self.grid.spread(self.zero_RG, codes.shape[1]).to(dtype)
        return codes * self.grid.spread(self.scale_RG, codes.shape[1]).to(dtype)


def usual_grid(bits: int, group: int | None = None, symmetric: bool = True, kind: Kind = "int", search: bool = True) -> Grid:
    """The grid of one-shot methods: 4 bits in groups of 128 whose scales are searched, or 8 bits with one scale per output."""
    return Grid(bits, group or (128 if bits == 4 else None), symmetric, kind, search=search and bits == 4)


def quantise(weight_RK: Tensor, grid: Grid, scale_RG: Tensor | None = None, zero_RG: Tensor | None = None) -> Quantised:
    """Rounds a weight to the nearest values of a grid; scales by smallest and largest value unless given."""
    if scale_RG is None:
        scale_RG, zero_RG = grid.scales(weight_RK)
    codes = grid.codes(weight_RK, scale_RG, zero_RG)
    return Quantised(codes.to(grid.code_dtype), scale_RG, zero_RG, grid)
