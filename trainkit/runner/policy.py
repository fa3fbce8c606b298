"""How much to draft, decided while decoding: when to stop drafting in a round, and when to pause it altogether.

A policy chooses how many tokens are drafted and how many of them are verified, and nothing else, so the text is the target's
under every policy. It decides by what is known at that moment: the draft's probabilities, an acceptance predictor's, and what
earlier rounds accepted. The policies themselves are in policies/.
"""

# B rows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAX_DEPTH = 10
"""Largest number of tokens that a policy drafts in a round unless `depth` gives another."""

Signal = Literal["none", "confidence", "predictor", "logistic"]
"""What a policy reads of each draft level: nothing, the draft's probability of its token, or the acceptance predicted by a
trained predictor or by the online logistic model."""


@dataclass(frozen=True)
class RoundOutcome:
    """What a round accepted; each list, and each level of `chances` and `features`, has an item per row that had not ended.

    Attributes:
        rows: Number of rows that the round decoded, those with ended texts included.
        levels: Number of draft levels run.
        verified: Tokens verified in each row.
        accepted: Tokens accepted in each row.
        chances: For each level, the predicted probabilities that the tokens are accepted, as a captured round read them;
            otherwise empty.
        features: For each level that was run, the feature of the online logistic model; empty without that model.
        seconds: Seconds of the step in which the host read the round's output; 0 if unknown.
    """

    rows: int
    levels: int
    verified: Sequence[int]
    accepted: Sequence[int]
    chances: Sequence[Sequence[float]] = ()
    features: Sequence[Sequence[float]] = ()
    seconds: float = 0.0


class Policy:
    """Drafts the same depth in every round; subclasses choose it. A policy lives as long as its runner and learns from every
    call.

    Args:
        max_depth: Largest number of draft levels in a round.

    Attributes:
        signal: What `continues` receives for each row.
        pauses: Whether some rounds may have no draft; what the drafter misses in them is stored, which takes memory.
        cached: Mean number of tokens of the next round's texts, prompts included, as last read by the host.
    """

    signal: Signal = "none"
    pauses = True
    cached = 0.0

    def __init__(self, max_depth: int) -> None:
        self.max_depth = max_depth

    def begin(self, rows: int) -> int:
        """The largest number of levels to draft in the next round, which decodes `rows` texts; 0 decodes it plainly."""
        return self.max_depth

    def is_paused(self, rows: int) -> bool:
        """Whether the next round will be decoded plainly, as far as is known before it begins."""
        return False

    def captured_size(self, rows: int) -> tuple[int, int]:
        """Draft depth and mean number of verified tokens per row, for captured rounds, which cannot stop early."""
        levels = self.begin(rows)
        return levels, levels

    def continues(self, signal_B: Sequence[float]) -> bool:
        """Whether to draft another level, given the signal of the level just drafted for each row."""
        return True

    def verified(self, levels: int, rows: int) -> Sequence[int]:
        """For each row, the number of tokens to verify of the `levels` that were drafted, where some may be dropped."""
        return [levels] * rows

    def predicted_seconds(self, outcome: RoundOutcome) -> float:
        """Seconds of the round as predicted from the policy's costs; 0 if it has none."""
        return 0.0

    def learn(self, outcome: RoundOutcome) -> None:
        """Updates the policy with what a round accepted."""
