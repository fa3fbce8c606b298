"""How sets are begun, resumed and written part by part."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainkit.errors import UserError


def begin(out: Path, file: str, values: Mapping[str, Any], read: Callable[[Path], dict[str, Any] | None], command: str) -> bool:
    """Writes `file` into the folder of a set, or holds it against the one that is there; returns whether it wrote it.

    Args:
        out: Folder of the set.
        file: What says how the set is made.
        values: What it says, JSON-able; `versions` may change while a set is made.
        read: Reads it from a folder, None where there is none.
        command: That makes such sets.

    Raises:
        UserError: `out` holds something else, or a set begun with other values.
    """
    values = json.loads(json.dumps(values))
    # looked at before the file, since another rank may be beginning the set right now, and writes that first
    foreign = out.exists() and (not out.is_dir() or any(p.name != file and not p.name.startswith(".") for p in out.iterdir()))
    then = read(out)
    if then is None:
        if foreign:
            raise UserError(f"--out {out}: holds something else; give a new folder, or one that {command} began")
        new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        temporary = out / f".{file}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, out / file)
        except OSError:
            temporary.unlink(missing_ok=True)
            if new:
                with suppress(OSError):  # another process has begun there
                    out.rmdir()
            raise
        return new
    for name in {**values, **then}:
        old, new = _without_place(then.get(name)), _without_place(values.get(name))
        if name != "versions" and old != new:
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(key for key in {**new, **old} if old.get(key) != new.get(key))
                name, old, new = f"{name} {key}", old.get(key), new.get(key)
            raise UserError(
                f"--out {out}: that set was begun with {name} {_short(old)}, now it is {_short(new)}; "
                "give the same settings to go on, or another folder"
            )
    return False


def write_part(path: Path, make: Callable[[], bytes]) -> None:
    """Writes what `make` gives into a file that is whole once it bears its name; what is there already stays.

    Raises:
        UserError: another process is writing it.
    """
    partial = path.with_suffix(".partial")
    with partial.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{partial}: another process is writing it; let it finish, or stop it first") from None
        try:
            if path.exists():  # by a process that had the lock before
                partial.unlink(missing_ok=True)
                return
            content = make()
            stream.truncate(0)  # what a killed process left
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _without_place(value: Any) -> Any:
    """Where prompts lay and a server listened changes no row."""
    return {k: v for k, v in value.items() if k not in ("name", "path", "base_url")} if isinstance(value, dict) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
