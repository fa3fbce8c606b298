"""Medusa heads (Cai et al. 2024, arXiv 2401.10774): head i reads the target's hidden state and predicts the token i + 2 ahead.

A head does not read what the other heads propose, so all nodes of a level have the same children.
"""

# B batch  T positions  D hidden  F frontier nodes  P path  H heads  K ids a head may propose

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from trainkit.drafters.base import Accepted, Chunk, Divergence, DraftBatch, Frontier, State, StepOutput
from trainkit.drafters.heads import HeadDrafter, ResidualBlock
from trainkit.drafters.medusa.outside import check_heads, is_medusa, read_heads
from trainkit.losses.output import LossOutput
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.weights import check_finite

_NAMES, _FILE_NAMES = re.compile(r"(blocks\.\d+)\.(\d+)\.linear\.(.*)"), re.compile(r"(blocks\.\d+)\.layers\.(\d+)\.(.*)")


class Medusa(HeadDrafter):
    """Heads of residual blocks, each with a vocabulary projection of its own or with the target's.

    Args:
        target: Sizes of the target.
        num_heads: Number of heads H, the largest number of draft tokens.
        num_layers: Residual blocks per head.
        head: `own` gives each head a projection of its own, copied from the target's; `target` shares the target's.
        decay: Weight of head i in the loss is decay^i.
        draft_vocab: Token ids the heads may propose, ascending, or a JSON file of them (`trainkit vocab`); all by default.
            Requires `head: own`.
    """

    resumable = True
    formats: ClassVar[Mapping[str, str]] = {"native": "vllm", "vllm": "vllm"}

    def __init__(
        self,
        target: TargetShape,
        *,
        num_heads: int = 4,
        num_layers: int = 1,
        head: Literal["own", "target"] = "own",
        decay: float = 1.0,
        draft_vocab: list[int] | str | None = None,
    ) -> None:
        super().__init__(target, num_heads, num_layers, head, decay, draft_vocab)
        D = target.decoder.hidden_size
        self.set_blocks(nn.Sequential(*(ResidualBlock(D) for _ in range(num_layers))) for _ in range(num_heads))

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        assert batch.taps_BTAD is not None
        hidden_BTD = batch.taps_BTAD[:, :, 0].to(self.blocks[0][0].linear.weight.dtype)  # the target may be bfloat16
        return self.heads_loss(batch, divergence, repeat(hidden_BTD, self.num_heads))

    # Serving: all that is cached is the target's hidden state before the root

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        return {"hidden": torch.zeros(batch_size, 1, self.target.decoder.hidden_size, device=device, dtype=dtype)}

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        assert chunk.taps_BTAD is not None
        state["hidden"].copy_(chunk.last(chunk.taps_BTAD)[:, :, 0])

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        hidden_B1D = self.blocks[frontier.depth](state["hidden"])
        logits_B1K = self.projection(frontier.depth, handle)(hidden_B1D)
        nodes = frontier.tokens_BF.shape[1]
        return StepOutput(logits_B1K.expand(-1, nodes, -1), self.ids_K, hidden_B1D.expand(-1, nodes, -1))

    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        assert accepted.taps_BPAD is not None
        state["hidden"].copy_(accepted.last(accepted.taps_BPAD[:, :, 0], state["hidden"]))

    # Files: the layout that vLLM up to 0.32 loads

    def layout_shapes(self, layout: str) -> dict[str, tuple[int, ...]] | None:
        if self.head == "target":  # vLLM would look for the projections in this file and leave them uninitialised
            return None
        D, K, heads = self.target.decoder.hidden_size, self.draft_vocab_size, range(self.num_heads)
        blocks = [f"blocks.{head}.layers.{layer}" for head in heads for layer in range(self.num_layers)]
        shapes: dict[str, tuple[int, ...]] = {f"{block}.weight": (D, D) for block in blocks}
        shapes |= {f"{block}.bias": (D,) for block in blocks} | {f"lm_heads.{head}.weight": (K, D) for head in heads}
        return shapes if self.ids_K is None else shapes | {"token_map": (K,)}

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "vllm") -> None:
        tensors = {_NAMES.sub(r"\1.layers.\2.\3", name): value for name, value in self.file_tensors(dtype).items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if self.head == "target":
            return  # without config.json vLLM does not take the folder for Medusa heads
        config = {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": self.target.decoder.hidden_size,
            "vocab_size": self.target.decoder.vocab_size,
            "num_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "medusa_fc_bias": True,
            "original_lm_head": False,
            "truncated_vocab_size": self.draft_vocab_size,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def claims(cls, folder: Path) -> bool:
        """Whether the folder holds heads of the original training code, or in vLLM's layout."""
        return is_medusa(folder)

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Medusa:
        if config:
            drafter, tensors = cls(target, **config), load_file(folder / "model.safetensors")
        else:  # written by another program
            tensors, heads, layers = read_heads(folder)
            ids = tensors["token_map"].tolist() if "token_map" in tensors else None
            drafter = cls(target, num_heads=heads, num_layers=layers, draft_vocab=ids)
            check_heads(tensors, drafter.layout_shapes("vllm") or {}, folder)
            check_finite(tensors.items(), str(folder))
        return drafter.load_tensors({_FILE_NAMES.sub(r"\1.\2.linear.\3", name): value for name, value in tensors.items()})
