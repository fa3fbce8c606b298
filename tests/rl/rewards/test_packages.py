"""Built-in reward functions that need math-verify or reasoning-gym; skipped where the package is not installed."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from tests.support.rewards import group, rewards_of
from trainkit.errors import UserError
from trainkit.rl.rewards.score import Rewards


@pytest.fixture(scope="module")
def maths() -> Rewards:
    pytest.importorskip("math_verify")
    return Rewards([{"function": "math_verify", "options": {"workers": 2, "seconds": 2.0}}])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (
            "#### 72",
            ["#### 72", "so 72.", "24 or 30%\n#### 72", r"$\boxed{72}$", "$x = 72$", "72.0"],
            ["27", r"\boxed{3} or \boxed{72}", "", "x"],
        ),
        (r"\frac{1}{2}", ["1/2", "$0.5$", r"\boxed{\frac12}"], ["2", "1"]),
        (r"3\sqrt{2}", [r"$\sqrt{18}$"], ["3"]),
        (r"The box: $\boxed{(1,2)}$", [r"$(1,2)$"], [r"$(2,1)$"]),
        ("1<x<2", ["$(1,2)$"], ["$(1,3)$"]),
        ("(1,2)", ["$(1,2)$"], ["$1<x<2$"]),
        (12, ["12"], ["13"]),
    ],
)
def test_math_verify_compares_as_mathematics(answer: Any, right: list[str], wrong: list[str], maths: Rewards) -> None:
    """Equal expressions are right in any form; no expression is wrong, not missing."""
    groups = [group([*right, *wrong], answer=answer)]
    maths.check([groups[0].task])
    maths.score(groups, 0)
    assert rewards_of(groups, "math_verify") == [1] * len(right) + [0] * len(wrong)


def test_math_verify_ends_endless_expressions(maths: Rewards) -> None:
    """An endless expression costs its limit, gives 0, is counted, and takes no other completion with it."""
    groups = [group(["72", "$10000000!$", "72"], answer="72")]
    maths.score([group(["1"], answer="1")], 0)
    start = time.monotonic()
    maths.score(groups, 0)
    assert time.monotonic() - start < 20  # 2 s, and the start of a process on a busy machine
    assert rewards_of(groups, "math_verify") == [1, 0, 1] and maths.metrics == {"math_verify/over_limit": 1}


def test_math_verify_refuses_unreadable_references(maths: Rewards) -> None:
    """A reference that is no expression is refused with its row, before training and at the first score."""
    tasks = [group([], index=n, answer=answer).task for n, answer in enumerate(["7", None, "7", "#### "])]
    maths.check(tasks[:3])
    with pytest.raises(UserError, match=r"^rows.jsonl:4: '' is not a mathematical expression, for the reward math_verify"):
        maths.check(tasks)
    with pytest.raises(UserError, match=r"^rows.jsonl:2: '' is not a mathematical expression"):
        maths.score([group(["7"], answer="7"), group(["7"], index=1, answer="#### ")], 0)
    groups = [group(["7"], answer="7"), group(["7"], index=1, answer=None)]
    maths.score(groups, 0)
    assert rewards_of(groups, "math_verify")[0] == 1 and math.isnan(groups[1].responses[0].reward)


def test_reasoning_gym_scores_by_its_verifier() -> None:
    """Only the text in the tag counts, and a text that merely contains the answer is wrong unless `strict` is off."""
    gym = pytest.importorskip("reasoning_gym")
    item = gym.create_dataset("chain_sum", size=1, seed=0)[0]
    answer = item["answer"]
    texts = [f"<answer>1</answer> <answer> {answer} </answer>", f"<answer>{answer} or 1</answer>", answer, "<answer></answer>"]
    scores = {}
    for name, options in (("tag", {}), ("soft", {"strict": False}), ("whole", {"tag": None})):
        groups = [group(texts, entry=item)]
        Rewards([{"function": "reasoning_gym", "options": options}]).score(groups, 0)
        scores[name] = rewards_of(groups, "reasoning_gym")
    assert scores["tag"] == [1, 0, 0, 0] and scores["whole"] == [0, 0, 1, 0]
    assert scores["soft"] == [1, pytest.approx(len(answer) / len(f"{answer} or 1")), 0, 0]
    with pytest.raises(UserError, match=r"^rows.jsonl:1: entry {} is not an item of reasoning-gym"):
        Rewards([{"function": "reasoning_gym"}]).check([group([], entry={}).task])
