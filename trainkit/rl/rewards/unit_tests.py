"""The reward of Python unit tests: takes the code from a completion and runs its data set's tests on it in the sandbox."""

from __future__ import annotations

import ast
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from trainkit.errors import UserError, note
from trainkit.rl.rewards.calls import BadGold
from trainkit.rl.rewards.functions import Completion, RewardFunction, check_column, text_of
from trainkit.rl.sandbox.level import LEVELS
from trainkit.rl.sandbox.run import Calls, Limits, Program, Verdict, probe, run_python

FENCE = re.compile(r"^([ \t]*)```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
COUNTED = ("timeout", "memory", "output", "signal", "sandbox_error")


def python_tests(
    column: str = "test",
    partial: bool = False,
    require: str = "full",
    workers: int | None = None,
    limits: dict[str, int] | None = None,
) -> RewardFunction:
    """1 if a completion's Python code passes its tests, else 0; missing if it could not be tested.

    A completion that reaches a limit of time, memory or output has 0, so that failures cannot hide behind hangs. The number of
    completions of each such outcome is logged as `python_tests/OUTCOME`, and the reason of each completion in tables.

    Args:
        column: Column with the tests. HumanEval: text that defines `check`, beside the column `entry_point`. MBPP: a list of
            assertions, beside `test_setup_code` or `test_imports` if there are any. Programs: what they read and print, as
            {"inputs": [...], "outputs": [...]} or [{"input": ..., "output": ...}], or that as JSON.
        partial: Reward the share of assertions or inputs that pass.
        require: Least level of the sandbox: full, landlock or none. Where anything is not contained, one line says what.
        workers: Number of completions that are tested at once; by default one per CPU of this rank, up to 16.
        limits: Values for fields of `sandbox.run.Limits`.

    Raises:
        UserError: an option is out of range, or the machine contains less than `require`.
    """
    if require not in LEVELS:
        raise UserError(f"require: unknown level {require!r}; choose from {', '.join(reversed(LEVELS))}")
    if workers is not None and workers < 1:
        raise UserError(f"workers: {workers} is less than 1")
    if unknown := [name for name in limits or {} if name not in Limits.__dataclass_fields__]:
        raise UserError(f"limits: unknown limit {unknown[0]!r}; choose from {', '.join(Limits.__dataclass_fields__)}")
    allowed, level = Limits(**(limits or {})), probe()
    if LEVELS.index(level.name) < LEVELS.index(require):
        raise UserError(f"require: {require}: {level}; set require: {level.name} to run completions all the same")
    if level.open:
        note(str(level))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    at_once = workers or max(1, min(16, len(os.sched_getaffinity(0)) // ranks))

    def python_tests(
        completions: Sequence[Completion],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[str]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        tests = _read_all(columns, column, partial)
        pairs = zip(tests, map(text_of, completions), strict=bool(completions))
        jobs = [test and (_solution(text, test[0], test[1]), test[0]) for test, text in pairs]
        with ThreadPoolExecutor(at_once) as pool:
            verdicts = list(pool.map(lambda job: job and run_python(*job, limits=allowed, level=level), jobs))
        counts = Counter(verdict.outcome for verdict in verdicts if verdict)
        if log_metric is not None and completions:
            for outcome in COUNTED:
                log_metric(f"python_tests/{outcome}", counts[outcome])
        if log_extra is not None and completions:
            log_extra(
                "python_tests", [f"{verdict.outcome}: {verdict.why}".rstrip(": ") if verdict else "" for verdict in verdicts]
            )
        return [_value(verdict, partial) if verdict else None for verdict in verdicts]

    return python_tests


def extract_code(text: str) -> str:
    """The last fenced block of Python, or of no language, in a completion; the whole text if it has no such block.

    A block that the completion does not close extends to its end.
    """
    blocks = [
        re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
        for indent, language, code in FENCE.findall(text)
        if language.lower() in ("", "py", "python", "python3")
    ]
    return blocks[-1] if blocks else text


def _value(verdict: Verdict, partial: bool) -> float | None:
    if verdict.outcome == "sandbox_error":
        note(f"python_tests: a completion was not tested and has no reward: {verdict.why}")
        return None
    if partial and verdict.outcome == "failed" and verdict.total:
        return verdict.passed / verdict.total
    return float(verdict.outcome == "passed")


def _solution(text: str, tests: Calls | Program, prompt: str) -> str:
    """The code to test, after the prompt's own; a completion that only continues the prompt is joined to it."""
    code = extract_code(text)
    if isinstance(tests, Program) or not tests.entry:
        return code
    entry = re.escape(tests.entry)
    if re.search(rf"^(async +)?def +{entry}\b|^{entry} *=", code, re.MULTILINE):
        return f"{tests.setup}\n\n{code}"
    return prompt + _body(code)


def _read_all(columns: Mapping[str, Any], column: str, partial: bool) -> list[tuple[Calls | Program, str] | None]:
    """The tests and the prompt of each row; None where it has no tests."""
    check_column(columns, column)
    names = [name for name in ("entry_point", "prompt", "prompts", "test_imports", "test_setup_code") if name in columns]
    found = []
    for n, value in enumerate(columns[column]):
        row = {name: columns[name][n] for name in names}
        try:
            found.append(None if value is None else _read(value, row, partial))
        except ValueError as error:
            raise BadGold(n, f"{column} {value!r:.60} {error}") from None
    return found


def _read(tests: Any, row: Mapping[str, Any], partial: bool) -> tuple[Calls | Program, str]:
    if isinstance(tests, str) and (entry := row.get("entry_point")):  # HumanEval
        prompt = row.get("prompt") or row.get("prompts") or ""
        prompt = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        setup = prompt if _is_python(prompt) else ""
        return Calls(_checked(f"{tests}\ncheck({entry})\n", partial), setup, entry), prompt
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            raise ValueError("is no JSON, and the row has no column entry_point") from None
    if isinstance(tests, Sequence) and tests and all(isinstance(test, str) for test in tests):  # MBPP
        setup = "\n".join([*(row.get("test_imports") or []), row.get("test_setup_code") or ""])
        return Calls(_checked("\n".join(tests), partial), setup), ""
    if isinstance(tests, Mapping) and len(tests.get("inputs", ())) == len(tests.get("outputs", ())):
        tests = [{"input": i, "output": o} for i, o in zip(tests.get("inputs", ()), tests.get("outputs", ()), strict=True)]
    good = isinstance(tests, Sequence) and all(
        isinstance(test, Mapping) and test.keys() >= {"input", "output"} for test in tests
    )
    if not good or not tests:
        raise ValueError("has no tests in a known form")
    return Program([(str(test["input"]), str(test["output"])) for test in tests], partial), ""


def _body(text: str) -> str:
    """The lines that continue a function: all before the next one that is not indented."""
    lines = text.split("\n")
    end = next((n for n, line in enumerate(lines) if n and line[:1] not in ("", " ", "\t", "#", ")", "]", "}")), len(lines))
    return "\n".join(lines[:end]) + "\n"


@lru_cache(4096)
def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


class _Counted(ast.NodeTransformer):
    """Each assertion counts as passed or not, and the tests go on."""

    def visit_Assert(self, node: ast.Assert) -> ast.Try:
        count = lambda passed: ast.Expr(ast.Call(ast.Name("__test__", ast.Load()), [ast.Constant(passed)], []))
        handler = ast.ExceptHandler(ast.Name("Exception", ast.Load()), None, [count(False)])
        return ast.Try([node], [handler], [count(True)], [])


@lru_cache(4096)
def _checked(source: str, partial: bool) -> str:
    """The tests' source, with counted assertions if `partial`; raises ValueError if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"is not Python: {error}") from None
    return ast.unparse(ast.fix_missing_locations(_Counted().visit(tree))) if partial else source
