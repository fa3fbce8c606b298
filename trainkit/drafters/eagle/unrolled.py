"""Attention of EAGLE-3's training-time test: a query sees the text in step 0, and in the later steps only its own position.

EAGLE-3 (Li et al. 2025, arXiv 2503.01840) trains its layer on its own outputs. Step s at position t corresponds to the draft
token s levels below the root at t. In serving, the cache then contains the text up to t, made from the target's hidden states
(step 0), and one entry per level in between (steps 1..s, at position t). As one matrix that is S masks of T x T, nearly all of
them empty; here it is the causal product with step 0, plus one score per later step. Queries are processed in blocks that are
recomputed in backward, so that only queries, keys and values are stored: memory is linear in steps and in positions.
Left out on purpose: a fused kernel; one more T-wide product per step is cheap compared with the vocabulary's.
"""

# B batch  T positions  H query heads  G key-value heads  R = H / G  E head width
# Q queries of a block  P positions up to a block's end  S steps

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Entry: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values [B, T, G, E] of one step."""


def attend(q_BTHE: Tensor, entries: Sequence[Entry], document_BT: Tensor, block: int = 256) -> Tensor:
    """[B, T, H, E] attention of the newest step over the entries that serving would have in its cache.

    softmax over {q_t k0_u : u <= t in t's document} and {q_t kj_t : j = 1..s}, q scaled by E^-1/2. Computed in
    float32 or wider; the result has q's dtype.

    Args:
        q_BTHE: Queries of step s.
        entries: Keys and values of steps 0..s.
        document_BT: Document numbers.
        block: Queries whose scores exist at the same time.
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
    """[B, Q, H, E] attention of the queries start..stop - 1; `later` are keys and values of steps 1..s in turn."""
    dtype = torch.promote_types(q_BTHE.dtype, torch.float32)
    wide = [x.to(dtype) for x in (q_BTHE[:, start:stop], k_BTGE[:, :stop], v_BTGE[:, :stop])]
    own = [x[:, start:stop].to(dtype) for x in later]
    with torch.autocast(q_BTHE.device.type, enabled=False):  # it would round the scores before the softmax
        return _wide(start, *wide, document_BT[:, :stop], *own).to(q_BTHE.dtype)


def _wide(start: int, q_BQHE: Tensor, k_BPGE: Tensor, v_BPGE: Tensor, document_BP: Tensor, *later: Tensor) -> Tensor:
    """As `_block`, in one dtype: the queries are the last Q of P positions; `later` has keys and values of these Q only."""
    # Scores over the text in step 0
    (P, G, E), device = k_BPGE.shape[1:], q_BQHE.device
    q_BGRQE = (q_BQHE * E**-0.5).unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)
    k_BG1PE, v_BG1PE = (x.transpose(1, 2)[:, :, None] for x in (k_BPGE, v_BPGE))
    positions = torch.arange(P, device=device)
    seen_BQP = (document_BP[:, start:, None] == document_BP[:, None]) & (positions[start:, None] >= positions)
    past_BGRQP = (q_BGRQE @ k_BG1PE.transpose(-1, -2)).masked_fill(~seen_BQP[:, None, None], float("-inf"))
    # One score per later step, at the query's own position
    own = [x.transpose(1, 2)[:, :, None] for x in later]  # [B, G, 1, Q, E]
    weights = torch.cat([past_BGRQP, *((q_BGRQE * k).sum(-1, keepdim=True) for k in own[::2])], -1).softmax(-1)
    # Weighted sum of the values
    y_BGRQE = weights[..., :P] @ v_BG1PE
    for step, v in enumerate(own[1::2]):
        y_BGRQE = y_BGRQE + weights[..., P + step, None] * v
    return y_BGRQE.permute(0, 3, 1, 2, 4).flatten(2, 3)
