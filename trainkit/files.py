"""The one place for atomic files and folders: after a kill or a power cut there is the old version or the new one, never a mix.

A file takes its name in one step (rename). A folder that replaces another needs two renames: the old one is moved aside, then
the new one takes its name. A kill between the two leaves the old folder beside, as `.NAME.*.old`, until `tidy` puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from trainkit.errors import REMEDIES, UserError

T = TypeVar("T")
_REFUSALS = REMEDIES.keys() - {errno.ENOENT, errno.ELOOP}
"""Errors of the file system while writing that a user can fix by choosing another path or freeing space."""


def cache_folder(name: str) -> Path:
    """Folder for results that can be computed again; a temporary folder if the user has no home."""
    try:
        return Path.home() / ".cache" / "trainkit" / name
    except RuntimeError:  # a user id without an entry in the user database, as in some containers
        return Path(tempfile.gettempdir()) / "trainkit" / name


CACHED_BYTES = 1 << 24
"""Size from which the digest of a file is cached; smaller files are hashed in milliseconds."""
_digests: dict[Path, tuple[list[int], str]] = {}


def file_digest(path: Path, cached: bool = False) -> str:
    """SHA-256 (hex) of a file's content.

    With `cached`, a large file that was hashed before is not read again, in this process or a later one, while its path, size,
    inode, and times of modification and status change are the same. A file that changed less than two seconds ago is not
    cached, because a further change within the resolution of the clock would not be seen. Without a cache folder that can be
    written, the digest is cached in this process only.
    """
    path = path.resolve()
    state = _state(path)
    if not cached or state[0] < CACHED_BYTES:
        return _sha256(path)
    entry = cache_folder("digests") / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    stored, digest = _digests.get(path) or _read_entry(entry)
    if stored == state:
        return digest
    digest = _sha256(path)
    if state == _state(path) and time.time_ns() - max(state[2:]) > 2_000_000_000:
        _digests[path] = state, digest
        with contextlib.suppress(UserError, OSError):
            write_json(entry, {"state": state, "sha256": digest})
    return digest


def _state(path: Path) -> list[int]:
    """Size, inode, and times of modification and status change in nanoseconds."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_entry(entry: Path) -> tuple[list[int], str]:
    try:
        values = json.loads(entry.read_text(encoding="utf-8"))
        return list(values["state"]), str(values["sha256"])
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
        return [], ""


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically and syncs it to disk.

    Args:
        path: File to create or replace; missing parent folders are created.
        write: Receives the path of a temporary file in the same folder and writes the content there.

    Raises:
        UserError: the file system refuses (permissions, space, a folder of that name).
    """
    path = Path(path)
    temporary = _temporary_name(path)
    with _writable(path):
        try:
            write(temporary)
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically; errors as in `write_file`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, values: Any) -> None:
    """Writes indented JSON atomically; NaN and infinities become null; errors as in `write_file`."""
    write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The same nested values with None in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_folder(folder: Path, fill: Callable[[Path], T]) -> T:
    """Writes a folder atomically and syncs it to disk; removes what killed writers of it left.

    Args:
        folder: Folder to create or replace; missing parent folders are created.
        fill: Receives an empty temporary folder and fills it; its result is returned.

    Raises:
        UserError: the file system refuses (permissions, space).
    """
    with _writable(folder):
        tidy(folder)
        with _temporary_sibling(folder) as temporary:
            result = fill(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            put_in_place(temporary, folder)
    return result


def put_in_place(partial: Path, path: Path) -> None:
    """Renames a file or folder called *.partial to `path` and removes what had that name.

    A file replaces a file in one step. Otherwise the old one is first renamed to `partial` with the suffix .old.
    """
    if partial.is_file() and not path.is_dir():
        sync(partial)
        partial.replace(path)
    elif not path.exists():
        partial.rename(path)
    else:
        aside = partial.with_suffix(".old")
        remove(aside)
        path.rename(aside)
        partial.rename(path)
        sync(path.parent)
        remove(aside)
    sync(path.parent)


def tidy(folder: Path) -> None:
    """Removes temporary folders of killed writers, and puts back an old folder that a killed writer had moved aside."""
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            if _lock(lock):
                remove(partial)
            os.close(lock)
    for aside in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
        if aside.with_suffix(".partial").exists():  # its writer is alive, between the two renames
            continue
        if folder.exists():
            remove(aside)
        else:
            aside.rename(folder)


def remove(path: Path) -> None:
    """Removes a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file or the entries of a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Creates the parents of `path`; on any failure removes those it created, and reports a refusal in one line."""
    missing = [parent for parent in path.parents if not parent.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # another process may have written there meanwhile
            for parent in missing:
                parent.rmdir()
        reason = error.strerror if isinstance(error, OSError) and error.errno in _REFUSALS else None
        if isinstance(error, SafetensorError):  # safetensors reports every error of the system as its own
            reason = str(error)
        if reason is None:
            raise
        raise UserError(f"{path}: cannot be written ({reason}); free space there or choose another path") from error


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")


@contextlib.contextmanager
def _temporary_sibling(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked while this process lives, so that `tidy` can tell it from a leftover."""
    while True:
        path = _temporary_name(folder)
        path.mkdir()
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another writer tidied it away before it was locked
            continue
        if _lock(lock) and path.exists():
            break
        os.close(lock)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # a file system without locks
    return True
