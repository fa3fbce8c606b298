"""Ends a process at its k-th change of the file system, as a kill would: just before the change, or in the middle of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Faults:
    """Counts this process's changes of the file system for the rest of its life, and ends it at one of them.

    An audit hook sees the changes that Python makes; `also` names compiled functions that it does not see, such as safetensors'
    writer. Every change is counted, so a kill just after the k-th leaves the same files as one just before the next.

    Args:
        at: Number of the change to end at, counted from 1; 0 for never.
        torn: If that change writes a file, end after its first byte instead of before it.
        also: Further functions that change files, as (module, name).
    """

    def __init__(self, at: int = 0, torn: bool = False, also: tuple[tuple[Any, str], ...] = ()) -> None:
        self.at, self.torn, self.busy = at, torn, False
        self.seen: list[str] = []
        for owner, name in ((os, "fsync"), *also):
            setattr(owner, name, self._counted(getattr(owner, name), name))
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        if event in CHANGES:
            self._change(event, None)
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING and _is_file(arguments[0]):
            self._change("open", arguments[0])

    def _counted(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **more: Any) -> Any:
            self._change(name, arguments[1] if name == "serialize_file" else None)
            return function(*arguments, **more)

        return counted

    def _change(self, name: str, file: Any) -> None:
        self.seen.append(name)
        if len(self.seen) == self.at:
            self.busy = True
            if self.torn and file is not None:
                Path(os.fsdecode(file)).write_bytes(b"{")
            os._exit(9)


def _is_file(path: Any) -> bool:
    return isinstance(path, (str, bytes, Path)) and not os.fsdecode(path).startswith(("/dev/", "/proc/"))


def in_fork(work: Callable[[], Any]) -> tuple[int, str]:
    """Exit code of `work` in a fork (9 if a fault ended it), and the text of its result."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = str(work())
            os.write(writing, result.encode())
            os._exit(0)
        finally:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text
