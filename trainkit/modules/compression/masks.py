"""Masks that are fixed, or that grow by magnitude: pruned weights are zero at once and stay zero."""

# R outputs  K inputs

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from trainkit.compress.masks import Pattern, Scope, mask_from_scores
from trainkit.errors import UserError
from trainkit.modules.compression.base import CompressedLinear, Masks, check_pattern, known_total, read_pattern, share_of


class FixedMask(Masks):
    """The zeros of the loaded weights stay zero: recovery of a model that `trainkit compress` pruned.

    Args:
        sparsity: Pattern that the zeros must have, as 2:4 or 0.6; by default any zeros.
    """

    def __init__(self, sparsity: str | None = None) -> None:
        super().__init__(sparsity=sparsity)
        self.pattern = None if sparsity is None else read_pattern("sparsity", sparsity)

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        self.masks = {name: linear.weight.detach() != 0 for name, linear in linears.items()}
        if all(bool(mask.all()) for mask in self.masks.values()):
            raise UserError(
                "model.folder: none of its weights is zero, so dense weights would train; prune it first (trainkit compress)"
            )
        if self.pattern is not None:
            check_pattern("sparsity", self.pattern, linears)
            for name, mask_RK in self.masks.items():
                _check_fits(name, mask_RK, self.pattern)

    def new_masks(self, step: int, total: int | None) -> None:
        return None


def _check_fits(name: str, mask_RK: Tensor, pattern: Pattern) -> None:
    """Refuses a weight with fewer zeros than its pattern."""
    if pattern.group:
        fits = bool((mask_RK.view(-1, pattern.group).sum(1) <= pattern.kept).all())
    else:
        fits = int((~mask_RK).sum()) >= pattern.pruned(mask_RK.shape[1]) * mask_RK.shape[0]
    if not fits:
        raise UserError(
            f"model.compression.sparsity: the zeros of {name} do not have the pattern {pattern}; give the right one"
        )


class GradualMagnitude(Masks):
    """Prunes more and more of the smallest weights; a pruned weight never comes back. Zhu & Gupta, arXiv 1710.01878.

    s(t) = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3 after t optimiser steps, updated every `every` steps from t0 to t1.

    Args:
        sparsity: Share pruned at the end, s_f.
        initial: Share pruned at the start, s_i.
        begin: Step t0.
        end: Step t1; by default after 80 % of the run, so that the last steps train a fixed mask.
        every: Steps between updates.
        scope: Whether weights are compared within their output row or within their matrix.
    """

    def __init__(
        self,
        sparsity: float,
        initial: float = 0.0,
        begin: int = 0,
        end: int | None = None,
        every: int = 10,
        scope: Scope = "matrix",
    ) -> None:
        super().__init__(sparsity=sparsity, initial=initial, begin=begin, end=end, every=every, scope=scope)
        read_pattern("sparsity", str(sparsity))
        if not 0 <= initial <= sparsity:
            raise UserError(f"model.compression.initial is {initial}; it must be from 0 to sparsity {sparsity}")
        if every < 1 or begin < 0 or (end is not None and end <= begin):
            raise UserError(
                f"model.compression: begin {begin}, end {end}, every {every}; take begin from 0, end after it, every from 1"
            )
        self.sparsity, self.initial, self.begin, self.end, self.every = sparsity, initial, begin, end, every
        self.scope: Scope = scope

    def share(self, step: int, total: int | None) -> float:
        """Share to prune after `step` optimiser steps."""
        if step < self.begin:
            return self.initial
        end = self._end(total)
        done = min(1.0, (step - self.begin) / (end - self.begin))
        return self.sparsity + (self.initial - self.sparsity) * (1 - done) ** 3

    def new_masks(self, step: int, total: int | None) -> Mapping[str, Tensor] | None:
        end = self._end(total)
        if total is not None and end > total:
            raise UserError(
                f"model.compression: sparsity {self.sparsity:g} is reached at step {end}, after the last step {total}; lower "
                "begin or end, or raise trainer.max_steps"
            )
        first = self.step < 0 and self.initial > 0
        regular = self.begin <= step < end and (step - self.begin) % self.every == 0
        last = self.step < end <= step  # also if `every` does not divide the steps to it
        if not (first or regular or last):
            return None
        pattern = Pattern(self.share(step, total))
        scores = {name: score.masked_fill(~self.mask(name, score), -1.0) for name, score in self.scores().items()}
        return {name: mask_from_scores(score, pattern, self.scope) for name, score in scores.items()}

    def _end(self, total: int | None) -> int:
        return self.end if self.end is not None else max(self.begin + 1, round(0.8 * known_total(total)))


class HardMask(Masks):
    """N:M (or a share) by magnitude, chosen once after the dense steps and then fixed: the baseline of gradual methods.

    Args:
        sparsity: Pattern, as 2:8 (quote it in YAML), or a share of each row.
        dense: Share of the run's steps that train dense weights first.
    """

    def __init__(self, sparsity: str, dense: float = 0.1) -> None:
        super().__init__(sparsity=sparsity, dense=dense)
        self.pattern, self.dense = read_pattern("sparsity", sparsity), share_of("dense", dense)

    def attach(self, linears: Mapping[str, CompressedLinear]) -> None:
        super().attach(linears)
        check_pattern("sparsity", self.pattern, linears)

    def new_masks(self, step: int, total: int | None) -> Mapping[str, Tensor] | None:
        start = round(self.dense * known_total(total)) if self.dense else 0
        if not self.step < start <= step:
            return None
        return {name: mask_from_scores(score, self.pattern) for name, score in self.scores().items()}
