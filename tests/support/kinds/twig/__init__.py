"""A kind for tests: two recurrent steps over the target's taps, drafting a small tree.

It proves that trainer, exporter and runner know no kind by name: it needs taps, keeps no cache, reads its parent's state
through the frontier, drafts siblings, and exports in its own layout.
"""

# B batch  T positions  A taps  D hidden  F frontier nodes  P path  N counted tokens

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

MAX_WIDTH = 4


class Twig(Drafter):
    """h0 = mix(W taps, E(root)), h' = mix(h, E(token)); logits are the target's head on it.

    Args:
        target: Sizes of the target.
        first_tap: Index of a hidden state that it reads beside the last one.
    """

    default_tree = ((0,), (1,), (0, 0), (0, 1), (1, 0))
    max_width = MAX_WIDTH

    def __init__(self, target: TargetShape, *, first_tap: int = 1) -> None:
        super().__init__(target)
        D = target.decoder.hidden_size
        self.taps = (first_tap, -1)
        self.fuse = nn.Linear(2 * D, D)
        self.mix = nn.Linear(2 * D, D)

    def _grow(self, hidden: Tensor, tokens: Tensor, handle: TargetHandle) -> Tensor:
        return hidden + F.silu(self.mix(torch.cat([hidden, handle.embed(tokens).to(hidden.dtype)], dim=-1)))

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        assert batch.taps_BTAD is not None
        hidden_BTD = self.fuse(batch.taps_BTAD.flatten(2).to(self.fuse.weight.dtype))
        hidden, counted = [], []
        for step in (1, 2):
            # after reading x_{t+step}, position t predicts x_{t+step+1}
            counted.append((batch.label_mask(step + 1), step + 1))
            hidden_BTD = self._grow(hidden_BTD, batch.tokens_BT.roll(-step, 1), batch.handle)
            hidden.append(hidden_BTD[counted[-1][0]])
        return batch.heads_loss(divergence, hidden, batch.handle.head, counted, None, decay=1.0)

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        D = self.target.decoder.hidden_size
        return {
            "feature": torch.zeros(batch_size, 1, D, device=device, dtype=dtype),
            "level": torch.zeros(batch_size, MAX_WIDTH, D, device=device, dtype=dtype),
        }

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        assert chunk.taps_BTAD is not None
        state["feature"].copy_(self.fuse(chunk.last(chunk.taps_BTAD).flatten(2)))

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        parents = frontier.gather_parents(state["level"]) if frontier.depth else state["feature"]
        hidden = self._grow(parents, frontier.tokens_BF, handle)
        state["level"][:, : hidden.shape[1]].copy_(hidden)
        return StepOutput(handle.head(hidden), None, hidden)

    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        assert accepted.taps_BPAD is not None
        feature_BPD = self.fuse(accepted.taps_BPAD.flatten(2))
        state["feature"].copy_(accepted.last(feature_BPD, state["feature"]))

    def step_bytes(self, head_bytes: int) -> int:
        return self.mix.weight.numel() * self.mix.weight.element_size() + head_bytes

    def config(self) -> dict[str, Any]:
        return {"first_tap": self.taps[0]}

    def export(self, folder: Path, dtype: torch.dtype, layout: str = "native") -> None:
        save_file({name: value.to(dtype) for name, value in self.state_dict().items()}, folder / "twig.safetensors")

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> Twig:
        twig = cls(target, **config)
        weights = load_file(folder / "twig.safetensors")
        twig.to(next(iter(weights.values())).dtype).load_state_dict(weights)
        return twig.eval()
