"""Which cache slots each query attends to, as lengths and bits on the device.

One form serves chains, trees and prefill, because a round's nodes lie in the slots from its root on: every slot before the root
is visible, and of the round's own slots those whose bit is set. A Triton kernel reads this form directly; CPUs use it as an
additive bias.
"""

# B batch  T queries  S cache slots  N nodes  W words of 64 bits

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Visible:
    """Query t of row b sees slot s if s < first_B[b], or if bit s - first_B[b] of bits_BTW[b, t] is set.

    Attributes:
        first_B: Slots before this one are visible to every query of the row; int32.
        bits_BTW: Bit i % 64 of word i // 64 is that of slot first + i; int64, one row for the whole batch where all are alike.
            None for a causal mask: query t sees the slots up to first + t.
    """

    first_B: Tensor
    bits_BTW: Tensor | None = None

    @staticmethod
    def causal(positions_BT: Tensor) -> Visible:
        """Queries at consecutive positions, each in the slot of its position, that see the slots up to their own."""
        return Visible(positions_BT[:, 0].int())

    def bias(self, T: int, span: int, dtype: torch.dtype) -> Tensor:
        """[B, T, span] additive bias: 0 where visible, else minus infinity. No slot at or past `span` may be visible."""
        device = self.first_B.device
        if self.bits_BTW is None:
            slots_S = torch.arange(span, dtype=torch.int32, device=device)
            last_BT = self.first_B[:, None] if T == 1 else self.first_B[:, None] + slots_S[:T]
            return additive(slots_S > last_BT[..., None], dtype)
        # Column 0 stands for all slots before `first`, the last column for all past the bits.
        (rows, _, W), B = self.bits_BTW.shape, len(self.first_B)
        table_BTM = torch.full((rows, T, 64 * W + 2), float("-inf"), dtype=dtype, device=device)
        table_BTM[..., 0] = 0
        table_BTM[..., 1:-1].masked_fill_(unpack_bits(self.bits_BTW, 64 * W), 0)
        column_BS = (torch.arange(1, span + 1, device=device) - self.first_B[:, None]).clamp_(0, 64 * W + 1)
        return table_BTM.expand(B, -1, -1).gather(2, column_BS[:, None].expand(B, T, span))


def additive(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where masked, else 0."""
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, float("-inf"))


def node_bits(numbers_N: Tensor, size: int) -> Tensor:
    """[N, W] words in which only the bit of each number is set, W words for `size` numbers."""
    word_W = torch.arange(-(-size // 64), device=numbers_N.device)
    return torch.where(numbers_N[:, None] // 64 == word_W, torch.ones_like(numbers_N[:, None]) << numbers_N[:, None] % 64, 0)


def unpack_bits(bits_W: Tensor, size: int) -> Tensor:
    """[..., size] the first bits of the words [..., W], as bool."""
    return (bits_W[..., None] >> torch.arange(64, device=bits_W.device) & 1).flatten(-2)[..., :size].bool()
