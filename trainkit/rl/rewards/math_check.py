"""Comparison of an answer with its reference by math-verify; loaded only in processes, which limit its time and memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from trainkit.rl.rewards.calls import BadGold

_MATH_VERIFY = import_module("math_verify")  # here, so that the first call does not pay for it
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it has no limit of its own


def check_math(completions: Sequence[str], gold: str) -> list[float | None]:
    """1 if the only completion equals the reference, else 0."""
    reference = _parse_gold(gold)
    if not reference:
        raise BadGold(0, f"{gold!r:.60} is not a mathematical expression")
    answer = _parse(completions[0])
    # Not symmetric: the reference is first.
    return [float(bool(answer) and _MATH_VERIFY.verify(reference, answer, timeout_seconds=None))]


def _parse(text: str) -> list[Any]:
    return _MATH_VERIFY.parse(text, parsing_timeout=None)


@lru_cache(4096)
def _parse_gold(text: str) -> list[Any]:
    marked = any(mark in text for mark in ("$", "\\boxed", "\\(", "\\["))
    return _parse(text) if marked else _parse(f"${text}$") or _parse(text)  # without $, only 3 of 3\sqrt{2} would be read
