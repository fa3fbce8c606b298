"""A decoder's forward over a cache in few kernels, as decoding on a GPU runs it: nine of them a layer.

It computes what `Decoder.forward` does, with fewer roundings: sums stay in float32 until they are added to the residual stream.
With 16-bit weights and up to `INVARIANT_ROWS` rows (B * T) of a causal mask, a row's hidden state and logits do not depend, to
the last bit, on the other rows nor on their number. So plain decoding and the verification of a chain take the same tokens.
More rows than `MAX_ROWS` take a library's matrix products, and so do float32 weights.
"""

# B batch  T positions  Q packed positions  M rows: B * T, or Q  N outputs  S parts  D hidden  V vocabulary  A taps
# G key-value heads  E head width

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from trainkit.layers.attend import attend
from trainkit.layers.kernels.add_norm import add_norm
from trainkit.layers.kernels.few_rows import MAX_ROWS, few_rows, supports
from trainkit.layers.kernels.place import place
from trainkit.layers.packed import Packed
from trainkit.layers.visible import Visible

if TYPE_CHECKING:
    from trainkit.layers.attention import Attention, Packing
    from trainkit.layers.blocks import Decoder, GatedMLP
    from trainkit.layers.linear import Linear


@dataclass(frozen=True)
class Positions:
    """What the attention of every layer reads beside its input and its cache.

    Attributes:
        rope_P2E: The rotary table.
        positions_BT: Absolute positions.
        slots_BT: Cache slots of the new keys and values.
        seen: What each query sees.
        packing: If given, rows are packed positions; all else belongs to the padded rows.
    """

    rope_P2E: Tensor
    positions_BT: Tensor
    slots_BT: Tensor
    seen: Visible
    packing: Packing | None


def product(x_MK: Tensor, weight: Tensor | Packed, silu: bool = False) -> Tensor:
    """x w^T in parts [S, M, N], or with `silu` silu(gate) * up [M, N / 2]; as `few_rows`, or by the library."""
    if len(x_MK) <= MAX_ROWS and supports(weight):
        return few_rows(x_MK, weight, silu)
    y_MN = F.linear(x_MK, weight.dense(x_MK.dtype) if isinstance(weight, Packed) else weight)
    if not silu:
        return y_MN[None]
    gate, up = y_MN.chunk(2, dim=-1)
    return F.silu(gate) * up


def attention_parts(attention: Attention, x_MD: Tensor, at: Positions, cache_BGSE: Tensor) -> Tensor:
    """Attention's output in parts [S, M, D]; new keys and values are written to the cache first."""
    parts_SMN = product(x_MD, weight_of(attention.qkv))
    if at.packing is not None:
        parts_SMN = parts_SMN.index_select(1, at.packing.packed_BT.flatten())
    norms = (attention.q_norm, attention.k_norm)
    q_BTHE = place(
        parts_SMN,
        attention.qkv.bias,
        *(None if norm is None else norm.weight for norm in norms),
        attention.norm_eps,
        at.rope_P2E,
        at.positions_BT,
        at.slots_BT,
        cache_BGSE,
    )
    y_BTD = attend(q_BTHE, cache_BGSE, at.seen).flatten(2)
    y_BTD = y_BTD if at.packing is None else at.packing.pack(y_BTD)
    return product(y_BTD.flatten(0, 1), weight_of(attention.out))


def mlp_parts(mlp: GatedMLP, x_MD: Tensor) -> Tensor:
    """The MLP's output in parts [S, M, D]."""
    return product(product(x_MD, weight_of(mlp.gate_up), silu=True), weight_of(mlp.down))


def weight_of(linear: Linear) -> Tensor | Packed:
    """A projection's weight as stored."""
    return linear.weight if linear.packed is None else linear.packed


def forward(
    decoder: Decoder, tokens_BT: Tensor, at: Positions, cache_BLGSE: Tensor, taps: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """As `Decoder.forward`; `taps` are indices from 0 to the number of layers."""
    residual_MD = decoder.embed(tokens_BT.flatten())
    (M, D), depth = residual_MD.shape, len(decoder.layers)
    taps_MAD = residual_MD.new_empty(M, len(taps), D)

    def next_norm(parts_SMD: Tensor | None, index: int) -> Tensor:
        """Adds to the residual stream, and returns the input of layer `index`, or the final hidden state after the last."""
        norm = decoder.norm if index == depth else decoder.layers[index].attention_norm
        tap = taps_MAD[:, taps.index(index)] if index in taps and index < depth else None
        return add_norm(residual_MD, parts_SMD, norm.weight, norm.eps, tap)

    hidden_MD = next_norm(None, 0)
    for index, layer in enumerate(decoder.layers):
        parts_SMD = attention_parts(layer.attention, hidden_MD, at, cache_BLGSE[:, index])
        hidden_MD = add_norm(residual_MD, parts_SMD, layer.mlp_norm.weight, layer.mlp_norm.eps)
        hidden_MD = next_norm(mlp_parts(layer.mlp, hidden_MD), index + 1)
    if depth in taps:
        taps_MAD[:, taps.index(depth)] = hidden_MD
    hidden = hidden_MD.view(*tokens_BT.shape, D)
    return hidden, taps_MAD.view(*tokens_BT.shape, len(taps), D) if taps else None


def logits(hidden: Tensor, weight_VD: Tensor) -> Tensor:
    """float32 logits [..., V], or in the dtype of `hidden` where a library computes them."""
    parts_SMV = product(hidden.flatten(0, -2), weight_VD)
    return (parts_SMV[0] if len(parts_SMV) == 1 else parts_SMV.sum(0)).view(*hidden.shape[:-1], -1)


