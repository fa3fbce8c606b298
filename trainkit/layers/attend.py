"""Attention by PyTorch with an additive bias, over a sequence or over cache slots: the path of CPUs and of training."""

# B batch  T positions  H query heads  G key-value heads  E head width  S keys
# R rows: T positions for each of the H / G query heads that share a key head

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BTHE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_B1RS: Tensor) -> Tensor:
    """[B, T, H, E] attention with an additive bias; query heads that share a key head are rows, so that no key is copied."""
    (B, T, H, E), G = q_BTHE.shape, k_BGSE.shape[1]
    q_BGRE = q_BTHE.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, E)
    y_BGRE = F.scaled_dot_product_attention(q_BGRE, k_BGSE, v_BGSE, attn_mask=bias_B1RS)
    # the library may return any strides, so no view that joins heads and rows
    return y_BGRE.unflatten(2, (H // G, T)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def folded(bias_BTS: Tensor, group: int) -> Tensor:
    """[B, 1, R, S] the bias of the rows that `attend` makes of `group` query heads."""
    T = bias_BTS.shape[1]
    bias_BRS = bias_BTS.expand(-1, group * T, -1) if 1 in (T, group) else bias_BTS.repeat(1, group, 1)  # no copy if 1
    return bias_BRS[:, None]
