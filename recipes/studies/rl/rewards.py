"""Reward functions of the RL study."""

from __future__ import annotations


def digits(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Share of the answer's digits that are right at their position, minus 0.25 for each digit too many or too few."""
    return [
        sum(a == b for a, b in zip(text, gold, strict=False)) / len(gold) - 0.25 * abs(len(text) - len(gold))
        for text, gold in zip(completions, answer, strict=True)
    ]
