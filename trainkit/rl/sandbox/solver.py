"""The process that a solution runs in, and the messages between it and the judge (`judge`).

It is contained already, and restricts itself further before it loads the solution. A bare interpreter runs this file's code, so
it imports nothing of trainkit but files that run there too.
"""

from __future__ import annotations

import builtins
import io
import itertools
import marshal
import os
import pickle
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trainkit.rl.sandbox.contain import die_with_parent, filter_calls

PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset)
"""Types whose values pass from solver to judge; an object of a subclass arrives as the type itself."""
CLASSES = {
    "builtins": {"int", "float", "complex", "str", "bytes", "bytearray", "tuple", "list", "dict", "set", "frozenset", "range"}
    | {"iter", "slice"},
    "collections": {"deque"},
    "datetime": {"date", "datetime", "time", "timedelta"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
}
"""Names that the judge looks up for the solver: constructors of data and nothing else."""
MAX_ITEMS = 100_000
"""Largest number of items taken from a solution's iterator."""
MEMORY_EXIT = 77
"""Exit code of a solution that ran out of memory."""


class Ended(BaseException):
    """The solver ended before its answer. No `Exception`, so that tests do not catch it."""


def send(file: int, data: bytes) -> None:
    """Writes `data` after its length."""
    data = len(data).to_bytes(8, "little") + data
    try:
        while data:
            data = data[os.write(file, data) :]
    except BrokenPipeError:
        raise Ended from None


def receive(file: int) -> bytes:
    """The next message; raises `Ended` at the end of the pipe."""
    return _read(file, int.from_bytes(_read(file, 8), "little"))


def _read(file: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = os.read(file, min(size - len(data), 1 << 20))
        if not piece:
            raise Ended
        data += piece
    return bytes(data)


class AtSolver(pickle.Unpickler):
    """Reads what a test passes."""

    def __init__(self, data: bytes, objects: list[Any]) -> None:
        super().__init__(io.BytesIO(data))
        self.objects = objects

    def persistent_load(self, pid: int) -> Any:
        return self.objects[int(pid)]


class ToJudge(pickle.Pickler):
    """Pickles plain data by value, iterators as their items, and all else as a number in `objects`."""

    def __init__(self, file: Any, objects: list[Any]) -> None:
        super().__init__(file, 5)
        self.objects = objects

    def persistent_id(self, obj: Any) -> int | None:
        kind = type(obj)
        if (
            obj is None
            or isinstance(obj, PLAIN)
            or hasattr(kind, "__next__")
            or kind.__name__ in CLASSES.get(kind.__module__, ())
        ):
            return None
        if (isinstance(obj, type) or kind.__name__ == "builtin_function_or_method") and obj.__name__ in CLASSES.get(
            obj.__module__, ()
        ):
            return None  # such as the class that rebuilds a date
        self.objects.append(obj)
        return len(self.objects) - 1

    def reducer_override(self, obj: Any) -> Any:
        for base in PLAIN:
            if isinstance(obj, base):
                return base, (base(obj),)
        if hasattr(type(obj), "__next__"):
            return iter, (list(itertools.islice(obj, MAX_ITEMS)),)
        return NotImplemented


def dump(pickler: type, value: Any, *arguments: Any) -> bytes:
    """`value` as `pickler` writes it."""
    file = io.BytesIO()
    pickler(file, *arguments).dump(value)
    return file.getvalue()


def fork(work: Callable[[], None], keep: tuple[int, ...], filtered: bool) -> int:
    """Runs `work` in a fork with the standard files and `keep`, its system calls filtered if `filtered`; its process id."""
    parent, pid = os.getpid(), os.fork()
    if pid:
        return pid
    code = 0
    try:
        for file in set(range(3, 64)) - set(keep):
            with suppress(OSError):
                os.close(file)
        die_with_parent(parent)
        if filtered:
            filter_calls()
        work()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        code = MEMORY_EXIT if isinstance(error, MemoryError) else 1
        with suppress(BaseException):
            sys.stderr.write(": ".join(describe(error)) + "\n")
    for file in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            file.flush()
    os._exit(code & 255)


def describe(error: BaseException) -> tuple[str, str]:
    """Class and text of an exception."""
    try:
        return type(error).__name__, str(error)[:300]
    except BaseException:
        return type(error).__name__, ""


def serve_calls(source: str, requests: int, answers: int) -> None:
    """Loads the solution, sends the names that it defines, then calls and looks up what the judge asks for."""
    module = type(sys)("solution")  # not `__main__`: the block that a script ends with does not run
    sys.modules["solution"] = module
    objects: list[Any] = []
    try:
        exec(compile(source, "solution.py", "exec"), module.__dict__)
        names = list(module.__dict__)
        objects += [module.__dict__[name] for name in names]
        answer: Any = (True, names, ())
    except Exception as error:
        answer = (False, *describe(error))
    while True:
        try:
            data = dump(ToJudge, answer, objects)
        except Exception as error:
            data = dump(ToJudge, (False, *describe(error)), objects)
        try:
            send(answers, data)
            message = receive(requests)
        except Ended:
            return
        try:
            action, target, *rest = AtSolver(message, objects).load()
            if action == "call":
                answer = (True, target(*rest[0], **rest[1]), rest[0])
            else:
                answer = (True, getattr(target, rest[0]), ())
        except Exception as error:
            answer = (False, *describe(error))


def serve_program(source: str, requests: int, answers: int, options: dict[str, Any]) -> None:
    """Runs the solution as a program for each input that the judge sends; answers with how it ended and what it printed."""
    most = options["output"]
    while True:
        try:
            text = receive(requests)
        except Ended:
            return
        given = os.memfd_create("input")
        os.write(given, text)
        os.lseek(given, 0, 0)
        read, write = os.pipe()

        def run(given: int = given, write: int = write) -> None:
            os.dup2(given, 0)
            os.dup2(write, 1)
            os.closerange(3, 64)
            sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
            exec(compile(source, "solution.py", "exec"), {"__name__": "__main__", "__builtins__": builtins})

        pid = fork(run, (given, write), options["filter"])
        os.close(given)
        os.close(write)
        printed = bytearray()
        while len(printed) <= most and (piece := os.read(read, 1 << 16)):
            printed += piece
        os.close(read)
        outcome, detail = end_of(pid, options, kill=len(printed) > most)
        if len(printed) > most:
            outcome, detail = "output", f"printed more than {most} bytes"
        send(answers, marshal.dumps((outcome, detail, bytes(printed))))


def end_of(pid: int, options: dict[str, Any], kill: bool) -> tuple[str, str]:
    """Waits for a fork, after ending it if `kill`; how it ended, `passed` for exit code 0, and that in words."""
    done, status, usage = os.wait4(pid, os.WNOHANG if kill else 0)
    if not done:
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    seconds = usage.ru_utime + usage.ru_stime
    if code == -signal.SIGXCPU or code == -signal.SIGKILL and seconds >= options["limits"]["CPU"]:
        return "timeout", f"used {seconds:.1f} s of CPU time"
    if code < 0:
        return "signal", f"ended by {signal.Signals(-code).name}"
    return {0: "passed", MEMORY_EXIT: "memory"}.get(code, "failed"), f"ended with code {code}"
