"""Attention of T query positions over a static cache whose live length only the device knows, split over keys.

Query heads that share a key head are folded into rows t * group + head. Every program reads one split of the slots for one
tile of rows and writes unnormalised sums; a second kernel adds the splits. Grids depend on shapes alone, so one captured graph
serves every length: a program whose split begins past the live slots returns immediately. Splits are counted from slot 0, and
causal calls of up to `CHAIN` positions run the same binary with the same tile, so a row's result does not depend on other rows.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

# B batch  T positions  H query heads  G key-value heads  E head width  S cache slots  W words of 64 bits
# R rows: t * (H / G) + head within its group  N splits  Z = B * G

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.kernels.launch import dependent_launch, on_its_device

LOG2E = 1.4426950408889634  # the softmax is computed in powers of two
CHAIN = 32  # in causal calls of up to this many positions, results are bitwise independent of T


class Plan(NamedTuple):
    """Sizes of a launch, from shapes alone: rows per tile, keys per step, slots per split, splits, warps, pipeline stages."""

    rows: int
    keys: int
    split: int
    splits: int
    warps: int
    stages: int


def plan(T: int, group: int, G: int, S: int, E: int, dtype: torch.dtype, causal: bool) -> Plan:
    """The launch for these shapes; of T it depends only beyond `CHAIN` positions, or for trees beyond 32 rows.

    A key head gets 256 / G splits in a chain, for two programs on each multiprocessor at batch 1, and fewer the more tiles of
    rows there are, because each split writes float32 sums of all rows.
    """
    rows, splits = 32, min(128, max(16, 256 // G))
    if T > CHAIN if causal else T * group > 32:
        rows, splits = 128 if causal and T * group >= 1024 else 64, max(1, min(16, 4096 // (T * group)))
    if dtype == torch.float32:  # exact products take many registers
        rows, keys, warps, stages = 32, 32 if E <= 64 else 16, 8, 2
    else:
        keys, stages = (64, 3) if E <= 128 else (32, 2)
        warps = 8 if rows == 128 or rows == 64 and E > 128 else 4
    split = 64
    while split * (splits + splits // 4) < S:  # a quarter more for slots beyond a power of two
        split *= 2
    if split <= keys:
        stages = 2  # one step
    return Plan(rows, keys, split, -(-S // split), warps, stages)


@triton.jit
def _live(first, T, t, S, WORDS: tl.constexpr):
    """One past the last slot that a query at index t may see."""
    return tl.minimum(first + (t + 1 if WORDS == 0 else 64 * WORDS), S)


@triton.jit
def _word(bits, word, mask, WORDS: tl.constexpr):
    """A word of each row's bits: all ones before the first (committed slots), zero past the last."""
    inside = mask & (word >= 0) & (word < WORDS)
    return tl.where(word < 0, -1, tl.load(bits + word, mask=inside, other=0)).to(tl.uint64, bitcast=True)


