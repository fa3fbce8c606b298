"""Sums over the calibration inputs of a linear layer, for the one-shot methods."""

# B sequences  T positions  N counted tokens of a sequence  K inputs

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from trainkit.errors import UserError


class Statistics:
    """Sums over counted tokens of the inputs of one or several linear layers that read the same input.

    They are float64, so that neither the order of sequences nor their distribution over processes matters beyond rounding. The
    Gram matrix of a sequence is a float32 product unless its inputs are float64.

    Attributes:
        tokens: Number of counted tokens.
        sequences: Number of sequences with a counted token.
        sum_K: Sum of x.
        square_K: Sum of x^2.
        within_K: Sum over sequences of their number of tokens times the (biased) variance within the sequence.
        magnitude_K: Sum over sequences of the square of their mean |x|.
        gram_KK: Sum of x x^T, float64; None if not requested.

    Args:
        inputs: Number of inputs K.
        gram: Whether to accumulate the Gram matrix.
        device: Device of the sums.
    """

    def __init__(self, inputs: int, gram: bool = False, device: torch.device | str = "cpu") -> None:
        zeros = lambda *size: torch.zeros(*size, dtype=torch.float64, device=device)
        self.tokens = self.sequences = 0
        self.sum_K, self.square_K, self.within_K, self.magnitude_K = (zeros(inputs) for _ in range(4))
        self.gram_KK = zeros(inputs, inputs) if gram else None

    @torch.no_grad()
    def add(self, x_BTK: Tensor, counted_BT: Tensor) -> None:
        """Adds whole sequences; positions where `counted_BT` is False, such as padding, are left out.

        Raises:
            UserError: a counted input is not finite.
        """
        for x_TK, counted_T in zip(x_BTK, counted_BT, strict=True):  # one at a time: sums do not depend on the batch
            x_NK = x_TK[counted_T]
            x_NK = x_NK if x_NK.dtype == torch.float64 else x_NK.float()
            if not len(x_NK):
                continue
            sum_K, square_K = x_NK.sum(0, dtype=torch.float64), x_NK.double().square().sum(0)
            if not torch.isfinite(square_K).all():
                remedy = "check its weights, or use --dtype float32"
                raise UserError(f"--calibration: the model computes NaN or infinity on this text; {remedy}")
            self.tokens += len(x_NK)
            self.sequences += 1
            self.sum_K += sum_K
            self.square_K += square_K
            self.within_K += (square_K - sum_K.square() / len(x_NK)).clamp(min=0)
            self.magnitude_K += (x_NK.abs().sum(0, dtype=torch.float64) / len(x_NK)).square()
            if self.gram_KK is not None:
                self.gram_KK += x_NK.T @ x_NK

    def reduce(self) -> None:
        """Adds up the sums of all processes, if there are several; each has read other sequences."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        counts_2 = torch.tensor([self.tokens, self.sequences], dtype=torch.float64, device=self.sum_K.device)
        sums = [counts_2, self.sum_K, self.square_K, self.within_K, self.magnitude_K]
        for total in sums if self.gram_KK is None else [*sums, self.gram_KK]:
            dist.all_reduce(total)
        self.tokens, self.sequences = (int(count) for count in counts_2)
