"""Errors of the command line as one line: what was wrong, where, and the remedy."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import jsonargparse

from trainkit.errors import UserError

_UNKNOWN = (r"unrecognized arguments: -{0,2}([^\s=]+)", r"does not accept option '([^']+)'", r"invalid choice: '([^']+)'")
_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value",
    "Expected a <class 'NoneType'>",
    "Expected <class 'NoneType'>",
)


class OneLine:
    """Mixin for an argument parser (`Parser`, or Lightning's `parser_class`): an error raises UserError instead of exiting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # type: ignore[attr-defined]  # a trial parse of jsonargparse, which handles the error
            super().error(message, ex)  # type: ignore[misc]
        raise UserError(one_line(message, list(_names(self)))) from ex


class Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of examples in the help, and shows types and flags as users write them."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = action.option_strings
        action.option_strings = [flag for flag in flags if not flag.endswith("+")]  # --data+ is jsonargparse's own
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = flags

    def _expand_help(self, action: argparse.Action) -> str:
        text = re.sub(r"<class '(\w+)'>", r"\1", super()._expand_help(action))
        text = re.sub(r"type: Optional\[(.*)\](?=, default)", r"type: \1 | null", text)
        text = re.sub(r"type: Union\[(.*)\](?=, default)", lambda match: f"type: {match[1].replace(', ', ' | ')}", text)
        return re.sub(r"type: Literal\[(.*)\]", lambda match: f"type: {match[1].replace(', ', ' or ')}", text)


class Parser(OneLine, jsonargparse.ArgumentParser):
    """Parser of every command except those that Lightning runs."""


def one_line(message: str, known: list[str]) -> str:
    """A jsonargparse message as one line, with the nearest of the `known` names if a name was mistyped."""
    key = re.search(r'Parser key "([^"]+)":', message)
    value = re.search(r"Given value: (.*)", message)
    lines = [re.sub(r'^Parser key "[^"]+":', "", line.strip()).strip().removeprefix("- ") for line in message.splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NOISE)]
    text = "; ".join(dict.fromkeys(_plain(line) for line in lines))
    if value:  # shown once, as the user wrote it; the other lines show it half parsed
        text = re.sub(r", got [^;]*", "", text) + f", got {value[1]}"
    text = text.replace("expected list, got", "expected a list, got")
    if single := re.search(r"expected a list, got ([-+\d.,; ()]+)$", text):
        text += f"; write [{','.join(re.findall(r'[^,; ()]+', single[1]))}]"
    if required := re.search(r"^the following arguments are required: (.*)$", text):  # flags as users write them
        names = [f"--{name}" if name in known else name.upper() for name in required[1].split(", ")]
        text = f"missing {', '.join(names)}; --help explains all arguments"
    text = f"{key[1]}: {text}" if key else text
    return text.replace('"<unicode string>"', "the file") + _suggestion(message, known)


def _plain(line: str) -> str:
    line = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", line).replace("typing.", "").replace(". Got value:", ", got")
    line = re.sub(r"Literal\[(.*?)\]", r"one of \1", line)
    line = re.sub(r"^Type .* expects a function or a callable class: ", "", line)
    return re.sub(r"^Expected (?:an? )?", "expected ", line).replace("expected tuple", "expected a list")


def _suggestion(message: str, known: list[str]) -> str:
    option = re.search(r"Option '([^']+)' is not accepted", message)
    owner = re.search(r"class_path='([\w.]+)'", message) or re.search(r"class_path '([\w.]+)'", message)
    if option and owner:
        near = difflib.get_close_matches(option[1], _arguments_of(owner[1]), n=1)
        return f"; did you mean {near[0]}?" if near else ""
    if "File does not exist" in message:
        return "; give a file that exists"
    if match := re.search(r"[Ee]xpected a dot import path string: (\w+)", message):
        near = difflib.get_close_matches(match[1], _classes(), n=1)
        return f"; did you mean {near[0]}?" if near else "; name a class, or give its dotted path"
    for pattern in _UNKNOWN:
        if match := re.search(pattern, message):
            name = match[1]
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            dashes = "--" if f"--{name}" in message else ""
            return f"; did you mean {dashes}{near[0]}?" if near else "; --help lists all options"
    return ""


def _classes() -> list[str]:
    """Names of the imported trainkit classes that a recipe may use."""
    namespaces = [vars(module) for name, module in list(sys.modules.items()) if name.startswith("trainkit.")]
    return sorted({name for names in namespaces for name, value in names.items() if isinstance(value, type) and name[0] != "_"})


def _arguments_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    with contextlib.suppress(ImportError, AttributeError, ValueError):
        bases = inspect.getmro(getattr(importlib.import_module(module), name))  # a class may pass **kwargs on to its base
        return [parameter for base in bases for parameter in inspect.signature(base).parameters]
    return []


def _names(parser: Any) -> Iterator[str]:
    """Names of options and subcommands of a parser and of its subcommands, without dashes."""
    for action in parser._actions:
        yield from (option.lstrip("-") for option in action.option_strings)
        for name, child in (getattr(action, "_name_parser_map", None) or {}).items():
            yield name
            yield from _names(child)
