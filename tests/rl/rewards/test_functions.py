"""Values of the built-in reward functions on texts worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.rewards import group, rewards_of
from trainkit.errors import UserError
from trainkit.rl.rewards.score import Rewards


def values(name: str, texts: list[str], options: dict[str, Any] | None = None, **columns: Any) -> list[float]:
    groups = [group(texts, **columns)]
    Rewards([{"function": name, "options": options or {}}]).score(groups, 0)
    return rewards_of(groups, name)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("#### 1234", True),
        ("#### $1,234.", True),
        ("#### 1234.00 dollars", True),
        ("5 times 2 is 10, so it is 1,234.", True),
        ("1234", True),
        ("1.234e3", True),
        ("It is $1234", True),
        ("#### 7\n#### 1234", True),
        ("#### 1234 or 7", True),
        ("1234 is not 7", False),
        ("#### none, but 1234 later", True),
        ("1234 ####", False),
        ("#### -1234", False),
        ("x = -1234", False),
        ("2000-1234", True),
        ("1,2,3,4", False),
        ("12,34", False),
        ("1234.5", False),
        ("1e99999999999999999999", False),
        ("no number", False),
        ("", False),
    ],
)
def test_numeric_follows_gsm8k(text: str, right: bool) -> None:
    """The number after ####, else the last number, equals the reference as a decimal."""
    assert values("numeric", [text], answer="2 x 617 = <<2*617=1234>>1234\n#### 1,234") == [right]


def test_numeric_reads_references_of_every_type() -> None:
    """References may be numbers or texts; a text must be a number as a whole."""
    for answer in (12, 12.0, "12", "$12.", "12.00", "so\n#### 12 "):
        assert values("numeric", ["I say 12.", "13"], answer=answer) == [1, 0]
    assert values("numeric", ["-0.5", ".5"], answer="-.5") == [1, 0]
    for answer in ("12 apples", "1,2,3", "1_000", "1/2", "", True, [1], "nan", "#### "):
        with pytest.raises(UserError, match=r"^rows.jsonl:1: answer .* (is not a|holds no) number, for the reward numeric"):
            values("numeric", ["12"], answer=answer)


def test_numeric_reads_all_of_gsm8k_form() -> None:
    """Every bundled answer of GSM8K's form is right for itself and wrong for the next."""
    answers = [f"She has {n} - 1 = <<{n}-1={n - 1}>>{n - 1:,} left.\n#### {n - 1:,}" for n in (1, 12, 1001, 2_000_000)]
    for own, other in zip(answers, answers[1:] + answers[:1], strict=True):
        assert values("numeric", [own, other], answer=own) == [1, 0]


def test_extract_takes_the_last_match() -> None:
    """`extract` takes the group of the last match as the answer; a response without a match is wrong."""
    options = {"extract": r"\\boxed\{(.*?)\}"}
    texts = [r"\boxed{3} or \boxed{ 4 }", r"\boxed{4} or \boxed{3}", "4"]
    assert values("numeric", texts, options, answer="4") == values("exact", texts, options, answer="4") == [1, 0, 0]
    assert values("exact", ["a1 b22"], {"extract": r"\d+"}, answer=22) == [1]


def test_exact_compares_stripped_texts() -> None:
    """White space around the answer does not count, case only if it is not ignored, and an empty reference is refused."""
    assert values("exact", [" Yes\n", "yes", "Yes!"], answer="Yes ") == [1, 0, 0]
    assert values("exact", [" Yes\n", "yes", "Yes!"], {"ignore_case": True}, answer="Yes ") == [1, 1, 0]
    assert values("exact", ["46", "046"], {"column": "gold"}, gold=46) == [1, 0]
    with pytest.raises(UserError, match="answer ' ' is empty"):
        values("exact", [""], answer=" ")


def test_rows_without_reference_have_no_value() -> None:
    """A row whose reference is null has no value, also if no row of a call has one; if none of the data has, it is refused."""
    groups = [group(["1"], answer="1"), group(["1"], index=1, answer=None)]
    assert Rewards([{"function": "numeric"}]).score(groups, 0)["missing"] == 1
    assert Rewards([{"function": "numeric"}]).score(groups[1:], 0)["missing"] == 1
    with pytest.raises(UserError, match="numeric needs the column 'answer', which is null in all rows; set its options"):
        Rewards([{"function": "numeric"}]).check([groups[1].task])


def test_regex_searches_or_matches_all() -> None:
    """The pattern may match anywhere, or must match the whole completion."""
    assert values("regex", ["so 42", "42", "x"], {"pattern": r"\d+"}) == [1, 1, 0]
    assert values("regex", ["so 42", "42", "x"], {"pattern": r"\d+", "full": True}) == [0, 1, 0]


def test_format_wants_each_tag_once_and_nothing_else() -> None:
    """Tags in order, once each, with nothing outside."""
    right = "<think>a\nb</think>\n<answer>c</answer>"
    wrong = [
        f"Well, {right}",
        f"{right}.",
        right.replace("</think>", ""),
        "<answer>c</answer><think>a</think>",
        f"{right}<answer>d</answer>",
        right.replace("a\n", "<think>"),
    ]
    assert values("format", [right, f" {right}\n", *wrong]) == [1, 1, *[0] * len(wrong)]
    assert values("format", ["<a+>x</a+>", "<a>x</a>"], {"tags": ["a+"]}) == [1, 0]


def test_length_is_the_soft_overlong_punishment() -> None:
    """Maximum 16 with margin 4: lengths 16, 17, 18, 20 and 21 give 0, -.25, -.5, -1 and -1; too short likewise."""
    texts = ["a" * n for n in (0, 3, 4, 16, 17, 18, 20, 21)]
    assert values("length", texts[3:], {"maximum": 16, "margin": 4}) == [0, -0.25, -0.5, -1, -1]
    assert values("length", texts, {"maximum": 16, "minimum": 4}) == [-1, -1, 0, 0, -1, -1, -1, -1]
    assert values("length", texts[:3], {"maximum": 16, "minimum": 4, "margin": 8}) == [-0.5, -0.125, 0]
    assert str(values("length", ["a"], {"maximum": 16})[0]) == "0.0"


def test_repetition_is_the_share_of_repeated_ngrams() -> None:
    """Of the 6 pairs in abababa only ab and ba are new: -4 / 6; short texts have none."""
    assert values("repetition", ["abababa", "abcdefg", "a", ""], {"size": 2}) == [pytest.approx(-4 / 6), 0, 0, 0]
    assert values("repetition", ["a" * 103]) == [pytest.approx(-0.99)]


def test_chats_score_as_texts() -> None:
    """Every built-in function gives chats what it gives texts."""
    chat = [{"role": "user", "content": "?"}]
    for name, options in (
        ("exact", {}),
        ("numeric", {}),
        ("regex", {"pattern": "^4"}),
        ("format", {}),
        ("length", {"maximum": 2}),
    ):
        assert values(name, ["4", "<think>4</think><answer>4</answer>"], options, answer="4") == values(
            name, ["4", "<think>4</think><answer>4</answer>"], options, answer="4", prompt=chat
        )
