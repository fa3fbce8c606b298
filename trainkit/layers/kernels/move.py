"""Moves the cache slots of an accepted path, all layers in one launch."""

# B batch  L layers  G key-value heads  S cache slots  E head width  P positions to move

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.kernels.launch import on_its_device


@triton.jit
def _move_slots(
    cache,
    sources,
    destinations,
    P,
    G2,
    row_stride,
    layer_stride,
    head_stride,
    slot_stride,
    source_row_stride,
    source_stride,
    E: tl.constexpr,
    PATH: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b, plane = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index, column = tl.arange(0, PATH), tl.arange(0, WIDTH)
    inside = (index < P)[:, None] & (column < E)[None, :]
    source = tl.load(sources + b * source_row_stride + index * source_stride, mask=index < P, other=0)
    destination = tl.load(destinations + b) + index
    slots = cache + b * row_stride + plane // G2 * layer_stride + plane % G2 * head_stride + column[None, :]
    path = tl.load(slots + source[:, None] * slot_stride, mask=inside, other=0.0)
    tl.debug_barrier()  # the ranges may overlap: every thread reads before any thread writes
    tl.store(slots + destination[:, None] * slot_stride, path, mask=inside)


@on_its_device
def move_slots(cache_BLGSE: Tensor, from_BP: Tensor, to_B: Tensor) -> None:
    """Copies cache slots `from_BP` to `to_B`, `to_B` + 1, ...; the ranges may overlap. See layers/attention.py."""
    B, L, G2, _, E = cache_BLGSE.shape
    P = from_BP.shape[1]
    path, width = triton.next_power_of_2(P), triton.next_power_of_2(E)
    assert cache_BLGSE.stride(4) == 1 and to_B.stride(0) == 1
    _move_slots[(B, L * G2)](
        cache_BLGSE,
        from_BP,
        to_B,
        P,
        G2,
        *cache_BLGSE.stride()[:4],
        *from_BP.stride(),
        E=E,
        PATH=path,
        WIDTH=width,
        num_warps=min(8, max(1, path * width // 1024)),
    )
