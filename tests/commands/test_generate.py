"""`trainkit generate`: where the prompt comes from."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainkit.commands import generate
from trainkit.errors import UserError


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"Why?\n", "Why?"), (b"Why?\r\n", "Why?"), (b"Why?\n\n", "Why?\n"), (b" Why? ", " Why? "), ("é😀".encode(), "é😀")],
)
def test_prompt_of_a_file_loses_its_final_line_break(content, text, tmp_path, monkeypatch):
    """The prompt of a file or of standard input loses one final line break, and nothing else; a given text loses nothing."""
    (tmp_path / "question.txt").write_bytes(content)
    assert generate._read_prompt(f"@{tmp_path}/question.txt") == text
    monkeypatch.setattr(generate.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert generate._read_prompt("-") == text
    assert generate._read_prompt(content.decode()) == content.decode()


def test_prompt_that_is_not_utf8_is_one_line(tmp_path: Path, monkeypatch):
    """A file or standard input that is not UTF-8 gives one line with the byte."""
    (tmp_path / "question.txt").write_bytes(b"Wh\xff?")
    monkeypatch.setattr(generate.sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"Wh\xff?")))
    for prompt in (f"@{tmp_path}/question.txt", "-"):
        with pytest.raises(UserError, match=f"prompt {prompt}: not UTF-8 at byte 3; give text in UTF-8"):
            generate._read_prompt(prompt)
