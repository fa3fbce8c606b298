"""Hydra heads (Ankner et al. 2024, arXiv 2402.05109): head i reads the target's hidden state and all tokens drafted before it.

At position t the target itself predicts the root, the token at t + 1. Head i reads [h_t; E(x_{t+1}); ...; E(x_{t+1+i})],
where E is the target's embedding, and predicts the token at t + 2 + i. So siblings in a tree have different children. Hydra++
(`prefix`) replaces h_t by the output of a decoder layer over the target's hidden states up to t, with a key-value cache.
"""

# B batch  T positions  D hidden  F frontier nodes  P path  H heads  K ids a head may propose  N counted  I head inputs

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainkit.drafters.base import (
    Accepted,
    Chunk,
    Divergence,
    DraftBatch,
    Drafter,
    Frontier,
    LossOutput,
    State,
    StepOutput,
    TargetHandle,
    TargetShape,
)
from trainkit.layers.attention import causal_bias, document_bias, fold_bias, rotary_table, slot_index
from trainkit.layers.blocks import DecoderLayer
from trainkit.layers.heads import WIDEST, OutputHeads, ResidualBlock, checked_heads, trim_rows
from trainkit.layers.linear import Linear
from trainkit.losses.output import heads_together
from trainkit.models.load import load_decoder


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


class Hydra(Drafter):
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

    taps = (-1,)
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
        super().__init__(target)
        D, V = target.decoder.hidden_size, target.decoder.vocab_size
        self.register_buffer("ids_K", checked_heads(num_heads, num_layers, head, draft_vocab, V), persistent=False)
        self.ids_K: Tensor | None
        self.max_depth, self.num_layers, self.head, self.decay, self.dropout = num_heads, num_layers, head, decay, dropout
        self.prefix = PrefixLayer(target) if prefix else None
        self.blocks: Any = nn.ModuleList(
            nn.Sequential(FirstBlock(index + 2, D), *(ResidualBlock(D) for _ in range(num_layers - 1)))
            for index in range(num_heads)
        )
        self.lm_heads = OutputHeads(num_heads, D, V, self.ids_K, head == "own")

    def initialise(self, target_folder: Path) -> None:
        self.lm_heads.copy_from(load_decoder(target_folder, dtype=torch.float32, layers=False).head_weight.detach(), self.ids_K)

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        dtype = self.blocks[0][0].linear.weight.dtype  # the target may be bfloat16
        assert batch.taps_BTAD is not None
        hidden_BTD = batch.taps_BTAD[:, :, 0].to(dtype)
        if self.prefix is not None:
            hidden_BTD = self.prefix(hidden_BTD, batch.positions_BT, document_bias(batch.document_BT, hidden_BTD.dtype))
        embedded_BTD = batch.handle.embed(batch.tokens_BT).to(dtype)
        inputs_BTI, outputs, counted = hidden_BTD, [], []
        for index, block in enumerate(self.blocks):
            ahead = index + 2
            inputs_BTI = torch.cat(
                [inputs_BTI, embedded_BTD.roll(1 - ahead, 1)], dim=-1
            )  # adds E of the token at t + ahead - 1
            counted_BT, target_ND, labels_N = batch.training_targets(ahead)
            hidden_ND = block(F.dropout(inputs_BTI[counted_BT], self.dropout, self.training))
            projection = self.lm_heads.of(index, batch.handle.head)
            outputs.append(divergence(hidden_ND, projection, target_ND, batch.teacher_head, self.ids_K, labels_N=labels_N))
            counted.append((counted_BT, ahead))
        return heads_together(outputs, [self.decay**index for index in range(len(outputs))], counted)

    # Serving

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        D = self.target.decoder.hidden_size
        state = {
            "hidden": torch.zeros(batch_size, 1, D, device=device, dtype=dtype),  # h_t, t the position before the root
            # the tokens from the root to each node of the level above
            "paths": torch.zeros(batch_size, WIDEST, len(self.blocks), dtype=torch.long, device=device),
        }
        if self.prefix is not None:
            state["cache"] = self.prefix.new_cache(batch_size, slots, device, dtype)
        return state

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        state["hidden"].copy_(self._read(state, chunk.taps_BTAD, chunk.positions_BT, span)[:, -1:])

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        depth, nodes = frontier.depth, frontier.tokens_BF.shape[1]
        paths_BFL = torch.cat([frontier.gather_parents(state["paths"][:, :, :depth]), frontier.tokens_BF[..., None]], dim=-1)
        state["paths"][:, :nodes, : depth + 1].copy_(paths_BFL)
        embedded_BFI = handle.embed(paths_BFL).flatten(2)
        inputs_BFI = torch.cat([state["hidden"].expand(-1, nodes, -1), embedded_BFI.to(state["hidden"].dtype)], dim=-1)
        hidden_BFD = self.blocks[depth](inputs_BFI)
        return StepOutput(self.lm_heads.of(depth, handle.head)(hidden_BFD), self.ids_K, hidden_BFD)

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
        return self.prefix(hidden_BTD, positions_BT, causal_bias(positions_BT, span, hidden_BTD.dtype), state["cache"])

    def step_bytes(self, head_bytes: int) -> int:
        own = super().step_bytes(head_bytes) // len(self.blocks)  # a level reads one head
        return own if self.head == "own" else own + head_bytes

    # Files: a layout of ours, which no other program reads

    def config(self) -> dict[str, Any]:
        return {
            "num_heads": len(self.blocks),
            "num_layers": self.num_layers,
            "prefix": self.prefix is not None,
            "head": self.head,
            "decay": self.decay,
            "dropout": self.dropout,
            "draft_vocab": None if self.ids_K is None else self.ids_K.tolist(),
        }

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "native") -> None:
        tensors = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        if self.ids_K is not None:
            tensors["token_map"] = self.ids_K.clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Hydra:
        drafter, tensors = cls(target, **config), load_file(folder / "model.safetensors")
        ids_K = tensors.pop("token_map", None)
        dtype = next(iter(tensors.values())).dtype
        drafter.to(dtype).load_state_dict(trim_rows(tensors, "lm_heads.", ids_K, drafter.ids_K))
        return drafter.eval()


