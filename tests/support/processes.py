"""Processes to kill: forks of the test's own, so that they start at once and may be given any function."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def fork(work: Callable[[], object], stderr: Path | None = None) -> int:
    """Runs `work` in a process of its own and returns its pid; it ends with the int that `work` returns, or with 1."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the parent's threads are not here
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # pytest's own is in memory
        result = work()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Waits for it: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(true: Callable[[], bool], pid: int | None = None, seconds: float = 60) -> None:
    """Returns once `true`, or once process `pid` is over."""
    until = time.monotonic() + seconds
    while not true():
        if pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.001)


def rows_in(folder: Path) -> int:
    """Whole rows of a distillation set that are on disk now."""
    total = 0
    for number in {path.name.split(".")[0] for path in folder.glob("part-*.*")}:
        for suffix in (".jsonl", ".partial"):
            try:
                total += (folder / f"{number}{suffix}").read_bytes().count(b"\n")
                break
            except FileNotFoundError:
                continue
    return total


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of a set but hidden ones and what only says who made it."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0] != "."}


def start(work: Callable[..., object], *arguments: object, stderr: Path | None = None) -> multiprocessing.Process:
    """Runs `work`, a function of a module, in a child of a server that has imported what training needs and nothing else.

    For work that a fork of the test itself would hang in: one with a process group, as any training that ran here leaves.
    """
    process = _SERVER.Process(target=_end_with, args=(work, arguments, stderr))
    process.start()
    return process  # type: ignore[return-value]


def torchrun(flags: list[str], stderr: Path) -> subprocess.Popen[bytes]:
    """Starts `trainkit fit` with these flags in two processes of one machine; their error output goes to the file `stderr`."""
    command = [sys.executable, "-m", "trainkit.launch", "--standalone", "--nproc-per-node=2", "-m", "trainkit.cli", "fit"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    with stderr.open("wb") as file:
        return subprocess.Popen([*command, *flags], env=environment, stdout=subprocess.DEVNULL, stderr=file)


def code_of(process: multiprocessing.Process, seconds: float = 120) -> int:
    """Waits for it: its exit code, or minus the signal that killed it."""
    process.join(seconds)
    assert process.exitcode is not None, "it does not end"
    return process.exitcode


def _end_with(work: Callable[..., object], arguments: tuple[object, ...], stderr: Path | None) -> None:
    torch.set_num_threads(1)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)  # of a training that ran in the test itself, whose port is still taken
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    result = work(*arguments)
    sys.exit(result if isinstance(result, int) else 0)


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["trainkit.commands.fit", "transformers"])
