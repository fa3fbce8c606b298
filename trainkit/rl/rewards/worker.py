"""Processes that call one reward function each, and are killed when a call takes too long.

They are plain `python -c`, not those of multiprocessing: no process with threads and CUDA is forked, and the main program is
not imported again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from trainkit.errors import UserError, first_lines
from trainkit.rl.rewards.calls import BadCall, BadGold, Failed, Request, Result, TimedOut, call, load_function

LOAD_SECONDS = 300.0
"""Limit for the start of a process, with the imports of its function."""
_CHILD = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from trainkit.rl.rewards.worker import serve
serve(*sys.argv[2:])
"""


class Worker:
    """A process that calls one function, one call at a time; it starts at the first call, and again after it was killed.

    Args:
        function: Name of the function, as in `load_function`.
        options: Its further keyword arguments.
        memory: Limit of the process's address space in bytes, or None.
    """

    def __init__(self, function: str, options: Mapping[str, Any] | None = None, memory: int | None = None) -> None:
        self._target = (function, dict(options or {}), memory)
        self._connection: Connection | None = None
        self._close: Callable[[], Any] = lambda: None

    def call(self, request: Request, seconds: float) -> Result:
        """The function's result; errors as in `calls.call`.

        Raises:
            TimedOut: the call took longer than `seconds`, and the process was killed.
            Failed: the process died, too.
        """
        if self._connection is None:
            self._start()
        return self._exchange(request, seconds)

    def _start(self) -> None:
        ours, its = socket.socketpair()
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(its.fileno()), str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[its.fileno()], start_new_session=True)
        its.close()
        self._connection = Connection(ours.detach())
        self._close = weakref.finalize(self, _end, process, self._connection)
        self._exchange(self._target, LOAD_SECONDS)

    def _exchange(self, message: Any, seconds: float) -> Any:
        assert self._connection is not None
        try:
            self._connection.send((message, seconds))
            if not self._connection.poll(seconds):
                raise TimedOut
            reply = self._connection.recv()
        except (EOFError, ConnectionError):
            raise Failed("died", f"its process ended with code {self.close()}") from None
        except BaseException:  # too late, or interrupted: the reply would be taken for that of the next call
            self.close()
            raise
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> int | None:
        """Ends the process; its exit code, or minus the number of the signal that ended it, or None if there is none."""
        self._connection = None
        return self._close()


class Pool:
    """Several workers for one function; arguments as in `Worker`."""

    def __init__(self, function: str, options: Mapping[str, Any], workers: int, memory: int | None = None) -> None:
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self.workers = workers
        for _ in range(workers):
            self._idle.put(Worker(function, options, memory))

    def calls(self, requests: Sequence[Request], seconds: float) -> list[Result | Exception]:
        """The result of each request, or the error that `Worker.call` raised for it."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda request: self._call(request, seconds), requests))

    def _call(self, request: Request, seconds: float) -> Result | Exception:
        worker = self._idle.get()
        try:
            return worker.call(request, seconds)
        except (BadCall, BadGold, Failed, TimedOut) as error:
            return error
        finally:
            self._idle.put(worker)


def serve(handle: str, parent: str) -> None:
    """The process's side: reads what to load, then answers one request after another until the other side ends.

    If the main process is killed, this one ends within a second. A function that never lets another thread run, such as a
    regular expression that backtracks without end, ends a second after the limit of its call, by a thread of faulthandler.
    """
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    connection, function, nowhere = Connection(int(handle)), None, open(os.devnull, "w")  # noqa: SIM115
    while True:
        try:
            message, seconds = connection.recv()
        except (EOFError, ConnectionError):
            return
        faulthandler.dump_traceback_later(seconds + 1, exit=True, file=nowhere)
        try:
            if function is None:
                name, options, memory = message
                if memory is not None:
                    _limit_memory(memory)
                function, reply = load_function(name, options), None
            else:
                reply = call(function, message)
        except (BadCall, BadGold, Failed) as error:
            reply = error
        except UserError as error:
            reply = error if function else BadCall(f"cannot be loaded: {error}")
        faulthandler.cancel_dump_traceback_later()
        try:
            connection.send(reply)
        except ConnectionError:
            return
        except Exception as error:  # a value that `log_extra` was given cannot be pickled
            connection.send(Failed("result", f"its result cannot be sent to the main process: {first_lines(error)}"))


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, even if it is in an endless loop."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _end(process: subprocess.Popen[bytes], connection: Connection) -> int:
    connection.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # it died itself: keep its exit code
        return process.wait(0.1 if process.poll() is None else 0)
    process.kill()
    return process.wait()


def _limit_memory(size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (size, size))
