"""The linear layers that train compressed, and what every compression of them has: a transform, a schedule and a state.

A compressed layer computes with `transform(W + BA)`. W is its weight, which keeps its name and its dense storage; BA is its
low-rank addition, if it has one. Because the transform comes last, a merged weight is as sparse, or on the same grid, as the
weight that was trained.
"""

# R outputs  K inputs  r rank of the low-rank addition

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.compress.masks import Pattern, pack_mask, parse_pattern, unpack_mask
from trainkit.errors import UserError


class CompressedLinear(nn.Linear):
    """A linear layer with the weight `transform(merged())`; an `nn.Linear` becomes one by `compress_linear`."""

    transform: Callable[[Tensor], Tensor]
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    lora_scale: float
    scale: Tensor
    """Learned scales, flat; only `QuantAware` sets them."""

    def merged(self) -> Tensor:
        """[R, K] weight with its low-rank addition, before compression."""
        return merge(self.weight, self.lora_A, self.lora_B, self.lora_scale)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.transform(self.merged()), self.bias)


def merge(weight_RK: Tensor, a_rK: Tensor | None, b_Rr: Tensor | None, scale: float) -> Tensor:
    """[R, K] W + scale * B A; W without an addition. Hu et al. 2021, arXiv 2106.09685."""
    return weight_RK if a_rK is None or b_Rr is None else weight_RK + scale * (b_Rr @ a_rK)


def compress_linear(linear: nn.Linear, rank: int, alpha: float) -> CompressedLinear:
    """Turns a linear layer into a compressed one, in place; rank 0: without a low-rank addition."""
    linear.__class__ = CompressedLinear
    assert isinstance(linear, CompressedLinear)
    linear.lora_A = linear.lora_B = None
    linear.lora_scale = alpha / max(1, rank)
    if rank:
        linear.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        linear.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(linear.lora_A, a=math.sqrt(5))
    return linear


