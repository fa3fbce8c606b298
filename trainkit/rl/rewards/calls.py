"""One call of a reward function: how a name becomes a function, what a call gives, and what its errors mean.

Nothing here imports torch, because processes that call one function (`worker`) load it and start at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, TypeVar

from trainkit.errors import UserError, first_lines

T = TypeVar("T")
BUILT_IN = {
    name: f"trainkit.rl.rewards.functions:{name}" for name in ("exact", "numeric", "regex", "format", "length", "repetition")
} | {name: f"trainkit.rl.rewards.packages:{name}" for name in ("math_verify", "reasoning_gym")}
BUILT_IN |= {"python_tests": "trainkit.rl.rewards.unit_tests:python_tests"}
"""Names of functions that need no module, and the factory of each."""
NOT_COLUMNS = frozenset(("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"))
"""Arguments of reward functions that are no columns of the data set."""


class BadCall(Exception):
    """A mistake in the function or its data that stops the run; the text continues after the function's name."""


class BadGold(Exception):
    """A reference answer that cannot be read; its number among the rows of the call, and the reason."""


class Failed(Exception):
    """The function raised an error, or its process died: a short kind that distinguishes failures, and a text."""


class TimedOut(Exception):
    """A call took longer than its limit."""


@dataclass
class Result:
    """What a call gave.

    Attributes:
        values: A reward for each completion; NaN if it is missing.
        extra: Columns for tables of completions, from `log_extra`.
        metrics: Numbers from `log_metric`.
    """

    values: list[float] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Keeps a value for each completion; anything but numbers and text becomes text, because tables are JSON."""
        self.extra[column] = [value if isinstance(value, (bool, int, float, str, NoneType)) else str(value) for value in values]

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))


@dataclass(frozen=True)
class Request:
    """A call: keyword arguments, the number of completions, and which of `log_extra` and `log_metric` the function takes."""

    arguments: Mapping[str, Any]
    count: int
    loggers: Collection[str] = ()

    def keywords(self, result: Result) -> dict[str, Any]:
        return {**self.arguments, **{name: getattr(result, name) for name in self.loggers}}


def load_function(function: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The function of a name: a built-in one, made with `options`, or `module:function` or `path/to/file.py:function`.

    The last two receive `options` as further keyword arguments in each call.

    Raises:
        UserError: there is no such module, file or function, or its file raises an error.
    """
    if function in BUILT_IN:
        return load_function(BUILT_IN[function], {})(**options)
    where, _, name = function.rpartition(":")
    if not where or not name:
        raise UserError(f"unknown function {function!r}; give module:function or file.py:function")
    found: Any = _load_module(where)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{where} has no function {name!r}; check the name")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{function} is a {type(found).__name__}, not a function; give the name of a function")
    return partial(found, **options) if options else found


def is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def call(function: Callable[..., Any], request: Request) -> Result:
    """The result of a function, awaited if it is asynchronous.

    Raises:
        BadCall: its result, or what it logs, is not one value per completion.
        BadGold: it cannot read a reference answer.
        UserError: it raised one.
        Failed: it raised another error.
    """
    if is_async(function):
        return wait(call_async(function, request))
    with _errors_of_function():
        result = Result()
        return _checked(result, function(**request.keywords(result)), request.count)


async def call_async(function: Callable[..., Any], request: Request) -> Result:
    """The result of an asynchronous function; errors as in `call`."""
    with _errors_of_function():
        result = Result()
        return _checked(result, await function(**request.keywords(result)), request.count)


def wait(work: Coroutine[Any, Any, T]) -> T:
    """The result of asynchronous work.

    All work of a process runs in one event loop, because clients and locks that a function keeps between calls belong to the
    loop that first used them. The loop has a thread of its own, because one may run already in this thread, as in notebooks.
    """
    return asyncio.run_coroutine_threadsafe(work, _loop(os.getpid())).result()


@functools.cache
def _loop(pid: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process; a fork has another, since it has no copies of its parent's threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _load_module(where: str) -> ModuleType:
    """The module of a dotted name or a .py file; a file is run once in a process, and may import from its folder."""
    path = Path(where).resolve()
    name = f"reward_functions_of_{path.as_posix()}" if where.endswith(".py") else where
    if name in sys.modules:
        return sys.modules[name]
    try:
        if name == where:
            return importlib.import_module(where)
        if not path.is_file():
            raise UserError(f"{where}: there is no such file; give a path that exists")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except ModuleNotFoundError as error:
        sys.modules.pop(name, None)
        if name == where and error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise UserError(f"there is no module {where}; install it, or give file.py:function") from None
        raise UserError(f"{where} needs the module {error.name}, which is not installed; install it") from error
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise UserError(f"{where} raises {_describe(error)}; fix it") from error


@contextlib.contextmanager
def _errors_of_function() -> Iterator[None]:
    """Turns every error but those that stop the run, even `exit()`, into `Failed`."""
    try:
        yield
    except (BadCall, BadGold, UserError):
        raise
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        text = _describe(error)
        raise Failed(f"{type(error).__name__}{text[text.rfind(' (') :]}", text) from error


def _describe(error: BaseException) -> str:
    """Type, message, file and line of an error."""
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    message = first_lines(error) if isinstance(error, Exception) else str(error)
    name = type(error).__name__
    return f"{name}{location}" if message in ("", name) else f"{name}: {message}{location}"


def _checked(result: Result, values: Any, count: int) -> Result:
    result.values = _numbers(values, count)
    for column, entries in result.extra.items():
        if len(entries) != count:
            raise BadCall(f"called log_extra({column!r}) with {len(entries)} values for {count} completions; log one for each")
    return result


def _numbers(values: Any, count: int) -> list[float]:
    """A function's result as floats, NaN for None; raises BadCall if it is anything but `count` finite numbers or None."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        raise BadCall(f"returned {_kind(values)}; it must return a list with a number or None for each completion")
    if len(values) != count:
        raise BadCall(f"returned {len(values)} values for {count} completions; it must return one for each")
    numbers = []
    for n, value in enumerate(values):
        try:
            number = math.nan if value is None else math.inf if isinstance(value, (str, bytes)) else float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.inf
        if math.isinf(number):
            raise BadCall(f"returned {value!r:.60} for completion {n}; it must return finite numbers or None")
        numbers.append(number)
    return numbers


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"
