"""Policies that need no costs: stop below a threshold, or follow the recently accepted length."""

# B rows

from __future__ import annotations

from collections.abc import Sequence

from trainkit.runner.policy import Policy, RoundOutcome, Signal


class Threshold(Policy):
    """Stops once what is read falls below a threshold, in the mean over rows.

    Args:
        reads: `confidence`: the draft's probability of the last token; `predictor`: the chance that all so far are kept.
        threshold: Below it, no more is drafted.
        most: Levels at most.
    """

    def __init__(self, reads: Signal, threshold: float, most: int) -> None:
        super().__init__(most)
        self.reads, self.threshold = reads, threshold
        self._survival: list[float] = []

    def begin(self, rows: int) -> int:
        self._survival = [1.0] * rows
        return self.most

    def more(self, said_B: Sequence[float]) -> bool:
        if self.reads == "predictor":
            self._survival = [before * said for before, said in zip(self._survival, said_B, strict=True)]
            said_B = self._survival
        return sum(said_B) / len(said_B) >= self.threshold


class Recent(Policy):
    """Drafts one more than was lately accepted, of a few depths, so that few graphs are captured.

    Args:
        most: Levels at most.
        decay: Weight of the past against a new round.
    """

    tiers = (1, 2, 3, 4, 6, 8, 10, 12, 16)

    def __init__(self, most: int, decay: float = 0.9) -> None:
        super().__init__(most)
        self.decay = decay
        self._accepted = min(3.0, float(most))

    def begin(self, rows: int) -> int:
        fitting = [tier for tier in self.tiers if tier <= self.most]
        return next((tier for tier in fitting if tier >= self._accepted + 1), fitting[-1])

    def learn(self, came: RoundOutcome) -> None:
        if came.accepted:
            mean = sum(came.accepted) / len(came.accepted)
            self._accepted = self.decay * self._accepted + (1 - self.decay) * mean
