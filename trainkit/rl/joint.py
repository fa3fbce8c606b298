"""Trains the drafter in the policy's own forward pass, instead of in a pass of its own.

NeMo-RL's way (its `draft` options): in each micro-batch the drafter learns from the hidden states that the policy's loss has
computed anyway. That saves the target's forward pass; the drafter reads every response, where `Refresh` samples some. Hidden
states are detached, so that the policy's objective stays what it is. A weight of this loss (0.1 there) would therefore only
scale the gradient of the drafter's own AdamW, which is invariant to it; `lr` is the setting.
"""

# B rows  T positions  R responses  L response tokens

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainkit.drafters.base import DraftBatch, Drafter
from trainkit.errors import UserError
from trainkit.losses.chunked import ChunkedDivergence
from trainkit.models.target import LiveTarget
from trainkit.rl.refresh import Positions, Refresh
from trainkit.rl.types import Group


class JointRefresh(Refresh):
    """Trains the drafter at each optimiser step of the policy, on the same micro-batches.

    Args:
        drafter: The runner's drafter, whose weights are replaced in place.
        source: Bundle or folder that it was loaded from.
        target: The policy; its architecture must separate packed documents.
        lr: Learning rate of AdamW, constant.
        loss: Any divergence, at the sampling temperature; TV by default.
        positions: Positions that count: `all` of the responses; `rejected`: drawn with the probability that the first draft
            token is rejected there; `mixed`: those, and as many of the others at random.
        seed: Seed of the choice of positions.
        reduce: Sums a tensor over all ranks; every rank then holds the same drafter.
    """

    def __init__(
        self,
        drafter: Drafter,
        source: str | Path,
        target: LiveTarget,
        lr: float = 1e-5,
        loss: ChunkedDivergence | None = None,
        positions: Positions = "all",
        seed: int = 0,
        reduce: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        super().__init__(drafter, source, target, lr=lr, loss=loss, positions=positions, seed=seed, reduce=reduce)
        if target.one_document_per_row:
            raise UserError(
                f"{target.folder}: runs one document per row, so a drafter cannot share its forward pass; use Refresh"
            )
        self._target = target
        self._pending: Tensor | None = None  # gradients of the micro-batches since the last optimiser step
        self._steps, self._sums, self._seconds = 0, torch.zeros(4), 0.0

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Nothing: no rollouts are remembered."""

    def due(self, step: int, acceptance: float) -> bool:
        """Whether the drafter has been trained since it was last copied into the runner."""
        return bool(self._sums[1] > 0)

    @contextmanager
    def listening(self, micro: Mapping[str, Tensor]) -> Iterator[None]:
        """Around the policy's forward pass over a micro-batch of `pack_responses`: adds the drafter's gradients on it."""
        with self._target.overheard(self.twin.taps) as heard:
            yield
        began = perf_counter()
        tokens_BT = micro["tokens_BT"]
        mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        mask_BT.view(-1)[micro["index_RL"][micro["exists_RL"]] + 1] = True
        taps_BTAD = heard[1] if self.twin.taps else None
        positions_BT, document_BT, handle = micro["positions_BT"], micro["document_BT"], self._teacher.handle()
        batch = DraftBatch(tokens_BT, positions_BT, document_BT, mask_BT, taps_BTAD, heard[0], handle)
        generator = self._generator("joint", self._steps)
        with torch.random.fork_rng([tokens_BT.device] if tokens_BT.is_cuda else []):
            torch.manual_seed(generator.initial_seed())
            gradients_N = self._gradients(batch, generator)
        self._pending = gradients_N if self._pending is None else self._pending + gradients_N
        self._seconds += perf_counter() - began

    def step(self) -> None:
        """One optimiser step of the drafter, on all ranks together; call it with each of the policy's."""
        assert self._pending is not None
        self._sums += self._apply(self._pending)
        self._pending, self._steps = None, self._steps + 1

    def run(self, step: int) -> dict[str, float]:
        """Copies the drafter into the runner; `refresh/loss`, `positions` and `seconds` since the last copy."""
        self._drafter.copy_weights(self.twin.state_dict())
        loss, count, chosen, labels = self._sums.tolist()
        values = {"loss": loss / max(count, 1.0), "positions": chosen / max(labels, 1.0), "seconds": self._seconds}
        self._sums, self._seconds = torch.zeros(4), 0.0
        return {f"refresh/{name}": value for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self._steps, "sums": self._sums.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps, self._sums = int(state["steps"]), state["sums"].clone()
