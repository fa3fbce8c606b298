"""Grouped-query attention over packed text and over a static cache, with rotary positions.

One forward serves training and decoding: keys and values come either from the sequence itself or from cache slots. What each
query sees is an additive bias (training) or a `Visible` (decoding).
"""

# B batch  T positions  D hidden  H query heads  G key-value heads  E head width  L layers  S cache slots  M nodes of a round
# R rows: T positions for each of the H / G query heads that share a key head  Q packed positions of all batch rows
# P positions to move

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.layers import kernels
from trainkit.layers.attend import attend, folded
from trainkit.layers.linear import Linear
from trainkit.layers.norm import RMSNorm
from trainkit.layers.shape import DecoderShape
from trainkit.layers.visible import Visible, additive


def rotary_table(shape: DecoderShape, length: int) -> Tensor:
    """[length, 2, E] float32: cosines, and sines whose first half is negated, so that rotating is x * cos + swap(x) * sin.

    The frequencies are those of transformers' Llama for each `rope_type` (default, linear, llama3, yarn).
    """
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=shape.num_heads * shape.head_dim,
        num_attention_heads=shape.num_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters=dict(shape.rope),
    )
    with torch.device("cpu"):
        rotary = LlamaRotaryEmbedding(config)
    # float32 angles as in transformers; more precise angles would differ from its own at large positions
    angles = torch.arange(length).float()[:, None] * torch.as_tensor(rotary.inv_freq).float()[None]
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], dim=1).float()


MAX_KERNEL_QUERIES = 128
"""Largest number of queries per row for the kernels; with more (prefill, scoring) PyTorch reads each key for many queries."""


class Rotary(nn.Module):
    """The rotary table of a decoder, which grows on request, and what attention reads at given positions."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("table", torch.empty(0, 2, shape.head_dim), persistent=False)
        self.table: Tensor

    def reserve(self, length: int, like: Tensor) -> None:
        """Computes the rows below `length` with the device and dtype of `like`; it allocates, so call it before a capture."""
        if len(self.table) < length:
            self.table = rotary_table(self.shape, length).to(device=like.device, dtype=like.dtype)

    def rows(self, positions_BT: Tensor) -> Tensor:
        """[B, T, 2, E] rows of the table; positions must be below the reserved length."""
        return F.embedding(positions_BT, self.table.flatten(1)).unflatten(-1, self.table.shape[1:])

    def context(
        self,
        positions_BT: Tensor,
        seen: Visible | Tensor,
        slots_BT: Tensor | None = None,
        span: int | None = None,
        packing: Packing | None = None,
    ) -> Context | KernelContext:
        """The context of all layers, computed once; here the implementation is chosen: PyTorch, or kernels over a cache.

        Args:
            positions_BT: Absolute positions.
            seen: What each query sees, of the sequence itself or of a cache; a tensor is an additive bias [B, T, S].
            slots_BT: Cache slots of the new keys and values; None without a cache.
            span: Number of slots that the bias covers: with a cache an upper bound, known on the host, of those in use; T by
                default, which is right without a cache.
            packing: As in `Context`.
        """
        shape, T = self.shape, positions_BT.shape[1]
        if isinstance(seen, Visible):
            few = T <= MAX_KERNEL_QUERIES and shape.head_dim <= 256
            if slots_BT is not None and few and kernels.available(self.table):
                return KernelContext(self.table, positions_BT, slots_BT, seen, packing)
            seen = seen.bias(T, span or T, self.table.dtype)
        if slots_BT is not None:
            slots_BT = slots_BT[:, None, :, None].expand(-1, 2 * shape.num_kv_heads, -1, shape.head_dim)
        return Context(self.rows(positions_BT), folded(seen, shape.num_heads // shape.num_kv_heads), slots_BT, packing)


def rotate(x_BTHE: Tensor, rope_BT2E: Tensor) -> Tensor:
    """Applies rotary positions to every head."""
    cos, sin = rope_BT2E[:, :, :1], rope_BT2E[:, :, 1:]
    return torch.addcmul(x_BTHE * cos, x_BTHE.unflatten(-1, (2, -1)).flip(-2).flatten(-2), sin)


def document_bias(document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, T] additive bias: causal within a document, no attention across documents."""
    same = (document_BT[:, :, None] == document_BT[:, None, :]).tril()
    return additive(~same, dtype)


@dataclass(frozen=True)
class Packing:
    """Batch rows of unequal length, concatenated into one row of Q positions.

    Modules that compute each position independently run on the Q packed positions. Only attention runs on batch rows, padded to
    the longest. A pad repeats the first position of its row; its cache slot is beyond the row's positions, so no query attends
    to it.

    Attributes:
        lengths_B: Number of positions of each row, at least 1.
        packed_BT: Packed index of each padded position.
        padded_Q: Flat index, row by row, into the padded positions of each packed position.
    """

    lengths_B: Tensor
    packed_BT: Tensor
    padded_Q: Tensor

    @staticmethod
    def from_lengths(lengths_B: Tensor, longest: int, total: int) -> Packing:
        """The packing of rows of these lengths; maximum and sum are passed in so that no device-to-host sync is needed."""
        ends_B = lengths_B.cumsum(0)
        starts_B = ends_B - lengths_B
        column_T = torch.arange(longest, device=lengths_B.device)
        packed_BT = starts_B[:, None] + torch.where(column_T < lengths_B[:, None], column_T, 0)
        index_Q = torch.arange(total, device=lengths_B.device)
        row_Q = torch.searchsorted(ends_B, index_Q, right=True)
        return Packing(lengths_B, packed_BT, row_Q * longest + index_Q - starts_B[row_Q])

    def pack(self, padded_BT: Tensor) -> Tensor:
        """[B, T, ...] -> [1, Q, ...]."""
        return padded_BT.flatten(0, 1).index_select(0, self.padded_Q)[None]

    def pad(self, packed_1Q: Tensor) -> Tensor:
        """[1, Q, ...] -> [B, T, ...]."""
        return packed_1Q[0].index_select(0, self.packed_BT.flatten()).unflatten(0, self.packed_BT.shape)


