"""Products of few rows with a weight matrix, y = x w^T, limited by the bandwidth of reading the weight.

The weight is the left operand of the tensor cores' product, so 16 rows cost the same as one, and each program streams some
rows of the weight through shared memory. A row's result does not depend on the other rows: every output is summed over K in the
same order, in a number of parts that depends only on the weight's shape. The kernel that reads the parts adds them in order
(add_norm.py, place.py), so no program waits for another.
"""

# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
# M rows  N outputs  K inputs  S parts

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.kernels.launch import dependent_launch, on_its_device
from trainkit.layers.packed import VALUES, Packed, plane

MAX_ROWS = 32
"""With more rows than this the library's product is faster."""
BLOCK_N = 32
WARPS, PACKED_WARPS = 4, 2
"""With 4 warps, two warps share each weight row: reading it twice is cheap, unpacking it twice is not."""
PROGRAMS, PACKED_PROGRAMS = 256, 512
"""Number of programs that saturates the memory of a large GPU; `splits` makes at least so many where it can."""
BALANCED = 264
"""Two programs for each of a large GPU's 132 multiprocessors; with no more programs, a deeper pipeline (more shared memory)
keeps a third one off a multiprocessor."""


@triton.jit
def _plane(word, i: tl.constexpr, KIND: tl.constexpr):
    """Value i of each word, as float32. A GPU converts integers at a quarter of the rate of these operations."""
    if KIND == "fp8":
        byte = word >> 8 * i
        # sign, exponent and mantissa at their bit positions in float32; 2^120 corrects the exponent bias, 127 instead of 7
        return ((byte & 0x80) << 24 | (byte & 0x7F) << 20).to(
            tl.float32, bitcast=True
        ) * 1329227995784915872903807060280344576.0
    if KIND == "int4":
        # 2^23 + value, less 2^23 + 8
        return (word >> 4 * i & 15 | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    return (word >> 8 * i & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    DENSITY: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Part `program_id(1)` of `BLOCK_N` outputs: consecutive ones, or with SILU half as many gates and the matching ups."""
    # Step 1: the rows of the weight and of x.
    part = tl.program_id(1)
    row_N = tl.arange(0, BLOCK_N)
    if SILU:
        half: tl.constexpr = BLOCK_N // 2
        n_N = tl.program_id(0) * half + row_N % half + (row_N // half) * (N // 2)
        real_N = tl.program_id(0) * half + row_N % half < N // 2
    else:
        n_N = tl.program_id(0) * BLOCK_N + row_N
        real_N = n_N < N
    n_N = tl.where(real_N, n_N, 0).to(tl.int64)
    m_M = tl.arange(0, BLOCK_M)
    real_M = m_M < M
    x_M = x_ptr + m_M * x_stride
    first, length = part * (K // SPLITS), K // SPLITS
    sum_NM = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    if PDL:
        # Step 2: the previous kernel may still run, so only the weight is read: its first steps are prefetched to the L2 cache.
        tl.extra.cuda.gdc_launch_dependents()
        row_bytes = K * w_ptr.dtype.element_ty.primitive_bitwidth // (8 * DENSITY)
        line_L = tl.arange(0, AHEAD) * 128
        address_NL = w_ptr.to(tl.int64) + n_N[:, None] * row_bytes + part * (row_bytes // SPLITS) + line_L[None, :]
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [address_NL], dtype=tl.int32, is_pure=False, pack=1)
    # Step 3: the sum over this part of K.
    if KIND == "dense":
        k = tl.arange(0, BLOCK_K)
        w_NK = w_ptr + n_N[:, None] * K + first + k[None, :]
        x_KM = x_M[None, :] + first + k[:, None]
        if PDL:
            tl.extra.cuda.gdc_wait()
        for _ in range(0, length, BLOCK_K):
            sum_NM = tl.dot(tl.load(w_NK), tl.load(x_KM, mask=real_M[None, :], other=0.0), sum_NM, input_precision="ieee")
            w_NK += BLOCK_K
            x_KM += BLOCK_K
    else:
        # Words of several values; value i of consecutive words is a plane of consecutive columns (layers/packed.py).
        PLANE: tl.constexpr = BLOCK_K // DENSITY
        j = tl.arange(0, PLANE)
        w_NJ = w_ptr + n_N[:, None] * (K // DENSITY) + first // DENSITY + j[None, :]
        x_JM = x_M[None, :] + first + j[:, None]
        group_N = n_N * (K // GROUP) + first // GROUP if GROUP else n_N
        if PDL:
            tl.extra.cuda.gdc_wait()
        for _ in range(0, length, BLOCK_K):
            word = tl.load(w_NJ).to(tl.uint32, bitcast=True)
            group_NM = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for i in tl.static_range(DENSITY):
                x = tl.load(x_JM + i * PLANE, mask=real_M[None, :], other=0.0)
                w = _plane(word, i, KIND)
                if zero_ptr is not None:
                    w -= tl.load(zero_ptr + group_N + (i * PLANE // GROUP if GROUP else 0))[:, None].to(tl.float32)
                w = w.to(x.dtype)  # exact: at most 8 bits and a sign
                if GROUP:
                    group_NM = tl.dot(w, x, group_NM, input_precision="ieee")
                    if (i + 1) * PLANE % GROUP == 0:
                        sum_NM += group_NM * tl.load(scale_ptr + group_N + i * PLANE // GROUP)[:, None].to(tl.float32)
                        group_NM = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                else:
                    sum_NM = tl.dot(w, x, sum_NM, input_precision="ieee")
            w_NJ += PLANE
            x_JM += BLOCK_K
            group_N += BLOCK_K // GROUP if GROUP else 0
    # Step 4: scale, activate and store.
    if KIND != "dense" and not GROUP:
        sum_NM *= tl.load(scale_ptr + n_N)[:, None].to(tl.float32)
    if SILU:
        gate, up = tl.split(tl.permute(tl.reshape(sum_NM, (2, half, BLOCK_M)), (1, 2, 0)))
        # rounded where two separate products would be rounded
        gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
        up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
        y = (gate / (1.0 + tl.exp(-gate))).to(out_ptr.dtype.element_ty).to(tl.float32) * up
        n_H = tl.program_id(0) * half + tl.arange(0, half)
        out = out_ptr + m_M[None, :].to(tl.int64) * (N // 2) + n_H[:, None]
        tl.store(out, y.to(out_ptr.dtype.element_ty), mask=real_M[None, :] & (n_H < N // 2)[:, None])
    else:
        out = out_ptr + (part.to(tl.int64) * M + m_M[None, :]) * N + n_N[:, None]
        tl.store(out, sum_NM, mask=real_M[None, :] & real_N[:, None])


def splits(N: int, K: int, kind: str = "dense", silu: bool = False, group: int | None = None) -> int:
    """Number of parts of the sum over K: the smallest power of two that makes `PROGRAMS` programs, from the shape alone."""
    count, step, programs = 1, block_k(K, kind, group), PROGRAMS if kind == "dense" else PACKED_PROGRAMS
    while not silu and count < 8 and triton.cdiv(N, BLOCK_N) * count < programs and K % (2 * count * step) == 0:
        count *= 2
    return count


def block_k(K: int, kind: str = "dense", group: int | None = None) -> int:
    """Columns of a step: the largest power of two up to 256 that divides K, or a block of words; 0 if not covered."""
    if kind != "dense":
        return plane(K, kind, group) * VALUES[kind]
    size = min(256, K & -K)
    return size if size >= 64 else 0


def supports(weight: Tensor | Packed) -> bool:
    """Whether the kernel covers a weight: packed with a plane that fits, or 16-bit with columns in multiples of 64."""
    if isinstance(weight, Packed):
        return block_k(weight.columns, weight.kind, weight.group) > 0
    return weight.dtype in (torch.bfloat16, torch.float16) and block_k(weight.shape[1]) > 0


@on_its_device
def few_rows(x_MK: Tensor, weight: Tensor | Packed, silu: bool = False) -> Tensor:
    """Parts [S, M, N] of x w^T in float32, to be added; with `silu`, silu(gate) * up [M, N / 2] in the dtype of x.

    Args:
        x_MK: At most `MAX_ROWS` rows, contiguous in K.
        weight: [N, K], contiguous, or packed; with `silu` the rows of gate, then those of up.
        silu: Whether to return the gated activation.
    """
    (M, K), (N, _) = x_MK.shape, weight.shape
    kind = weight.kind if isinstance(weight, Packed) else "dense"
    values, scale, zero, group = weight, None, None, K
    if isinstance(weight, Packed):
        values, scale, zero, group = weight.words, weight.scale, weight.zero, weight.group
    size = block_k(K, kind, group)
    parts = splits(N, K, kind, silu, group)
    # number of 128-byte lines of each weight row to prefetch: those of the first steps
    row_bytes = values.shape[1] * values.element_size() // parts
    ahead = min(16, 1 << max(1, row_bytes // 128).bit_length() - 1)
    if silu:
        out = torch.empty(M, N // 2, dtype=x_MK.dtype, device=x_MK.device)
        grid = (triton.cdiv(N // 2, BLOCK_N // 2), 1)
    else:
        out = torch.empty(parts, M, N, dtype=torch.float32, device=x_MK.device)
        grid = (triton.cdiv(N, BLOCK_N), parts)
    few_rows_kernel[grid](
        x_MK,
        values,
        scale,
        zero,
        out,
        M,
        N,
        K,
        x_MK.stride(0),
        SPLITS=parts,
        BLOCK_M=16 if M <= 16 else 32,
        BLOCK_N=BLOCK_N,
        BLOCK_K=size,
        KIND=kind,
        GROUP=group if group < K else 0,
        SILU=silu,
        DENSITY=K // values.shape[1],
        AHEAD=ahead,
        num_warps=WARPS if kind == "dense" else PACKED_WARPS,
        num_stages=5 if grid[0] * grid[1] <= BALANCED and M <= 16 else 4,
        **dependent_launch(x_MK.device),
    )
    return out


def few_rows_eager(x_MK: Tensor, weight: Tensor | Packed, silu: bool = False) -> Tensor:
    """What `few_rows` computes, in torch operations."""
    K = x_MK.shape[1]
    kind = weight.kind if isinstance(weight, Packed) else "dense"
    w_NK = (weight.dense(torch.float32) if isinstance(weight, Packed) else weight).float()
    parts = splits(len(w_NK), K, kind, silu, weight.group if isinstance(weight, Packed) else None)
    parts_SMN = torch.stack([x.float() @ w.T for x, w in zip(x_MK.chunk(parts, 1), w_NK.chunk(parts, 1), strict=True)])
    if not silu:
        return parts_SMN
    gate, up = parts_SMN[0].to(x_MK.dtype).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.float()).to(x_MK.dtype) * up
