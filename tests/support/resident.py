"""Memory of a step, measured on a process of its own: what is there before it, and the largest resident set since.

Large blocks are mapped and returned by malloc, so the difference is what the step needed on top. Linux only: /proc, and
ru_maxrss in KiB.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any


def measured(step: Callable[[], Any]) -> tuple[int, float, Any]:
    """Of one call in this process: bytes above what is there now, seconds of one core, and what it returns."""
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    start = time.process_time()
    made = step()
    seconds = time.process_time() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, seconds, made


def alone(function: Callable[..., None], *arguments: Any) -> Any:
    """What `function(*arguments, connection)` sends from a process that it has for itself."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's peak
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result
