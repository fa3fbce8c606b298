"""Importance of neurons, heads and hidden channels by the size of their activations, as in Minitron (arXiv 2407.14679).

The importance of a channel is sqrt(sum over sequences of (mean over tokens of |x|)^2), in the dense model. After a cut, the
norms' means are over fewer channels. This is not corrected; training afterwards adapts to it.
"""

# K inputs  G key-value heads  Q query heads of each  E head width

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.compress.statistics import Statistics


def importance(statistics: Statistics) -> Tensor:
    """Importance [K] of a linear layer's inputs."""
    return statistics.magnitude_K.sqrt()


def head_importance(statistics: Statistics, kv_heads: int, head_dim: int) -> Tensor:
    """Importance [G, Q] of query heads, from the input of attention's output projection: the L2 norm over a head's channels."""
    return importance(statistics).view(kv_heads, -1, head_dim).norm(dim=2)


def highest(score_K: Tensor, count: int) -> list[int]:
    """Ascending indices of the `count` highest scores; among equal scores the one of the lower index is dropped first."""
    dropped = score_K.sort(stable=True).indices[: len(score_K) - count]
    kept = torch.ones_like(score_K, dtype=torch.bool)
    kept[dropped] = False
    return kept.nonzero()[:, 0].tolist()


def heads_within_groups(score_GQ: Tensor, count: int) -> list[int]:
    """Ascending indices of the `count` highest query heads of every group; the number of key-value heads is unchanged."""
    return [group * score_GQ.shape[1] + head for group, score in enumerate(score_GQ) for head in highest(score, count)]
