"""How much to draft, decided while decoding: stop a round's draft, or drafting altogether, where it no longer pays.

A policy chooses how many tokens are drafted and how many of them are verified, and nothing else, so that the text stays the
target's under every one of them. It looks only at what is known when it chooses: how the draft proposed, what an acceptance
predictor makes of that, and what earlier rounds accepted.

`confidence` (Kangaroo, arXiv 2404.18911) and `predictor` (SpecDec++, arXiv 2405.19715) stop below a threshold. `ema` follows
the recent accepted length. `cost`, which needs no threshold, is in worth.py.
"""

# B rows

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainkit.errors import UserError

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

    def rests(self, rows: int) -> bool:
        """Whether the coming round of so many texts is decoded plainly, as far as is known before it."""
        return False

    def tier(self, rows: int) -> tuple[int, int]:
        """Levels, and tokens verified in the mean of rows, of a round that cannot be stopped within; a captured graph."""
        levels = self.begin(rows)
        return levels, levels

    def more(self, said_B: Sequence[float]) -> bool:
        """Whether to draft another level, after one of which this was said, row by row."""
        return True

    def keep(self, levels: int) -> int:
        """How many of the drafted levels to verify, where some may be left out (`AdaptiveChain.drops`)."""
        return levels

    def share(self, levels: int) -> Sequence[int]:
        """How many to verify of each row, where they need not be equally many; none where they are to be (`keep`)."""
        return ()

    def learn(self, came: RoundOutcome) -> None:
        """What came of a round."""


@dataclass(frozen=True)
class RoundOutcome:
    """What came of a round; lists have an item for each text that was not done.

    Attributes:
        rows: Texts that it decoded, done ones included.
        levels: Draft levels run.
        verified: Tokens verified.
        accepted: Of them.
        chances: How likely each drafted token was to be kept, by level, as a captured round read it; empty otherwise.
        nodes: Of a tree, verified in each row beside the root.
    """

    rows: int
    levels: int
    verified: Sequence[int]
    accepted: Sequence[int]
    chances: Sequence[Sequence[float]] = ()
    nodes: int = 0


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
    def parse(text: str) -> PolicyName:
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
