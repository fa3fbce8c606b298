"""Atomic files and the cache folder; test_kills.py and test_bundle.py show what a kill leaves."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainkit import files
from trainkit.errors import UserError
from trainkit.files import cache_folder, file_digest, write_file, write_folder, write_json, write_text


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


class Large:
    """A file that counts as large, with a clock that is `later` seconds ahead, and a fresh cache in a home of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.read, self.later, self.patch = folder / "large.bin", 0, 60.0, monkeypatch
        monkeypatch.setenv("HOME", str(folder / "home"))
        monkeypatch.setattr(files, "CACHED_BYTES", 1)
        monkeypatch.setattr(files, "_digests", {})
        content, clock = files._sha256, time.time_ns
        monkeypatch.setattr(files.time, "time_ns", lambda: clock() + int(self.later * 1e9))

        def counted(path: Path) -> str:
            self.read += 1
            return content(path)

        monkeypatch.setattr(files, "_sha256", counted)
        self.path.write_bytes(b"abc")

    def digest(self, new_process: bool = True) -> str:
        """The cached digest, by default as a process computes it that has just started."""
        if new_process:
            self.patch.setattr(files, "_digests", {})
        return file_digest(self.path, cached=True)


@pytest.fixture
def large(tmp_path, monkeypatch) -> Large:
    return Large(tmp_path, monkeypatch)


def test_digest_of_a_large_file_is_computed_once(large):
    """A second call, in this process or another, does not read the file; without `cached` it is read."""
    expected = hashlib.sha256(b"abc").hexdigest()
    assert [large.digest(), large.digest(), large.digest(new_process=False)] == [expected] * 3 and large.read == 1
    assert file_digest(large.path) == expected and large.read == 2
    (entry,) = cache_folder("digests").iterdir()
    entry.write_text("{")
    assert large.digest() == expected and large.read == 3, "a damaged entry is replaced"
    assert large.digest() == expected and large.read == 3


@pytest.mark.parametrize("how", ["in place", "same time", "replaced", "longer"])
def test_digest_of_a_changed_file_is_computed_again(how, large):
    """Also if size and time of modification are those of before, as after `touch -r`."""
    before, stat = large.digest(), large.path.stat()
    time.sleep(0.02)  # file systems count in ticks of some milliseconds
    if how == "replaced":
        write_file(large.path, lambda path: path.write_bytes(b"abd"))
    else:
        large.path.write_bytes(b"abcd" if how == "longer" else b"abd")
    if how != "in place":
        os.utime(large.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert large.digest() == large.digest(new_process=False) == hashlib.sha256(large.path.read_bytes()).hexdigest() != before


def test_digest_of_a_file_just_written_is_not_cached(large):
    """A change within the same tick of the clock would not show in the times."""
    large.later = 0.0
    assert large.digest() == large.digest(new_process=False) and large.read == 2
    assert not cache_folder("digests").exists()


def test_digest_needs_no_writable_cache(large, tmp_path):
    """Where the cache folder cannot be written, the digest is cached in this process."""
    (tmp_path / "home").write_text("a file where a folder should be")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert large.digest() == large.digest(new_process=False) == expected and large.read == 1


def test_digests_of_concurrent_writers_agree(large):
    """Processes that hash the same file at the same time leave one whole entry."""
    code = (
        "import sys; from pathlib import Path; from trainkit import files; files.CACHED_BYTES = 1\n"
        "import time; clock = time.time_ns; time.time_ns = lambda: clock() + 60 * 10**9\n"
        "for _ in range(50): files._digests.clear(); print(files.file_digest(Path(sys.argv[1]), cached=True))"
    )
    command, env = [sys.executable, "-c", code, str(large.path)], os.environ | {"PYTHONPATH": os.getcwd()}
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {line for process in running for line in process.communicate()[0].split()}
    assert printed == {hashlib.sha256(b"abc").hexdigest()} and all(process.returncode == 0 for process in running)
    assert large.digest() in printed and large.read == 0


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
