"""Prunes and quantises a matrix input by input, and changes the weights of later inputs to compensate each error.

SparseGPT (Frantar and Alistarh 2023, arXiv 2301.00774) and GPTQ (Frantar et al. 2022, arXiv 2210.17323) are one algorithm; they
differ in the values that a weight may take. The matrix is kept transposed so that an input's weights lie next to one another,
and an input receives the errors of earlier inputs as late as possible, by products of matrices.
"""

# R outputs  K inputs  N, B some consecutive inputs  G groups that share a scale

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trainkit.compress.masks import Pattern, Scope, mask_from_scores
from trainkit.compress.quantise import Grid, Quantised
from trainkit.errors import UserError

STEP = 32
"""Inputs that receive one another's errors one at a time; a choice of speed alone."""


@dataclass(frozen=True)
class Solved:
    """The result of `solve`.

    Attributes:
        weight_RK: New weights, in the dtype of the Gram matrix.
        mask_RK: False where a weight was pruned.
        quantised: Codes and scales whose product is `weight_RK`; None without a grid.
        loss: Half the squared error of the outputs over all calibration tokens, by the damped Gram matrix.
        damping: Damping used: the requested one unless the factorisation failed with it.
    """

    weight_RK: Tensor
    mask_RK: Tensor
    quantised: Quantised | None
    loss: float
    damping: float


