"""How much to draft, decided while decoding: stop a round's draft, or drafting altogether, where it no longer pays.

A policy chooses how many tokens are drafted and how many of them are verified, and nothing else, so that the text stays the
target's under every one of them. It looks only at what is known when it chooses: how the draft proposed, what an acceptance
predictor makes of that, and what earlier rounds accepted.

`confidence` (Kangaroo, arXiv 2404.18911) and `predictor` (SpecDec++, arXiv 2405.19715) stop below a threshold. `ema` follows
the recent accepted length. `cost` needs no threshold: with R the tokens per second that decoding makes, another draft token is
worth its chance of being kept and costs R times the seconds of a draft step and of one more row to verify. R is what the rounds
so far have made (Dinkelbach's iteration for a ratio of expectations), and plain decoding's at least; where speculation makes
less than that, it rests and is tried again ever more seldom.
Left out on purpose: learning a policy (bandits); there are three numbers to know, and they are measured.
"""

# B rows  D draft levels

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainkit.errors import UserError
from trainkit.runner.costs import ChainCosts

MOST = 10
"""Tokens a policy drafts at most where no depth says so."""

Signal = Literal["nothing", "confidence", "predictor"]


class Policy:
    """The same depth each round; the others choose it. One lives as long as its runner, and learns from call to call.

    Args:
        most: Levels of a round at most.

    Attributes:
        reads: What it is told of each level: nothing, the draft's probability of the token it took, or the predictor's.
    """

    reads: Signal = "nothing"

    def __init__(self, most: int) -> None:
        self.most = most

    def begin(self, rows: int) -> int:
        """Levels of the coming round at most; 0 decodes it plainly.

        Args:
            rows: Texts that the round decodes.
        """
        return self.most

    def tier(self, rows: int) -> int:
        """As `begin`, for a round that cannot be stopped within; a captured graph."""
        return self.begin(rows)

    def more(self, said_B: Sequence[float]) -> bool:
        """Whether to draft another level, after one of which this was said, row by row."""
        return True

    def keep(self, levels: int) -> int:
        """How many of the drafted levels to verify, where some may be left out (`AdaptiveChain.drops`)."""
        return levels

    def learn(self, rows: int, levels: int, verified: int, accepted: Sequence[int]) -> None:
        """What came of a round: levels run, tokens verified in each row, and accepted by each that was not done."""


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

    def learn(self, rows: int, levels: int, verified: int, accepted: Sequence[int]) -> None:
        if accepted:
            self._accepted = self.decay * self._accepted + (1 - self.decay) * sum(accepted) / len(accepted)


FADE = 0.98
"""Weight of past rounds against a new one: some fifty count."""

PRIOR = 0.7
"""Acceptance of a level that has not been tried."""

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