class PrefixLayer(nn.Module):
    """One decoder layer of the target's sizes over its last hidden states; initially the identity."""

    def __init__(self, target: TargetShape) -> None:
        super().__init__()
        self.shape = replace(target.decoder, num_layers=1)
        self.layer = DecoderLayer(self.shape)
        for name, parameter in self.layer.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.zeros_(parameter) if residual else nn.init.normal_(parameter, std=0.02)
        self.register_buffer("rope", torch.empty(0, 2, self.shape.head_dim), persistent=False)
        self.rope: Tensor

    def _reserve(self, positions: int, like: Tensor) -> None:
        if self.rope.shape[0] < positions:
            self.rope = rotary_table(self.shape, positions).to(device=like.device, dtype=like.dtype)

    def new_cache(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A zeroed cache [B, 1, 2G, slots, E], keys before values."""
        self._reserve(slots, self.layer.attention.qkv.weight)
        G, E = self.shape.num_kv_heads, self.shape.head_dim
        return torch.zeros(batch_size, 1, 2 * G, slots, E, device=device, dtype=dtype)

    def forward(self, hidden_BTD: Tensor, positions_BT: Tensor, bias_BTS: Tensor, cache: Tensor | None = None) -> Tensor:
        """[B, T, D]; with a cache, keys and values go to the slots that equal their positions."""
        if cache is None:
            self._reserve(hidden_BTD.shape[1], hidden_BTD)
        rope = F.embedding(positions_BT, self.rope.flatten(1)).unflatten(-1, self.rope.shape[1:])
        bias = fold_bias(bias_BTS, self.shape.num_heads // self.shape.num_kv_heads)
        if cache is None:
            return self.layer(hidden_BTD, rope, bias)
        return self.layer(hidden_BTD, rope, bias, cache[:, 0], slot_index(positions_BT, cache[:, 0]))
