"""Attention by PyTorch with an additive bias, over a sequence or over cache slots: the path of CPUs and of training."""

# B batch  T positions  H query heads  G key-value heads  E head width  S keys
# R rows: T positions for each of the H / G query heads that share a key head

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ALONE = 64
"""Positions up to which `alone` applies: more are a prompt, not a round."""


def attend(q_BTHE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_B1RS: Tensor, alone: bool = False) -> Tensor:
    """[B, T, H, E] attention with an additive bias; query heads that share a key head are rows, so that no key is copied.

    Args:
        q_BTHE: Queries.
        k_BGSE: Keys.
        v_BGSE: Values.
        bias_B1RS: Bias from `folded`.
        alone: Whether each position is computed as if it were alone, so that a round of several gives the very bits of decoding
            one by one. Products with packed weights need that: they round their inputs, which makes a difference in the last
            place a hundred times larger. It takes 1.3 to 1.5 times as long for 4 positions.
    """
    (B, T, H, E), G = q_BTHE.shape, k_BGSE.shape[1]
    if alone and 1 < T <= MOST_ALONE:
        rows = []
        for q_THE, k_GSE, v_GSE, bias_1RS in zip(q_BTHE, k_BGSE, v_BGSE, bias_B1RS, strict=True):  # no keys copied
            keys, values = (part.expand(T, -1, -1, -1) for part in (k_GSE, v_GSE))
            bias_T11S = bias_1RS[0, :T, None, None]  # the first head's
            rows.append(F.scaled_dot_product_attention(q_THE.unflatten(1, (G, H // G)), keys, values, attn_mask=bias_T11S))
        return torch.stack(rows).flatten(2, 3)
    q_BGRE = q_BTHE.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, E)
    y_BGRE = F.scaled_dot_product_attention(q_BGRE, k_BGSE, v_BGSE, attn_mask=bias_B1RS)
    # the library may return any strides, so no view that joins heads and rows
    return y_BGRE.unflatten(2, (H // G, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def folded(bias_BTS: Tensor, group: int) -> Tensor:
    """[B, 1, R, S] the bias of the rows that `attend` makes of `group` query heads."""
    T = bias_BTS.shape[1]
    bias_BRS = bias_BTS.expand(-1, group * T, -1) if 1 in (T, group) else bias_BTS.repeat(1, group, 1)  # no copy if 1
    return bias_BRS[:, None]
