"""Atomic files and the cache folder; test_kills.py and test_bundle.py show what a kill leaves."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.errors import UserError
from trainkit.files import cache_folder, write_file, write_folder, write_json, write_text


def test_cache_folder_is_in_the_home(monkeypatch, tmp_path):
    """The cache folder is in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("costs") == tmp_path / ".cache" / "trainkit" / "costs"


def test_user_without_home_can_load_the_runner(tmp_path):
    """Such as a container's user id: no HOME, no entry in the user database."""
    code = (
        "import os, pwd\n"
        "os.environ.pop('HOME', None)\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "import trainkit.runner.policies.cost_model, trainkit.data.text.prepare\n"
        "print(trainkit.runner.policies.cost_model.CACHE, trainkit.data.text.prepare.CACHE)\n"
    )
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TMPDIR": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.split() == [str(tmp_path / "trainkit" / name) for name in ("costs", "data")]


def test_json_is_finite_and_replaces_a_file(tmp_path):
    """JSON is written indented, with null for NaN and infinity, in place of the old file."""
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    write_json(path, {"x": [1.5, float("nan"), (float("inf"), "é")]})
    assert json.loads(path.read_text()) == {"x": [1.5, None, [None, "é"]]} and path.read_text().endswith("}\n")
    assert os.listdir(path.parent) == ["a.json"]


@pytest.mark.parametrize("name", ["a", "new/folder/a"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_failed_writer_leaves_the_old_content(kind, name, tmp_path):
    """A writer that fails leaves the old content and no new folder."""

    def fail(path: Path) -> None:
        (path if kind == "file" else path / "part").write_text("half")
        raise RuntimeError("disk on fire")

    write_text(tmp_path / "a" if kind == "file" else tmp_path / "a" / "part", "old")
    with pytest.raises(RuntimeError, match="disk on fire"):
        (write_file if kind == "file" else write_folder)(tmp_path / name, fail)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a" if kind == "file" else tmp_path / "a" / "part").read_text() == "old"


def test_unwritable_path_gives_one_line(tmp_path):
    """A path that cannot be written gives a one-line error that names it."""
    (tmp_path / "folder").mkdir()
    write_text(tmp_path / "file", "x")
    for path, reason in ((tmp_path / "folder", "Is a directory"), (tmp_path / "file" / "a", "File exists|Not a directory")):
        with pytest.raises(UserError, match=f"{path}: cannot be written .({reason}).; .*choose another path") as caught:
            write_json(path, {})
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_full_disk_leaves_the_old_json(tmp_path, monkeypatch):
    """Without space for a JSON file, the error is one line, and the old file stays as it was."""

    def full(self: Path, *_: object, **__: object) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="a.json: cannot be written .No space left on device.; free space there") as caught:
        write_json(tmp_path / "a.json", {"x": 2})
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
