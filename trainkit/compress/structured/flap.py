"""Scores of heads and neurons, and the bias that replaces removed ones: FLAP, and the baselines it is compared with.

FLAP (An et al. 2024, arXiv 2312.11983) removes the parts whose values vary least around their mean on calibration text, and
adds the contribution of the mean to the output as a bias. Statistics are those of the dense model. Query heads that share a
key-value head are removed together.
"""

# R outputs  K inputs  U units: groups of heads, or neurons

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainkit.compress.statistics import Statistics


def fluctuation(statistics: Statistics, weight_RK: Tensor) -> Tensor:
    """The score [K] of a linear layer's inputs: variance over tokens times the squared norm of the weight's column.

    The variance is unbiased, from sums over all tokens.
    """
    variance_K = (statistics.square_K - statistics.sum_K.square() / statistics.tokens) / max(1, statistics.tokens - 1)
    return variance_K.clamp(min=0) * weight_RK.double().square().sum(0)


def standardised(score_K: Tensor) -> Tensor:
    """The scores less their mean, divided by their (unbiased) standard deviation."""
    return (score_K - score_K.mean()) / score_K.std().clamp(min=torch.finfo(score_K.dtype).tiny)


def group_scores(score_K: Tensor, groups: int, squared: bool = True) -> Tensor:
    """Mean standardised score [U] of the inputs of each group of heads.

    Args:
        score_K: `fluctuation` of the input of attention's output projection.
        groups: Number of groups.
        squared: Whether scores are squared first, as in the published code; this gives single strong channels more weight.
    """
    return standardised(score_K.square() if squared else score_K).view(groups, -1).mean(1)


def removed_bias(statistics: Statistics, weight_RK: Tensor, removed_K: Tensor) -> Tensor:
    """The mean contribution [R] of removed inputs (True in `removed_K`) to a linear layer's output."""
    mean_K = statistics.sum_K / statistics.tokens
    return weight_RK.double() @ torch.where(removed_K, mean_K, 0)


def magnitudes(first: Iterable[nn.Linear], last: nn.Linear, units: int) -> Tensor:
    """Sum of squares [U] of the weights of each unit: its rows of the layers `first` and its columns of `last`."""
    sums = [linear.weight.double().square().sum(1) for linear in first] + [last.weight.double().square().sum(0)]
    return torch.stack([sum_K.view(units, -1).sum(1) for sum_K in sums]).sum(0)
