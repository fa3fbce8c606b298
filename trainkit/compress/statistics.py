"""Sums over calibration inputs of a linear layer, from which the one-shot methods take what they need."""

# B sequences  T positions  K inputs

from __future__ import annotations

import torch
from torch import Tensor


class Statistics:
    """Sums over counted tokens of the inputs of one or several linear layers that read the same input.

    They are float64, so that neither the order of sequences nor their distribution over processes matters beyond rounding. The
    Gram matrix of a batch is a float32 product.

    Attributes:
        tokens: Number of counted tokens.
        sequences: Number of sequences with a counted token.
        sum_K: Sum of x.
        square_K: Sum of x^2.
        within_K: Sum over sequences of their number of tokens times the (biased) variance within the sequence.
        gram_KK: Sum of x x^T; None if not asked for.

    Args:
        inputs: Number of inputs K.
        gram: Whether to accumulate the Gram matrix.
        device: Where the sums lie.
    """

    def __init__(self, inputs: int, gram: bool = False, device: torch.device | str = "cpu") -> None:
        zeros = lambda *size: torch.zeros(*size, dtype=torch.float64, device=device)
        self.tokens = self.sequences = 0
        self.sum_K, self.square_K, self.within_K = zeros(inputs), zeros(inputs), zeros(inputs)
        self.gram_KK = zeros(inputs, inputs) if gram else None

    @torch.no_grad()
    def add(self, x_BTK: Tensor, counted_BT: Tensor) -> None:
        """Adds whole sequences; positions where `counted_BT` is False, such as padding, are left out."""
        weight_BT1 = counted_BT.unsqueeze(2).double()
        x_BTK = torch.where(counted_BT.unsqueeze(2), x_BTK, 0).double()
        tokens_B1 = weight_BT1.sum(1)
        sum_BK, square_BK = x_BTK.sum(1), x_BTK.square().sum(1)
        self.tokens += int(tokens_B1.sum())
        self.sequences += int((tokens_B1 > 0).sum())
        self.sum_K += sum_BK.sum(0)
        self.square_K += square_BK.sum(0)
        self.within_K += (square_BK - sum_BK.square() / tokens_B1.clamp(min=1)).clamp(min=0).sum(0)
        if self.gram_KK is not None:
            x_NK = x_BTK[counted_BT].float()
            self.gram_KK += x_NK.T @ x_NK

    def reduce(self) -> None:
        """Adds up the sums of all processes, if there are several; each has read other sequences."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        counts_2 = torch.tensor([self.tokens, self.sequences], dtype=torch.float64, device=self.sum_K.device)
        for sums in (counts_2, self.sum_K, self.square_K, self.within_K, *([] if self.gram_KK is None else [self.gram_KK])):
            torch.distributed.all_reduce(sums)
        self.tokens, self.sequences = (int(count) for count in counts_2)
