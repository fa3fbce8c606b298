"""Which weights are pruned: patterns, counts, and masks as bits.

A mask is True where a weight is kept. Exactly the number of weights that the pattern gives is pruned: among equal scores the
one of the lower index is pruned first.
"""

# R outputs  K inputs  S compared sets  N members of a set

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trainkit.errors import UserError

Scope = Literal["row", "matrix"]
"""Weights that are compared with one another: those of an output, or of the whole matrix."""


@dataclass(frozen=True)
class Pattern:
    """A share of the weights to prune, or N:M: how many of every M consecutive inputs are kept.

    Public pruning codes write N:M with the number pruned; this is the number kept, as hardware and papers do.

    Attributes:
        share: Share pruned, at least 0 and below 1.
        kept: N of N:M; 0 without groups.
        group: M of N:M; 0 without groups.
    """

    share: float
    kept: int = 0
    group: int = 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else f"{self.share:g}"

    def pruned(self, weights: int) -> int:
        """How many of so many weights a share prunes, rounded down; 0.29 of 100 are 29, although 0.29 * 100 < 29 in floats."""
        return int(weights * self.share * (1 + 1e-12))

    def check(self, columns: int, name: str) -> None:
        """Raises UserError if a matrix of so many inputs cannot have this pattern; `name` is the tensor's."""
        if self.group and columns % self.group:
            raise UserError(f"--sparsity {self}: {name} has {columns} inputs, not a multiple of {self.group}; take another M")


def parse_pattern(text: str) -> Pattern:
    """The pattern written as a share, 0.6, or as N:M, 2:4.

    Raises:
        UserError: it is neither, or N is not between 1 and M - 1.
    """
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        kept, group = map(int, match.groups())
        if not 0 < kept < group:
            raise UserError(f"--sparsity {text}: N:M keeps N of every M weights, so N must be from 1 to M - 1, as in 2:4")
        return Pattern(1 - kept / group, kept, group)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise UserError(f"--sparsity {text}: give the share to prune, above 0 and below 1, or N:M, as in 2:4")
    return Pattern(share)


def prune_lowest(score_SN: Tensor, count: int) -> Tensor:
    """A mask [S, N] that prunes the `count` lowest scores of each set."""
    if count == 0:
        return torch.ones_like(score_SN, dtype=torch.bool)
    last_S1 = score_SN.kthvalue(count, dim=1, keepdim=True).values  # several times as fast as a stable sort
    below_SN, tied_SN = score_SN < last_S1, score_SN == last_S1
    return ~(below_SN | (tied_SN & (tied_SN.cumsum(1) <= count - below_SN.sum(1, keepdim=True))))


def mask_from_scores(score_RK: Tensor, pattern: Pattern, scope: Scope = "row") -> Tensor:
    """The mask [R, K] that prunes the lowest scores by a pattern; a share counts within `scope`, N:M within its groups."""
    R, K = score_RK.shape
    if pattern.group:
        grouped = score_RK.reshape(R * K // pattern.group, pattern.group)
        return prune_lowest(grouped, pattern.group - pattern.kept).view(R, K)
    compared = score_RK.reshape(1, R * K) if scope == "matrix" else score_RK
    return prune_lowest(compared, pattern.pruned(compared.shape[1])).view(R, K)


def pack_mask(mask: Tensor) -> Tensor:
    """The mask as bits, uint8 [ceil(n / 8)]: row by row, the first weight in the lowest bit."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1), bitorder="little"))


def unpack_mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask of this shape that `pack_mask` packed, on the CPU."""
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count, bitorder="little").astype(bool)).view(*shape)
