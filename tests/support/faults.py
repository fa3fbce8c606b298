"""Ends a process at its k-th change of the file system, as a kill would: just before it, or with it half done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Faults:
    """Counts this process's changes of the file system from now on, for good; ends it at one of them.

    The audit hook sees what Python does; what compiled code does unseen, such as safetensors' writing and the swap of two names
    through ctypes, `also` names. A kill just after the k-th change leaves what one just before the next leaves, as every change
    is counted.

    Args:
        at: Number of the change to end at, from 1; 0 never.
        torn: End not before it but, where it writes a file, with the file's first byte written.
        also: More functions that change files, by their module and name.
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
    """Runs `work` in a fork; its exit code (9 where a fault ended it), and what it returned, as text."""
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
        said = stream.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
