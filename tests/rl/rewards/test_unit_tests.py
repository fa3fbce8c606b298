"""The reward python_tests on rows as HumanEval, MBPP and data sets of programs have them."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import pytest

from trainkit.errors import UserError
from trainkit.rl.rewards import unit_tests
from trainkit.rl.rewards.calls import BadCall, BadGold
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.rewards.unit_tests import extract_code, python_tests
from trainkit.rl.sandbox.level import FEATURES
from trainkit.rl.sandbox.run import Verdict, probe
from trainkit.rl.types import Group, Response, Task

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")
PROMPT = 'import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef area(r):\n    """Area of a circle."""\n'
CHECK = """
def check(candidate):
    for r in (1, 2):
        assert abs(candidate(r) - math.pi * r * r) < 1e-9
    assert half(4) == 2
"""
HUMANEVAL = {"test": CHECK, "entry_point": "area", "prompts": PROMPT}
MBPP = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 0) == 0"]}


def score(completion: Any, row: dict[str, Any], **options: Any) -> float | None:
    return python_tests(require="none", **options)(completions=[completion], **{name: [value] for name, value in row.items()})[
        0
    ]


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("    return math.pi * r ** 2\n", 1.0),
        ("    return math.pi * r ** 2\n\n\nprint(area('x'))\n", 1.0),
        ("    return math.pi * r\n", 0.0),
        ("So:\n```python\ndef area(r):\n    return math.pi * r * r\n```\nDone.", 1.0),
        ("```python\ndef area(r):\n    return 0\n```\nBetter:\n```python\ndef area(r):\n    return math.pi * r * r\n```", 1.0),
        ("```\n    return math.pi * r * r\n```", 1.0),
        ([{"role": "assistant", "content": "```python\nimport math\narea = lambda r: math.pi * r * r\n```"}], 1.0),
        ("I do not know.", 0.0),
        ("", 0.0),
        ("    import sys; sys.exit(0)\n", 0.0),
    ],
)
def test_humaneval_row_is_scored(completion: Any, value: float) -> None:
    """A completion may continue the prompt or hold a whole function in its last block; helpers of the prompt are there."""
    assert score(completion, HUMANEVAL) == value


def test_prompt_in_a_chat_is_read_too() -> None:
    """The prompt may be the last message, and need not be Python if the completion needs nothing of it."""
    code = "```python\nimport math\ndef half(x): return x / 2\ndef area(r): return math.pi * r * r\n```"
    chat = [{"role": "user", "content": PROMPT}]
    assert score("    return math.pi * r * r", {**HUMANEVAL, "prompts": chat}) == 1
    check = "import math\n" + CHECK
    assert score(code, {**HUMANEVAL, "test": check, "prompts": [{"role": "user", "content": "Write area(r)."}]}) == 1


def test_partial_reward_is_the_share_of_tests() -> None:
    """The share of assertions or inputs; 0 for one that ends early or reaches a limit, 1 only if all pass."""
    wrong = "def add(a, b):\n    return a + b if a != 2 else 0"
    assert score(wrong, MBPP, column="test_list") == 0
    assert score(wrong, MBPP, column="test_list", partial=True) == pytest.approx(2 / 3)
    assert score("def add(a, b):\n    return a + b", MBPP, column="test_list", partial=True) == 1
    assert score("def add(a, b):\n    if a: return a + b\n    raise SystemExit", MBPP, column="test_list", partial=True) == 0
    assert score("    return math.pi * (r if r == 1 else 0)\n", HUMANEVAL, partial=True) == pytest.approx(2 / 3)
    program = {"io": {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "6", "4"]}}
    assert score("print(int(input()))", program, column="io", partial=True) == 3 / 4
    assert score("while True: print(input())", program, column="io", partial=True) == 0


def test_mbpp_setup_and_builtin_names_work() -> None:
    """Setup code is there for the tests; a solution may be named like a builtin, but not replace one that tests use."""
    row = {"test_list": ["assert math.isclose(root(2), math.sqrt(2))"], "test_imports": ["import math"]}
    assert score("def root(x): return x ** 0.5", row, column="test_list") == 1
    shared = {"test_list": ["assert total(Pair(1, 2)) == 3"], "test_setup_code": "x = 1"}
    pair = "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
    assert score(pair + "def total(p): return p.a + p.b", shared, column="test_list") == 1
    assert score("def sum(a, b): return a + b", {"test_list": ["assert sum(1, 2) == 3"]}, column="test_list") == 1
    cheat = "def f(x): return [1]\ndef set(x): return 0"
    assert score(cheat, {"test_list": ["assert set(f(1)) == set((2, 3))"]}, column="test_list") == 0


@pytest.mark.parametrize("form", ["mapping", "list", "json"])
def test_programs_are_scored_by_what_they_print(form: str) -> None:
    """All forms of pairs; white space at line ends does not count, an exception does."""
    pairs: Any = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}
    if form != "mapping":
        pairs = [
            {"input": i, "output": o, "type": "stdin_stdout"} for i, o in zip(pairs["inputs"], pairs["outputs"], strict=True)
        ]
    row = {"tests": json.dumps(pairs) if form == "json" else pairs}
    right = "```python\nif __name__ == '__main__':\n    a, b = map(int, input().split())\n    print(a + b, ' ')\n```"
    assert score(right, row, column="tests") == 1
    assert score("print(3)", row, column="tests") == 0
    assert score(right.replace("```\n", "", 1).replace("```", "1 / 0"), row, column="tests") == 0


def test_code_is_the_last_python_block() -> None:
    """Other languages do not count; an indented fence loses its indent; an open block extends to the end."""
    assert extract_code("```py\na\n```\n```text\nb\n```") == "a\n"
    assert extract_code("- so\n  ```python\n  if a:\n      b\n  ```\n") == "if a:\n    b\n"
    assert extract_code("x\n```python\na = 1") == "a = 1"
    assert extract_code("a = 1") == "a = 1"


def test_hang_delays_no_other_completion() -> None:
    """One that sleeps ends at the wall limit and counts as a timeout, while the others are scored beside it."""
    right = "def add(a, b):\n    return a + b"
    completions = [right] * 6
    completions[1] = "import time\ntime.sleep(60)"
    began, counts, reasons = time.monotonic(), {}, {}
    reward = python_tests(column="test_list", require="none", workers=3, limits={"wall_seconds": 4})
    rows = {"test_list": [MBPP["test_list"]] * 6}
    values = reward(completions=completions, log_metric=counts.__setitem__, log_extra=reasons.__setitem__, **rows)
    assert time.monotonic() - began < 8
    assert values == [1, 0, 1, 1, 1, 1] and counts["python_tests/timeout"] == 1 and counts["python_tests/memory"] == 0
    assert reasons["python_tests"][:2] == ["passed", "timeout: not done after 4 s"]


def test_failure_of_the_sandbox_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """It has no reward, is counted, and its reason is printed once."""
    reward = python_tests(column="test_list", require="none")
    monkeypatch.setattr(unit_tests, "run_python", lambda *a, **k: Verdict("sandbox_error", why="no processes left"))
    counts = {}
    assert reward(completions=["x", "y"], test_list=[MBPP["test_list"]] * 2, log_metric=counts.__setitem__) == [None, None]
    assert counts["python_tests/sandbox_error"] == 2 and capsys.readouterr().err.count("no processes left") == 1


def test_rewards_call_it_by_name() -> None:
    """It is a built-in function of a recipe, checks its rows before training, and logs counts."""
    rewards = Rewards([{"function": "python_tests", "options": {"column": "test_list", "require": "none"}}])
    task = Task(0, [1], "Write add.", MBPP)
    rewards.check([task])
    texts = ["def add(a, b): return a + b", "def add(a, b): return a", "def add(a, b):\n    x = bytearray(4 << 30)"]
    groups = [Group(task, [Response([1], text, "end", [0.0]) for text in texts])]
    assert rewards.score(groups, 0)["missing"] == 0
    assert [response.reward for response in groups[0].responses] == [1, 0, 0]
    assert rewards.metrics["python_tests/memory"] == 1 and "memory" in groups[0].responses[2].extra["python_tests"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"require": "strict"}, "require: unknown level 'strict'; choose from full, landlock, none"),
        ({"workers": 0}, "workers: 0"),
        ({"limits": {"wall": 1}}, "limits: unknown limit 'wall'; choose from wall_seconds"),
        ({"limits": {"files": 0}}, "limit files"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], line: str) -> None:
    """One line names the option."""
    with pytest.raises(UserError, match=line):
        python_tests(**options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"test": "x ="}, "is no JSON"),
        ({"test": "assert (", "entry_point": "f", "prompts": ""}, "is not Python"),
        ({"test": []}, "known form"),
        ({"test": [{"input": "1"}]}, "known form"),
        ({"test": {"inputs": ["1"], "outputs": []}}, "known form"),
        ({"test": 3}, "known form"),
    ],
)
def test_row_without_tests_is_named(row: dict[str, Any], reason: str) -> None:
    """The row and the reason, before anything runs."""
    with pytest.raises(BadGold, match=reason):
        python_tests(require="none")(completions=[], **{name: [value] for name, value in row.items()})
    with pytest.raises(BadCall, match="needs the column 'other'"):
        python_tests("other", require="none")(completions=[], test=[""])


def test_lower_level_needs_consent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A machine that contains less than required is refused; with consent, one line says what is open."""
    level = probe(FEATURES)
    monkeypatch.setattr(unit_tests, "probe", lambda: level)
    with pytest.raises(UserError, match="require: full: sandbox level none: not contained: .*; set require: none"):
        python_tests()
    python_tests(require="none")
    assert capsys.readouterr().err.count("note: sandbox level none: not contained") <= 1  # once in a process


def test_ranks_share_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a machine do not each start a pool for all its CPUs."""
    sizes = []
    real = unit_tests.ThreadPoolExecutor
    monkeypatch.setattr(unit_tests, "ThreadPoolExecutor", lambda size: sizes.append(size) or real(size))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for ranks in (1, 8, 128):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        python_tests(require="none")(completions=[], test=[["assert True"]])
    assert sizes == [16, 8, 1]