@dataclass(frozen=True)
class Context:
    """What the attention of every layer reads beside its input and its cache; made by `Rotary.context`.

    Attributes:
        rope_BT2E: Rows of `rotary_table` at the positions.
        bias_B1RS: Additive bias of the folded rows; S is T without a cache, else at most the number of cache slots.
        slots_BGTE: Slot of each new key and value, as an index for `scatter` ([B, 2G, T, E]); None without a cache.
        packing: If given, input and output are packed [1, Q, D]; all else belongs to the padded rows.
    """

    rope_BT2E: Tensor
    bias_B1RS: Tensor
    slots_BGTE: Tensor | None
    packing: Packing | None


@dataclass(frozen=True)
class KernelContext:
    """As `Context`, for layers that run in kernels over a cache (layers/fused.py).

    Attributes:
        rope_S2E: The rotary table.
        positions_BT: Absolute positions.
        slots_BT: Cache slots of the new keys and values.
        seen: What each query sees.
        packing: As in `Context`.
    """

    rope_S2E: Tensor
    positions_BT: Tensor
    slots_BT: Tensor
    seen: Visible
    packing: Packing | None


class Attention(nn.Module):
    """Attention with query, key and value projections fused into one matrix, rows in the order q, k, v.

    Args:
        shape: Sizes of the decoder.
        input_size: Width of the input; the hidden size by default, twice that in EAGLE-3.
    """

    def __init__(self, shape: DecoderShape, input_size: int | None = None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.norm_eps = shape.norm_eps
        rows = (self.heads + 2 * self.kv_heads) * self.width
        self.qkv = Linear(input_size or shape.hidden_size, rows, bias=shape.qkv_bias)
        self.out = Linear(self.heads * self.width, shape.hidden_size, bias=shape.out_bias)
        self.q_norm = RMSNorm(self.width, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = RMSNorm(self.width, eps=shape.norm_eps) if shape.qk_norm else None

    def forward(self, x_BTD: Tensor, context: Context, cache_BGSE: Tensor | None = None) -> Tensor:
        """Attention output [B, T, D], within the sequence or over a cache; new keys and values are written to the cache first.

        Args:
            x_BTD: Normalised input.
            context: Positions, mask and cache slots.
            cache_BGSE: This layer's cache [B, 2G, slots, E], keys before values; written in place.
        """
        H, G, packing = self.heads, self.kv_heads, context.packing
        qk, v = self.projected(x_BTD, context.rope_BT2E, packing)
        q_BTHE, k = qk[:, :, :H], qk[:, :, H:]
        if cache_BGSE is None:
            y_BTHE = attend(q_BTHE, k.transpose(1, 2), v.transpose(1, 2), context.bias_B1RS)
        else:
            assert context.slots_BGTE is not None
            cache_BGSE.scatter_(2, context.slots_BGTE, torch.cat([k, v], dim=2).transpose(1, 2))
            keys, values = cache_BGSE[:, :, : context.bias_B1RS.shape[3]].split(G, dim=1)
            y_BTHE = attend(q_BTHE, keys, values, context.bias_B1RS, alone=self.qkv.packed is not None)
        y_BTD = y_BTHE.flatten(2)
        return self.out(y_BTD if packing is None else packing.pack(y_BTD))

    def projected(self, x_BTD: Tensor, rope_BT2E: Tensor, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
        """Rotated queries and keys [B, T, H + G, E], queries first, and values [B, T, G, E]."""
        H, G = self.heads, self.kv_heads
        qkv = self.qkv(x_BTD)
        qkv = (qkv if packing is None else packing.pad(qkv)).unflatten(-1, (H + 2 * G, self.width))
        qk, v = qkv[:, :, : H + G], qkv[:, :, H + G :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], dim=2)
        return rotate(qk, rope_BT2E), v


def move_slots(cache_BLGSE: Tensor, from_BP: Tensor, to_B: Tensor) -> None:
    """Copies cache slots `from_BP` to `to_B`, `to_B` + 1, ..., which compacts an accepted path; the ranges may overlap."""
    if kernels.available(cache_BLGSE):
        from trainkit.layers.kernels.move import move_slots as move_in_kernel

        return move_in_kernel(cache_BLGSE, from_BP, to_B)
    B, L, G, _, E = cache_BLGSE.shape
    index = from_BP[:, None, None, :, None].expand(B, L, G, from_BP.shape[1], E)
    path = cache_BLGSE.gather(3, index)
    to_BP = to_B[:, None] + torch.arange(from_BP.shape[1], device=to_B.device)
    cache_BLGSE.scatter_(3, to_BP[:, None, None, :, None].expand_as(path), path)
