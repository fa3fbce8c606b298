"""The policy `cost`: draft while the next token is worth more than it costs, and verify the tokens that are worth their cost.

Let R be the decoding speed in tokens per second. A drafted token is worth its probability of being accepted. It costs R times
the seconds of a draft level and of verifying one more node. R is the speed of recent rounds (Dinkelbach's iteration for a ratio
of expectations), and at least that of plain decoding. While speculation is slower than plain decoding, drafting is paused and
tried again at growing intervals. Statistics of a level fade, so a level that failed is tried again too. With several texts,
those whose tokens are likelier to be accepted get more of them verified.
Left out on purpose: learning a policy (bandits). The decision depends on three numbers, and all three are measured.
"""

# B rows  D draft levels

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from operator import mul
from statistics import median

from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policies.logistic import OnlineLogistic
from trainkit.runner.policies.simple import TIERS
from trainkit.runner.policy import Policy, RoundOutcome, Signal

FADE = 0.98
"""Weight of past rounds against a new one: about fifty rounds count."""

PRIOR = 0.7
"""Assumed acceptance of a level that was never tried."""

PRIOR_ROUNDS = 10.0
"""Number of rounds that the prior counts for at first."""

NEIGHBOUR_ROUNDS = 0.25
"""Weight, in rounds, of the level before in each level's mean. A level that failed is no longer reached, and its statistics
fade: after about 150 rounds it is assumed to be as good as the level before, and is tried once. A larger value retries sooner
and costs more."""

_TRIAL = 4
"""Number of rounds after which speculation that loses is paused."""

_PAUSE, _LONGEST_PAUSE = 32, 2048
"""Number of plain rounds until drafting is tried again; doubled after each trial that failed."""

_LENGTHS = 64
"""Lengths of texts are rounded to a multiple of this number of tokens when costs are looked up."""

_DRIFT_ROUNDS, _DRIFT = 200, 1.2
"""Costs have drifted if the median round of 200 took more than 1.2 times the predicted time, or less than 1 / 1.2 of it."""


@dataclass
class _Drift:
    """Ratios of measured to predicted seconds, for rounds with one number of texts.

    Attributes:
        ratios: Ratios of the rounds since the last comparison.
        is_new: Whether the costs have drifted and have not been measured again.
        is_known: Whether the costs have drifted before; they are measured again only once.
    """

    ratios: list[float] = field(default_factory=list)
    is_new: bool = False
    is_known: bool = False

    def add(self, ratio: float) -> None:
        self.ratios.append(ratio)
        if len(self.ratios) == _DRIFT_ROUNDS:
            typical = median(self.ratios)  # not the mean: a round that captures a graph takes a second more
            if not self.is_known and not 1 / _DRIFT <= typical <= _DRIFT:
                self.is_new = self.is_known = True
            self.ratios.clear()


@dataclass
class _Account:
    """Time of drafted rounds, for batches of about one size, compared with plain decoding; older rounds fade.

    Attributes:
        seconds: Seconds of the rounds.
        plain: Seconds of plain decoding for the same tokens.
        trial: Number of rounds since drafting began or was resumed.
        paused: Number of plain rounds left in this pause.
        pause: Number of rounds of the next pause.
    """

    seconds: float = 0.0
    plain: float = 0.0
    trial: int = 0
    paused: int = 0
    pause: int = _PAUSE

    @property
    def speedup(self) -> float:
        return self.plain / self.seconds if self.seconds else 1.0

    def add(self, seconds: float, plain: float) -> None:
        self.seconds, self.plain = FADE * self.seconds + seconds, FADE * self.plain + plain
        self.trial += 1
        if self.trial >= _TRIAL and self.speedup < 1:
            self.paused, self.pause = self.pause, min(2 * self.pause, _LONGEST_PAUSE)
            self.seconds = self.plain = 0.0
            self.trial = 0
        elif self.trial > 8 * _TRIAL:
            self.pause = _PAUSE


class FadingMeans:
    """For each level the share of tokens accepted among those that reached it; older rounds fade.

    Args:
        levels: Number of levels.
        prior: Mean assumed at first, and for the level before the first.

    Attributes:
        means: The means as of the last `fade`.
    """

    def __init__(self, levels: int, prior: float) -> None:
        self.prior, self.means = prior, [prior] * levels
        self._reached, self._accepted = [PRIOR_ROUNDS] * levels, [PRIOR_ROUNDS * prior] * levels

    def fade(self) -> None:
        """Called before each round."""
        before = self.prior
        for level, (reached, accepted) in enumerate(zip(self._reached, self._accepted, strict=True)):
            self._reached[level], self._accepted[level] = FADE * reached, FADE * accepted
            before = (FADE * accepted + NEIGHBOUR_ROUNDS * before) / (FADE * reached + NEIGHBOUR_ROUNDS)
            self.means[level] = before

    def add(self, level: int, reached: float, accepted: float) -> None:
        """Adds the shares of a round's rows that reached a level, and that accepted its token."""
        self._reached[level] += reached
        self._accepted[level] += accepted


