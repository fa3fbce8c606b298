"""Divergence from the dense model when the layers have the levels of a candidate: KL, nats per token."""

# S windows  T tokens  D hidden  B windows of a batch  N tokens of a batch  V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainkit.compress.allocation.evolution import Candidate
from trainkit.compress.allocation.levels import Database
from trainkit.compress.divergence import divergences
from trainkit.models.target import FrozenTarget

BATCH_TOKENS = 4096
"""Tokens in a forward pass, unless a window is longer."""


class KLToDense:
    """KL(dense || candidate), nats per token, on windows of text; a fitness of `evolution.Search`.

    The dense model's hidden states before its output head are computed once and kept, S x T x D values: the head is never
    compressed, so the logits are exact, and a table of [S x T, V] probabilities is never built. Between two candidates only the
    weights of layers whose level differs are read from the database.

    Args:
        target: The dense model; its weights are replaced.
        database: Weights of the levels.
        tokens_ST: Windows.
    """

    def __init__(self, target: FrozenTarget, database: Database, tokens_ST: Tensor) -> None:
        self._target, self._database = target, database
        self._names = list(database.levels)
        self._now: list[int | None] = [None] * len(self._names)
        self._tokens_ST = tokens_ST.to(target.device)
        self._batch = max(1, BATCH_TOKENS // tokens_ST.shape[1])
        batches = torch.arange(len(tokens_ST)).split(self._batch)
        self._dense_STD = torch.cat([self._states(batch.tolist()) for batch in batches])

    @torch.no_grad()
    def __call__(self, candidate: Candidate, windows: Sequence[int]) -> float:
        """The divergence of a candidate, averaged over the tokens of the windows with these numbers."""
        # Replace the weights of layers whose level differs.
        for index, level in enumerate(candidate):
            if self._now[index] != level:
                name = self._names[index]
                self._target.model.get_parameter(f"{name}.weight").copy_(self._database.weight(name, level))
                self._now[index] = level
        # Compare with the dense model.
        head, total, tokens = self._target.handle().head, 0.0, 0
        for start in range(0, len(windows), self._batch):
            batch = list(windows[start : start + self._batch])
            dense_ND, states_ND = self._dense_STD[batch].flatten(0, 1), self._states(batch).flatten(0, 1)
            total += float(divergences(head, dense_ND, [states_ND]))
            tokens += len(dense_ND)
        return total / tokens

    @torch.no_grad()
    def _states(self, windows: list[int]) -> Tensor:
        tokens_BT = self._tokens_ST[windows]
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        return self._target.forward(tokens_BT, positions_BT, torch.zeros_like(tokens_BT))[0]
