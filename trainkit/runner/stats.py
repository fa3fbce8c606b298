"""What decoding counted: rounds, accepted lengths, block efficiency; sums, so that outputs add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counts of one output, or of several added together.

    Attributes:
        accepted: `accepted[k]` full rounds accepted exactly k drafted tokens.
        cut_rounds: Last rounds cut by an end token, a stop string or the length; counted here and nowhere else.
        tokens: Tokens emitted in all, the prefill's and the cut rounds' included.
        lossy: The text is not what the target alone would have written, nor distributed as it (for any, if added together).
    """

    accepted: list[int] = field(default_factory=list)
    cut_rounds: int = 0
    tokens: int = 0
    lossy: bool = False

    def add_round(self, accepted: int) -> None:
        """Counts one full round."""
        self.accepted.extend([0] * (accepted + 1 - len(self.accepted)))
        self.accepted[accepted] += 1

    @property
    def rounds(self) -> int:
        """Full verification rounds; prefill is none."""
        return sum(self.accepted)

    @property
    def tau(self) -> float:
        """Block efficiency: tokens emitted per full round, bonus token included; 1 for plain decoding, nan without a round."""
        if not self.rounds:
            return float("nan")
        return sum((k + 1) * n for k, n in enumerate(self.accepted)) / self.rounds

    @property
    def alpha_k(self) -> list[float]:
        """For each draft position k from 1, the share of rounds that accepted it among those that accepted k - 1."""
        reached = [sum(self.accepted[k:]) for k in range(len(self.accepted))]
        return [after / before for before, after in zip(reached, reached[1:], strict=False) if before]

    @staticmethod
    def merge(many: Iterable[Stats]) -> Stats:
        """The sum over outputs."""
        total = Stats()
        for one in many:
            total.accepted.extend([0] * (len(one.accepted) - len(total.accepted)))
            for k, n in enumerate(one.accepted):
                total.accepted[k] += n
            total.cut_rounds += one.cut_rounds
            total.tokens += one.tokens
            total.lossy |= one.lossy
        return total
