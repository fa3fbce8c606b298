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
        offered: `offered[k]` full rounds came to draft position k and had a token there, counted from 1; of trees, those whose
            tree is as deep, whether or not below the node that was reached.
        drafted: Tokens drafted in full rounds, of chains those too that were not verified; of trees their verified nodes.
        paused: Full rounds without a draft because a policy found that it would not pay.
        lossy: The text is not what the target alone would have written, nor distributed as it (for any, if added together).
    """

    accepted: list[int] = field(default_factory=list)
    cut_rounds: int = 0
    tokens: int = 0
    lossy: bool = False
    offered: list[int] = field(default_factory=list)
    drafted: int = 0
    paused: int = 0

    def add_round(self, accepted: int, depth: int, drafted: int | None = None, paused: bool = False) -> None:
        """Counts one full round.

        Args:
            accepted: Drafted tokens that it kept.
            depth: Of what was verified.
            drafted: Tokens drafted; `depth` by default.
            paused: A policy chose to draft nothing.
        """
        _extend(self.accepted, accepted + 1)
        self.accepted[accepted] += 1
        came = min(accepted + 1, depth)
        _extend(self.offered, came + 1)
        for k in range(1, came + 1):
            self.offered[k] += 1
        self.drafted += depth if drafted is None else drafted
        self.paused += paused

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
        """For each draft position k from 1, the share of rounds that accepted it among those that came to it."""
        return [sum(self.accepted[k:]) / offered for k, offered in enumerate(self.offered) if k]

    @property
    def wasted(self) -> float:
        """Drafted tokens thrown away for each token that full rounds emitted; nan without a round."""
        kept = sum(k * n for k, n in enumerate(self.accepted))
        return (self.drafted - kept) / (kept + self.rounds) if self.rounds else float("nan")

    @staticmethod
    def merge(many: Iterable[Stats]) -> Stats:
        """The sum over outputs."""
        total = Stats()
        for one in many:
            for sums, more in ((total.accepted, one.accepted), (total.offered, one.offered)):
                _extend(sums, len(more))
                for k, n in enumerate(more):
                    sums[k] += n
            total.drafted += one.drafted
            total.paused += one.paused
            total.cut_rounds += one.cut_rounds
            total.tokens += one.tokens
            total.lossy |= one.lossy
        return total


def _extend(counts: list[int], length: int) -> None:
    counts.extend([0] * (length - len(counts)))
