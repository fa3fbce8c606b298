"""Better masks of the same sparsity, without changing weights: exact swaps, and DSnoT.

Both change only the mask, so they need the dense weights. A solver that changes weights must run after them.
"""

# R outputs  K inputs  A active outputs  P candidates  Q groups  M inputs of a group

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.compress.masks import Pattern
from trainkit.compress.scores import wanda
from trainkit.compress.statistics import Statistics


@torch.no_grad()
def swaps(weight_RK: Tensor, mask_RK: Tensor, gram_KK: Tensor, pattern: Pattern, steps: int = 50) -> Tensor:
    """The mask after up to `steps` swaps in each output of a pruned weight for a kept one, each of which lowers its error.

    With d_j the pruned weights, else 0, an output's squared error is d^T G d, G the Gram matrix. With g = G d, keeping a and
    pruning b changes it by -2 w_a g_a + w_a^2 G_aa + 2 w_b g_b + w_b^2 G_bb - 2 w_a w_b G_ab. N:M swaps the best pair within a
    group. Otherwise the best pair is swapped whose a is one of the `CANDIDATES` weights that alone would lower the error most.
    Each output keeps its number of weights. The objective is that of SparseSwaps (arXiv 2512.10922); the search is ours.

    Args:
        weight_RK: Dense weights.
        mask_RK: True where a weight is kept.
        gram_KK: Sum of x x^T over calibration tokens; errors are computed in its dtype.
        pattern: Pattern of the mask.
        steps: Most swaps of one output.
    """
    gram_KK = gram_KK.to(weight_RK.device)
    weight_RK, mask_RK = weight_RK.to(gram_KK), mask_RK.clone()
    diagonal_K = gram_KK.diagonal()
    rows = max(1, ENTRIES // (weight_RK.shape[1] * (pattern.group or CANDIDATES)))
    for first in range(0, len(weight_RK), rows):
        active_A = torch.arange(first, min(first + rows, len(weight_RK)), device=weight_RK.device)
        weight_AK, mask_AK = weight_RK[active_A], mask_RK[active_A]
        lost_AK = weight_AK.masked_fill(mask_AK, 0) @ gram_KK
        for _ in range(steps):
            square_AK = weight_AK.square() * diagonal_K
            regrown_AK = (square_AK - 2 * weight_AK * lost_AK).masked_fill(mask_AK, torch.inf)
            pruned_AK = (square_AK + 2 * weight_AK * lost_AK).masked_fill(~mask_AK, torch.inf)
            error_A = (weight_AK.masked_fill(mask_AK, 0) * lost_AK).sum(1)
            pair = _best_in_groups if pattern.group else _best_of_candidates
            change_A, a_A, b_A = pair(weight_AK, regrown_AK, pruned_AK, gram_KK, pattern)
            better_A = change_A < -(1e-12 + 16 * torch.finfo(gram_KK.dtype).eps * error_A)
            if not better_A.any():
                break
            # Continue only with outputs that improved; no swap helps the others
            active_A, a_A1, b_A1 = active_A[better_A], a_A[better_A].unsqueeze(1), b_A[better_A].unsqueeze(1)
            weight_AK = weight_AK[better_A]
            mask_AK = mask_AK[better_A].scatter(1, a_A1, True).scatter(1, b_A1, False)
            mask_RK[active_A] = mask_AK
            lost_AK = (
                lost_AK[better_A]
                - weight_AK.gather(1, a_A1) * gram_KK[a_A1[:, 0]]
                + weight_AK.gather(1, b_A1) * gram_KK[b_A1[:, 0]]
            )
    return mask_RK


CANDIDATES = 4
"""Pruned weights of an output for which each step looks for the best partner; with 8, errors were 0.1 to 4 % lower."""

ENTRIES = 2**24
"""Largest number of entries of a tensor that `swaps` makes."""


def _best_in_groups(
    weight_AK: Tensor, regrown_AK: Tensor, pruned_AK: Tensor, gram_KK: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """Change of the error, input regrown and input pruned of the best swap within a group of each output."""
    A, K = weight_AK.shape
    M, Q = pattern.group, K // pattern.group
    at_Q = torch.arange(Q, device=gram_KK.device)
    gram_QMM = gram_KK.view(Q, M, Q, M)[at_Q, :, at_Q]
    weight_AQM = weight_AK.view(A, Q, M)
    change_AQMM = (weight_AQM.unsqueeze(3) * weight_AQM.unsqueeze(2)).mul_(-2 * gram_QMM)
    change_AQMM.add_(regrown_AK.view(A, Q, M, 1)).add_(pruned_AK.view(A, Q, 1, M))
    change_A, best_A = change_AQMM.view(A, -1).min(1)
    q_A, a_A, b_A = best_A // (M * M), best_A // M % M, best_A % M
    return change_A, q_A * M + a_A, q_A * M + b_A


def _best_of_candidates(
    weight_AK: Tensor, regrown_AK: Tensor, pruned_AK: Tensor, gram_KK: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """Change of the error, input regrown and input pruned of the best swap with one of each output's candidates."""
    K = weight_AK.shape[1]
    own_AP, a_AP = regrown_AK.topk(min(CANDIDATES, K), dim=1, largest=False)
    both_APK = (weight_AK.gather(1, a_AP).unsqueeze(2) * weight_AK.unsqueeze(1)).mul_(gram_KK[a_AP])
    change_APK = both_APK.mul_(-2).add_(own_AP.unsqueeze(2)).add_(pruned_AK.unsqueeze(1))
    change_A, best_A = change_APK.flatten(1).min(1)
    return change_A, a_AP.gather(1, (best_A // K).unsqueeze(1))[:, 0], best_A % K


@torch.no_grad()
def dsnot(
    weight_RK: Tensor, mask_RK: Tensor, statistics: Statistics, pattern: Pattern, cycles: int = 50, guard: bool = True
) -> Tensor:
    """The mask after up to `cycles` swaps in each output that bring its mean output towards that of the dense weights.

    With c_j = w_j times the mean of input j, an output's lost mean e is the sum of c over pruned weights. A cycle keeps the
    pruned weight whose c / variance is largest with the sign of e, prunes the kept one of lowest Wanda score whose c has the
    opposite sign (N:M: of lowest score in the group), and moves no weight twice. An output stops when |e| is at most 0.1 / L,
    with L the mean length of a sequence, when no such weight is left, or with N:M when e would change its sign. Zhang et al.
    2023, arXiv 2310.08915, whose sums are L times ours.

    Args:
        weight_RK: Dense weights.
        mask_RK: True where a weight is kept.
        statistics: Sums over the layer's inputs.
        pattern: Pattern of the mask.
        cycles: Most swaps of one output.
        guard: Whether an output stops before a swap that makes |e| larger; without it this often happens.
    """
    R, K = weight_RK.shape
    device, tokens, infinite = weight_RK.device, max(statistics.tokens, 1), torch.inf
    rows_R, score_RK = torch.arange(R, device=device), wanda(weight_RK, statistics)
    mean_RK = weight_RK.double() * (statistics.sum_K / tokens).to(device)
    variance_K = (statistics.within_K / tokens).to(device).clamp(min=torch.finfo(torch.float64).tiny)
    ratio_RK = mean_RK / variance_K
    mask_RK, free_RK, active_R = mask_RK.clone(), torch.ones_like(mask_RK), torch.ones(R, dtype=torch.bool, device=device)
    lost_R = mean_RK.masked_fill(mask_RK, 0).sum(1)
    sign_R = lost_R.sign()
    for _ in range(cycles):
        positive_R1 = (lost_R > 0).unsqueeze(1)
        # Step 1: the pruned weight to keep
        gain_RK = torch.where(positive_R1, ratio_RK, -ratio_RK).masked_fill(mask_RK | ~free_RK, -infinite)
        gain_R, a_R = gain_RK.max(1)
        # Step 2: the kept weight to prune
        if pattern.group:
            open_RK = (
                mask_RK & free_RK & (torch.arange(K, device=device) // pattern.group == (a_R // pattern.group).unsqueeze(1))
            )
        else:
            open_RK = mask_RK & free_RK & torch.where((lost_R < 0).unsqueeze(1), mean_RK > 0, mean_RK < 0)
        price_R, b_R = score_RK.masked_fill(~open_RK, infinite).min(1)
        # Step 3: whether to swap them
        after_R = lost_R + mean_RK[rows_R, b_R] - mean_RK[rows_R, a_R]
        active_R &= (lost_R.abs() > 0.1 * statistics.sequences / tokens) & (gain_R > 0) & (price_R < infinite)
        if pattern.group:
            active_R &= after_R.sign() == sign_R
        if guard:
            active_R &= after_R.abs() < lost_R.abs()
        if not active_R.any():
            break
        swapped_A, a_A, b_A = rows_R[active_R], a_R[active_R], b_R[active_R]
        mask_RK[swapped_A, a_A], mask_RK[swapped_A, b_A] = True, False
        free_RK[swapped_A, a_A] = free_RK[swapped_A, b_A] = False
        lost_R = torch.where(active_R, after_R, lost_R)
    return mask_RK
