"""Built-in reward functions, called as those of a user are; each factory returns one for its options.

Called without completions, they only read the reference answers, so that a bad row is found before training.
Nothing here imports torch, because a process with a time limit loads it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, TypeAlias

from trainkit.errors import UserError
from trainkit.rl.rewards.calls import NOT_COLUMNS, BadCall, BadGold

Completion: TypeAlias = str | list[dict[str, Any]]
RewardFunction: TypeAlias = Callable[..., list[float | None]]
Columns: TypeAlias = Mapping[str, Sequence[Any]]

_NUMBER = re.compile(r"(?:(?<![\w)\].])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
"""A number in a text: commas only between groups of three digits, a minus only where it cannot be a subtraction."""
MARK = "####"


def exact(column: str = "answer", extract: str | None = None, ignore_case: bool = False) -> RewardFunction:
    """1 if the answer equals the reference text, without surrounding white space, else 0.

    Args:
        column: Column of the reference text.
        extract: Regular expression whose last match (or its first group) is the answer; None takes the completion.
        ignore_case: Whether upper and lower case are equal.
    """
    found = extractor(extract)

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    def read(gold: Any) -> str:
        if not (text := normal(str(gold))):
            raise ValueError("is empty")
        return text

    def exact(completions: Sequence[Completion], **columns: Sequence[Any]) -> list[float | None]:
        golds = read_golds(columns, column, read)
        return compare(golds, completions, lambda gold, text: (answer := found(text)) is not None and normal(answer) == gold)

    return exact


def numeric(column: str = "answer", extract: str | None = None) -> RewardFunction:
    """1 if the answer is the reference number, else 0; compared as decimals, so 72, 72.0 and $72. are equal.

    The answer is the first number after the last `####`, as GSM8K writes it (arXiv 2110.14168), and the last number of the text
    if there is no `####`. Commas between thousands and `$` are left out.

    Args:
        column: Column of the reference: a number, or a text that is one, after the last `####` if it has one.
        extract: Regular expression whose last match (or its first group) holds the answer; None takes the completion.
    """
    found = extractor(extract)

    def read(gold: Any) -> Decimal:
        text = str(gold).rpartition(MARK)[2].strip().removesuffix(".")
        match = _NUMBER.fullmatch(text)
        number = None if isinstance(gold, bool) or match is None else _decimal(text)
        if number is None:
            raise ValueError("holds no number" if MARK in str(gold) else "is not a number")
        return number

    def numeric(completions: Sequence[Completion], **columns: Sequence[Any]) -> list[float | None]:
        return compare(read_golds(columns, column, read), completions, lambda gold, text: _answer(found(text)) == gold)

    return numeric


def regex(pattern: str, full: bool = False) -> RewardFunction:
    """1 if the completion has a match of the regular expression, else 0.

    Args:
        pattern: Regular expression of Python's `re`; `(?s)` at its start lets a dot match line breaks.
        full: Whether the whole completion must match.
    """
    compiled = _compile("pattern", pattern)
    match = compiled.fullmatch if full else compiled.search

    def regex(completions: Sequence[Completion], **columns: Sequence[Any]) -> list[float | None]:
        return [float(match(text_of(completion)) is not None) for completion in completions]

    return regex


def format(tags: list[str] | None = None) -> RewardFunction:
    """1 if the completion is `<think>...</think> <answer>...</answer>` and nothing else, each tag once, else 0.

    The form that DeepSeek-R1-Zero was rewarded for (arXiv 2501.12948).

    Args:
        tags: Names of the tags in their order; None means think and answer.
    """
    names = ["think", "answer"] if tags is None else tags
    if not names or not all(name.strip() for name in names):
        raise UserError("tags: must be a list of names, such as [think, answer]")
    marks = [f"<{slash}{name}>" for name in names for slash in ("", "/")]
    whole = re.compile(r"\s*".join(rf"<{re.escape(name)}>.*</{re.escape(name)}>" for name in names), re.DOTALL)

    def format(completions: Sequence[Completion], **columns: Sequence[Any]) -> list[float | None]:
        texts = [text_of(completion).strip() for completion in completions]
        return [float(all(text.count(mark) == 1 for mark in marks) and whole.fullmatch(text) is not None) for text in texts]

    return format


def length(maximum: int, minimum: int = 0, margin: int = 0) -> RewardFunction:
    """0 if the number of tokens is between `minimum` and `maximum`, else down to -1, in proportion over `margin` tokens.

    With maximum L - C and margin C this is DAPO's soft overlong punishment (arXiv 2503.14476, equation 13).
    """
    for name, value, least in (("minimum", minimum, 0), ("maximum", maximum, max(minimum, 1)), ("margin", margin, 0)):
        if value < least:
            raise UserError(f"{name}: {value} must be at least {least}; choose a larger number")

    def length(
        completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]
    ) -> list[float | None]:
        off = [max(minimum - len(ids), len(ids) - maximum, 0) for ids in completion_ids]
        return [-min(1.0, tokens / margin if margin else float(tokens > 0)) + 0.0 for tokens in off]

    return length


def repetition(size: int = 4) -> RewardFunction:
    """Minus the share of the completion's n-grams of tokens that occurred before in it: near -1 in a loop.

    Args:
        size: Tokens of an n-gram.
    """
    if size < 1:
        raise UserError(f"size: {size} must be at least 1; choose a larger number")

    def repetition(
        completions: Sequence[Completion], completion_ids: Sequence[Sequence[int]], **columns: Sequence[Any]
    ) -> list[float | None]:
        return [_distinct_share(ids, size) - 1.0 for ids in completion_ids]

    return repetition


def text_of(completion: Completion) -> str:
    """The text of a completion of either form."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def read_golds(columns: Columns, column: str, read: Callable[[Any], Any]) -> list[Any]:
    """The reference of each row by `read`, whose ValueError is the reason why it cannot; None where the row has none."""
    check_column(columns, column)
    golds = []
    for n, value in enumerate(columns[column]):
        try:
            golds.append(None if value is None else read(value))
        except ValueError as error:
            raise BadGold(n, f"{column} {value!r:.60} {error}") from None
    return golds


