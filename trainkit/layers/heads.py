"""What heads are made of, and which tokens they may propose."""

# D hidden  K ids a head may propose

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.layers.linear import Linear


class ResidualBlock(nn.Module):
    """x + silu(W x + b), W and b zero at first, so that a new head starts as what it projects with (arXiv 2401.10774, 2.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


def checked_vocab(draft_vocab: list[int] | None, vocab_size: int) -> Tensor | None:
    """The ids of a trimmed vocabulary as a tensor [K]; None for the whole one.

    Raises:
        UserError: not ascending, or outside the vocabulary.
    """
    if draft_vocab is None:
        return None
    ids_K = torch.tensor(draft_vocab, dtype=torch.long)
    if not len(ids_K) or int(ids_K[0]) < 0 or int(ids_K[-1]) >= vocab_size or not bool((ids_K.diff() > 0).all()):
        raise UserError(f"drafter.draft_vocab: must be ascending ids within the vocabulary of {vocab_size}")
    return ids_K
