"""What a machine contains: which layers of the sandbox work on it, and what is open without the others."""

from __future__ import annotations

import os
from dataclasses import dataclass

LEVELS = ("none", "landlock", "full")
"""What can be contained, from least to most; see `Level`."""
FEATURES = ("namespaces", "tmpfs", "landlock", "nobody", "filter")
"""Layers that a machine may lack: namespaces, a folder in memory, Landlock, another user for root, a filter of system calls."""
MEMORY_FOLDER = "/dev/shm"
"""Where a folder in memory is mounted for the contained process alone, so that nothing is left on disk."""


@dataclass(frozen=True)
class Level:
    """What this machine contains.

    Attributes:
        name: full: namespaces and Landlock; landlock: no namespaces; none: no Landlock.
        features: Those of `FEATURES` that work here.
        open: What is not contained, in words.
        reason: Why a feature does not work here.
    """

    name: str
    features: frozenset[str]
    open: tuple[str, ...]
    reason: str = ""

    def __str__(self) -> str:
        left = f"not contained: {', '.join(self.open)}" if self.open else "everything is contained"
        return f"sandbox level {self.name}: {left}{f' ({self.reason})' if self.open and self.reason else ''}"


def level_of(features: frozenset[str], landlock: int, reason: str = "") -> Level:
    """The level that `features` make, with version `landlock` of Landlock."""
    abi = landlock if "landlock" in features else 0
    have, away = features.__contains__, os.geteuid() == 0 and "nobody" in features
    left = {
        "files that this user may read or write": not abi,
        "TCP": not (have("namespaces") or have("filter") or abi >= 4),
        "UDP and other sockets": not (have("namespaces") or have("filter")),
        "signals to this user's processes": not (have("namespaces") or have("filter") or abi >= 6 or away),
        "processes that outlive their solution": not (have("namespaces") or have("filter")),
        "the number of processes": not (have("filter") or away or os.geteuid() != 0),
        "disk space": not have("tmpfs"),
    }
    name = "none" if not abi else "full" if have("namespaces") else "landlock"
    return Level(name, features, tuple(what for what, is_left in left.items() if is_left), reason)
