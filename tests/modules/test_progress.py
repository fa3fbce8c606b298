"""What a person sees of a run: its own lines and one narrow bar; messages of the libraries are in log.txt."""

import os
import pty
import re
import struct
import threading
import time
import warnings
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest

from tests.support.processes import code_of, start
from tests.support.runs import arguments, resumed
from trainkit.commands.fit import run
from trainkit.modules.draft import DraftModule

NOISE = ("Tip", "GPU available", "Epoch", "distributed", "Seed set", "deprecated", "[transformers]", "`Trainer.fit` stopped")


def run_on(stdout: str, args: list[str]) -> int:
    """Trains with both streams going to a file or terminal; validation is slow enough to be drawn."""
    step = DraftModule.validation_step
    DraftModule.validation_step = lambda *args: (time.sleep(0.12), step(*args))[1]
    handle = os.open(stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    return run("fit", args)


def on_terminal(args: list[str], columns: int) -> str:
    """All that a run writes to a terminal of this width."""
    master, slave = pty.openpty()
    ioctl(slave, TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    output = bytearray()

    def read() -> None:
        while True:
            try:
                output.extend(os.read(master, 65536))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert code_of(start(run_on, os.ttyname(slave), args)) == 0
    os.close(slave)
    reader.join(10)
    return output.decode()


def flags(target: Path, chats: Path, root: Path, **more) -> list[str]:
    shown = {"trainer.enable_progress_bar": "true", "trainer.max_steps": 12}
    return arguments("draft", target, chats, root, **(shown | more))


@pytest.mark.parametrize("columns", [80, 200])
def test_terminal_shows_one_bar_that_fits(columns, tiny_target, chats, tmp_path):
    """A terminal shows one progress bar within its width, and none of the libraries' messages."""
    text = on_terminal(flags(tiny_target, chats, tmp_path / "run"), columns)
    drawn = [line for line in re.split(r"[\r\n]+", text) if line.startswith("step")]
    assert all(len(line) <= min(columns, 100) for line in re.split(r"[\r\n]+", text) if "|" in line)
    bars = [line for line in drawn if "|" in line]
    assert bars[0].startswith("step 0/12 |") and bars[-1].startswith("step 12/12 |")
    assert re.search(r"\| loss [\d.]+  alpha [\d.]+  [\d,]+ tokens/s  00:00 left$", bars[-1].strip())
    assert any(re.search(r"\| validation \d/2 ", line) for line in bars)
    assert [line for line in drawn if re.match(r"step 11: validation loss [\d.]+  alpha [\d.]+  tau [\d.]+$", line)]
    assert not [word for word in NOISE if word in text], text
    assert "train: " in text and "checkpoint: " in text


def test_file_gets_plain_lines_at_log_intervals(tiny_target, chats, tmp_path):
    """After a resume, steps are counted from the first run's start."""
    output = tmp_path / "output"
    args = flags(tiny_target, chats, tmp_path / "run")
    assert code_of(start(run_on, str(output), flags(tiny_target, chats, tmp_path / "run", **{"trainer.max_steps": 6}))) == 0
    assert code_of(start(run_on, str(output), resumed(args, tmp_path / "run"))) == 0
    text = output.read_text()
    steps = [line.split("  ")[0] for line in text.splitlines() if re.match(r"step \d+/", line)]
    assert steps == ["step 3/6", "step 6/6", "step 9/12", "step 12/12"]
    assert re.search(r"^step 9/12  loss [\d.]+  alpha [\d.]+  [\d,]+ tokens/s  \d\d:\d\d left$", text, re.MULTILINE)
    assert "\r" not in text and not [word for word in NOISE if word in text], text
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("GPU available") == 2 and "`max_steps=12` reached" in log


def test_warnings_go_to_the_log_during_training(tiny_target, chats, tmp_path, monkeypatch):
    """During training warnings go to log.txt; afterwards they are shown as before."""
    monkeypatch.setattr("trainkit.modules.draft.DraftModule.on_train_start", lambda self: warnings.warn("odd", stacklevel=1))
    args = flags(tiny_target, chats, tmp_path / "run", **{"trainer.enable_progress_bar": "false", "trainer.max_steps": 2})
    before = warnings.showwarning
    assert run("fit", args) == 0
    assert "odd" in (tmp_path / "run" / "log.txt").read_text() and warnings.showwarning is before
