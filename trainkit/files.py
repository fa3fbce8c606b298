"""Files and folders put in place whole: what a kill or a power cut leaves is the old one or the new one, never half of one.

Where the kernel swaps two names in one step (Linux renameat2), one of them stands at every instant. Elsewhere replacing a
folder takes two renames; killed between them, the old one lies beside under a name of its own until `tidy` puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainkit.errors import UserError


def cache_folder(name: str) -> Path:
    """Where what can be made anew is kept from run to run; among temporary files where the user has no home."""
    try:
        return Path.home() / ".cache" / "trainkit" / name
    except RuntimeError:  # a container's made-up user
        return Path(tempfile.gettempdir()) / "trainkit" / name


@contextlib.contextmanager
def temporary_sibling(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked while this process lives, so that `tidy` can tell it from a leftover."""
    while True:
        path = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.partial"
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


def tidy(folder: Path) -> None:
    """Removes what killed writers left, and puts back an old bundle that one had moved aside."""
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        with contextlib.suppress(FileNotFoundError):
            lock = os.open(partial, os.O_RDONLY)
            if _lock(lock):
                shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)
    for aside in folder.parent.glob(f".{glob.escape(folder.name)}.*.old"):
        if aside.with_suffix(".partial").exists():  # its writer is alive, between the two renames
            continue
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(folder)


def put_in_place(made: Path, place: Path) -> None:
    """Renames a file or folder called *.partial to `place`; what stands there is replaced.

    In one step where both are files, or where the kernel swaps two names (`_exchange`). Elsewhere what stands there is first
    renamed to `made` with the suffix .old, and a kill before the second rename leaves it under that name.
    """
    if made.is_file() and not place.is_dir():
        sync(made)
        os.replace(made, place)
    elif not place.exists():
        made.rename(place)
    elif not _exchange(made, place):
        aside = made.with_suffix(".old")
        remove(aside)
        place.rename(aside)
        made.rename(place)
        sync(place.parent)
        remove(aside)
    sync(place.parent)
    remove(made)  # after an exchange this is what stood there


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot (no Linux, or a file system without it)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary sibling that then takes the name `path`: a kill leaves the old file or the new one.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    final = Path(path)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.")
    except OSError as error:
        raise UserError(f"{final}: cannot write there ({error.strerror}); name another file") from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Any) -> None:
    """Writes JSON, indented, atomically; numbers that JSON does not have (nan, infinity) become null.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    text = json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """The same values with None for nan and infinities."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
