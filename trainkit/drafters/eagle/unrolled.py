"""Attention of the training-time test: a step sees the first step's past, and of the later steps only its own place.

EAGLE-3 (Li et al. 2025, arXiv 2503.01840) trains its layer on its own outputs. Step s at place t stands for the draft token s
levels below the root at t: when it is served, the cache holds the text up to t, made from the target's states (step 0), and one
entry for each level in between (steps 1..s, at place t). As one matrix that is S masks of T x T, nearly all of them empty; here
it is the causal product with step 0, and one number for each later step. Queries go in blocks that are recomputed in backward,
so that what is kept are queries, keys and values: linear in steps and in places.
Left out on purpose: a fused kernel; one more T-wide product a step is little beside the vocabulary's.
"""

# B batch  T places  H query heads  G key-value heads  R = H / G  E head width
# Q queries of a block  P places up to a block's end  S steps

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Entry: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values [B, T, G, E] of one step."""


def attend(q_BTHE: Tensor, entries: Sequence[Entry], document_BT: Tensor, block: int = 256) -> Tensor:
    """[B, T, H, E] attention of the newest step over what serving would have in the cache.

    softmax over {q_t k0_u : u <= t in t's document} and {q_t kj_t : j = 1..s}, q scaled by E^-1/2; softmax in float32 at least.

    Args:
        q_BTHE: Queries of step s.
        entries: Keys and values of steps 0..s.
        document_BT: Document numbers.
        block: Queries whose scores exist at once.
    """
    first, later = entries[0], entries[1:]
    flat = [tensor for entry in later for tensor in entry]
    parts = []
    for start in range(0, q_BTHE.shape[1], block):
        stop = min(start + block, q_BTHE.shape[1])
        parts.append(
            checkpoint(_block, start, stop, q_BTHE, *first, document_BT, *flat, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(parts, dim=1)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _block(
    start: int, stop: int, q_BTHE: Tensor, k_BTGE: Tensor, v_BTGE: Tensor, document_BT: Tensor, *later: Tensor
) -> Tensor:
    G, E = k_BTGE.shape[2:]
    q_BGRQE = (q_BTHE[:, start:stop] * E**-0.5).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
    k_BGPE, v_BGPE = (x[:, :stop].transpose(1, 2) for x in (k_BTGE, v_BTGE))
    places = torch.arange(stop, device=q_BTHE.device)
    seen_BQP = (document_BT[:, start:stop, None] == document_BT[:, None, :stop]) & (places[start:, None] >= places)
    past_BGRQP = (q_BGRQE @ k_BGPE[:, :, None].transpose(-1, -2)).masked_fill(~seen_BQP[:, None, None], float("-inf"))
    if not later:
        weights = past_BGRQP.softmax(-1, dtype=_wide(past_BGRQP)).to(v_BGPE.dtype)
        return (weights @ v_BGPE[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2, 3)
    own = [x[:, start:stop].transpose(1, 2)[:, :, None] for x in later]  # [B, G, 1, Q, E], keys and values in turn
    own_BGRQS = torch.stack([(q_BGRQE * k).sum(-1) for k in own[::2]], -1)
    scores = torch.cat([past_BGRQP, own_BGRQS], -1)
    weights = scores.softmax(-1, dtype=_wide(scores)).to(v_BGPE.dtype)
    y_BGRQE = weights[..., :stop] @ v_BGPE[:, :, None]
    for step, v in enumerate(own[1::2]):
        y_BGRQE = y_BGRQE + weights[..., stop + step, None] * v
    return y_BGRQE.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
