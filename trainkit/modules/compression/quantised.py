"""Quantisation-aware training: the forward pass computes with the weights that the export stores, gradients pass through."""

# R outputs  K inputs  G groups of a row

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.compress.quantise import Grid, Quantised, quantise
from trainkit.errors import UserError
from trainkit.modules.compression.base import CompressedLinear, Compression, packed_masks, unpacked_masks

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Rounded(torch.autograd.Function):
    """codes * scale; straight-through to weights whose code is in range, and the derivative of LSQ to the scales."""

    @staticmethod
    def forward(ctx: Any, weight_RK: Tensor, scale_RG: Tensor, grid: Grid) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rounded = quantise(weight_RK, grid, scale_RG.to(grid.scale_dtype))
        ctx.grid = grid
        ctx.save_for_backward(weight_RK, rounded.scale_RG, rounded.codes_RK)
        return rounded.dense(weight_RK.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_RK: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight_RK, scale_RG, codes_RK = ctx.saved_tensors
        grid: Grid = ctx.grid
        R, K = weight_RK.shape
        scaled_RK = weight_RK / grid.spread(scale_RG, K).float()
        inside_RK = (scaled_RK.round() >= grid.low) & (scaled_RK.round() <= grid.high)
        to_scale = None
        if ctx.needs_input_grad[1]:
            G = scale_RG.shape[1]
            each_RK = gradient_RK * torch.where(inside_RK, codes_RK - scaled_RK, codes_RK.float())
            to_scale = each_RK.view(R, G, -1).sum(2) / (K // G * grid.high) ** 0.5
        return torch.where(inside_RK, gradient_RK, 0.0), to_scale, None


class QuantAware(Compression):
    """Symmetric int8 or int4 weights in the forward pass; activations stay floating point.

    q = clamp(round(W / s), low, high) s. The gradient of W is that of q where round(W / s) is in range, else 0. `minmax`: s is
    the largest magnitude of the group / high, from the weights after each optimiser step, without gradient; nothing is clipped.
    `learned`: LSQ, arXiv 1902.08153: s starts there and has the gradient g (code - W / s), or g code out of range, summed over
    the group and divided by sqrt(members * high). The export stores the same codes and scales.

    Args:
        bits: 8 or 4.
        group: Consecutive inputs that share a scale; by default 128 for 4 bits and the whole row for 8.
        scales: Where the scales come from.
        scale_dtype: Dtype in which the scales are stored and used.
        keep_zeros: Whether weights that are zero in the folder stay zero.
    """

    def __init__(
        self,
        bits: Literal[8, 4] = 8,
        group: int | None = None,
        scales: Literal["minmax", "learned"] = "minmax",
        scale_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
        keep_zeros: bool = False,
    ) -> None:
        if group is not None and group < 1:
            raise UserError(f"model.compression.group is {group}; it must be at least 1")
        group = group or (128 if bits == 4 else None)
        super().__init__(bits=bits, group=group, scales=scales, scale_dtype=scale_dtype, keep_zeros=keep_zeros)
        self.grid = Grid(bits, group, rule="full", scale_dtype=_DTYPES[scale_dtype])
        self.learned, self.keep_zeros = scales == "learned", keep_zeros
        self.scales: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        for name, linear in linears.items():
            if linear.in_features % (self.grid.group or 1):
                raise UserError(
                    f"model.compression.group: {name} has {linear.in_features} inputs, not a multiple of {self.grid.group}; "
                    "take another group size"
                )
            if self.keep_zeros:
                self.masks[name] = linear.weight.detach() != 0
            if self.learned:  # flat, so that the optimiser's weight decay leaves them out as it does all vectors
                linear.scale = nn.Parameter(self.grid.scales(linear.weight.detach())[0].float().flatten())

    def transform(self, name: str, weight_RK: Tensor) -> Tensor:
        weight_RK = self._masked(name, weight_RK)
        if self.learned:
            scale_RG = self._positive(self.linears[name].scale, weight_RK)
        else:
            scale_RG = self.scales.get(name)
            if scale_RG is None or scale_RG.device != weight_RK.device:
                scale_RG = self.scales[name] = self.grid.scales(weight_RK.detach())[0]
        return _Rounded.apply(weight_RK, scale_RG, self.grid)  # type: ignore[no-any-return]

    def finished(self, name: str, weight_RK: Tensor, scale: Tensor | None = None) -> Quantised:
        """Codes and scales of a merged weight; `scale` is the learned parameter of its layer."""
        weight_RK = self._masked(name, weight_RK)
        if not self.learned:
            return quantise(weight_RK, self.grid)
        assert scale is not None
        return quantise(weight_RK, self.grid, self._positive(scale, weight_RK).to(self.grid.scale_dtype))

    def refresh(self, step: int, total: int | None, optimizer: torch.optim.Optimizer | None) -> None:
        super().refresh(step, total, optimizer)
        self.scales = {}  # the next forward pass takes them from the new weights

    def state(self) -> dict[str, Any]:
        return super().state() | {"masks": packed_masks(self.masks)}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.masks, self.scales = unpacked_masks(state["masks"]), {}

    def _positive(self, flat: Tensor, weight_RK: Tensor) -> Tensor:
        return flat.view(len(weight_RK), -1).clamp(min=torch.finfo(self.grid.scale_dtype).tiny)

    def _masked(self, name: str, weight_RK: Tensor) -> Tensor:
        if name not in self.masks:
            return weight_RK
        if self.masks[name].device != weight_RK.device:
            self.masks[name] = self.masks[name].to(weight_RK.device)
        return torch.where(self.masks[name], weight_RK, 0.0)
