"""How a user names a policy: `cost`, `confidence:0.6` and so on, parsed once."""

# B rows

from __future__ import annotations

import re
from dataclasses import dataclass

from trainkit.errors import UserError


@dataclass(frozen=True)
class PolicySpec:
    """A policy as the user names it.

    Attributes:
        name: fixed, confidence, predictor, cost, cost-blind (`cost` without the predictor) or ema.
        threshold: Threshold of confidence and predictor.
    """

    name: str
    threshold: float = 0.0

    @staticmethod
    def parse(text: str) -> PolicySpec:
        """Reads `cost`, `confidence:0.6` and so on; default thresholds are 0.6 for confidence and 0.5 for predictor.

        Raises:
            UserError: unknown policy, or a threshold outside 0..1.
        """
        if match := re.fullmatch(r"(confidence|predictor)(?::([0-9.]+))?", text):
            try:
                threshold = float(match[2]) if match[2] else {"confidence": 0.6, "predictor": 0.5}[match[1]]
            except ValueError:
                threshold = -1.0
            if not 0 <= threshold <= 1:
                raise UserError(f"policy {text}: the threshold must be a number between 0 and 1")
            return PolicySpec(match[1], threshold)
        if text in ("fixed", "cost", "cost-blind", "ema"):
            return PolicySpec(text)
        raise UserError(f"unknown policy {text!r}; choose from cost, cost-blind, confidence:P, predictor:P, ema, fixed")
