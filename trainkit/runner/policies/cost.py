"""The policy `cost`: draft while the next token is worth more than it costs, verify those that are worth their rows.

With R the tokens per second that decoding makes, a draft token is worth its chance of being kept, and costs R times the seconds
of a draft step and of one more row to verify. R is what the rounds so far have made (Dinkelbach's iteration for a ratio of
expectations), and plain decoding's at least; where speculation makes less than that, it rests and is tried again ever more
seldom. What is known of a level fades, so that one that failed is tried again too. Of several texts, those whose tokens are
likelier to be kept get more of them verified.
Left out on purpose: learning a policy (bandits); there are three numbers to know, and they are measured.
"""

# B rows  D tokens by level

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from operator import mul
from typing import Any

from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policies.simple import Recent
from trainkit.runner.policy import Policy, RoundOutcome, Signal

FADE = 0.98
"""Weight of past rounds against a new one: some fifty count."""

PRIOR = 0.7
"""Acceptance of a level that has not been tried."""

SOME = 10.0
"""Rounds that the prior counts for at first."""

DOUBT = 0.25
"""Rounds for which the level before counts, and for good. A level that failed is not come to any more, and what is known of it
fades: after some 150 rounds it passes for as good as the one before again and is tried, once. More is sooner, and dearer."""

_TRIAL = 4
"""Rounds after which speculation that loses is given up."""

_REST, _LONGEST_REST = 32, 2048
"""Plain rounds until it is tried again; twice as many after each trial that failed."""


@dataclass
class _Book:
    """What drafted rounds of about so many rows took, and what plain decoding would have taken; older ones fade.

    Attributes:
        seconds: As they were.
        plain: For the same tokens.
        trial: Rounds since drafting began or was taken up again.
        resting: Plain rounds still to come.
        rest: How many the next rest will have.
    """

    seconds: float = 0.0
    plain: float = 0.0
    trial: int = 0
    resting: int = 0
    rest: int = _REST

    @property
    def speedup(self) -> float:
        return self.plain / self.seconds if self.seconds else 1.0

    def add(self, seconds: float, plain: float) -> None:
        self.seconds, self.plain = FADE * self.seconds + seconds, FADE * self.plain + plain
        self.trial += 1
        if self.trial >= _TRIAL and self.speedup < 1:
            self.resting, self.rest = self.rest, min(2 * self.rest, _LONGEST_REST)
            self.seconds = self.plain = 0.0
            self.trial = 0
        elif self.trial > 8 * _TRIAL:
            self.rest = _REST


class Fading:
    """Means by level of what was kept of what came to it, older rounds fading; of numbers, or of arrays of them.

    Args:
        levels: How many.
        prior: What is taken for a level's mean at first, and stands before the first level.

    Attributes:
        means: As of the last `fade`.
    """

    def __init__(self, levels: int, prior: Any) -> None:
        self.prior, self.means = prior, [prior] * levels
        self._came, self._kept = [SOME] * levels, [SOME * prior] * levels

    def fade(self) -> None:
        """Before each round."""
        before = self.prior
        for level, (came, kept) in enumerate(zip(self._came, self._kept, strict=True)):
            self._came[level], self._kept[level] = FADE * came, FADE * kept
            before = self.means[level] = (FADE * kept + DOUBT * before) / (FADE * came + DOUBT)

    def add(self, level: int, came: float, kept: Any) -> None:
        """The shares of a round's rows that came to a level, and that kept its token."""
        self._came[level] += came
        self._kept[level] = self._kept[level] + kept


