"""`trainkit generate` says when a text ended because all positions are used."""

import pytest

from trainkit.cli import main
from trainkit.runner.round import Rounds


@pytest.mark.parametrize(
    ("flags", "said", "unsaid"),
    [
        (["--max_new_tokens=600"], "the target covers 512 positions", "max_len"),
        (["--max_new_tokens=60", "--max_len=20"], "max_len 20 is reached", "covers"),
        (["--max_new_tokens=4"], "[4 tokens", "ended before"),
    ],
)
def test_text_cut_by_the_positions_is_reported(flags, said, unsaid, tiny_target, capsys, monkeypatch):
    """The last line says that a text ended before `max_new_tokens`, and why."""
    set_end_ids = Rounds.set_end_ids
    monkeypatch.setattr(Rounds, "set_end_ids", lambda self, end_ids: set_end_ids(self, ()))
    assert main(["generate", f"--target={tiny_target}", "--prompt=How many", "--raw=true", "--device=cpu", *flags]) == 0
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line and unsaid not in line