@triton.jit(do_not_specialize=["T", "S", "SPLITS"])
def _split_kernel(
    q_ptr, cache_ptr, first_ptr, bits_ptr, y_ptr, sum_ptr, stat_ptr,
    T, S, SPLIT, SPLITS, q_b, q_t, q_h, c_b, c_g, c_s, bits_b, scale,
    G: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DIRECT: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    z, split = tl.program_id(0), tl.program_id(1)
    tile = tl.num_programs(2) - 1 - tl.program_id(2)  # causal tiles with the most keys start first
    b, g = z // G, z % G
    first, R = tl.load(first_ptr + b), T * GROUP
    begin = split * SPLIT
    end = tl.minimum(_live(first, T, tl.minimum(T - 1, (tile * ROWS + ROWS - 1) // GROUP), S, WORDS), begin + SPLIT)
    if begin >= end:
        return

    # Step 1: queries of this tile
    r = tile * ROWS + tl.arange(0, ROWS)
    e, n = tl.arange(0, WIDTH), tl.arange(0, KEYS)
    t, real = r // GROUP, r < R
    q_row = q_ptr + b.to(tl.int64) * q_b + t * q_t + (g * GROUP + r % GROUP) * q_h
    q = tl.load(q_row[:, None] + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
    k_ptr = cache_ptr + b.to(tl.int64) * c_b + g * c_g
    v_ptr = k_ptr + G * c_g
    bits_row = bits_ptr + b.to(tl.int64) * bits_b + t * WORDS

    # Step 2: softmax in float32 over this split, with a running maximum
    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    for low in range(begin, end, KEYS):
        slot = low + n
        k = tl.load(k_ptr + slot[None, :] * c_s + e[:, None], mask=(slot < end)[None, :] & (e < E)[:, None], other=0.0)
        v = tl.load(v_ptr + slot[:, None] * c_s + e[None, :], mask=(slot < end)[:, None] & (e < E)[None, :], other=0.0)
        score = tl.dot(q, k, input_precision="ieee") * scale
        if WORDS == 0:
            seen = slot[None, :] <= (first + t)[:, None]
        else:  # the 64 bits from slot `low` on, out of two words
            window = tl.full([ROWS], -1, tl.int64).to(tl.uint64, bitcast=True)
            if low + KEYS > first:
                word, shift = (low - first) >> 6, ((low - first) & 63).to(tl.uint64)
                window = _word(bits_row, word, real, WORDS) >> shift
                window |= (_word(bits_row, word + 1, real, WORDS) << 1) << (63 - shift)
            seen = ((window[:, None] >> n[None, :].to(tl.uint64)) & 1) != 0
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(top - base)
        mass = mass * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new

    # Step 3: the result, or this split's part of it
    if DIRECT:
        y_row = y_ptr + ((b * T + t).to(tl.int64) * (G * GROUP) + g * GROUP + r % GROUP) * E
        y = acc / tl.where(mass == 0.0, 1.0, mass)[:, None]
        tl.store(y_row[:, None] + e[None, :], y.to(y_ptr.dtype.element_ty), mask=real[:, None] & (e < E)[None, :])
    else:
        row = (z * SPLITS + split).to(tl.int64) * R + r
        tl.store(sum_ptr + row[:, None] * E + e[None, :], acc, mask=real[:, None] & (e < E)[None, :])
        tl.store(stat_ptr + row * 2, top, mask=real)
        tl.store(stat_ptr + row * 2 + 1, mass, mask=real)


@triton.jit(do_not_specialize=["T", "S", "SPLITS"])
def _combine_kernel(
    sum_ptr, stat_ptr, first_ptr, y_ptr, T, S, SPLIT, SPLITS,
    G: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, WORDS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r, z = tl.program_id(0), tl.program_id(1)
    b, g, t, R = z // G, z % G, r // GROUP, T * GROUP
    live = tl.cdiv(_live(tl.load(first_ptr + b), T, t, S, WORDS), SPLIT)
    e, n = tl.arange(0, WIDTH), tl.arange(0, CHUNK)
    top = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for low in range(0, live, CHUNK):
        row = (z * SPLITS + low + n).to(tl.int64) * R + r
        here = low + n < live
        tops = tl.load(stat_ptr + row * 2, mask=here, other=float("-inf"))
        masses = tl.load(stat_ptr + row * 2 + 1, mask=here, other=0.0)
        sums = tl.load(sum_ptr + row[:, None] * E + e[None, :], mask=here[:, None] & (e < E)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight, fade = tl.exp2(tops - base), tl.exp2(top - base)
        mass = mass * fade + tl.sum(masses * weight, 0)
        acc = acc * fade + tl.sum(sums * weight[:, None], 0)
        top = new
    y = acc / tl.where(mass == 0.0, 1.0, mass)
    y_row = y_ptr + ((b * T + t).to(tl.int64) * (G * GROUP) + g * GROUP + r % GROUP) * E
    tl.store(y_row + e, y.to(y_ptr.dtype.element_ty), mask=e < E)


@on_its_device
def attend(q_BTHE: Tensor, cache_BGSE: Tensor, first_B: Tensor, bits_BTW: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Attention output [B, T, H, E], contiguous and in the queries' dtype, over a cache that already holds the new keys.

    softmax(q k / sqrt(E)) v over the slots that a query sees, with sums in float32: query t of row b sees slot s if
    s < first_B[b], or if bit s - first_B[b] of `bits_BTW[b, t]` is set. A query that sees nothing gives zeros. Keys are split
    as in Flash-Decoding (Dao et al. 2023), parts are added as in Milakov and Gimelshein 2018, arXiv 1805.02867.

    A causal call (`bits_BTW` None) of up to 32 positions gives each row bitwise the same whatever T, B and the other rows are.

    Args:
        q_BTHE: Queries, float32, bfloat16 or float16, E at most 256; any strides, but 1 for E.
        cache_BGSE: One layer's cache [B, 2G, S, E] in the same dtype, keys in heads 0..G-1; any strides, but 1 for E.
        first_B: int32; slot of the row's first new position. Every visible slot must be below S.
        bits_BTW: int64 [B or 1, T, W]; None means causal: slots up to first_B[b] + t.
        out: Receives the result if given; contiguous.
    """
    B, T, H, E = q_BTHE.shape
    G, S = cache_BGSE.shape[1] // 2, cache_BGSE.shape[2]
    group = H // G
    assert q_BTHE.stride(3) == cache_BGSE.stride(3) == 1 and q_BTHE.dtype == cache_BGSE.dtype and E <= 256 and G * group == H
    size = plan(T, group, G, S, E, q_BTHE.dtype, bits_BTW is None)
    y_BTHE = torch.empty(B, T, H, E, dtype=q_BTHE.dtype, device=q_BTHE.device) if out is None else out
    assert y_BTHE.is_contiguous() and y_BTHE.shape == q_BTHE.shape
    if bits_BTW is None:
        words, bits_b = 0, 0
    else:
        assert bits_BTW.shape[1] == T and bits_BTW[0].is_contiguous()
        words, bits_b = bits_BTW.shape[2], bits_BTW.stride(0) if len(bits_BTW) > 1 else 0
    sums = stats = y_BTHE
    if size.splits > 1:
        sums = torch.empty(B * G, size.splits, T * group, E, dtype=torch.float32, device=q_BTHE.device)
        stats = torch.empty(B * G, size.splits, T * group, 2, dtype=torch.float32, device=q_BTHE.device)
    width = max(16, triton.next_power_of_2(E))
    tiles, early = triton.cdiv(T * group, size.rows), dependent_launch(q_BTHE.device)
    _split_kernel[(B * G, size.splits, tiles)](
        q_BTHE, cache_BGSE, first_B, first_B if bits_BTW is None else bits_BTW, y_BTHE, sums, stats,
        T, S, size.split, size.splits, *q_BTHE.stride()[:3], *cache_BGSE.stride()[:3], bits_b, E**-0.5 * LOG2E,
        G, group, E, width, size.rows, size.keys, size.splits == 1, words, num_warps=size.warps, num_stages=size.stages,
        **early,
    )  # fmt: skip
    if size.splits > 1:
        chunk = 32 if size.splits > 16 else 16
        _combine_kernel[(T * group, B * G)](
            sums, stats, first_B, y_BTHE, T, S, size.split, size.splits, G, group, E, width, chunk, words, **early
        )
    return y_BTHE


def attend_eager(
    q_BTHE: Tensor, cache_BGSE: Tensor, first_B: Tensor, bits_BTW: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """`attend` in torch operations, float32 throughout."""
    T, H = q_BTHE.shape[1:3]
    G, S = cache_BGSE.shape[1] // 2, cache_BGSE.shape[2]
    ahead_BTS = (torch.arange(S, device=first_B.device) - first_B[:, None])[:, None].expand(-1, T, -1)
    if bits_BTW is None:
        seen_BTS = ahead_BTS <= torch.arange(T, device=first_B.device)[:, None]
    else:
        word_BTS = ahead_BTS >> 6
        bits_BTS = bits_BTW.expand(len(q_BTHE), -1, -1).gather(2, word_BTS.clamp(0, bits_BTW.shape[2] - 1))
        seen_BTS = (word_BTS < 0) | (word_BTS < bits_BTW.shape[2]) & ((bits_BTS >> (ahead_BTS & 63) & 1) == 1)
    k, v = cache_BGSE.float().repeat_interleave(H // G, 1).chunk(2, 1)
    score_BHTS = q_BTHE.float().transpose(1, 2) @ k.mT * q_BTHE.shape[3] ** -0.5
    weight_BHTS = score_BHTS.masked_fill(~seen_BTS[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    y_BTHE = (weight_BHTS @ v).transpose(1, 2).to(q_BTHE.dtype).contiguous()
    return y_BTHE if out is None else out.copy_(y_BTHE)
