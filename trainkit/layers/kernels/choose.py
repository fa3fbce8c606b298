"""The choice of a token from logits: temperature, Gumbel noise and argmax, without a tensor of noise or scores."""

# B batch  R rows of logits of one text  V vocabulary  N blocks

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainkit.layers.kernels.launch import on_its_device

BLOCK = 1024
"""Number of logits that one program reads."""


@triton.jit
def _mix(x):
    """`runner.sampling.mix`, on uint32, whose shifts bring in zeros."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _best_of_block(
    logits,
    temperatures,
    keys,
    positions,
    values,
    tokens,
    maxima,
    sums,
    R,
    V,
    N,
    logits_text_stride,
    logits_row_stride,
    key_stride,
    position_text_stride,
    position_row_stride,
    SALT: tl.constexpr,
    BLOCK: tl.constexpr,
    PROCESSED: tl.constexpr,
):
    # Step 1: this block's logits. One that is not a number counts as +inf, which makes the row invalid.
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, r = row // R, row % R
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < V
    x = tl.load(logits + b * logits_text_stride + r * logits_row_stride + token, mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    temperature = tl.load(temperatures + b)
    if PROCESSED and temperature > 0:
        x = tl.div_rn(x, temperature)
    maximum = tl.max(x, axis=0)
    tl.store(maxima + row * N + block, maximum)
    tl.store(sums + row * N + block, tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - maximum)), axis=0))
    # Step 2: temperature and noise, a hash of key, position, stream and token, as `gumbel` of runner/sampling.py computes it.
    if temperature > 0:
        first = tl.load(keys + b * key_stride).to(tl.uint32, bitcast=True)
        second = tl.load(keys + b * key_stride + 1).to(tl.uint32, bitcast=True)
        position = tl.load(positions + b * position_text_stride + r * position_row_stride).to(tl.uint32)
        hashed = _mix(_mix(position ^ first) ^ SALT)
        h = _mix((_mix(token.to(tl.uint32) ^ hashed) + second) ^ (hashed * 0x27D4EB2F))
        u = tl.minimum((h.to(tl.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
        w = 1.0 - u
        exponential = tl.where(w == 1.0, u, tl.div_rn(tl.log(w) * u, w - 1.0))  # -log1p(-u), as precise for a small u
        if not PROCESSED:
            x = tl.div_rn(x, temperature)
        x -= tl.log(exponential)
    # Step 3: the best; of equal ones the lowest id.
    value, index = tl.max(x, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * N + block, value)
    tl.store(tokens + row * N + block, block * BLOCK + index)


@triton.jit
def _best_of_blocks(
    logits,
    temperatures,
    values,
    tokens,
    maxima,
    sums,
    chosen,
    logprobs,
    R,
    N,
    logits_text_stride,
    logits_row_stride,
    LOGPROBS: tl.constexpr,
    PROCESSED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    inside, at = block < N, row * N + block
    maxima_N = tl.load(maxima + at, mask=inside, other=float("-inf"))
    maximum = tl.max(maxima_N, axis=0)
    best = tl.argmax(tl.load(values + at, mask=inside, other=float("-inf")), axis=0, tie_break_left=True)
    token = tl.load(tokens + row * N + best)
    tl.store(chosen + row, tl.where((maximum > float("-inf")) & (maximum < float("inf")), token, -1))
    if LOGPROBS:
        total = tl.sum(tl.load(sums + at, mask=inside, other=0.0) * tl.exp(maxima_N - maximum), axis=0)
        logit = tl.load(logits + row // R * logits_text_stride + row % R * logits_row_stride + token).to(tl.float32)
        if PROCESSED:
            temperature = tl.load(temperatures + row // R)
            logit = tl.div_rn(logit, tl.where(temperature > 0, temperature, 1.0))
        tl.store(logprobs + row, logit - maximum - tl.log(total))


@on_its_device
def choose(
    logits_BRV: Tensor,
    temperature_B: Tensor,
    keys_B2: Tensor,
    positions_BR: Tensor,
    stream: int,
    logprobs: bool = False,
    processed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Tokens [B, R] that maximise logit / temperature + Gumbel noise, and on request their log-probabilities [B, R].

    The tokens are those of `Sampling.process` without top-k and top-p, plus `gumbel`, and `argmax`: from the same hash, with
    logarithms that may differ in their last bits. Of equal tokens the lowest id is chosen. A row with a logit that is not a
    number or +inf, or without a finite one, gets token -1.

    Args:
        logits_BRV: Logits in any dtype.
        temperature_B: float32; 0 means no noise.
        keys_B2: int32, from `request_keys`.
        positions_BR: Absolute position of the token being chosen, an integer.
        stream: Purpose of the draw, as in `uniform` of runner/sampling.py.
        logprobs: Also return the chosen tokens' log-probabilities, float32; otherwise None.
        processed: Log-probabilities at the text's temperature, where it is above 0; otherwise at temperature 1.
    """
    B, R, V = logits_BRV.shape
    N, device = triton.cdiv(V, BLOCK), logits_BRV.device
    assert logits_BRV.stride(2) == keys_B2.stride(1) == temperature_B.stride(0) == 1 and positions_BR.shape == (B, R)
    values, maxima, sums = (torch.empty(B * R, N, device=device) for _ in range(3))
    tokens = torch.empty(B * R, N, device=device, dtype=torch.int32)
    chosen_BR = torch.empty(B, R, device=device, dtype=torch.long)
    logprobs_BR = torch.empty(B, R, device=device) if logprobs else None
    _best_of_block[(N, B * R)](
        logits_BRV,
        temperature_B,
        keys_B2,
        positions_BR,
        values,
        tokens,
        maxima,
        sums,
        R,
        V,
        N,
        *logits_BRV.stride()[:2],
        keys_B2.stride(0),
        *positions_BR.stride(),
        SALT=(stream * 0x9E3779B1 + 0x7F4A7C15) & 0x7FFFFFFF,
        BLOCK=BLOCK,
        PROCESSED=processed,
        num_warps=4,
    )
    _best_of_blocks[(B * R,)](
        logits_BRV,
        temperature_B,
        values,
        tokens,
        maxima,
        sums,
        chosen_BR,
        values if logprobs_BR is None else logprobs_BR,
        R,
        N,
        *logits_BRV.stride()[:2],
        LOGPROBS=logprobs,
        PROCESSED=processed,
        BLOCKS=triton.next_power_of_2(N),
        num_warps=1,
    )
    return chosen_BR, logprobs_BR
