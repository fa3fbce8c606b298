"""Policies that know no costs: stop below a threshold, or follow the recently accepted length.

`confidence` is Kangaroo's rule (arXiv 2404.18911), `predictor` that of SpecDec++ (arXiv 2405.19715), and `logistic` is the same
rule with the online logistic model.
"""

# B rows

from __future__ import annotations

from collections.abc import Sequence

from trainkit.runner.policies.logistic import OnlineLogistic
from trainkit.runner.policy import Policy, RoundOutcome, Signal

TIERS = (1, 2, 3, 4, 6, 8, 10, 12, 16)
"""Draft depths of captured rounds: few, so that few graphs are captured."""

DECAY = 0.9
"""Weight of the past against a new round."""


def next_tier(depth: float, max_depth: int) -> int:
    """The smallest depth of `TIERS` that is at least `depth`; the largest within `max_depth` if there is none."""
    tiers = [tier for tier in TIERS if tier <= max_depth]
    return next((tier for tier in tiers if tier >= depth), tiers[-1])


class Fixed(Policy):
    """Always drafts the same depth."""

    pauses = False


class Threshold(Policy):
    """Stops drafting once the signal, averaged over rows, falls below a threshold.

    A captured round cannot stop early: its depth follows from this rule and the moving means of earlier rounds' signals.

    Args:
        signal: `confidence`: the draft's probability of the last token; `predictor` and `logistic`: the predicted probability
            that all tokens so far are accepted.
        threshold: Drafting stops below this value.
        max_depth: Largest number of levels.
        logistic: The model behind the signal `logistic`, which learns from the rounds.
    """

    pauses = False

    def __init__(self, signal: Signal, threshold: float, max_depth: int, logistic: OnlineLogistic | None = None) -> None:
        super().__init__(max_depth)
        self.signal, self.threshold, self.logistic = signal, threshold, logistic
        self._survival: list[float] = []
        self._means = [1.0] * max_depth  # by level, of the signals of captured rounds

    def begin(self, rows: int) -> int:
        self._survival = [1.0] * rows
        return self.max_depth

    def continues(self, signal_B: Sequence[float]) -> bool:
        if self.signal != "confidence":
            self._survival = [before * now for before, now in zip(self._survival, signal_B, strict=True)]
            signal_B = self._survival
        return sum(signal_B) / len(signal_B) >= self.threshold

    def captured_size(self, rows: int) -> tuple[int, int]:
        passed = next((level for level, mean in enumerate(self._means) if mean < self.threshold), self.max_depth)
        depth = next_tier(passed + 1, self.max_depth)
        return depth, depth

    def learn(self, outcome: RoundOutcome) -> None:
        if self.logistic is not None:
            self.logistic.learn(outcome)
        before = float(len(outcome.accepted))
        for level, chance_B in enumerate(outcome.chances):
            survival = sum(chance for chance in chance_B if chance == chance)
            mean = survival / (before or 1.0) if self.signal == "confidence" else survival / len(chance_B)
            self._means[level] += (1 - DECAY) * (mean - self._means[level])
            before = survival


class Recent(Policy):
    """Drafts one token more than was recently accepted, rounded up to a depth of `TIERS`.

    Args:
        max_depth: Largest number of levels.
    """

    pauses = False

    def __init__(self, max_depth: int) -> None:
        super().__init__(max_depth)
        self._accepted = min(3.0, float(max_depth))

    def begin(self, rows: int) -> int:
        return next_tier(self._accepted + 1, self.max_depth)

    def learn(self, outcome: RoundOutcome) -> None:
        if outcome.accepted:
            mean = sum(outcome.accepted) / len(outcome.accepted)
            self._accepted = DECAY * self._accepted + (1 - DECAY) * mean
