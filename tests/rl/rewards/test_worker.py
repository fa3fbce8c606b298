"""Processes that call one function: limits, deaths, and that none outlives its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import wait_until
from trainkit.rl.rewards.calls import BadCall, Failed, Request, TimedOut
from trainkit.rl.rewards.worker import Pool, Worker

MODULE = "tests.support.reward_users"


def ask(text: str) -> Request:
    return Request({"completions": [text]}, 1)


def test_worker_starts_again_after_a_limit_and_a_death() -> None:
    """A process that was killed, or that died, is replaced at the next call."""
    worker = Worker(f"{MODULE}:endless")
    assert worker.call(ask("a"), 60).values == [1]
    with pytest.raises(TimedOut):
        worker.call(ask("hang"), 0.2)
    assert worker.call(ask("a"), 60).values == [1]
    dying = Worker(f"{MODULE}:killed")
    for _ in range(2):
        with pytest.raises(Failed, match="ended with code 7"):
            dying.call(ask("a"), 60)


def test_memory_limit_is_an_error_of_the_call() -> None:
    """A call that takes more memory than allowed fails, and the process goes on."""
    worker = Worker("builtins:bytearray", {"source": 4 << 30}, memory=2 << 30)
    for _ in range(2):
        with pytest.raises(Failed) as caught:
            worker.call(Request({}, 1), 60)
        assert caught.value.args[0].startswith("MemoryError")


def test_a_function_that_is_not_there_is_a_bad_call() -> None:
    """A file that only the process cannot load stops the run rather than failing at every call."""
    with pytest.raises(BadCall, match="cannot be loaded"):
        Worker(f"{MODULE}:nothing").call(ask("a"), 60)


def test_pool_keeps_order_and_loses_only_what_hangs() -> None:
    """Results are in the order of the requests, and a call that hangs takes no other with it."""
    texts = ["a", "hang", "b", "c", "hang", "d"]
    results = Pool(f"{MODULE}:endless", {}, workers=2).calls([ask(text) for text in texts], 2)
    assert [type(result).__name__ for result in results] == ["TimedOut" if text == "hang" else "Result" for text in texts]


@pytest.mark.parametrize(
    ("hang", "limit"), [("while True: pass", 60), ("import re; re.match('(a*)*b', 'a' * 40)", 5)], ids=["loop", "regex"]
)
def test_a_hanging_process_ends_with_its_parent(tmp_path: Path, hang: str, limit: float) -> None:
    """When the training process is killed, a hanging reward function ends too, even if it lets no other thread run."""
    pid_file, loop = tmp_path / "pid", tmp_path / "loop.py"
    loop.write_text(f"import os\n\ndef f():\n    open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n    {hang}\n")
    source = f"from trainkit.rl.rewards.worker import *; Worker('{loop}:f').call(Request({{}}, 0), {limit})"
    parent = subprocess.Popen([sys.executable, "-c", source])
    wait_until(lambda: pid_file.exists() and bool(pid_file.read_text()), parent.pid)
    child = int(pid_file.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    state = Path(f"/proc/{child}/stat")
    wait_until(lambda: not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z")
