"""Runs tests on a solution in another process than the solution's; both are contained already (`contain`).

The solution's process (`solver`) is a fork made before this one, the judge, reads the tests. Only plain data passes between
them, through pipes. So a solution sees no test, no result and no frame of the judge, and cannot forge a result by ending early,
by printing, by patching builtins or by returning objects that equal everything. A bare interpreter runs this file's code, so it
imports nothing of trainkit but files that run there too.
"""

from __future__ import annotations

import builtins
import io
import marshal
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from types import CodeType
from typing import Any

from trainkit.rl.sandbox.solver import CLASSES, Ended, describe, dump, end_of, fork, receive, send, serve_calls, serve_program


class Unsent(BaseException):
    """A test cannot be run this way, which is not the solution's fault. No `Exception`, so that tests do not catch it."""


class ToSolver(pickle.Pickler):
    """Pickles what a test passes; objects of the solver are numbers."""

    def persistent_id(self, obj: Any) -> int | None:
        return obj._number if type(obj) is Remote else None


class AtJudge(pickle.Unpickler):
    """Reads what a solution returns; looks up no name but those in `CLASSES`."""

    def __init__(self, data: bytes, solver: Solver) -> None:
        super().__init__(io.BytesIO(data))
        self.solver = solver

    def persistent_load(self, pid: int) -> Remote:
        return Remote(self.solver, pid)

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not plain data")
        build = super().find_class(module_name, global_name)
        return lambda *arguments: build(*arguments)  # not the class itself, which a pickle may change


class Remote:
    """An object in the solver that is not plain data: a function, a class, an instance. It equals only itself."""

    def __init__(self, solver: Solver, number: int) -> None:
        self._solver, self._number = solver, number

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        value, changed = self._solver.ask("call", self, arguments, named)
        for old, new in zip(arguments, changed, strict=False):  # as the call left them
            if type(old) is type(new) and type(old) in (list, bytearray):
                old[:] = new
            elif type(old) is type(new) and type(old) in (dict, set):
                old.clear()
                old.update(new)
        return value

    def __getattr__(self, name: str) -> Any:
        if name[:2] == "__":
            raise AttributeError(name)
        return self._solver.ask("attribute", self, name)[0]

    def _special(self, name: str, *arguments: Any) -> Any:
        return self._solver.ask("attribute", self, name)[0](*arguments)

    def __len__(self) -> int:
        return self._special("__len__")

    def __iter__(self) -> Any:
        return iter(self._special("__iter__"))

    def __getitem__(self, key: Any) -> Any:
        return self._special("__getitem__", key)

    def __str__(self) -> str:
        return str(self._special("__str__"))

    def __repr__(self) -> str:
        return str(self._special("__repr__"))


