"""Runs Python code that a model wrote, with its tests, in a contained process. Linux only.

`probe` finds out once what this machine allows; `run_python` runs one solution in a fresh interpreter, which restricts itself
(`contain`) and runs the tests in another process than the solution's (`judge`). The process is started with subprocess, never
by a fork of this one, whose threads hold locks. Outcomes do not depend on the order or number of solutions that run at once,
except by the wall limit, which a loaded machine reaches earlier: it should be generous, and the CPU limit the usual one.
"""

from __future__ import annotations

import marshal
import os
import platform
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any, Literal

from trainkit.errors import UserError
from trainkit.rl.sandbox.level import FEATURES, MEMORY_FOLDER, Level, level_of

Outcome = Literal["passed", "failed", "timeout", "memory", "output", "signal", "sandbox_error"]


@dataclass(frozen=True)
class Limits:
    """What one solution may use with all its tests.

    Args:
        wall_seconds: Time until everything is killed; a loaded machine reaches it earlier, so be generous.
        cpu_seconds: CPU time of a process.
        memory_mb: Address space of a process.
        output_kb: What it may print.
        processes: Processes and threads at once.
        files: Open files of a process.
        disk_mb: Size of its folder where it is in memory, else of each file.

    Raises:
        UserError: a limit is not a positive whole number.
    """

    wall_seconds: int = 20
    cpu_seconds: int = 4
    memory_mb: int = 512
    output_kb: int = 64
    processes: int = 16
    files: int = 32
    disk_mb: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"limit {field.name}: {value!r} is not a whole number above 0")


@dataclass(frozen=True)
class Calls:
    """Tests that call the solution's functions: a text with assertions.

    Attributes:
        source: The tests; names that they do not define are the solution's.
        setup: Code that runs before them, on their side.
        entry: Name that is the solution's even where `setup` defines it.
    """

    source: str
    setup: str = ""
    entry: str = ""


@dataclass(frozen=True)
class Program:
    """Tests that run the solution as a program: pairs of what it reads and what it should print.

    Attributes:
        pairs: (standard input, expected output); white space at the ends of lines does not count.
        partial: Continue after the first pair that fails.
    """

    pairs: Sequence[tuple[str, str]]
    partial: bool = False


@dataclass(frozen=True)
class Verdict:
    """How a solution did.

    Attributes:
        outcome: passed; failed: a test failed or the solution ended early; timeout, memory, output: a limit was reached;
            signal: it was killed; sandbox_error: it was not tested, which is not the solution's fault.
        passed: Number of assertions (only those that call `__test__`) or inputs that passed.
        total: Number of assertions or inputs that were tested.
        why: The reason in words; "" if it passed.
    """

    outcome: Outcome
    passed: int = 0
    total: int = 0
    why: str = ""


@cache
def probe(without: tuple[str, ...] = ()) -> Level:
    """What this machine contains, measured by running a small program; `without` leaves out some of `FEATURES`.

    Raises:
        UserError: the machine does not run Linux, or cannot run even an unrestricted program.
    """
    if sys.platform != "linux":
        raise UserError(f"Python code of a model runs only on Linux, not on {platform.system()}; use another reward or machine")
    from trainkit.rl.sandbox import contain  # loads the C library of Linux

    here = {
        "namespaces": True,
        "tmpfs": os.path.isdir(MEMORY_FOLDER) and "namespaces" not in without,
        "landlock": contain.landlock_abi() > 0,
        "nobody": os.geteuid() == 0,
        "filter": contain.has_filter(),
    }
    possible = {name for name in FEATURES if here[name] and name not in without}

    # The features that fail are left out, the least important one first.
    reason = ""
    for leave in ([], ["tmpfs"], ["nobody"], ["nobody", "tmpfs"], ["namespaces", "tmpfs"], ["namespaces", "tmpfs", "nobody"]):
        level = level_of(frozenset(possible - set(leave)), contain.landlock_abi(), reason)
        if leave and not set(leave) & possible:
            continue
        verdict = run_python("def f(x):\n    return x + 1\n", Calls("assert f(1) == 2"), level=level)
        if verdict.outcome == "passed":
            return level
        reason = reason or verdict.why
    raise UserError(f"the sandbox for Python code does not start: {reason}")


