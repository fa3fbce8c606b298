"""The steps between the fused projection and attention: bias, head norms, rotation, and cache writes."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# B batch  T positions  M rows, B * T  N columns, (H + 2G) * E  K partial sums  H query heads  G key-value heads  E head width
# S cache slots or positions of the rotary table

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.attention import rotate
from trainkit.layers.kernels.launch import dependent_launch, on_its_device


@triton.jit
def _place(
    parts,
    bias,
    q_norm,
    k_norm,
    eps,
    rope,
    positions,
    slots,
    q,
    cache,
    T,
    part_stride,
    row_stride,
    position_row_stride,
    position_stride,
    slot_row_stride,
    slot_stride,
    cache_row_stride,
    cache_head_stride,
    cache_slot_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    NORMS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Step 1: this head's two halves, rounded as a matrix product in the model's dtype would be.
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, HALF)
    inside = column < E // 2
    dtype = cache.dtype.element_ty
    part = parts + row * row_stride + head * E + column
    low = tl.load(part, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(part + E // 2, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(1, K):
        low += tl.load(part + k * part_stride, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(part + k * part_stride + E // 2, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        low += tl.load(bias + head * E + column, mask=inside, other=0.0).to(tl.float32)
        high += tl.load(bias + head * E + column + E // 2, mask=inside, other=0.0).to(tl.float32)
    low, high = low.to(dtype), high.to(dtype)
    b, t = row // T, row % T
    if head < H + G:
        # Step 2: the norm of a query or key head, rounded as `RMSNorm` does.
        if NORMS:
            wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide_low * wide_low + wide_high * wide_high, axis=0) / E + eps)
            norm = tl.where(head < H, q_norm, k_norm) + column
            low = (wide_low * scale * tl.load(norm, mask=inside, other=0.0).to(dtype).to(tl.float32)).to(dtype)
            high = (wide_high * scale * tl.load(norm + E // 2, mask=inside, other=0.0).to(dtype).to(tl.float32)).to(dtype)
        # Step 3: rotate. As in `rotate`, the product with the cosine is rounded before the other is added.
        angle = rope + tl.load(positions + b * position_row_stride + t * position_stride) * (2 * E) + column
        cos_low = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
        cos_high = tl.load(angle + E // 2, mask=inside, other=0.0).to(tl.float32)
        sin_low = tl.load(angle + E, mask=inside, other=0.0).to(tl.float32)
        sin_high = tl.load(angle + E + E // 2, mask=inside, other=0.0).to(tl.float32)
        x_low, x_high = low.to(tl.float32), high.to(tl.float32)
        low = ((x_low * cos_low).to(dtype).to(tl.float32) + x_high * sin_low).to(dtype)
        high = ((x_high * cos_high).to(dtype).to(tl.float32) + x_low * sin_high).to(dtype)
    # Step 4: queries go to the output, keys and values to their cache slot.
    if head < H:
        to = q + (row * H + head) * E + column
    else:
        slot = tl.load(slots + b * slot_row_stride + t * slot_stride)
        to = cache + b * cache_row_stride + (head - H).to(tl.int64) * cache_head_stride + slot * cache_slot_stride + column
    tl.store(to, low, mask=inside)
    tl.store(to + E // 2, high, mask=inside)


@on_its_device
def place(
    parts_KMN: Tensor,
    bias_N: Tensor | None,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    rope_S2E: Tensor,
    positions_BT: Tensor,
    slots_BT: Tensor,
    cache_BGSE: Tensor,
) -> Tensor:
    """Rotated queries [B, T, H, E]; rotated keys, and values, are written to their cache slots.

    The parts are added in order, in float32, then the bias; the sum is rounded to the cache's dtype, the model's, and from
    there on rounded where `Attention.projected` rounds. A row's result does not depend on the number of rows.

    Args:
        parts_KMN: Partial sums, in any dtype, of the fused projection, columns in the order q, k, v. The finished product of
            another matrix multiplication is one part.
        bias_N: Bias of the projection.
        q_norm_E: Weight of the queries' norm; None, as `k_norm_E` then is, without norms.
        k_norm_E: Weight of the keys' norm.
        eps: Epsilon of both norms.
        rope_S2E: The rotary table in the model's dtype, one row for each position.
        positions_BT: Absolute positions, int64, below S.
        slots_BT: Cache slots, int64; no two rows may write the same slot.
        cache_BGSE: This layer's cache [B, 2G, slots, E], keys before values; written in place.
    """
    (K, M, N), (B, T), (_, G2, _, E) = parts_KMN.shape, positions_BT.shape, cache_BGSE.shape
    H = N // E - G2
    assert B * T == M and E % 2 == 0 and rope_S2E.is_contiguous() and parts_KMN.stride(2) == cache_BGSE.stride(3) == 1
    q_BTHE = torch.empty(B, T, H, E, device=cache_BGSE.device, dtype=cache_BGSE.dtype)
    _place[(M, H + G2)](
        parts_KMN,
        parts_KMN if bias_N is None else bias_N,
        parts_KMN if q_norm_E is None else q_norm_E,
        parts_KMN if k_norm_E is None else k_norm_E,
        eps,
        rope_S2E,
        positions_BT,
        slots_BT,
        q_BTHE,
        cache_BGSE,
        T,
        *parts_KMN.stride()[:2],
        *positions_BT.stride(),
        *slots_BT.stride(),
        *cache_BGSE.stride()[:3],
        H=H,
        G=G2 // 2,
        E=E,
        K=K,
        BIAS=bias_N is not None,
        NORMS=q_norm_E is not None,
        HALF=triton.next_power_of_2(E // 2),
        num_warps=1,
        **dependent_launch(cache_BGSE.device),
    )
    return q_BTHE


def place_eager(
    parts_KMN: Tensor,
    bias_N: Tensor | None,
    q_norm_E: Tensor | None,
    k_norm_E: Tensor | None,
    eps: float,
    rope_S2E: Tensor,
    positions_BT: Tensor,
    slots_BT: Tensor,
    cache_BGSE: Tensor,
) -> Tensor:
    """What `place` computes, in torch operations."""
    G2, E = cache_BGSE.shape[1], cache_BGSE.shape[3]
    sum_MN = parts_KMN[0].float()
    for part_MN in parts_KMN[1:]:
        sum_MN = sum_MN + part_MN.float()
    if bias_N is not None:
        sum_MN = sum_MN + bias_N.float()
    heads = sum_MN.to(cache_BGSE.dtype).unflatten(0, positions_BT.shape).unflatten(-1, (-1, E))
    q, k, v = heads.split([heads.shape[2] - G2, G2 // 2, G2 // 2], dim=2)
    if q_norm_E is not None and k_norm_E is not None:
        q, k = F.rms_norm(q, (E,), q_norm_E.to(q.dtype), eps), F.rms_norm(k, (E,), k_norm_E.to(k.dtype), eps)
    rope_BT2E = rope_S2E[positions_BT]
    rotated = rotate(torch.cat([k, q], dim=2), rope_BT2E)
    keys_values = torch.cat([rotated[:, :, : G2 // 2], v], dim=2).transpose(1, 2)
    cache_BGSE.scatter_(2, slots_BT[:, None, :, None].expand_as(keys_values), keys_values)
    return rotated[:, :, G2 // 2 :].contiguous()
