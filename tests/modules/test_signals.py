"""Runs that are stopped or killed, then resumed: losses equal to the last bit, one log, the exit codes that shells expect."""

import random
import signal
import time
from collections.abc import Callable
from functools import cache
from os import kill
from pathlib import Path

import pytest
import torch

from tests.support.processes import code_of, start, wait_until
from tests.support.runs import STEPS, arguments, check_equal, lines, resumed
from trainkit.commands.fit import run
from trainkit.errors import UserError
from trainkit.modules.draft import DraftModule


@pytest.fixture(scope="module")
def straight(tiny_target, chats, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of an uninterrupted run of a kind; each kind runs once for all tests here."""

    @cache
    def trained(kind: str) -> Path:
        root = tmp_path_factory.mktemp(kind) / "run"
        assert code_of(start(run, "fit", arguments(kind, tiny_target, chats, root))) == 0
        return root

    return trained


@pytest.mark.parametrize("kind", ["language", "draft"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["sigterm", "ctrl-c"])
def test_signal_saves_and_resume_is_exact(number, kind, straight, tiny_target, chats, tmp_path, seed):
    """A signal saves the state and says so, and the resumed run equals an uninterrupted one."""
    stopped = tmp_path / "stopped"
    args = arguments(kind, tiny_target, chats, stopped)
    process = start(run, "fit", args, stderr=tmp_path / "output")
    after = random.randint(1, 5)  # rows of the log, of 10: the signal arrives before the end on a loaded machine too
    wait_until(lambda: lines(stopped) > after or not process.is_alive())
    kill(process.pid, number)
    assert code_of(process) == 128 + number
    step = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert after <= step < STEPS
    assert "the state is saved" in (tmp_path / "output").read_text()
    assert code_of(start(run, "fit", resumed(args, stopped))) == 0
    check_equal(straight(kind), stopped)


@pytest.mark.parametrize("kind", ["language", "draft"])
def test_three_kills_leave_no_trace(kind, straight, tiny_target, chats, tmp_path, seed):
    """A run that was killed three times and resumed equals an uninterrupted one."""
    killed = tmp_path / "killed"
    args, kills = arguments(kind, tiny_target, chats, killed), 0
    while kills < 3:
        before = lines(killed)
        process = start(run, "fit", resumed(args, killed))
        wait_until(lambda: lines(killed) > before + random.randint(0, 2) or not process.is_alive())  # noqa: B023
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        if code_of(process) == 0:
            break  # the run ended before the kill; the rest of the test holds nevertheless
        kills += 1
    assert kills
    assert code_of(start(run, "fit", resumed(args, killed))) == 0
    check_equal(straight(kind), killed)


def fit_slowly(args: list[str], marker: Path) -> int:
    """Trains with slow validation steps, which touch the file `mark`."""
    step = DraftModule.validation_step

    def slow(self, batch, batch_idx) -> None:
        marker.touch()
        time.sleep(0.3)
        step(self, batch, batch_idx)

    DraftModule.validation_step = slow
    return run("fit", args)


def test_signal_in_validation_repeats_it_on_resume(straight, tiny_target, chats, tmp_path):
    """A signal during validation ends the run, and the resumed run validates again."""
    stopped = tmp_path / "stopped"
    args = arguments("draft", tiny_target, chats, stopped)
    process = start(fit_slowly, args, tmp_path / "validating")
    wait_until(lambda: (tmp_path / "validating").exists() or not process.is_alive())
    kill(process.pid, signal.SIGTERM)
    assert code_of(process) == 143
    assert torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 11
    assert code_of(start(run, "fit", resumed(args, stopped))) == 0
    check_equal(straight("draft"), stopped)


def fit_stuck(args: list[str], marker: Path) -> int:
    """Trains with a first step that touches the file `mark` and does not end."""

    def endless(self, batch, micro):
        marker.touch()
        time.sleep(3600)

    DraftModule.loss = endless
    return run("fit", args)


def test_second_ctrl_c_aborts(tiny_target, chats, tmp_path):
    """A second Ctrl-C aborts a run that does not end, with one line and the exit code of a Ctrl-C."""
    args, output = arguments("draft", tiny_target, chats, tmp_path / "run"), tmp_path / "output"
    process = start(fit_stuck, args, tmp_path / "training", stderr=output)
    wait_until(lambda: (tmp_path / "training").exists() or not process.is_alive())
    for _ in range(2):
        kill(process.pid, signal.SIGINT)
        time.sleep(0.2)
    assert code_of(process) == 130
    assert output.read_text() == "trainkit: aborted by Ctrl-C; the checkpoints written before are kept\n"


def test_second_run_in_a_folder_is_refused(tiny_target, chats, tmp_path):
    """A second run in the folder of another is refused."""
    args = arguments("draft", tiny_target, chats, tmp_path / "run", **{"trainer.max_steps": 4})
    assert code_of(start(run, "fit", args)) == 0
    with pytest.raises(UserError, match=r"holds a run already; continue with --ckpt_path .*last.ckpt \(launch.sh: --resume "):
        run("fit", args)
