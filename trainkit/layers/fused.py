"""A decoder's layers over a cache as decoding on a GPU runs them: nine kernels per layer.

It computes what `DecoderLayer` does, with fewer roundings: sums stay in float32 until they are added to the residual stream.
With 16-bit weights and up to `MAX_ROWS` rows (B * T) under a causal mask, a row's hidden state and logits are bitwise
independent of the other rows and of their number. So plain decoding and the verification of a chain choose the same tokens.
More rows and float32 weights use the library's matrix products.
"""

# B batch  T positions  M rows: B * T, or packed positions  N outputs  S parts  D hidden  V vocabulary  A taps
# G key-value heads  E head width

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch.nn.functional as F
from torch import Tensor

from trainkit.layers.kernels.add_norm import add_norm
from trainkit.layers.kernels.attend import attend
from trainkit.layers.kernels.few_rows import MAX_ROWS, few_rows, supports
from trainkit.layers.kernels.place import place
from trainkit.layers.packed import Packed
from trainkit.layers.packed_cpu import OnCPU

if TYPE_CHECKING:
    from trainkit.layers.attention import Attention, KernelContext
    from trainkit.layers.blocks import Decoder, DecoderLayer, GatedMLP
    from trainkit.layers.linear import Linear
    from trainkit.layers.norm import RMSNorm


class Block(Protocol):
    """The part of a layer after its first norm, in the target and in drafters."""

    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP


def decode(
    decoder: Decoder, tokens_BT: Tensor, context: KernelContext, cache_BLGSE: Tensor, taps: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """As `Decoder.forward`; `taps` are distinct indices from 0 to the number of layers."""
    assert len(set(taps)) == len(taps)
    residual_MD, layers = decoder.embed(tokens_BT.flatten()), [cast("DecoderLayer", layer) for layer in decoder.layers]
    (M, D), last = residual_MD.shape, len(layers)
    taps_MAD = residual_MD.new_empty(M, len(taps), D)
    hidden_MD, parts_SMD = residual_MD, None
    for index in range(last + 1):
        norm = decoder.norm if index == last else layers[index].attention_norm
        tap_MD = taps_MAD[:, taps.index(index)] if index in taps and index < last else None
        hidden_MD = add_norm(residual_MD, parts_SMD, norm.weight, decoder.shape.norm_eps, tap_MD)
        if index < last:
            parts_SMD = layer_parts(residual_MD, hidden_MD, layers[index], context, cache_BLGSE[:, index])
    if last in taps:
        taps_MAD[:, taps.index(last)] = hidden_MD
    hidden = hidden_MD.view(*tokens_BT.shape, D)
    return hidden, taps_MAD.view(*tokens_BT.shape, len(taps), D) if taps else None


def layer(layer: DecoderLayer, x_BTD: Tensor, context: KernelContext, cache_BGSE: Tensor) -> Tensor:
    """As `DecoderLayer.forward`."""
    residual_MD = x_BTD.flatten(0, 1).clone()
    normed_MD = add_norm(residual_MD, None, layer.attention_norm.weight, layer.attention.norm_eps)
    parts_SMD = layer_parts(residual_MD, normed_MD, layer, context, cache_BGSE)
    return total(residual_MD, parts_SMD).view_as(x_BTD)


def layer_parts(residual_MD: Tensor, normed_MD: Tensor, layer: Block, context: KernelContext, cache_BGSE: Tensor) -> Tensor:
    """The MLP's output in parts [S, M, D], yet to be added to the residual stream, to which attention is added here."""
    parts_SMD = attention_parts(layer.attention, normed_MD, context, cache_BGSE)
    normed_MD = add_norm(residual_MD, parts_SMD, layer.mlp_norm.weight, layer.attention.norm_eps)
    gated_MK = product(normed_MD, layer.mlp.gate_up, layer.mlp.gate_up.bias, silu=True)
    return product(gated_MK, layer.mlp.down, layer.mlp.down.bias)


def attention_parts(attention: Attention, x_MD: Tensor, context: KernelContext, cache_BGSE: Tensor) -> Tensor:
    """Attention's output in parts [S, M, D]; new keys and values are written to the cache first."""
    packing = context.packing
    parts_SMN = product(x_MD, attention.qkv)
    if packing is not None:
        parts_SMN = parts_SMN.index_select(1, packing.packed_BT.flatten())
    q_BTHE = place(
        parts_SMN,
        attention.qkv.bias,
        None if attention.q_norm is None else attention.q_norm.weight,
        None if attention.k_norm is None else attention.k_norm.weight,
        attention.norm_eps,
        context.rope_S2E,
        context.positions_BT,
        context.slots_BT,
        cache_BGSE,
    )
    y_BTHE = attend(q_BTHE, cache_BGSE, context.seen.first_B, context.seen.bits_BTW)
    y_BTD = y_BTHE.flatten(2) if packing is None else packing.pack(y_BTHE.flatten(2))
    return product(y_BTD.flatten(0, 1), attention.out, attention.out.bias)


def product(x_MK: Tensor, linear: Linear, bias_N: Tensor | None = None, silu: bool = False) -> Tensor:
    """Parts [S, M, N] of x w^T + bias, or with `silu` silu(gate) * up [M, N / 2]; by `few_rows` or by the library."""
    return _product(x_MK, linear.weight if linear.packed is None else linear.packed, bias_N, silu)


def _product(x_MK: Tensor, weight: Tensor | Packed | OnCPU, bias_N: Tensor | None = None, silu: bool = False) -> Tensor:
    if len(x_MK) <= MAX_ROWS and not isinstance(weight, OnCPU) and supports(weight):
        parts_SMN = few_rows(x_MK, weight, silu and bias_N is None)
        if bias_N is None:
            return parts_SMN
        parts_SMN[0] += bias_N
        if not silu:
            return parts_SMN
        y_MN = parts_SMN.sum(0).to(x_MK.dtype)
    else:
        y_MN = F.linear(x_MK, weight, bias_N) if isinstance(weight, Tensor) else weight.product(x_MK, bias_N)
        if not silu:
            return y_MN[None]
    gate, up = y_MN.chunk(2, dim=-1)
    return F.silu(gate) * up


def total(residual_MD: Tensor, parts_SMD: Tensor) -> Tensor:
    """The residual stream [M, D] with the parts added, in its dtype."""
    return (residual_MD.float() + parts_SMD.float().sum(0)).to(residual_MD.dtype)


def logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """Logits [..., V] in float32, or in the dtype of `hidden` where a library computes them."""
    parts_SMV = _product(hidden.flatten(0, -2), weight_VD)
    return (parts_SMV[0] if len(parts_SMV) == 1 else parts_SMV.sum(0)).view(*hidden.shape[:-1], -1)
