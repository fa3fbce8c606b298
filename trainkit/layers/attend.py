"""Attention over cache slots: PyTorch's with an additive bias, or a Triton kernel that reads only the slots in use."""

# B batch  T positions  H query heads  G key-value heads  E head width  S cache slots
# R rows: T positions for each of the H / G query heads that share a key head

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.layers.visible import Visible

INTERPRET = False
"""Also choose the kernel for a CPU, where Triton's interpreter runs it; for tests."""
MAX_QUERIES = 128
"""Largest number of a row's queries that the kernel takes; more of them (prefill, scores) share each read of a key anyway."""


def has_kernel(like: Tensor, queries: int, width: int) -> bool:
    """Whether the kernel computes attention for `queries` positions of a row and heads of this width.

    Args:
        like: Has the device and dtype of the cache.
        queries: T.
        width: E.
    """
    fits = queries <= MAX_QUERIES and width in (16, 32, 64, 128, 256)
    exact = like.dtype in (torch.float32, torch.bfloat16, torch.float16) and not torch.is_grad_enabled()
    return fits and exact and (INTERPRET or (like.is_cuda and _has_triton()))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def attend(q_BTHE: Tensor, cache_BGSE: Tensor, seen: Visible | Tensor) -> Tensor:
    """[B, T, H, E] attention of the queries over a layer's cache.

    Args:
        q_BTHE: Rotated queries.
        cache_BGSE: The layer's cache [B, 2G, S, E], keys before values; any strides.
        seen: What each query sees. A `Visible` chooses the kernel, an additive bias [B, 1, R, S or fewer] PyTorch.
    """
    if isinstance(seen, Visible):
        from trainkit.layers.kernels.attend import attend as kernel  # pyright: ignore[reportMissingImports]

        return kernel(q_BTHE, cache_BGSE, seen.first_B, seen.bits_BTW)
    k_BGSE, v_BGSE = cache_BGSE[:, :, : seen.shape[3]].split(cache_BGSE.shape[1] // 2, dim=1)
    return sdpa(q_BTHE, k_BGSE, v_BGSE, seen)


def sdpa(q_BTHE: Tensor, k_BGSE: Tensor, v_BGSE: Tensor, bias_B1RS: Tensor) -> Tensor:
    """[B, T, H, E] attention with an additive bias; query heads that share a key head are rows, so that no key is copied."""
    (B, T, H, E), G = q_BTHE.shape, k_BGSE.shape[1]
    q_BGRE = q_BTHE.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).reshape(B, G, H // G * T, E)
    y_BGRE = F.scaled_dot_product_attention(q_BGRE, k_BGSE, v_BGSE, attn_mask=bias_B1RS)
    return y_BGRE.view(B, H, T, E).transpose(1, 2)


def folded(bias_BTS: Tensor, group: int) -> Tensor:
    """[B, 1, R, S] the bias of the rows that `sdpa` makes of `group` query heads."""
    T = bias_BTS.shape[1]
    bias_BRS = bias_BTS.expand(-1, group * T, -1) if 1 in (T, group) else bias_BTS.repeat(1, group, 1)  # no copy if 1
    return bias_BRS[:, None]