class Solver:
    """The fork with the solution."""

    def __init__(self, serve: Callable[[int, int], None], filtered: bool) -> None:
        (requests, self.requests), (self.answers, answers) = os.pipe(), os.pipe()
        self.out_of_memory = False
        self.pid = fork(lambda: serve(requests, answers), (requests, answers), filtered)
        os.close(requests)
        os.close(answers)

    def names(self) -> dict[str, Remote]:
        """What the solution defines; raises its exception if it cannot be loaded."""
        return {str(name): Remote(self, number) for number, name in enumerate(self._answer()[0])}

    def ask(self, *request: Any) -> tuple[Any, tuple[Any, ...]]:
        """The value that is requested, and the positional arguments as the call left them; raises what the solution raised."""
        try:
            data = dump(ToSolver, request)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise Unsent(f"a test passes a value that cannot be sent to the solution: {error}") from None
        send(self.requests, data)
        return self._answer()

    def _answer(self) -> tuple[Any, tuple[Any, ...]]:
        good, value, rest = AtJudge(receive(self.answers), self).load()
        if good:
            return value, rest
        self.out_of_memory |= value == "MemoryError"
        kind = getattr(builtins, str(value), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(TypeError):  # some take more than a text
                raise kind(str(rest))
        raise RuntimeError(f"{value}: {rest}")


def judge_calls(solver: Solver, tests: dict[str, Any]) -> tuple[str, int, int, str]:
    """Runs `setup` and then `source` with the solution's functions as names; outcome, passed and all assertions, and why."""
    passed, total = 0, 0

    def count(good: bool) -> None:
        nonlocal passed, total
        passed += good
        total += 1

    space: dict[str, Any] = {"__name__": "tests", "__test__": count}
    code = compile(tests["source"], "tests.py", "exec")
    try:
        exec(compile(tests["setup"], "setup.py", "exec"), space)
    except Exception as error:
        raise Unsent(f"the tests cannot be prepared: {': '.join(describe(error))}") from None
    try:
        found, used = solver.names(), names_in(code) - space.keys()
        mine = found.keys() & used - vars(builtins).keys()
        if tests["entry"] in found:
            mine |= {tests["entry"]}
        space |= {name: found[name] for name in mine or found.keys() & used}  # the last for a solution named like a builtin
        exec(code, space)
    except Exception as error:
        return ("memory" if solver.out_of_memory else "failed"), passed, total, ": ".join(filter(None, describe(error)))
    if passed < total:
        return ("memory" if solver.out_of_memory else "failed"), passed, total, f"{total - passed} assertions failed"
    return "passed", passed, total, ""


def names_in(code: CodeType) -> set[str]:
    """All names that some code uses, attributes too."""
    return set(code.co_names).union(*(names_in(part) for part in code.co_consts if isinstance(part, CodeType)))


def judge_program(solver: Solver, tests: dict[str, Any]) -> tuple[str, int, int, str]:
    """Compares what the solution prints for each input, apart from white space at the ends of lines."""
    passed, why, pairs = 0, "", tests["pairs"]
    for number, (given, expected) in enumerate(pairs, 1):
        send(solver.requests, given.encode(errors="replace"))
        outcome, detail, printed = marshal.loads(receive(solver.answers))
        if outcome not in ("passed", "failed"):
            return outcome, passed, len(pairs), f"input {number}: {detail}"
        lines, wanted = (text.rstrip().splitlines() for text in (printed.decode(errors="replace"), expected))
        if outcome == "passed" and [line.rstrip() for line in lines] == [line.rstrip() for line in wanted]:
            passed += 1
            continue
        why = why or f"input {number}: {'printed ' + repr(' '.join(lines)[:80]) if outcome == 'passed' else detail}"
        if not tests["partial"]:
            break
    return ("passed" if passed == len(pairs) else "failed"), passed, len(pairs), why


def main(options: dict[str, Any], source: str) -> None:
    """Writes one line about the solution to the result file: a random secret of the parent, outcome, counts and reason."""
    os.write(options["result"], b"contained\n")
    os.dup2(os.open("/dev/null", os.O_RDWR), 0)
    if options["program"]:
        solver = Solver(lambda given, sent: serve_program(source, given, sent, options), False)
    else:
        solver = Solver(lambda given, sent: serve_calls(source, given, sent), options["filter"])
    size = os.fstat(options["tests"]).st_size
    tests = marshal.loads(os.pread(options["tests"], size, 0))
    try:
        outcome, passed, total, why = (judge_program if options["program"] else judge_calls)(solver, tests)
    except Unsent as error:
        outcome, passed, total, why = "sandbox_error", 0, 0, str(error)
    except Ended:
        outcome, why = end_of(solver.pid, options, kill=False)
        outcome, passed, total, why = "failed" if outcome == "passed" else outcome, 0, 0, f"{why} before the tests did"
    line = f"{tests['secret']} {outcome} {passed} {total} {' '.join(why.split())[:500]}\n"
    os.write(options["result"], line.encode(errors="replace"))
    os._exit(0)  # the solver ends with it