class Compression(ABC):
    """How the weights of some linear layers are compressed while they train.

    `refresh` runs once at the start and once after each optimiser step, never between the micro-batches of a step.

    Attributes:
        options: Constructor arguments, plain values; a checkpoint stores them.
        linears: The layers by the name of their weight; set by `attach`.
        step: Optimiser step of the last `refresh`; -1 before the first.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.linears: dict[str, CompressedLinear] = {}
        self.step = -1

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        """Takes over the layers. Raises UserError if a weight does not fit the compression."""
        self.linears = dict(linears)
        for name, linear in linears.items():
            linear.transform = partial(self.transform, name)

    @abstractmethod
    def transform(self, name: str, weight_RK: Tensor) -> Tensor:
        """The compressed weight [R, K], differentiable; `weight_RK` is the merged weight of layer `name`."""

    @abstractmethod
    def finished(self, name: str, weight_RK: Tensor) -> Any:
        """The weight [R, K] to export: dense with zeros, or `Quantised`."""

    def refresh(self, step: int, total: int | None, optimizer: torch.optim.Optimizer | None) -> None:
        """Updates masks or scales by the schedule, from the weights after `step` optimiser steps.

        Args:
            step: Number of optimiser steps taken.
            total: Number of optimiser steps of the run; None if it has no end.
            optimizer: Its averages of an entry are set to zero when the entry is pruned.
        """
        self.step = step

    def adjust_gradients(self) -> None:  # noqa: B027  few compressions need it
        """Changes the gradients of an optimiser step, before their norm is computed and they are clipped."""

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that `restore` continues from."""
        return {"step": self.step, "names": list(self.linears)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint, whose weights may be loaded later."""
        self.step = state["step"]

    def metrics(self) -> dict[str, float]:
        """Values to log, by name; those since the last call start again from zero."""
        return {}

    def describe(self) -> dict[str, Any]:
        """Plain values that rebuild the compression."""
        return {"method": type(self).__name__, **self.options}


class Masks(Compression):
    """A compression that prunes: weights are kept where the mask is True.

    Attributes:
        masks: Mask [R, K] of each weight, by name.
        holds: Whether pruned weights are zero from now on; otherwise they stay in memory and may come back.
    """

    holds = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.masks: dict[str, Tensor] = {}
        self.flips = 0

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        self.masks = {name: torch.ones_like(linear.weight, dtype=torch.bool) for name, linear in linears.items()}

    def transform(self, name: str, weight_RK: Tensor) -> Tensor:
        # Autograd gives pruned entries the gradient 0, so neither the norm nor the optimiser sees them.
        return torch.where(self.mask(name, weight_RK), weight_RK, 0.0)

    def finished(self, name: str, weight_RK: Tensor) -> Tensor:
        return torch.where(self.masks[name], weight_RK, 0.0)

    def mask(self, name: str, like: Tensor) -> Tensor:
        """The mask of a layer, moved once to the device of `like`."""
        if self.masks[name].device != like.device:
            self.masks[name] = self.masks[name].to(like.device)
        return self.masks[name]

    @abstractmethod
    def new_masks(self, step: int, total: int | None) -> Mapping[str, Tensor] | None:
        """The masks after `step` optimiser steps; None if they do not change now."""

    @torch.no_grad()
    def refresh(self, step: int, total: int | None, optimizer: torch.optim.Optimizer | None) -> None:
        if step != self.step:
            changed = self.new_masks(step, total)
            for name, mask_RK in (changed or {}).items():
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    bits_RK = mask_RK.to(torch.uint8)  # devices may round scores differently
                    torch.distributed.broadcast(bits_RK, 0)
                    mask_RK = bits_RK.bool()
                self.flips += int((mask_RK != self.mask(name, mask_RK)).sum())
                self.masks[name] = mask_RK
            if changed and self.holds and optimizer is not None:
                self._clear_moments(optimizer)
        if self.holds:
            for name, linear in self.linears.items():
                if linear.lora_A is None:
                    linear.weight.masked_fill_(~self.mask(name, linear.weight), 0.0)
        super().refresh(step, total, optimizer)

    def _clear_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the optimiser's averages of pruned entries to zero, which would otherwise continue to change them."""
        for name, linear in self.linears.items():
            for value in optimizer.state.get(linear.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == linear.weight.shape:
                    value.masked_fill_(~self.masks[name].to(value.device), 0.0)

    def state(self) -> dict[str, Any]:
        return super().state() | {"masks": packed_masks(self.masks), "flips": self.flips}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.masks, self.flips = unpacked_masks(state["masks"]), state["flips"]

    def metrics(self) -> dict[str, float]:
        total = sum(mask.numel() for mask in self.masks.values())
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        flips, self.flips = self.flips, 0
        return {"sparsity": 1 - kept / total, "mask_flips": flips / total}

    def scores(self) -> dict[str, Tensor]:
        """Magnitudes of the merged weights, by name."""
        return {name: linear.merged().abs() for name, linear in self.linears.items()}


def packed_masks(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Masks as bits with their shape, by name, as a checkpoint holds them."""
    return {name: {"bits": pack_mask(mask), "shape": list(mask.shape)} for name, mask in masks.items()}


def unpacked_masks(saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that `packed_masks` packed, on the CPU."""
    return {name: unpack_mask(entry["bits"], entry["shape"]) for name, entry in saved.items()}


def check_zeros(source: str, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raises UserError if a weight is not zero where its mask prunes; `source` names the weights in the error."""
    for name, mask in masks.items():
        if bool((weights[name][~mask.to(weights[name].device)] != 0).any()):
            raise UserError(f"{source}: {name} is not zero where its mask prunes; give another checkpoint of the run")


def read_pattern(option: str, text: str) -> Pattern:
    """The pattern of a recipe's key; YAML reads 2:4 without quotes as a number, which is refused."""
    try:
        return parse_pattern(str(text))
    except UserError as error:
        raise UserError(f"model.compression.{option}: {str(error).removeprefix('--sparsity ')}") from error


def check_pattern(option: str, pattern: Pattern, linears: Mapping[str, CompressedLinear], group: int = 0) -> None:
    """Raises UserError if a weight's inputs are not whole groups of the pattern, or of `group` entries."""
    for name, linear in linears.items():
        if (group or pattern.group) and linear.in_features % (group or pattern.group):
            raise UserError(
                f"model.compression.{option}: {name} has {linear.in_features} inputs, not a multiple of "
                f"{group or pattern.group}; take another M"
            )


def share_of(option: str, value: float) -> float:
    """A share of the run's steps. Raises UserError unless it is from 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"model.compression.{option} is {value}; it is a share of the run's steps, from 0 to 1")
    return value


def known_total(total: int | None) -> int:
    """The number of steps, for schedules that need it. Raises UserError if the run has no end."""
    if total is None:
        raise UserError("model.compression: its schedule needs a last step; set trainer.max_steps")
    return total
