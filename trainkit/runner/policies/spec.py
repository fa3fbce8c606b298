"""How a user names a policy: `cost`, `confidence:0.6` and so on, parsed once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainkit.errors import UserError
from trainkit.runner.policy import Signal

THRESHOLD_SIGNALS: tuple[Signal, ...] = ("logistic", "predictor", "confidence")

SIGNALS: dict[str, Signal | None] = {
    "cost": None,
    "cost:logistic": "logistic",
    "cost:predictor": "predictor",
    "cost:confidence": "confidence",
    "cost-blind": "none",
}
"""Names of the variants of `cost` -> the signal that each reads; None for the best that there is."""


@dataclass(frozen=True)
class PolicySpec:
    """A policy as the user names it.

    Attributes:
        name: fixed, ema, cost, or threshold.
        signal: What it reads of each level; None for the best that there is.
        threshold: Threshold of the signal.
    """

    name: str
    signal: Signal | None = "none"
    threshold: float = 0.0

    @staticmethod
    def parse(text: str) -> PolicySpec:
        """Reads `cost`, `cost:logistic`, `confidence:0.6` and so on; the default threshold is 0.6 for confidence, else 0.5.

        Raises:
            UserError: unknown policy, or a threshold outside 0..1.
        """
        for signal in THRESHOLD_SIGNALS:
            if match := re.fullmatch(rf"{signal}(?::([0-9.]+))?", text):
                try:
                    threshold = float(match[1]) if match[1] else 0.6 if signal == "confidence" else 0.5
                except ValueError:
                    threshold = -1.0
                if not 0 <= threshold <= 1:
                    raise UserError(f"policy {text}: the threshold must be a number between 0 and 1")
                return PolicySpec("threshold", signal, threshold)
        if text in SIGNALS:
            return PolicySpec("cost", SIGNALS[text])
        if text in ("fixed", "ema"):
            return PolicySpec(text)
        thresholds = (f"{signal}:P" for signal in THRESHOLD_SIGNALS)
        raise UserError(f"unknown policy {text!r}; choose from {', '.join([*SIGNALS, *thresholds, 'ema', 'fixed'])}")
