"""A linear layer small enough to compute by hand, random ones, and what is said of their masks."""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.compress.statistics import Statistics

# fmt: off
WEIGHT_RK = torch.tensor([
    [-29, 30, 4, -18, -31, -26, -13, 28], [11, 21, -32, -1, -24, 16, -12, -14],
    [-9, 10, 19, -7, -2, -3, 27, 17], [15, 5, 8, -23, 6, 22, -20, -25],
]).double() / 16
"""Weights of 4 outputs and 8 inputs."""

INPUT_TK = torch.tensor([
    [0, 3, 2, 3, 2, 10, -1, 4], [4, 2, 1, 2, -4, 8, 5, -1], [6, 3, -2, 5, -2, 7, 1, 5], [2, -1, -1, 0, -1, 10, -4, 3],
    [4, -3, 1, 5, -5, 6, 0, 1], [-1, -1, 0, 1, 6, 10, 4, -4], [-6, 3, 2, 3, -2, 11, 6, 5], [0, -4, 1, 5, 1, 10, 5, 6],
    [6, 2, 2, 1, 0, 6, 1, 4], [-2, 4, -2, -6, 0, 9, -6, -5], [-3, -4, -1, -4, 2, 8, 0, -5], [-6, -3, 1, 0, -3, 9, 1, 6],
]).double() / 4
"""Their calibration inputs: 12 tokens, in 2 sequences of 6."""
# fmt: on

GRAM_KK = INPUT_TK.T @ INPUT_TK


def statistics_of(x_BTK: Tensor, gram: bool = True) -> Statistics:
    """Statistics over sequences of which every token counts."""
    statistics = Statistics(x_BTK.shape[2], gram)
    statistics.add(x_BTK, torch.ones(x_BTK.shape[:2], dtype=torch.bool))
    return statistics


def random_layer(outputs: int, inputs: int, tokens: int = 64) -> tuple[Tensor, Tensor]:
    """Random weights [R, K] and correlated inputs [T, K] of unequal size and mean, in float64."""
    mix_KK = torch.randn(inputs, inputs, dtype=torch.float64) / inputs**0.5
    size_K = torch.rand(inputs, dtype=torch.float64) * 2 + 0.1
    x_TK = (torch.randn(tokens, inputs, dtype=torch.float64) @ mix_KK + 0.3 * torch.randn(inputs, dtype=torch.float64)) * size_K
    return torch.randn(outputs, inputs, dtype=torch.float64), x_TK


def picture(mask_RK: Tensor) -> str:
    """A mask as text: a point for a kept weight, an x for a pruned one."""
    return " ".join("".join("." if kept else "x" for kept in row) for row in mask_RK.tolist())


def error(new_RK: Tensor, weight_RK: Tensor = WEIGHT_RK, input_TK: Tensor = INPUT_TK) -> float:
    """Squared difference of the outputs of two weights, summed over tokens and outputs."""
    return float(((weight_RK - new_RK) @ input_TK.T).square().sum())