class Cost(Policy):
    """Drafts while the next token is worth more than it costs.

    Seconds are the measured costs of what a round did, not a clock's, so that a call decides alike on a busy machine.

    Args:
        costs: Of a round's parts.
        most: Levels at most.
        predicted: Whether a predictor says how likely each proposal is; without, the mean of each level is taken for it.
    """

    def __init__(self, costs: ChainCosts, most: int, predicted: bool) -> None:
        super().__init__(most)
        self.costs, self.reads = costs, "predictor" if predicted else "nothing"
        self.accept = [PRIOR] * most
        self._books: dict[int, _Book] = {}
        self._rows = 1
        self._survival: list[float] = []
        self._expected: list[float] = []  # by level, tokens that the rows together keep of it

    def rate(self, rows: int) -> float:
        """R: tokens per second that decoding makes, plain decoding's at least."""
        return max(1.0, self._book(rows).speedup) * rows / self.costs.plain(rows)

    def _book(self, rows: int) -> _Book:
        return self._books.setdefault((rows - 1).bit_length(), _Book())

    def begin(self, rows: int) -> int:
        self._rows, self._survival, self._expected = rows, [1.0] * rows, []
        book = self._book(rows)
        if book.resting:
            book.resting -= 1
            return 0
        return self.most

    def tier(self, rows: int) -> int:
        if not self.begin(rows):
            return 0
        rate, kept, chance, values = self.rate(rows), 0.0, 1.0, {}
        for depth, accept in enumerate(self.accept, 1):
            chance *= accept
            kept += rows * chance
            if depth in Recent.tiers:
                values[depth] = kept - rate * self.costs.round(rows, depth, self.verified(depth))
        return max(values, key=lambda depth: values[depth])

    def verified(self, depth: int) -> int:
        """Tokens that a round of this depth verifies, decided beforehand."""
        return depth

    def more(self, said_B: Sequence[float]) -> bool:
        level, rows = len(self._expected), self._rows
        if self.reads == "nothing":
            said_B = [self.accept[level]] * rows
        before = sum(self._survival)
        self._survival = [chance * said for chance, said in zip(self._survival, said_B, strict=True)]
        reached = sum(self._survival)
        self._expected.append(reached)
        if self.reads == "predictor" and before:
            self.accept[level] += (1 - FADE) * (reached / before - self.accept[level])
        # further levels, however many: a row to verify may cost next to nothing beside the one before it, or a lot
        rate, verified, kept, chance = self.rate(rows), self.costs.verify(rows, level + 2), 0.0, reached
        for more, accept in enumerate(self.accept[level + 1 :], 1):
            chance *= accept
            kept += chance
            if kept > rate * (more * self.costs.level(rows) + self.costs.verify(rows, level + 2 + more) - verified):
                return True
        return False

    def keep(self, levels: int) -> int:
        rows, rate, gained = self._rows, self.rate(self._rows), 0.0
        values = [-rate * self.costs.verify(rows, 1)]
        for level, expected in enumerate(self._expected[:levels], 1):
            gained += expected
            values.append(gained - rate * self.costs.verify(rows, level + 1))
        return max(range(len(values)), key=lambda level: values[level])

    def learn(self, rows: int, levels: int, verified: int, accepted: Sequence[int]) -> None:
        if not levels or not accepted:
            return
        tokens = sum(accepted) + len(accepted)
        self._book(rows).add(self.costs.round(rows, levels, verified), tokens * self.costs.plain(rows) / rows)
        if self.reads == "nothing":
            self.tried(rows, verified, accepted)

    def tried(self, rows: int, levels: int, accepted: Sequence[int]) -> None:
        """Takes in how far rounds of so many levels were accepted."""
        for level in range(levels):
            came = sum(count >= level for count in accepted)
            if came:
                kept = sum(count > level for count in accepted)
                self.accept[level] += (1 - FADE) * came / rows * (kept / came - self.accept[level])


_FORMS = "fixed, confidence:P, predictor:P, cost, cost-blind or ema"


@dataclass(frozen=True)
class PolicyName:
    """A policy as it is asked for.

    Attributes:
        name: fixed, confidence, predictor, cost or ema.
        threshold: Of confidence and predictor.
        blind: Of `cost`: without the predictor, where there is one.
    """

    name: str
    threshold: float = 0.0
    blind: bool = False

    @staticmethod
    def of(text: str) -> PolicyName:
        """Reads `confidence:0.6` and the like; 0.6 is confidence's threshold by default, 0.5 predictor's.

        Raises:
            UserError: no such policy, or a threshold outside 0..1.
        """
        if found := re.fullmatch(r"(confidence|predictor)(?::([0-9.]+))?", text):
            try:
                threshold = float(found[2]) if found[2] else {"confidence": 0.6, "predictor": 0.5}[found[1]]
            except ValueError:
                threshold = -1.0
            if not 0 <= threshold <= 1:
                raise UserError(f"policy {text}: its threshold must be a number between 0 and 1")
            return PolicyName(found[1], threshold)
        if text == "cost-blind":
            return PolicyName("cost", blind=True)
        if text in ("fixed", "cost", "ema"):
            return PolicyName(text)
        raise UserError(f"policy {text}: must be {_FORMS}")

    @property
    def needs_predictor(self) -> bool:
        """Whether it is nothing without one."""
        return self.name == "predictor"

    @property
    def stops_within(self) -> bool:
        """Whether stopping within a round is all it does, which a captured graph cannot."""
        return self.name in ("confidence", "predictor")