class Cost(Policy):
    """Drafts while the next token is worth more than it costs.

    Seconds are the measured costs of what a round did, not a clock's, so decisions are the same on a busy machine.

    Args:
        costs: Seconds of a round's parts.
        max_depth: Largest number of levels.
        signal: Source of each proposal's probability of being accepted; with `none`, the mean of its level is used.
        per_row: Whether tokens may stay unverified by their signal, so that rows may verify different numbers of them.
        logistic: The model behind the signal `logistic`, which learns from the rounds.
    """

    def __init__(
        self,
        costs: ChainCosts,
        max_depth: int,
        signal: Signal = "none",
        per_row: bool = False,
        logistic: OnlineLogistic | None = None,
    ) -> None:
        super().__init__(max_depth)
        self.logistic = logistic
        self.signal, self.per_row = signal, per_row and signal != "none"
        self.known = FadingMeans(max_depth, PRIOR)
        self.accept: list[float] = self.known.means  # of each level, given that those before it were accepted
        self._accounts: dict[int, _Account] = {}
        self._rows = 1
        self._chances: list[list[float]] = []  # by level, the probability that each row's token is accepted
        self._drift: dict[int, _Drift] = {}
        self.use(costs)
        # Captured rounds: by tier, accepted tokens expected per row; fading sums of accepted and of expected tokens.
        self._gains: dict[tuple[int, int], float] = {}
        self._accepted = self._expected = 0.0

    def use(self, costs: ChainCosts) -> None:
        """Decides by these costs from now on."""
        self.costs = costs
        self._look_up(costs)

    def _look_up(self, costs: ChainCosts) -> None:
        # Costs are looked up many times a round, and a small model's levels are short.
        self._now = costs
        self._plain, self._draft, self._rest, self._packed = map(cache, (costs.plain, costs.draft, costs.rest, costs.packed))
        self._ahead = cache(self._further)

    def drifted_rows(self) -> int:
        """A number of texts whose costs have drifted, each returned once; 0 if there is none."""
        for rows, drift in self._drift.items():
            if drift.is_new:
                drift.is_new = False
                return rows
        return 0

    def rate(self, rows: int) -> float:
        """R: decoding speed in tokens per second, at least that of plain decoding."""
        return max(1.0, self._account(rows).speedup) * rows / self._plain(rows)

    def _account(self, rows: int) -> _Account:
        return self._accounts.setdefault((rows - 1).bit_length(), _Account())

    def is_paused(self, rows: int) -> bool:
        return self._account(rows).paused > 0

    def begin(self, rows: int) -> int:
        self._rows, self._chances = rows, []
        length = _LENGTHS * round(self.cached / _LENGTHS)
        if length != self._now.length:
            now = self.costs.at(length)
            if now is not self._now:
                self._look_up(now)
        account = self._account(rows)
        if account.paused:
            account.paused -= 1
            return 0
        self.known.fade()
        return self.max_depth

    def continues(self, signal_B: Sequence[float]) -> bool:
        # Probability that each row's token, and so all before it, is accepted.
        level, rows, rate = len(self._chances), self._rows, self.rate(self._rows)
        if self.signal == "none":
            signal_B = [self.accept[level]] * rows
        before_B = self._chances[-1] if level else [1.0] * rows
        # NaN counts as 0, since it would stay in all means.
        chances_B = [before * now if now == now else 0.0 for before, now in zip(before_B, signal_B, strict=True)]
        self._chances.append(chances_B)
        if self.signal != "none":
            self.known.add(level, sum(before_B) / rows, sum(chances_B) / rows)
        if level + 1 >= self.max_depth:
            return False
        # Rows that may differ: is the next level worth more than it costs, verified where it pays?
        if self.per_row and rows > 1:
            next_B = [chance * self.accept[level + 1] for chance in chances_B]
            gain = self._best_per_row([*self._chances, next_B])[0] - self._best_per_row(self._chances)[0]
            return gain > rate * self._now.level(rows)
        # Equal rows: is any number of further levels? The cost of one more verified node varies, from almost nothing to a lot.
        gained, chance = 0.0, sum(chances_B)
        for accept, seconds in zip(self.accept[level + 1 :], self._ahead(rows, level), strict=True):
            chance *= accept
            gained += chance
            if gained > rate * seconds:
                return True
        return False

    def _further(self, rows: int, level: int) -> list[float]:
        """Seconds that 1, 2, 3 ... levels after this one take, with one more row to verify for each."""
        so_far, step = self._now.verify(rows, level + 2), self._now.level(rows)
        return [more * step + self._now.verify(rows, level + 2 + more) - so_far for more in range(1, self.max_depth - level)]

    def verified(self, levels: int, rows: int) -> Sequence[int]:
        chances_DB = self._chances[:levels]
        return self._best_per_row(chances_DB)[1] if self.per_row and rows > 1 else [self._best_equal(chances_DB)[1]] * rows

    def _best_equal(self, chances_DB: Sequence[Sequence[float]]) -> tuple[float, int]:
        """The best value, tokens minus cost, of verifying equally many tokens in each row; and that number."""
        rows, rate, gained = self._rows, self.rate(self._rows), 0.0
        values = [(-rate * self._packed(rows, rows, 1), 0)]
        for level, chances_B in enumerate(chances_DB, 1):
            gained += sum(chances_B)
            values.append((gained - rate * self._packed(rows, rows * (level + 1), level + 1), level))
        return max(values, key=lambda value: value[0])

    def _best_per_row(self, chances_DB: Sequence[Sequence[float]]) -> tuple[float, list[int]]:
        """The same for verifying the likeliest tokens of all rows; none is likelier than the one before it in its row."""
        rows, rate, gained = self._rows, self.rate(self._rows), 0.0
        ranked = sorted(((chance, row) for chances_B in chances_DB for row, chance in enumerate(chances_B)), reverse=True)
        best, depth = self._best_equal(chances_DB)
        best_lengths, lengths, longest = [depth] * rows, [0] * rows, 0
        for count, (chance, row) in enumerate(ranked, 1):
            gained += chance
            lengths[row] += 1
            longest = max(longest, lengths[row])
            value = gained - rate * self._packed(rows, rows + count, 1 + longest)
            if value > best:
                best, best_lengths = value, lengths.copy()
        return best, best_lengths

    def captured_size(self, rows: int) -> tuple[int, int]:
        """One of a few sizes, so that few graphs are captured: all that is drafted is verified, or about half of it."""
        if not self.begin(rows):
            return 0, 0
        rate, values = self.rate(rows), {}
        for levels, per_row in self._tiers(rows):
            gained = self._gains.get((levels, per_row))
            if gained is None:
                gained = sum(accumulate(self.accept[:per_row], mul))
            elif self._expected:
                gained *= self._accepted / self._expected
            seconds = self._seconds(rows, levels, rows * (1 + per_row), 1 + levels)
            values[levels, per_row] = rows * gained - rate * seconds
        return max(values, key=lambda tier: values[tier])

    def _tiers(self, rows: int) -> list[tuple[int, int]]:
        depths = [tier for tier in TIERS if tier <= self.max_depth]
        whole = [(depth, depth) for depth in depths]
        if not self.per_row or rows == 1:
            return whole
        return whole + [(depth, max(half for half in depths if 2 * half <= depth)) for depth in depths if depth > 1]

    def _seconds(self, rows: int, levels: int, total: int, longest: int) -> float:
        return self._draft(rows, levels) + self._packed(rows, total, longest) + self._rest(rows)

    def predicted_seconds(self, outcome: RoundOutcome) -> float:
        rows, live = outcome.rows, len(outcome.accepted)
        if not outcome.levels or not live:
            return self._plain(rows)
        # Rows whose text has ended count as the mean of the others.
        total = rows + round(sum(outcome.verified) * rows / live)
        longest = 1 + (outcome.levels if outcome.chances else max(outcome.verified))
        return self._seconds(rows, outcome.levels, total, longest)

    def learn(self, outcome: RoundOutcome) -> None:
        if self.logistic is not None:
            self.logistic.learn(outcome)
        rows, live = outcome.rows, len(outcome.accepted)
        if outcome.seconds and live:
            self._drift.setdefault(rows, _Drift()).add(outcome.seconds / max(self.predicted_seconds(outcome), 1e-9))
        if not outcome.levels or not live:
            return
        tokens = sum(outcome.accepted) + live
        self._account(rows).add(self.predicted_seconds(outcome), tokens * self._plain(rows) / rows)
        # Acceptance by level, where no signal gave it while drafting.
        if outcome.chances:
            self._learn_tiers(outcome)
        elif self.signal == "none":
            for level in range(max(outcome.verified)):
                pairs = zip(outcome.accepted, outcome.verified, strict=True)
                reached = [accepted for accepted, verified in pairs if accepted >= level and verified > level]
                self.known.add(level, len(reached) / rows, sum(accepted > level for accepted in reached) / rows)

    def _learn_tiers(self, outcome: RoundOutcome) -> None:
        """Updates what each tier would have been expected to accept in this round; deeper levels by their mean."""
        live = len(outcome.accepted)
        levels = [[chance if chance == chance else 0.0 for chance in level] for level in outcome.chances]
        reached = [float(live), *map(sum, levels)]
        for level in range(len(levels)):
            self.known.add(level, reached[level] / live, reached[level + 1] / live)
        expected = sum(levels[level][row] for row, count in enumerate(outcome.verified) for level in range(count))
        self._accepted = FADE * self._accepted + sum(outcome.accepted)
        self._expected = FADE * self._expected + expected
        for accept in self.accept[len(levels) :]:
            levels.append([chance * accept for chance in levels[-1]])
        for depth, per_row in self._tiers(live):
            best = sorted((chance for level in levels[:depth] for chance in level), reverse=True)[: live * per_row]
            before = self._gains.setdefault((depth, per_row), sum(best) / live)
            self._gains[depth, per_row] += (1 - FADE) * (sum(best) / live - before)
