"""The reward of Python unit tests: takes the code from a completion and runs its data set's tests on it in the sandbox."""

from __future__ import annotations

import ast
import json
import os
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from trainkit.errors import UserError, note
from trainkit.rl.sandbox import LEVELS, Calls, Limits, Program, Verdict, probe, run_python

FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def python_tests(
    column: str = "test",
    partial: bool = False,
    require: str = "full",
    workers: int | None = None,
    limits: Mapping[str, int] | None = None,
) -> Callable[..., list[float | None]]:
    """A reward function: 1.0 if a completion's Python code passes its tests, else 0.0; None if it could not be tested.

    A completion that reaches a limit of time, memory or output has 0, so that failures cannot hide behind hangs.

    Args:
        column: Column with the tests. HumanEval: text that defines `check`, beside the columns `entry_point` and `prompt`.
            MBPP: a list of assertions, beside `test_setup_code` or `test_imports` if there are any. Programs: what they read
            and print, as {"inputs": [...], "outputs": [...]} or [{"input": ..., "output": ...}], or that as JSON.
        partial: Reward the share of assertions or inputs that pass.
        require: Least level of the sandbox: full, landlock or none. Below full, one line says what is not contained.
        workers: Number of completions that are tested at once; by default one per CPU of this rank, up to 16.
        limits: Values for fields of `sandbox.Limits`.

    Raises:
        UserError: an option is out of range, the machine contains less than `require`, or a row has no tests in a known form.
    """
    if require not in LEVELS:
        raise UserError(f"require: unknown level {require!r}; choose from {', '.join(reversed(LEVELS))}")
    if workers is not None and workers < 1:
        raise UserError(f"workers: {workers} is less than 1")
    try:
        allowed = Limits(**(limits or {}))
    except TypeError:
        known = ", ".join(Limits.__dataclass_fields__)
        raise UserError(f"limits: {', '.join(limits or {})}: choose names from {known}") from None
    level = probe()
    if LEVELS.index(level.name) < LEVELS.index(require):
        raise UserError(f"{level}; set require: {level.name} to run completions all the same, or use another machine")
    if level.open:
        note(str(level))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pool_size = workers or max(1, min(16, len(os.sched_getaffinity(0)) // ranks))

    def reward(
        completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float | None]:
        if column not in columns:
            raise UserError(f"python_tests: the data has no column {column!r}; set the option column")
        rows = [
            {name: values[row] for name, values in columns.items() if _is_column(values, len(completions))}
            for row in range(len(completions))
        ]
        jobs = [_job(completion, row, column, partial) for completion, row in zip(completions, rows, strict=True)]
        with ThreadPoolExecutor(pool_size) as pool:
            verdicts = list(pool.map(lambda job: run_python(*job, limits=allowed, level=level), jobs))
        if log_metric is not None:
            for outcome, count in Counter(verdict.outcome for verdict in verdicts).items():
                log_metric(f"python_tests/{outcome}", count)
        return [_value(verdict, partial) for verdict in verdicts]

    return reward


def extract_code(text: str) -> str:
    """The last fenced block of Python, or of no language, in a completion; the whole text if it has no such block.

    A block that the completion does not close extends to its end.
    """
    blocks = [code for language, code in FENCE.findall(text) if language.lower() in ("", "py", "python", "python3")]
    return textwrap.dedent(blocks[-1]) if blocks else text


def _is_column(values: Any, count: int) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and len(values) == count


def _value(verdict: Verdict, partial: bool) -> float | None:
    if verdict.outcome == "sandbox_error":
        note(f"python_tests: a completion was not tested and has no reward: {verdict.why}")
        return None
    if partial and verdict.outcome == "failed" and verdict.total:
        return verdict.passed / verdict.total
    return float(verdict.outcome == "passed")


def _job(completion: Any, row: Mapping[str, Any], column: str, partial: bool) -> tuple[str, Calls | Program]:
    """The solution's source and its tests."""
    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
    code, tests = extract_code(text), row[column]
    entry = row.get("entry_point")
    if isinstance(tests, str) and entry:  # HumanEval
        prompt = row.get("prompt") or row.get("prompts")
        setup = prompt if isinstance(prompt, str) and _parses(prompt) else ""
        if not re.search(rf"^(async +)?def +{re.escape(entry)}\b|^{re.escape(entry)} *=", code, re.MULTILINE):
            code = _body(code)  # continues the prompt
            return str(prompt) + code, Calls(_checked(f"{tests}\ncheck({entry})\n", column, partial), setup, entry)
        return f"{setup}\n\n{code}", Calls(_checked(f"{tests}\ncheck({entry})\n", column, partial), setup, entry)
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            raise UserError(f"column {column}: {tests[:60]!r} is no JSON, and the row has no column entry_point") from None
    if isinstance(tests, Sequence) and tests and all(isinstance(test, str) for test in tests):  # MBPP
        imports = row.get("test_imports") or []
        setup = "\n".join([*imports, row.get("test_setup_code") or ""])
        return code, Calls(_checked("\n".join(tests), column, partial), setup)
    if isinstance(tests, Mapping):
        tests = [{"input": i, "output": o} for i, o in zip(tests.get("inputs", ()), tests.get("outputs", ()), strict=True)]
    pairs = [
        (str(test["input"]), str(test["output"]))
        for test in tests
        if isinstance(test, Mapping) and test.keys() >= {"input", "output"}
    ]
    if not pairs or len(pairs) < len(tests):
        raise UserError(f"column {column}: {str(row[column])[:60]!r} has no tests in a known form; see the option column")
    return code, Program(pairs, partial)


def _body(text: str) -> str:
    """The lines that continue a function: all before the next one that is not indented."""
    lines = text.split("\n")
    end = next((n for n, line in enumerate(lines) if n and line[:1] not in ("", " ", "\t", "#", ")", "]", "}")), len(lines))
    return "\n".join(lines[:end]) + "\n"


def _parses(source: str) -> bool:
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


def _checked(source: str, column: str, partial: bool) -> str:
    """The tests' source, with counted assertions if `partial`."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"column {column}: a row's tests are not Python: {error}") from None
    return ast.unparse(ast.fix_missing_locations(_Counted().visit(tree))) if partial else source