class Cost(Policy):
    """Drafts while the next token is worth more than it costs.

    Seconds are the measured costs of what a round did, not a clock's, so that a call decides alike on a busy machine.

    Args:
        costs: Of a round's parts.
        most: Levels at most.
        reads: What says how likely each proposal is to be kept; with `nothing`, the mean of its level is taken for it.
        shares: Whether tokens may go unverified by what was said of them, so that rows need not verify equally many.
    """

    def __init__(self, costs: ChainCosts, most: int, reads: Signal = "nothing", shares: bool = False) -> None:
        super().__init__(most)
        self.costs, self.reads, self.shares = costs, reads, shares and reads != "nothing"
        self.known = Fading(most, PRIOR)
        self.accept: list[float] = self.known.means  # of each level, given those before it
        self._books: dict[int, _Book] = {}
        self._rows = 1
        self._chances: list[list[float]] = []  # by level, of each row's token to be kept
        # looked up many times a round, beside which a small model's levels are short
        self._plain, self._drafted, self._rest, self._price = map(cache, (costs.plain, costs.drafted, costs.rest, costs.packed))
        self._ahead = cache(self._further)
        # of captured rounds: tokens a row is expected to keep by tier, and those kept and expected of all, older ones fading
        self._gains: dict[tuple[int, int], float] = {}
        self._kept = self._expected = 0.0

    def rate(self, rows: int) -> float:
        """R: tokens per second that decoding makes, plain decoding's at least."""
        return max(1.0, self._book(rows).speedup) * rows / self._plain(rows)

    def _book(self, rows: int) -> _Book:
        return self._books.setdefault((rows - 1).bit_length(), _Book())

    def rests(self, rows: int) -> bool:
        return self._book(rows).resting > 0

    def begin(self, rows: int) -> int:
        self._rows, self._chances = rows, []
        book = self._book(rows)
        if book.resting:
            book.resting -= 1
            return 0
        self.known.fade()
        return self.most

    def more(self, said_B: Sequence[float]) -> bool:
        level, rows, rate = len(self._chances), self._rows, self.rate(self._rows)
        if self.reads == "nothing":
            said_B = [self.accept[level]] * rows
        before_B = self._chances[-1] if level else [1.0] * rows
        # what is no number says nothing good, and would stay in all means
        chances_B = [chance * said if said == said else 0.0 for chance, said in zip(before_B, said_B, strict=True)]
        self._chances.append(chances_B)
        if self.reads != "nothing":
            self.known.add(level, sum(before_B) / rows, sum(chances_B) / rows)
        if level + 1 >= self.most:
            return False
        if self.shares and rows > 1:
            next_B = [chance * self.accept[level + 1] for chance in chances_B]
            return self._shared([*self._chances, next_B])[0] - self._shared(self._chances)[0] > rate * self.costs.level(rows)
        # further levels, however many: a row to verify may cost next to nothing beside the one before it, or a lot
        gained, chance = 0.0, sum(chances_B)
        for accept, seconds in zip(self.accept[level + 1 :], self._ahead(rows, level), strict=True):
            chance *= accept
            gained += chance
            if gained > rate * seconds:
                return True
        return False

    def _further(self, rows: int, level: int) -> list[float]:
        """Seconds that 1, 2, 3 ... levels after this one take, with a row to verify for each."""
        so_far, step = self.costs.verify(rows, level + 2), self.costs.level(rows)
        return [more * step + self.costs.verify(rows, level + 2 + more) - so_far for more in range(1, self.most - level)]

    def keep(self, levels: int) -> int:
        return self._equal(self._chances[:levels])[1]

    def share(self, levels: int) -> Sequence[int]:
        return self._shared(self._chances[:levels])[1] if self.shares and self._rows > 1 else ()

    def _equal(self, chances_DB: Sequence[Sequence[float]]) -> tuple[float, int]:
        """What verifying equally many tokens of each row is worth at best, less what it costs; and how many."""
        rows, rate, gained = self._rows, self.rate(self._rows), 0.0
        values = [(-rate * self._price(rows, rows, 1), 0)]
        for level, chances_B in enumerate(chances_DB, 1):
            gained += sum(chances_B)
            values.append((gained - rate * self._price(rows, rows * (level + 1), level + 1), level))
        return max(values, key=lambda value: value[0])

    def _shared(self, chances_DB: Sequence[Sequence[float]]) -> tuple[float, list[int]]:
        """As `_equal`, of the likeliest of all rows' tokens, as many as pay; none is likelier than the one before it."""
        rows, rate, gained = self._rows, self.rate(self._rows), 0.0
        ranked = sorted(((chance, row) for chances_B in chances_DB for row, chance in enumerate(chances_B)), reverse=True)
        best, depth = self._equal(chances_DB)
        found, lengths, longest = [depth] * rows, [0] * rows, 0
        for count, (chance, row) in enumerate(ranked, 1):
            gained += chance
            lengths[row] += 1
            longest = max(longest, lengths[row])
            value = gained - rate * self._price(rows, rows + count, 1 + longest)
            if value > best:
                best, found = value, lengths.copy()
        return best, found

    def tier(self, rows: int) -> tuple[int, int]:
        """Among few, so that few graphs are captured: all that is drafted is verified, or about half of it."""
        if not self.begin(rows):
            return 0, 0
        rate, values = self.rate(rows), {}
        for levels, each in self._tiers(rows):
            gained = self._gains.get((levels, each))
            if gained is None:
                gained = sum(accumulate(self.accept[:each], mul))
            elif self._expected:
                gained *= self._kept / self._expected
            values[levels, each] = rows * gained - rate * self._seconds(rows, levels, rows * (1 + each), 1 + levels)
        return max(values, key=lambda tier: values[tier])

    def _tiers(self, rows: int) -> list[tuple[int, int]]:
        fitting = [tier for tier in Recent.tiers if tier <= self.most]
        whole = [(tier, tier) for tier in fitting]
        if not self.shares or rows == 1:
            return whole
        return whole + [(tier, max(each for each in fitting if 2 * each <= tier)) for tier in fitting if tier > 1]

    def _seconds(self, rows: int, levels: int, total: int, longest: int) -> float:
        return self._drafted(rows, levels) + self._price(rows, total, longest) + self._rest(rows)

    def learn(self, came: RoundOutcome) -> None:
        rows, live = came.rows, len(came.accepted)
        if not came.levels or not live:
            return
        # done rows take part as the others do in the mean
        total = rows + round(sum(came.verified) * rows / live)
        longest = 1 + (came.levels if came.chances else max(came.verified))
        tokens = sum(came.accepted) + live
        self._book(rows).add(self._seconds(rows, came.levels, total, longest), tokens * self._plain(rows) / rows)
        if came.chances:
            self._learn_tiers(came)
        elif self.reads == "nothing":
            for level in range(max(came.verified)):
                offered = [n for n, most in zip(came.accepted, came.verified, strict=True) if n >= level and most > level]
                self.known.add(level, len(offered) / rows, sum(n > level for n in offered) / rows)

    def _learn_tiers(self, came: RoundOutcome) -> None:
        """What each tier would have been expected to keep of a round, deeper levels by their mean."""
        live = len(came.accepted)
        levels = [[chance if chance == chance else 0.0 for chance in level] for level in came.chances]
        reached = [float(live), *map(sum, levels)]
        for level in range(len(levels)):
            self.known.add(level, reached[level] / live, reached[level + 1] / live)
        expected = sum(levels[level][row] for row, count in enumerate(came.verified) for level in range(count))
        self._kept = FADE * self._kept + sum(came.accepted)
        self._expected = FADE * self._expected + expected
        for accept in self.accept[len(levels) :]:
            levels.append([chance * accept for chance in levels[-1]])
        for depth, each in self._tiers(live):
            best = sorted((chance for level in levels[:depth] for chance in level), reverse=True)[: live * each]
            before = self._gains.setdefault((depth, each), sum(best) / live)
            self._gains[depth, each] += (1 - FADE) * (sum(best) / live - before)
