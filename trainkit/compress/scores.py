"""Scores of weights: those with the lowest scores are pruned, and the others do not change."""

# R outputs  K inputs

from __future__ import annotations

from torch import Tensor

from trainkit.compress.statistics import Statistics


def magnitude(weight_RK: Tensor) -> Tensor:
    """The absolute value of each weight, float32 [R, K]."""
    return weight_RK.float().abs()


def wanda(weight_RK: Tensor, statistics: Statistics) -> Tensor:
    """|W_rj| times the L2 norm of input j over the calibration tokens, float32 [R, K]; to be compared within each output.

    Sun et al. 2023, arXiv 2306.11695.
    """
    return weight_RK.float().abs() * statistics.square_K.sqrt().float().to(weight_RK.device)
