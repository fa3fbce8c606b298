"""Memory that a step needs, measured in a process of its own: largest resident set minus the resident set before the step.

malloc maps large blocks and returns them, so the difference is the step's own memory. Linux only: /proc, and ru_maxrss in KiB.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any


def measured(step: Callable[[], Any]) -> tuple[int, float, Any]:
    """Bytes above the present resident set, CPU seconds, and the result of one call in this process."""
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    start = time.process_time()
    result = step()
    seconds = time.process_time() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, seconds, result


def alone(function: Callable[..., None], *arguments: Any) -> Any:
    """The value that `function(*arguments, connection)` sends over its connection from a new process."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's peak
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result
