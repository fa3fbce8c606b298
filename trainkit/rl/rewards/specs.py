"""A reward function as a recipe names it, with its weight, options and limits."""

from __future__ import annotations

import inspect
import math
import typing
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import UnionType
from typing import Any

from trainkit.errors import UserError
from trainkit.rl.rewards.calls import BUILT_IN, NOT_COLUMNS, BadCall, Request, load_function
from trainkit.rl.rewards.worker import Worker

_KEYS = ("function", "weight", "options", "name", "timeout")
_LOGGERS = ("log_extra", "log_metric")


@dataclass
class Reward:
    """A reward function, and what `Rewards` needs to call it.

    Attributes:
        name: Key of its values.
        function: The function, in this process.
        weight: Factor of its values in the sum.
        built_in: Whether it is one of ours, which reads references without completions.
        seconds: Limit of a call, if it has a worker.
        worker: The process that calls it, or None.
        needed: Names of arguments without a default.
        wanted: Names of all arguments; None if it accepts any.
        fixed: Names of arguments that its options give.
        failed: Number of calls that failed in a row.
        kinds: Number of failures of each kind.
    """

    name: str
    function: Callable[..., Any]
    weight: float
    built_in: bool
    seconds: float | None
    worker: Worker | None
    needed: set[str]
    wanted: set[str] | None
    fixed: frozenset[str] = frozenset()
    failed: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def request(self, arguments: Mapping[str, Any], count: int) -> Request:
        """A call with what the function accepts; raises BadCall if it needs anything else."""
        if missing := self.needed - arguments.keys() - set(_LOGGERS):
            others = ", ".join(sorted(arguments.keys() - NOT_COLUMNS)) or "none"
            raise BadCall(f"needs the column {min(missing)!r}, but the tasks have: {others}; rename the column or the argument")
        # Deep copies, because a function may change what it receives: tokens that are trained on, columns of later steps.
        copies = {
            name: [list(ids) for ids in value] if name == "completion_ids" else deepcopy(value)
            for name, value in arguments.items()
            if (self.wanted is None or name in self.wanted) and name not in self.fixed
        }
        return Request(copies, count, [name for name in _LOGGERS if self.wanted is None or name in self.wanted])


def read_spec(spec: Mapping[str, Any], taken: set[str]) -> Reward:
    """A spec as a reward function; errors name the key, and continue the line of the caller."""
    if not isinstance(spec, Mapping) or "function" not in spec:
        raise UserError(f"{spec!r:.60} names no function; write, for example, {{function: numeric}}")
    if unknown := [key for key in spec if key not in _KEYS]:
        raise UserError(f"unknown key {unknown[0]!r}; choose from {', '.join(_KEYS)}")
    given, options = spec["function"], spec.get("options") or {}
    if not isinstance(options, Mapping):
        raise UserError(f"options: {options!r:.60} must be a mapping from names to values")
    weight, seconds = _number("weight", spec.get("weight", 1.0)), spec.get("timeout")
    if seconds is not None and (seconds := _number("timeout", seconds)) <= 0:
        raise UserError(f"timeout: {seconds:g} must be above 0; leave it out for no limit")

    # The function, in this process even if another one calls it, because errors of its file show now.
    built_in, worker = isinstance(given, str) and given in BUILT_IN, None
    if isinstance(given, str):
        if built_in:
            _check_options(given, options)
        elif ":" not in given:
            others = "or give module:function or file.py:function"
            raise UserError(f"unknown function {given!r}; choose from {', '.join(BUILT_IN)}, {others}")
        function, default = load_function(given, options), given.rpartition(":")[2]
        worker = None if seconds is None else Worker(given, options)
    elif callable(given):
        if seconds is not None:
            raise UserError("timeout: the function must be given by name, as module:function, to run in another process")
        function, default = partial(given, **options) if options else given, getattr(given, "__name__", type(given).__name__)
    else:
        raise UserError(f"function: {given!r:.60} must be a name")
    needed, wanted = _parameters(function)

    # Its name in results.
    numbered = (default if n == 1 else f"{default}_{n}" for n in count(1))
    name = spec.get("name") or next(name for name in numbered if name not in taken)
    if not isinstance(name, str) or name in taken:
        raise UserError(f"name: {name!r:.60} must be a name that no other reward has")
    fixed = frozenset() if built_in else frozenset(options)
    return Reward(name, function, weight, built_in, seconds, worker, needed, wanted, fixed)


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError for an option that a built-in function does not have, that it needs, or that has the wrong type."""
    factory = load_function(BUILT_IN[name], {})
    hints, parameters = typing.get_type_hints(factory), inspect.signature(factory).parameters
    for option, value in options.items():
        if option not in parameters:
            raise UserError(f"options: {name} has no option {option!r}; choose from {', '.join(parameters) or 'none'}")
        if not _fits(value, hints[option]):
            raise UserError(f"options: {option}: {value!r:.60} must be {parameters[option].annotation.replace(' | ', ' or ')}")
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"options: {name} needs the option {option}; set it")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from YAML has a type; whole numbers are floats too."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, UnionType):
        return any(_fits(value, part) for part in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(entry, inner[0]) for entry in value)
    if isinstance(value, bool) or hint is None:
        return hint in (bool, type(value))
    return isinstance(value, (int, float) if hint is float else kind or hint)


def _parameters(function: Callable[..., Any]) -> tuple[set[str], set[str] | None]:
    """Names of the arguments that a function needs, and of all that it accepts, None for any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # as partial() of a function without these keywords
        raise UserError("options: the function does not accept them; give arguments that it has") from None
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        raise UserError("function: takes arguments by position; reward functions are called with keywords")
    named = [
        parameter for parameter in parameters if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    needed = {parameter.name for parameter in named if parameter.default is parameter.empty}
    accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return needed, None if accepts_all else {parameter.name for parameter in named}


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{key}: {value!r:.60} must be a number")
    return float(value)
