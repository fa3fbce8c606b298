"""Base of the kinds `medusa` and `hydra`: heads on the target's last hidden state, one for each token ahead.

At position t the target itself predicts the token at t + 1, the root of a round; head i predicts the token at t + 2 + i.
"""

# B batch  T positions  D hidden  K ids a head may propose  V vocabulary  N counted positions  I inputs of a head

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.drafters.base import Divergence, DraftBatch, Drafter
from trainkit.errors import UserError
from trainkit.layers.linear import Linear
from trainkit.losses.output import LossOutput
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.target import FrozenTarget


class ResidualBlock(nn.Module):
    """x + silu(W x + b); W and b start at zero, so that a new head equals its projection (arXiv 2401.10774, 2.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class HeadDrafter(Drafter):
    """Heads of blocks, each followed by a projection to the vocabulary: its own (`head: own`) or the target's output head.

    A subclass passes its arguments to this constructor, then its blocks to `set_blocks`; see `Medusa` for their meaning.

    Attributes:
        blocks: One network per head.
        lm_heads: One projection per head; empty if the heads share the target's.
        dropout: Dropout probability of the inputs of the blocks in training.
    """

    taps = (-1,)
    dropout = 0.0
    blocks: Any
    lm_heads: nn.ModuleList

    def __init__(
        self, target: TargetShape, num_heads: int, num_layers: int, head: str, decay: float, draft_vocab: list[int] | str | None
    ) -> None:
        super().__init__(target, draft_vocab)
        for name, value in (("num_heads", num_heads), ("num_layers", num_layers)):
            if value < 1:
                raise UserError(f"drafter.{name}: {value} must be at least 1")
        if head == "target" and draft_vocab is not None:
            raise UserError("drafter.draft_vocab: the target's head has all ids; set drafter.head: own")
        self.num_heads = self.max_depth = num_heads
        self.num_layers, self.head, self.decay = num_layers, head, decay

    def set_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Registers the blocks, and the projections that follow them."""
        self.blocks, D = nn.ModuleList(blocks), self.target.decoder.hidden_size
        own = range(self.num_heads if self.head == "own" else 0)
        self.lm_heads = nn.ModuleList(Linear(D, self.draft_vocab_size, bias=False) for _ in own)

    def initialise(self, target: FrozenTarget) -> None:
        self.copy_head(target.head_weight)

    @torch.no_grad()
    def copy_head(self, weight_VD: Tensor) -> None:
        """Sets every projection of the heads' own to the target's output head."""
        for projection in self.lm_heads:
            projection.weight.copy_(weight_VD if self.ids_K is None else weight_VD[self.ids_K])  # type: ignore[operator]

    def projection(self, index: int, handle: TargetHandle) -> Callable[[Tensor], Tensor]:
        """The projection to the vocabulary of head `index`."""
        return self.lm_heads[index] if len(self.lm_heads) else handle.head

    def heads_loss(self, batch: DraftBatch, divergence: Divergence, inputs: Iterable[Tensor]) -> LossOutput:
        """The sum over heads i of decay^i * (loss of head i), where `inputs` has the input [B, T, I] of each head's block."""
        hidden, counted = [], []
        for index, (block, inputs_BTI) in enumerate(zip(self.blocks, inputs, strict=True)):
            counted_BT = batch.label_mask(index + 2)
            hidden.append(block(F.dropout(inputs_BTI[counted_BT], self.dropout, self.training)))
            counted.append((counted_BT, index + 2))
        projections = [self.projection(index, batch.handle) for index in range(self.num_heads)]
        head = projections if len(self.lm_heads) else projections[0]
        return batch.heads_loss(divergence, hidden, head, counted, self.ids_K, self.decay)

    def step_bytes(self, head_bytes: int) -> int:
        own = super().step_bytes(head_bytes) // self.num_heads  # a level reads one head
        return own if self.head == "own" else own + head_bytes
