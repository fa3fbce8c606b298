"""Child processes that tests kill."""

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
    """Runs `work` in a fork and returns its pid; the exit code is the int that `work` returns, or 1 on an error."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # a fork has no copies of the parent's threads
        if torch.distributed.is_initialized():  # nor of those of a process group that training left in the parent
            torch.distributed.distributed_c10d._update_default_pg(None)
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115  # pytest's stderr is in memory
        result = work()
        code = result if isinstance(result, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """Waits for process `pid`; its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(true: Callable[[], bool], pid: int | None = None, seconds: float = 60) -> None:
    """Returns when `true()` holds or process `pid` has ended; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not true():
        if pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        assert time.monotonic() < until, f"the condition did not hold within {seconds} seconds"
        time.sleep(0.001)


def rows_in(folder: Path) -> int:
    """Number of complete rows of a distillation set that are on disk now."""
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
    """All files of a set by name, without hidden files."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name[0] != "."}


def start(work: Callable[..., object], *arguments: object, stderr: Path | None = None) -> multiprocessing.Process:
    """Runs `work`, a top-level function of a module, in a child of a server process that imported only what training needs.

    For work that would hang in a fork of the test process, because training in that process left a process group.
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
    """Waits for the process; its exit code, or minus the number of the signal that killed it."""
    process.join(seconds)
    assert process.exitcode is not None, f"the process did not end within {seconds} seconds"
    return process.exitcode


def _end_with(work: Callable[..., object], arguments: tuple[object, ...], stderr: Path | None) -> None:
    torch.set_num_threads(1)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)  # left by a training run in the test process, whose port is still in use
    if stderr is not None:
        os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    result = work(*arguments)
    sys.exit(result if isinstance(result, int) else 0)


_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["trainkit.commands.fit", "transformers"])
