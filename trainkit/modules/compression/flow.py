"""N:M sparsity whose pruned weights keep learning for a while, so that the mask can still change.

Masks are recomputed from magnitudes after every optimiser step (the papers: in every forward pass, which is the same, because
weights change only then). Left out on purpose: masks of attention that differ from those of the MLP; `targets` of the module
selects the layers.
"""

# R outputs  K inputs

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit.compress.masks import Pattern, mask_from_scores
from trainkit.errors import UserError
from trainkit.modules.compression.base import CompressedLinear, Masks, check_pattern, known_total, read_pattern, share_of


class _Faded(torch.autograd.Function):
    """Weights times beta where they are pruned; the gradient passes whole (straight-through) or times beta there."""

    @staticmethod
    def forward(ctx: Any, weight_RK: Tensor, mask_RK: Tensor, beta: float, passes: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.beta, ctx.passes = beta, passes
        ctx.save_for_backward(mask_RK)
        return torch.where(mask_RK, weight_RK, weight_RK * beta if beta else 0.0)

    @staticmethod
    def backward(ctx: Any, gradient_RK: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.passes:
            gradient_RK = torch.where(ctx.saved_tensors[0], gradient_RK, gradient_RK * ctx.beta if ctx.beta else 0.0)
        return gradient_RK, None, None, None


class _Progressive(Masks):
    """Dense steps, then masks by magnitude after every step, then a last phase with a fixed mask.

    Attributes:
        beta: Factor of pruned weights in the forward pass.
    """

    passes = True
    """Whether the gradient of pruned entries is that of kept ones."""
    beta = 0.0

    def __init__(self, sparsity: str, dense: float, hard: float, **options: Any) -> None:
        super().__init__(sparsity=sparsity, dense=dense, hard=hard, **options)
        self.pattern = read_pattern("sparsity", sparsity)
        self.dense, self.hard = share_of("dense", dense), share_of("hard", hard)
        if dense + hard > 1:
            raise UserError(f"model.compression: dense {dense} and hard {hard} are more than the whole run; lower one")
        self.holds = False

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        check_pattern("sparsity", self.pattern, linears)

    def phase(self, step: int, total: int | None) -> tuple[int, int]:
        """First step of the masked phase and of the last phase with a fixed mask."""
        steps = known_total(total)
        if round(self.dense * steps) >= steps:
            raise UserError(f"model.compression.dense {self.dense}: leaves none of the {steps} steps a mask; lower it")
        return round(self.dense * steps), steps - round(self.hard * steps) if self.hard else steps + 1

    def transform(self, name: str, weight_RK: Tensor) -> Tensor:
        if self.holds:
            return super().transform(name, weight_RK)
        return _Faded.apply(weight_RK, self.mask(name, weight_RK), self.beta, self.passes)  # type: ignore[no-any-return]

    def new_masks(self, step: int, total: int | None) -> Mapping[str, Tensor] | None:
        first, last = self.phase(step, total)
        if step < first or self.holds:
            return None
        self.holds = step >= last
        pattern = self.pattern if self.holds else self.pattern_at(step - first, last - first)
        self.beta = 0.0 if self.holds else self.beta_at(step - first, last - first)
        return {name: mask_from_scores(score, pattern) for name, score in self.scores().items()}

    def pattern_at(self, step: int, steps: int) -> Pattern:
        """Pattern at a step of the masked phase, which has `steps`."""
        return self.pattern

    def beta_at(self, step: int, steps: int) -> float:
        """Factor of pruned weights at a step of the masked phase, which has `steps`."""
        return 0.0

    def state(self) -> dict[str, Any]:
        return super().state() | {"holds": self.holds, "beta": self.beta}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.holds, self.beta = state["holds"], state["beta"]


class SRSTE(_Progressive):
    """N:M by magnitude in every step, gradient straight through, pruned weights pulled to zero. arXiv 2102.04010.

    Forward W M; gradient g + decay (1 - M) W for all entries, M the mask.

    Args:
        sparsity: Pattern, as 2:8 (quote it in YAML), or a share of each row.
        decay: Strength of the pull, added to the gradient before it is clipped.
        dense: Share of the run's steps that train dense weights first.
        hard: Share of the run's steps that train with the mask fixed at the end; 0 in the paper.
    """

    def __init__(self, sparsity: str, decay: float = 2e-4, dense: float = 0.1, hard: float = 0.0) -> None:
        super().__init__(sparsity, dense, hard, decay=decay)
        if not decay >= 0:
            raise UserError(f"model.compression.decay is {decay}; it must not be negative")
        self.decay = decay

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        if any(linear.lora_A is not None for linear in linears.values()):
            raise UserError("model.lora_rank: SRSTE pulls whole weights to zero and has no low-rank form; use MaskDecay")

    @torch.no_grad()
    def adjust_gradients(self) -> None:
        if self.holds:
            return
        for name, linear in self.linears.items():
            if linear.weight.grad is not None:
                pruned_RK = linear.weight.masked_fill(self.mask(name, linear.weight), 0.0)
                linear.weight.grad.add_(pruned_RK.to(linear.weight.grad.dtype), alpha=self.decay)


class MaskDecay(_Progressive):
    """Progressive gradient flow by a decaying mask, arXiv 2402.04744: forward W (M + (1 - M) beta), beta from 1 to 0.

    With t optimiser steps since the dense ones, of n: linear, beta = max(0, 1 - rate t), rate 1 / n; exponential,
    beta = exp(-rate t), rate ln(1000) / n.

    Args:
        sparsity: Pattern, as 2:8 (quote it in YAML), or a share of each row.
        kind: How beta falls.
        rate: Rate of the fall per step; by default from the length of the phase, as above.
        gradient: Of pruned entries: `ste` passes it whole, as the authors' code does; `decayed` is the derivative, times beta.
        dense: Share of the run's steps that train dense weights first.
        hard: Share of the run's steps that train with beta 0 and the mask fixed at the end.
    """

    beta = 1.0

    def __init__(
        self,
        sparsity: str,
        kind: Literal["linear", "exponential"] = "exponential",
        rate: float | None = None,
        gradient: Literal["ste", "decayed"] = "ste",
        dense: float = 0.1,
        hard: float = 0.2,
    ) -> None:
        super().__init__(sparsity, dense, hard, kind=kind, rate=rate, gradient=gradient)
        self.kind, self.rate, self.passes = kind, rate, gradient == "ste"
        if rate is not None and not rate > 0:
            raise UserError(f"model.compression.rate is {rate}; it must be above 0")

    def beta_at(self, step: int, steps: int) -> float:
        if self.kind == "linear":
            return max(0.0, 1 - (self.rate or 1 / steps) * step)
        return math.exp(-(self.rate or math.log(1000) / steps) * step)

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"beta": self.beta}


class StructureDecay(_Progressive):
    """Progressive gradient flow by a pattern that tightens in equal frames, arXiv 2402.04744; gradient straight through.

    stepwise: (M - 1):M, M/2:M, M/4:M, ... N:M. geometric: 8N:8M, 4N:4M, 2N:2M, N:M, the same density in finer groups.

    Args:
        sparsity: Pattern of the end, as 1:8 (quote it in YAML).
        kind: Sequence of patterns.
        dense: Share of the run's steps that train dense weights first.
        hard: Share of the run's steps that train with the mask fixed at the end.
    """

    def __init__(
        self, sparsity: str, kind: Literal["stepwise", "geometric"] = "stepwise", dense: float = 0.1, hard: float = 0.2
    ) -> None:
        super().__init__(sparsity, dense, hard, kind=kind)
        if not self.pattern.group:
            raise UserError(f"model.compression.sparsity is {sparsity}; StructureDecay needs N:M, as '1:8'")
        self.frames = frames(self.pattern, kind)

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        check_pattern("kind", self.pattern, linears, max(frame.group for frame in self.frames))

    def pattern_at(self, step: int, steps: int) -> Pattern:
        return self.frames[min(len(self.frames) - 1, step * len(self.frames) // steps)]


def frames(pattern: Pattern, kind: str) -> list[Pattern]:
    """The patterns of the frames of `StructureDecay`, the last one being `pattern`."""
    N, M = pattern.kept, pattern.group
    if kind == "geometric":
        pairs = [(N * factor, M * factor) for factor in (8, 4, 2, 1)]
    else:
        halves = [M >> power for power in range(1, M.bit_length()) if M >> power > N]
        pairs = [(kept, M) for kept in dict.fromkeys([M - 1, *halves, N])]
    return [Pattern(1 - kept / group, kept, group) for kept, group in pairs]