def inverse_factor(gram_KK: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper U with U^T U = (gram + damping * mean of its diagonal * I)^-1, and the damping that was needed.

    Damping is raised tenfold, up to 1, as long as the Cholesky factorisation fails.

    Raises:
        UserError: the Gram matrix is not finite, or has no factor at damping 1.
    """
    if not torch.isfinite(gram_KK).all():
        raise UserError(
            "--calibration: the sums over a layer's inputs are not finite; check the model's weights or use --dtype float32"
        )
    identity_KK = torch.eye(len(gram_KK), dtype=gram_KK.dtype, device=gram_KK.device)
    while True:
        damped_KK = gram_KK + damping * gram_KK.diagonal().mean() * identity_KK
        # Both orders of inputs reversed, the Cholesky factor is V with V V^T = damped, V upper; U is its inverse.
        lower_KK, failed = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower_KK, identity_KK, upper=False).flip(0, 1), damping
        if damping >= 1:
            raise UserError("--calibration: the sums over a layer's inputs have no inverse, even damped; use more samples")
        damping = min(1.0, max(10 * damping, 1e-3))


def shared_factor(gram_KK: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """The part of `solve` that depends on the Gram matrix alone, to be shared by calls with the same matrix in stored order."""
    return inverse_factor(_repaired(gram_KK)[0], damping)


def _repaired(gram_KK: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix with a positive diagonal also for inputs that were always zero, and a mask of these inputs."""
    gram_KK, dead_K = gram_KK.clone(), gram_KK.diagonal() == 0
    gram_KK.diagonal()[dead_K] = 1 if dead_K.all() else gram_KK.diagonal()[~dead_K].mean()
    return gram_KK, dead_K


@torch.no_grad()
def solve(
    weight_RK: Tensor,
    gram_KK: Tensor,
    *,
    pattern: Pattern | None = None,
    grid: Grid | None = None,
    mask_RK: Tensor | None = None,
    scope: Scope = "matrix",
    damping: float = 0.01,
    block: int = 128,
    order: Literal["stored", "activation"] = "stored",
    static_scales: bool = False,
    factor: tuple[Tensor, float] | None = None,
) -> Solved:
    """Prunes a matrix by a pattern or a fixed mask, quantises it to a grid, or does both in one pass, by the layer's inputs.

    Every input in turn is pruned and rounded, with the error e = (w - q) / U_jj; e U_jk is subtracted from the weights of each
    later input k. A share is pruned block by block: when the pass reaches a block, its weights with the lowest w^2 / U_jj^2 are
    pruned. N:M groups are pruned when the pass reaches them, so that their result does not depend on the block. A group's scale
    is taken when the pass reaches its first input, from weights that have received all errors, without those to be pruned.

    Inputs that were zero on all calibration tokens get weights of zero.

    Args:
        weight_RK: Weights.
        gram_KK: Sum of x x^T over calibration tokens; the pass runs in its dtype, float32 or float64.
        pattern: What to prune.
        grid: What to round to.
        mask_RK: True where a weight may stay, instead of a pattern.
        scope: Whether a share is counted over a whole block of inputs or within each output's part of it.
        damping: Share of the Gram matrix's mean diagonal that is added to its diagonal.
        block: Inputs pruned at once by a share.
        order: Order of the pass: as stored, or from the largest mean square of an input to the smallest; the latter has static
            scales.
        static_scales: Take all scales from the weights before the pass.
        factor: `shared_factor` of the Gram matrix, which is then not factored again; only in stored order.

    Raises:
        ValueError: a pattern and a mask, neither of them and no grid, or N:M in another order than stored.
        UserError: a group of the grid is not a multiple of M; see `inverse_factor`.
    """
    R, K = weight_RK.shape
    if (pattern and mask_RK is not None) or not (pattern or grid or mask_RK is not None):
        raise ValueError("solve needs a pattern or a mask but not both, a grid, or one of the first two with a grid")
    if pattern and pattern.group and order == "activation":
        raise ValueError("N:M groups are pruned in stored order")
    if pattern and pattern.group and grid and grid.group and grid.group % pattern.group:
        raise UserError(f"--group {grid.group}: not a multiple of {pattern.group}, the groups of --sparsity {pattern}")
    static_scales = static_scales or order == "activation"

    # Step 1: inputs in the order of the pass
    gram_KK, dead_K = _repaired(gram_KK)
    order_K = torch.arange(K, device=gram_KK.device)
    if order == "activation":
        order_K = gram_KK.diagonal().argsort(descending=True, stable=True)
    assert factor is None or order == "stored"
    upper_KK, damping = factor or inverse_factor(gram_KK[order_K][:, order_K], damping)
    pivot_K, pivots = upper_KK.diagonal(), upper_KK.diagonal().tolist()
    weight_KR = weight_RK.to(gram_KK).T.masked_fill(dead_K.unsqueeze(1), 0)[order_K].contiguous()
    mask_KR = torch.ones_like(weight_KR, dtype=torch.bool) if mask_RK is None else mask_RK.T[order_K].contiguous()
    current_KR, error_KR = weight_KR.clone(), torch.zeros_like(weight_KR)

    def chosen(weight_NR: Tensor, first: int) -> Tensor:
        """The mask [N, R] that the pattern gives consecutive inputs with these present weights."""
        assert pattern
        return mask_from_scores((weight_NR / pivot_K[first : first + len(weight_NR)].unsqueeze(1)).square().T, pattern, scope).T

    def received(first: int, inputs: int, end: int) -> Tensor:
        """The weights [N, R] of inputs from `first` with all errors so far; those before `end` are up to date."""
        last = first + inputs
        return (
            current_KR[first:last] if last <= end else weight_KR[first:last] - upper_KK[:first, first:last].T @ error_KR[:first]
        )

    # Step 2: room for codes; scales by the weights before the pass
    if grid:
        group, columns = grid.group or K, order_K.tolist()
        kept_KR = chosen(weight_KR, 0) if pattern else mask_KR
        square_K = gram_KK.diagonal()
        scale_RG, zero_RG = grid.scales((weight_KR * kept_KR)[order_K.argsort()].T, square_K)
        codes_KR = torch.empty_like(weight_KR, dtype=grid.code_dtype)

    for start in range(0, K, block):
        # Step 3: the block receives the errors of earlier blocks; a share of it is pruned
        stop = min(start + block, K)
        current_KR[start:stop] -= upper_KK[:start, start:stop].T @ error_KR[:start]
        if pattern and not pattern.group:
            mask_KR[start:stop] = chosen(current_KR[start:stop], start)
        for first in range(start, stop, STEP):
            end = min(first + STEP, stop)
            current_KR[first:end] -= upper_KK[start:first, first:end].T @ error_KR[start:first]
            for j in range(first, end):
                # Step 4: at the first input of a group, N:M or of the grid: its mask, its scale
                if pattern and pattern.group and j % pattern.group == 0:
                    mask_KR[j : j + pattern.group] = chosen(received(j, pattern.group, end), j)
                if grid and not static_scales and j % group == 0:
                    weight_NR, decided = received(j, group, end), not pattern or (not pattern.group and j + group <= stop)
                    kept_NR = mask_KR[j : j + group] if decided else chosen(weight_NR, j)
                    new_scale_R1, new_zero_R1 = grid.scales((weight_NR * kept_NR).T, square_K[j : j + group])
                    scale_RG[:, j // group] = new_scale_R1[:, 0]
                    if zero_RG is not None and new_zero_R1 is not None:
                        zero_RG[:, j // group] = new_zero_R1[:, 0]
                # Step 5: the input is pruned and rounded; its error changes the later inputs of the step
                weight_R = current_KR[j]
                new_R = torch.where(mask_KR[j], weight_R, 0)
                if grid:
                    g = columns[j] // group
                    scale_R1, zero_R1 = scale_RG[:, g : g + 1], None if zero_RG is None else zero_RG[:, g : g + 1]
                    code_R1 = grid.codes(new_R.unsqueeze(1), scale_R1, zero_R1)
                    codes_KR[j] = code_R1[:, 0]
                    new_R = ((code_R1 if zero_R1 is None else code_R1 - zero_R1) * scale_R1)[:, 0]
                error_KR[j] = (weight_R - new_R) / pivots[j]
                current_KR[j] = new_R
                current_KR[j + 1 : end].addr_(upper_KK[j, j + 1 : end], error_KR[j], alpha=-1)

    # Step 6: back to the stored order
    inverse_K = order_K.argsort()
    quantised = Quantised(codes_KR[inverse_K].T.contiguous(), scale_RG, zero_RG, grid) if grid else None
    loss = 0.5 * float(error_KR.square().sum(dtype=torch.float64))
    return Solved(current_KR[inverse_K].T.contiguous(), mask_KR[inverse_K].T.contiguous(), quantised, loss, damping)
