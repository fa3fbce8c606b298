"""Hydra heads (Ankner et al. 2024, arXiv 2402.05109): head i reads the target's hidden state and all tokens drafted before it.

Head i reads [h_t; E(x_{t+1}); ...; E(x_{t+1+i})], where E is the target's embedding, and predicts the token at t + 2 + i. So
siblings in a tree have different children. Hydra++ (`prefix`) replaces h_t by the output of a decoder layer over the target's
hidden states up to t, with a key-value cache.
"""

# B batch  T positions  D hidden  F frontier nodes  P path  I inputs of a head  L tokens from the root to a node

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.drafters.base import WIDEST, Accepted, Chunk, Divergence, DraftBatch, Frontier, State, StepOutput
from trainkit.drafters.heads import HeadDrafter, ResidualBlock
from trainkit.layers.attention import Rotary, document_bias
from trainkit.layers.blocks import DecoderLayer, draw_weights
from trainkit.layers.linear import Linear
from trainkit.layers.visible import Visible
from trainkit.losses.output import LossOutput
from trainkit.models.load import with_supported_rope
from trainkit.models.shape import TargetHandle, TargetShape


class FirstBlock(nn.Module):
    """R x + silu(W x + b), from several concatenated states to one; initially R selects the first of them and W, b are zero."""

    def __init__(self, inputs: int, hidden_size: int) -> None:
        super().__init__()
        self.residual = Linear(inputs * hidden_size, hidden_size, bias=False)
        self.linear = Linear(inputs * hidden_size, hidden_size)
        with torch.no_grad():
            self.residual.weight.copy_(torch.eye(hidden_size, inputs * hidden_size))
            self.linear.weight.zero_()
            self.linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + F.silu(self.linear(x))


class Hydra(HeadDrafter):
    """Sequentially dependent heads.

    Args:
        target: Sizes of the target.
        num_heads: Number of heads H, the largest number of draft tokens.
        num_layers: Blocks per head; the first fuses the inputs, the others are residual.
        prefix: Whether a decoder layer over the target's hidden states precedes the heads (Hydra++).
        head: `own` gives each head a projection of its own, copied from the target's; `target` shares the target's.
        decay: Weight of head i in the loss is decay^i.
        dropout: Dropout probability of the heads' inputs in training.
        draft_vocab: Token ids the heads may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default.
            Requires `head: own`.
    """

    resumable = True
    max_width = WIDEST

    def __init__(
        self,
        target: TargetShape,
        *,
        num_heads: int = 4,
        num_layers: int = 1,
        prefix: bool = False,
        head: Literal["own", "target"] = "own",
        decay: float = 1.0,
        dropout: float = 0.0,
        draft_vocab: list[int] | str | None = None,
    ) -> None:
        super().__init__(target, num_heads, num_layers, head, decay, draft_vocab)
        D, self.dropout = target.decoder.hidden_size, dropout
        self.prefix = PrefixLayer(target) if prefix else None
        self.set_blocks(
            nn.Sequential(FirstBlock(index + 2, D), *(ResidualBlock(D) for _ in range(num_layers - 1)))
            for index in range(num_heads)
        )

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        return self.heads_loss(batch, divergence, self._inputs(batch))

    def _inputs(self, batch: DraftBatch) -> Iterator[Tensor]:
        """[B, T, I] inputs of each head; each adds one embedding to those of the head before it."""
        assert batch.taps_BTAD is not None
        dtype = self.blocks[0][0].linear.weight.dtype  # the target may be bfloat16
        inputs_BTI = batch.taps_BTAD[:, :, 0].to(dtype)
        if self.prefix is not None:
            inputs_BTI = self.prefix(inputs_BTI, batch.positions_BT, document_bias(batch.document_BT, dtype))
        embedded_BTD = batch.handle.embed(batch.tokens_BT).to(dtype)
        for ahead in range(1, self.num_heads + 1):
            inputs_BTI = torch.cat([inputs_BTI, embedded_BTD.roll(-ahead, 1)], dim=-1)
            yield inputs_BTI

    # Serving

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        D = self.target.decoder.hidden_size
        state = {
            "hidden": torch.zeros(batch_size, 1, D, device=device, dtype=dtype),  # h_t, t the position before the root
            # the tokens from the root to each node of the level above
            "paths": torch.zeros(batch_size, WIDEST, self.num_heads, dtype=torch.long, device=device),
        }
        if self.prefix is not None:
            state["cache"] = self.prefix.new_cache(batch_size, slots, device, dtype)
        return state

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        state["hidden"].copy_(chunk.last(self._read(state, chunk.taps_BTAD, chunk.positions_BT, span)))

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        depth, nodes = frontier.depth, frontier.tokens_BF.shape[1]
        paths_BFL = torch.cat([frontier.gather_parents(state["paths"][:, :, :depth]), frontier.tokens_BF[..., None]], dim=-1)
        state["paths"][:, :nodes, : depth + 1].copy_(paths_BFL)
        embedded_BFI = handle.embed(paths_BFL).flatten(2)
        inputs_BFI = torch.cat([state["hidden"].expand(-1, nodes, -1), embedded_BFI.to(state["hidden"].dtype)], dim=-1)
        hidden_BFD = self.blocks[depth](inputs_BFI)
        return StepOutput(self.projection(depth, handle)(hidden_BFD), self.ids_K, hidden_BFD)

    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        # nodes past the accepted path are cached too; the next rounds overwrite them before any query sees them
        hidden_BPD = self._read(state, accepted.taps_BPAD, accepted.positions_BP, span)
        state["hidden"].copy_(accepted.last(hidden_BPD, state["hidden"]))

    def _read(self, state: State, taps_BTAD: Tensor | None, positions_BT: Tensor, span: int) -> Tensor:
        """[B, T, D] the target's last hidden states, after the prefix layer if there is one."""
        assert taps_BTAD is not None
        hidden_BTD = taps_BTAD[:, :, 0]
        if self.prefix is None:
            return hidden_BTD
        return self.prefix(hidden_BTD, positions_BT, Visible.causal(positions_BT), state["cache"], span)

    def config(self) -> dict[str, Any]:
        return super().config() | {"prefix": self.prefix is not None}


class PrefixLayer(nn.Module):
    """One decoder layer of the target's sizes over its last hidden states; initially the identity."""

    def __init__(self, target: TargetShape) -> None:
        super().__init__()
        self.shape = with_supported_rope(replace(target.decoder, num_layers=1))
        self.layer = DecoderLayer(self.shape)
        draw_weights(self.layer, residual_std=0.0)
        self.rope = Rotary(self.shape)

    def new_cache(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A zeroed cache [B, 2G, slots, E], keys before values."""
        self.rope.reserve(slots, self.layer.attention.qkv.weight)
        return torch.zeros(batch_size, 2 * self.shape.num_kv_heads, slots, self.shape.head_dim, device=device, dtype=dtype)

    def forward(
        self,
        hidden_BTD: Tensor,
        positions_BT: Tensor,
        seen: Visible | Tensor,
        cache: Tensor | None = None,
        span: int | None = None,
    ) -> Tensor:
        """[B, T, D]; with a cache, keys and values go to the slots that equal their positions."""
        if cache is None:
            self.rope.reserve(hidden_BTD.shape[1], hidden_BTD)
        return self.layer(hidden_BTD, self.rope.context(positions_BT, seen, positions_BT, span), cache)
