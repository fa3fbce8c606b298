"""The residual stream between two matrix products: adds the partial sums of the last one, then the RMS norm for the next."""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# M rows  D hidden  K partial sums

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.kernels.launch import dependent_launch, on_its_device


@triton.jit
def _add_norm(
    residual,
    parts,
    weight,
    normed,
    tap,
    eps,
    residual_stride,
    part_stride,
    row_stride,
    tap_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    TAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = residual + row * residual_stride + column
    x = tl.load(at, mask=inside, other=0.0)
    dtype = x.dtype
    if K > 0:
        part = parts + row * row_stride + column
        added = tl.load(part, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(1, K):
            added += tl.load(part + k * part_stride, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + added).to(dtype)
        tl.store(at, x, mask=inside)
    if TAPPED:
        tl.store(tap + row * tap_stride + column, x, mask=inside)
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * scale.to(dtype).to(tl.float32)
    tl.store(normed + row * D + column, x.to(dtype), mask=inside)


@on_its_device
def add_norm(
    residual_MD: Tensor, parts_KMD: Tensor | None, weight_D: Tensor, eps: float, tap_MD: Tensor | None = None
) -> Tensor:
    """[M, D] RMS norm of the residual stream, in its dtype, after `parts_KMD` is added to it in place.

    The parts are added to each other in order, in float32, and their sum to the residual, which is rounded once; the norm is
    that of the rounded residual, as `RMSNorm` computes it. A row's result does not depend on the number of rows.

    Args:
        residual_MD: Residual stream; changed in place unless there are no parts.
        parts_KMD: Partial sums, in any dtype, of what is added; None before the first layer.
        weight_D: Weight of the norm.
        eps: Epsilon of the norm.
        tap_MD: If given, a copy of the new residual is stored here.
    """
    M, D = residual_MD.shape
    block = triton.next_power_of_2(D)
    normed_MD = torch.empty(M, D, device=residual_MD.device, dtype=residual_MD.dtype)
    parts = residual_MD[None] if parts_KMD is None else parts_KMD
    tap = residual_MD if tap_MD is None else tap_MD
    assert residual_MD.stride(1) == parts.stride(2) == tap.stride(1) == weight_D.stride(0) == 1
    _add_norm[(M,)](
        residual_MD,
        parts,
        weight_D,
        normed_MD,
        tap,
        eps,
        residual_MD.stride(0),
        parts.stride(0),
        parts.stride(1),
        tap.stride(0),
        D=D,
        K=0 if parts_KMD is None else len(parts_KMD),
        TAPPED=tap_MD is not None,
        BLOCK=block,
        num_warps=min(32, max(1, block // 512)),
        **dependent_launch(residual_MD.device),
    )
    return normed_MD


def add_norm_eager(
    residual_MD: Tensor, parts_KMD: Tensor | None, weight_D: Tensor, eps: float, tap_MD: Tensor | None = None
) -> Tensor:
    """What `add_norm` computes, in torch operations."""
    if parts_KMD is not None:
        added_MD = parts_KMD[0].float()
        for part_MD in parts_KMD[1:]:
            added_MD = added_MD + part_MD.float()
        residual_MD.copy_(residual_MD.float() + added_MD)
    if tap_MD is not None:
        tap_MD.copy_(residual_MD)
    return F.rms_norm(residual_MD, weight_D.shape, weight_D.to(residual_MD.dtype), eps)
