"""KL divergence between the next-token distributions of two models from their hidden states, logits a few hundred at a time."""

# N tokens  D hidden  V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 512
"""Tokens whose logits exist at once."""


def divergences(head: Callable[[Tensor], Tensor], dense_ND: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Sums over tokens of KL(dense || other), in nats, for each of the others; float64, on the CPU.

    Args:
        head: From hidden states to logits [N, V], the same for all models.
        dense_ND: Hidden states of the dense model.
        others: Hidden states [N, D] of each other model.
    """
    sums = torch.zeros(len(others), dtype=torch.float64)
    for dense, *rest in zip(*(states_ND.split(CHUNK) for states_ND in (dense_ND, *others)), strict=True):
        log_p_NV = head(dense).float().log_softmax(1)
        for index, other in enumerate(rest):
            log_q_NV = head(other).float().log_softmax(1)
            sums[index] += float(F.kl_div(log_q_NV, log_p_NV, reduction="none", log_target=True).sum(dtype=torch.float64))
    return sums
