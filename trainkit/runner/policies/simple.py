"""Policies that know no costs: stop below a threshold, or follow the recently accepted length.

`confidence` is Kangaroo's rule (arXiv 2404.18911), `predictor` that of SpecDec++ (arXiv 2405.19715).
"""

# B rows

from __future__ import annotations

from collections.abc import Sequence

from trainkit.runner.policy import Policy, RoundOutcome, Signal

TIERS = (1, 2, 3, 4, 6, 8, 10, 12, 16)
"""Draft depths of captured rounds: few, so that few graphs are captured."""


class Fixed(Policy):
    """Always drafts the same depth."""

    pauses = False


class Threshold(Policy):
    """Stops drafting once the signal, averaged over rows, falls below a threshold.

    Args:
        signal: `confidence`: the draft's probability of the last token; `predictor`: the predicted probability that all tokens
            so far are accepted.
        threshold: Drafting stops below this value.
        max_depth: Largest number of levels.
    """

    pauses = False

    def __init__(self, signal: Signal, threshold: float, max_depth: int) -> None:
        super().__init__(max_depth)
        self.signal, self.threshold = signal, threshold
        self._survival: list[float] = []

    def begin(self, rows: int) -> int:
        self._survival = [1.0] * rows
        return self.max_depth

    def continues(self, signal_B: Sequence[float]) -> bool:
        if self.signal == "predictor":
            self._survival = [before * now for before, now in zip(self._survival, signal_B, strict=True)]
            signal_B = self._survival
        return sum(signal_B) / len(signal_B) >= self.threshold


class Recent(Policy):
    """Drafts one token more than was recently accepted, rounded up to a depth of `TIERS`.

    Args:
        max_depth: Largest number of levels.
        decay: Weight of the past against a new round.
    """

    pauses = False

    def __init__(self, max_depth: int, decay: float = 0.9) -> None:
        super().__init__(max_depth)
        self.decay = decay
        self._accepted = min(3.0, float(max_depth))

    def begin(self, rows: int) -> int:
        tiers = [tier for tier in TIERS if tier <= self.max_depth]
        return next((tier for tier in tiers if tier >= self._accepted + 1), tiers[-1])

    def learn(self, outcome: RoundOutcome) -> None:
        if outcome.accepted:
            mean = sum(outcome.accepted) / len(outcome.accepted)
            self._accepted = self.decay * self._accepted + (1 - self.decay) * mean
