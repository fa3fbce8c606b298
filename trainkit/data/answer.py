"""What a target answered to a prompt, wherever it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A continuation of one prompt.

    Attributes:
        number: The number it was asked under.
        tokens: The new tokens, the end token included where the text ended by one.
        text: Their text without special tokens.
        finish: `end` or `length`.
    """

    number: int
    tokens: list[int]
    text: str
    finish: str
