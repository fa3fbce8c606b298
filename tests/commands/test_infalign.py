"""`trainkit infalign`: the table is the same after a kill, and in parts; wrong options give one line."""

from __future__ import annotations

import json
import os

import pytest

from tests.support.processes import ended, fork
from trainkit.cli import main
from trainkit.rl.infalign import Calibration, InfAlign

GRADE = """
import os, pathlib, signal

def grade(completion_ids, **columns):
    bomb = pathlib.Path(__file__).with_name("bomb")
    if bomb.exists() and len(completion_ids) < 3 * 32:  # the second part
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(ids)) / 8 for ids in completion_ids]
"""


@pytest.fixture
def command(tiny_target, tmp_path, monkeypatch):
    """The command on 36 prompts, with 3 samples each, as a function of its output and further flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grade.py").write_text(GRADE)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{n} + 1 ="}) + "\n" for n in range(36)))
    flags = (
        f"--target {tiny_target} --prompts prompts.jsonl --samples 3 --max-new-tokens 8 --reward grade.py:grade --device cpu"
    )
    return lambda out, *more: main(["infalign", str(out), *flags.split(), *more])


def test_infalign_table_is_the_same_after_a_kill(command, tmp_path, capsys):
    """A table whose job was killed, or which began with fewer prompts, ends with the same bytes; InfAlign reads it."""
    assert command("whole.json") == 0
    assert "wrote whole.json: 36 prompts with 3 rewards each" in capsys.readouterr().out
    (tmp_path / "bomb").touch()
    assert ended(fork(lambda: command("killed.json"))) == -9
    (tmp_path / "bomb").unlink()
    assert len(Calibration.load(tmp_path / "killed.json").rewards) == 32
    assert command("parts.json", "--limit", "5") == 0
    for name in ("killed.json", "parts.json"):
        assert command(name) == 0
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert 0 < InfAlign("whole.json").transform(35, 0.5) <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples", "0"], "--samples: 0 must be at least 1"),
        (
            ["--reward", '{"function"'],
            "not JSON (Expecting ':' delimiter: line 1 column 12 (char 11)); give a name or an object",
        ),
        (["--reward", "nothing"], "unknown function 'nothing'"),
        (["--seed", "1"], "there.json: its seed differs from what is given now; choose another file, or remove this one"),
    ],
)
def test_infalign_refuses_bad_option(command, capsys, flags, message):
    """A wrong option, and a file made with other options, give one line and leave the file as it was."""
    assert command("there.json", "--limit", "1") == 0
    before = os.stat("there.json").st_mtime_ns
    capsys.readouterr()
    assert command("there.json", *flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("trainkit: error: ") and message in error and os.stat("there.json").st_mtime_ns == before