def check_column(columns: Columns, column: str) -> None:
    """Raises BadCall if the tasks lack the column, or, called without completions, if it is null in all of them."""
    if column not in columns:
        others = ", ".join(sorted(name for name in columns if name not in NOT_COLUMNS)) or "none"
        raise BadCall(f"needs the column {column!r}, but the tasks have: {others}; set its options: {{column: ...}}")
    if not columns.get("completion_ids") and all(value is None for value in columns[column]):
        raise BadCall(f"needs the column {column!r}, which is null in all rows; set its options: {{column: ...}}")


def compare(golds: Sequence[Any], completions: Sequence[Completion], score: Callable[[Any, str], float]) -> list[float | None]:
    """The score of each completion; None if its row has no reference answer."""
    pairs = zip(golds, completions, strict=bool(completions))
    return [None if gold is None else float(score(gold, text_of(completion))) for gold, completion in pairs]


def _answer(text: str | None) -> Decimal | None:
    if text is None:
        return None
    if MARK in text:
        match = _NUMBER.search(text.rpartition(MARK)[2])
        return match and _decimal(match.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", "").replace("$", ""))
    except InvalidOperation:  # an exponent beyond those of decimals
        return None


def extractor(pattern: str | None) -> Callable[[str], str | None]:
    """Takes the last match of a pattern out of a text, None if there is none; without a pattern, the text."""
    if pattern is None:
        return lambda text: text
    compiled = _compile("extract", pattern)

    def find(text: str) -> str | None:
        matches = [match.group(1 if compiled.groups else 0) for match in compiled.finditer(text)]
        return matches[-1] if matches else None

    return find


def _compile(option: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(f"{option}: {pattern!r} is not a regular expression ({error}); correct it") from None


def _distinct_share(ids: Sequence[int], size: int) -> float:
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
