"""What decoding counted: rounds, accepted lengths, block efficiency. All are sums, so the counts of outputs add up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Stats:
    """Counts of one output, or of several added together.

    A round that an end token, a stop string or the length limit cuts short is not a full round: it counts in `cut_rounds` and
    `tokens` only.

    Attributes:
        accepted: `accepted[k]` is the number of full rounds that accepted exactly k drafted tokens.
        cut_rounds: Number of last rounds that were cut short.
        tokens: Number of tokens emitted in all, those of prefill and of cut rounds included.
        lossy: Whether the text (any, if added together) is neither the target's nor distributed like it.
        offered: `offered[k]`, from k = 1, is the number of full rounds that accepted at least k - 1 drafted tokens and verified
            a token at draft position k. A tree of depth k or more counts even if the last accepted node has no child.
        drafted: Number of tokens drafted in full rounds; for chains with those that were not verified, for trees the verified
            nodes.
        paused: Number of full rounds without a draft because a policy expected that it would not pay.
        seconds: Seconds of the rounds of a policy, shared among the texts of each round.
        predicted_seconds: The same as predicted from the policy's costs; 0 if it has none.
        cut_texts: Number of texts that ended before `max_new_tokens` because they fill `max_len`.
        prefilled: Number of prompt tokens that the target read; not compared by ==, because it depends on the other texts.
        shared: Number of prompt tokens reused from another text's cache; not compared either.
    """

    accepted: list[int] = field(default_factory=list)
    cut_rounds: int = 0
    tokens: int = 0
    lossy: bool = False
    offered: list[int] = field(default_factory=list)
    drafted: int = 0
    paused: int = 0
    cut_texts: int = 0
    prefilled: int = field(default=0, compare=False)
    shared: int = field(default=0, compare=False)
    seconds: float = 0.0
    predicted_seconds: float = 0.0

    def add_round(self, accepted: int, depth: int, drafted: int | None = None, paused: bool = False) -> None:
        """Counts one full round.

        Args:
            accepted: Number of drafted tokens that it accepted.
            depth: Depth of what was verified.
            drafted: Number of tokens drafted; `depth` by default.
            paused: Whether a policy chose not to draft.
        """
        _add(self.accepted, [0] * accepted + [1])
        _add(self.offered, [0] + [1] * min(accepted + 1, depth))
        self.drafted += depth if drafted is None else drafted
        self.paused += paused

    @property
    def rounds(self) -> int:
        """Number of full verification rounds; prefill is not counted."""
        return sum(self.accepted)

    @property
    def _accepted_tokens(self) -> int:
        return sum(k * rounds for k, rounds in enumerate(self.accepted))

    @property
    def tau(self) -> float:
        """Block efficiency: tokens emitted per full round, bonus token included; 1 for plain decoding, nan without a round."""
        return 1 + self._accepted_tokens / self.rounds if self.rounds else float("nan")

    @property
    def alpha_k(self) -> list[float]:
        """For each draft position k from 1, the share of rounds that accepted it among those that reached it."""
        return [sum(self.accepted[k:]) / offered for k, offered in enumerate(self.offered) if k]

    @property
    def first_drafts(self) -> tuple[int, int]:
        """Number of rounds that accepted their first drafted token, and of those that verified one, cut rounds included.

        A round is cut short only behind an accepted token. Without such rounds, short texts would seem to accept little.
        """
        full = self.offered[1] if len(self.offered) > 1 else 0
        return sum(self.accepted[1:]) + self.cut_rounds, full + self.cut_rounds

    @property
    def wasted(self) -> float:
        """Number of drafted tokens that were not accepted, for each token that full rounds emitted; nan without a round."""
        accepted = self._accepted_tokens
        return (self.drafted - accepted) / (accepted + self.rounds) if self.rounds else float("nan")

    @property
    def goodput(self) -> dict[str, float]:
        """Tokens per second of a policy's rounds: `predicted` from its costs, if it has any, and `measured`."""
        tokens, seconds = self._accepted_tokens + self.rounds, {"predicted": self.predicted_seconds, "measured": self.seconds}
        return {name: tokens / value for name, value in seconds.items() if value}

    @staticmethod
    def merge(outputs: Iterable[Stats]) -> Stats:
        """The sum over outputs."""
        total = Stats()
        for stats in outputs:
            _add(total.accepted, stats.accepted)
            _add(total.offered, stats.offered)
            total.drafted += stats.drafted
            total.paused += stats.paused
            total.cut_rounds += stats.cut_rounds
            total.cut_texts += stats.cut_texts
            total.tokens += stats.tokens
            total.prefilled += stats.prefilled
            total.shared += stats.shared
            total.seconds += stats.seconds
            total.predicted_seconds += stats.predicted_seconds
            total.lossy |= stats.lossy
        return total


def _add(counts: list[int], more: list[int]) -> None:
    counts.extend([0] * (len(more) - len(counts)))
    for k, n in enumerate(more):
        counts[k] += n