def run_python(source: str, tests: Calls | Program, limits: Limits | None = None, level: Level | None = None) -> Verdict:
    """Tests one solution at `level`, the best that this machine offers by default.

    Args:
        source: The solution's code; it is not even parsed in this process.
        tests: What is tested.
        limits: The defaults of `Limits` if None.
        level: From `probe`.
    """
    level, limits = level or probe(), limits or Limits()
    from trainkit.rl.sandbox import contain

    secret = secrets.token_hex(16)
    program = isinstance(tests, Program)
    options = {
        "parent": os.getpid(),
        "folder": MEMORY_FOLDER if "tmpfs" in level.features else tempfile.mkdtemp(prefix="trainkit-sandbox-"),
        **{name: name in level.features for name in FEATURES},
        "landlock": contain.landlock_abi() if "landlock" in level.features else 0,
        "readable": ["/usr", "/lib", "/lib64", sys.base_prefix, sys.base_exec_prefix],
        "limits": {
            "CPU": limits.cpu_seconds,
            "AS": limits.memory_mb << 20,
            "FSIZE": limits.disk_mb << 20,
            "NOFILE": limits.files,
            "NPROC": limits.processes,
            "CORE": 0,
            "STACK": 8 << 20,
        },
        "output": limits.output_kb << 10,
        "program": program,
    }
    try:
        if "nobody" in level.features and "tmpfs" not in level.features:
            os.chown(options["folder"], contain.NOBODY, contain.NOBODY)
        return _run(source, {**asdict(tests), "secret": secret}, options, limits, secret)
    except OSError as error:
        return Verdict("sandbox_error", why=f"the process did not start: {error}")
    finally:
        if "tmpfs" not in level.features:
            remove_folder(options["folder"])


_START = """
import marshal, os, sys
codes, options, source = marshal.load(sys.stdin.buffer)
for name in ("result", "tests"):
    low = os.dup(options[name])  # below the limit of open files
    os.close(options[name])
    options[name] = low
for name, code in codes.items():
    sys.modules[name] = type(sys)(name)
    exec(code, vars(sys.modules[name]))
try:
    sys.modules["trainkit.rl.sandbox.contain"].contain(options)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
sys.modules["trainkit.rl.sandbox.judge"].main(options, source)
"""


@cache
def _codes() -> dict[str, CodeType]:
    """The files that run in the process, compiled once; there, none of trainkit's own can be imported."""
    paths = {f"trainkit.rl.sandbox.{name}": Path(__file__).with_name(f"{name}.py") for name in ("contain", "solver", "judge")}
    return {name: compile(path.read_text(encoding="utf-8"), str(path), "exec") for name, path in paths.items()}


def _run(source: str, tests: dict[str, Any], options: dict[str, Any], limits: Limits, secret: str) -> Verdict:
    """Starts the process, reads what it prints up to the limits, and ends it with all that it started."""
    result, write = os.pipe()
    files = [result, write]
    try:
        # Step 1: the job is read from memory files, the tests from one that the solution's process does not get
        files += [os.memfd_create("job"), os.memfd_create("tests")]
        options |= {"result": write, "tests": files[3]}
        for file, value in ((files[2], (_codes(), options, source)), (files[3], tests)):
            with open(file, "wb", closefd=False) as memory:
                marshal.dump(value, memory)
            os.lseek(file, 0, os.SEEK_SET)

        # Step 2: a fresh interpreter, in a session of its own, with a fixed seed of string hashes
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", "-P", "-c", _START],
            stdin=files[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(write, files[3]),
            start_new_session=True,
            env={"PATH": os.defpath, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        )
        os.close(files.pop(1))
        try:
            reached, printed, line = _watch(process, result, limits)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
    finally:
        for file in files:
            os.close(file)

    # Step 3: the verdict
    contained, _, rest = line.decode(errors="replace").partition("\n")
    fields_ = rest.rstrip("\n").split(" ", 4)
    if contained != "contained":
        return Verdict(
            "sandbox_error", why=reached or " ".join(printed.decode(errors="replace").split())[-500:] or "it ended at once"
        )
    if reached:
        return Verdict("output" if len(printed) > limits.output_kb << 10 else "timeout", why=reached)
    if len(fields_) != 5 or fields_[0] != secret:
        return Verdict("signal", why="the tests were killed")
    return Verdict(fields_[1], int(fields_[2]), int(fields_[3]), fields_[4])  # type: ignore[arg-type]


def _watch(process: subprocess.Popen[bytes], result: int, limits: Limits) -> tuple[str, bytes, bytes]:
    """Reads until the verdict, the process's end or a limit; the limit in words or "", what was printed, the result file."""
    assert process.stdout is not None
    output, limit, until = process.stdout.fileno(), limits.output_kb << 10, time.monotonic() + limits.wall_seconds
    data = {result: bytearray(), output: bytearray()}  # in this order: what was printed precedes the verdict
    ended = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for file in (result, output, ended):
                os.set_blocking(file, False)
                selector.register(file, selectors.EVENT_READ)
            while True:
                ready = {key.fd for key, _ in selector.select(max(0.0, until - time.monotonic()))}
                over = ended in ready
                for file, pieces in data.items():
                    with suppress(BlockingIOError):
                        while len(pieces) <= limit:
                            piece = os.read(file, 1 << 16)
                            pieces += piece
                            if not piece:
                                over = True
                                break
                if len(data[output]) > limit:
                    return f"printed more than {limits.output_kb} KB", bytes(data[output]), bytes(data[result])
                if over or data[result].count(b"\n") == 2:
                    return "", bytes(data[output]), bytes(data[result])
                if time.monotonic() >= until:
                    return f"not done after {limits.wall_seconds} s", bytes(data[output]), bytes(data[result])
    finally:
        os.close(ended)


def remove_folder(folder: str) -> None:
    """Removes a folder whatever its permissions and depth."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.exists(folder):
        for command in (["chmod", "-R", "u+rwX", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
