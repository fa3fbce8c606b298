"""The command line: finds the command, reads its arguments from a function's signature, and ends a mistake in one line.

Heavy imports wait until a command is chosen, so `trainkit --help` answers at once. fit, validate and test belong to
LightningCLI; of every other command the signature is the interface: positional parameters are positional, keyword-only ones
are flags, the docstring is the help.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainkit import __version__
from trainkit.errors import UserError

TRAINING = {
    "fit": "train from a recipe: trainkit fit --config recipes/X.yaml",
    "validate": "validation metrics of a checkpoint: trainkit validate --config recipes/X.yaml --ckpt_path FILE",
    "test": "test metrics of a checkpoint, likewise",
}
COMMANDS: dict[str, tuple[str, str, str]] = {
    "export": ("trainkit.commands.export", "export", "a checkpoint as a bundle: trainkit export CHECKPOINT OUT"),
    "import": (
        "trainkit.commands.import_drafter",
        "import_outside",
        "another program's drafter as a bundle: trainkit import FOLDER OUT --target DIR",
    ),
    "trim": ("trainkit.commands.trim", "trim", "a smaller draft vocabulary: trainkit trim BUNDLE OUT --target DIR --text SET"),
    "vocab": ("trainkit.commands.vocab", "vocab", "the ids to train such a one on: trainkit vocab OUT --target DIR --text SET"),
    "tree": (
        "trainkit.commands.tree",
        "tree",
        "the fastest draft tree on this machine: trainkit tree BUNDLE --target DIR --prompts FILE",
    ),
    "inspect": ("trainkit.commands.inspect", "inspect", "a bundle's card, and whether it fits: trainkit inspect BUNDLE"),
    "distill": (
        "trainkit.commands.distill",
        "distill",
        "a training set of the target's own answers: trainkit distill --target DIR --prompts FILE --out DIR",
    ),
    "features": (
        "trainkit.commands.features",
        "features",
        "what the target says of training data, kept on disk: trainkit features --target DIR --data SET --out DIR",
    ),
    "generate": ("trainkit.commands.generate", "generate", "text: trainkit generate --target DIR --drafter DIR --prompt TEXT"),
    "eval": (
        "trainkit.commands.evaluate",
        "evaluate",
        "exact acceptance on given texts, with intervals: trainkit eval --target DIR --drafter [A,B] --data SET",
    ),
    "predictor": (
        "trainkit.commands.predictor",
        "predictor",
        "is a bundle's acceptance predictor calibrated: trainkit predictor BUNDLE --data SET",
    ),
    "bench": (
        "trainkit.commands.bench",
        "bench",
        "speed against plain decoding: trainkit bench --target DIR --drafter A --drafter B --prompts FILE --json OUT",
    ),
}
_MENDS = {
    errno.ENOENT: "give a path that exists",
    errno.EISDIR: "give a file, not a folder",
    errno.ENOTDIR: "give a path of folders",
    errno.EEXIST: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the links",
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions or choose another folder"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space or choose another disk"),
}
"""What the system refuses for a reason that lies outside the code, and what the user can do about it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C, or what training returns."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():  # transformers draws its bars into files too; what is there goes before
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        mistake = isinstance(error, UserError) or error.errno in _MENDS
        if not mistake or os.environ.get("TRAINKIT_DEBUG") == "1":
            raise
        line = " ".join((str(error) if isinstance(error, UserError) else _refusal(error)).split())
        print(f"trainkit: error: {line}", file=sys.stderr)
        return 2


def _refusal(error: OSError) -> str:
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{place}{error.strerror}; {_MENDS[error.errno or 0]}"


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(_overview())
        return 0
    if command == "--version":
        print(f"trainkit {__version__}")
        return 0
    if command in TRAINING:
        training = importlib.import_module("trainkit.commands.fit")
        return int(training.run(command, arguments[1:]) or 0)
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, [*TRAINING, *COMMANDS], n=1)
        raise UserError(f"no command {command!r}; " + (f"did you mean {near[0]}?" if near else "trainkit --help lists them"))
    module, name, _ = COMMANDS[command]
    function = getattr(importlib.import_module(module), name)
    result = function(**parse(command, function, arguments[1:]))
    if isinstance(result, str):
        print(result)
    return result if isinstance(result, int) else 0


def parse(command: str, function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """The keyword arguments for `function` that the command line gives; exits by itself for --help and mistakes."""
    from trainkit.parser import Parser

    parameters = inspect.signature(function).parameters
    flags: set[str | int] = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    about, examples = _help_texts(inspect.getdoc(function) or "")
    parser = Parser(prog=f"trainkit {command}", description=about, epilog=examples, formatter_class=_formatter())
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=flags)
    positionals: set[str | int] = {name for name in parameters if name not in flags}
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=positionals)
    lists = {name for name, parameter in parameters.items() if "list[str]" in str(parameter.annotation)}
    given = parser.parse_args(_gathered([_underscored(argument) for argument in arguments], lists))
    return {name: given[name] for name in parameters}


def _underscored(argument: str) -> str:
    """--base-url=X as --base_url=X: both spellings of an option are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _gathered(arguments: list[str], lists: set[str]) -> list[str]:
    """`--drafter A --drafter B` and `--drafter A` as `--drafter=[A,B]` and `--drafter=[A]`, for flags of several words."""
    rest: list[str] = []
    given: dict[str, list[str]] = {}
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name[:2] != "--" or name[2:] not in lists:
            rest.append(argument)
        elif (word := value if equals else next(waiting, None)) is None:
            rest.append(argument)  # the parser says that its value is missing
        else:
            given.setdefault(name, []).append(word)
    for name, words in given.items():
        if len(words) == 1 and (words[0].startswith("[") or words[0] == "null"):
            rest.append(f"{name}={words[0]}")
        else:
            rest.append(f"{name}={json.dumps(words)}")
    return rest


def _overview() -> str:
    rows = TRAINING | {name: help_line for name, (_, _, help_line) in COMMANDS.items()}
    lines = [f"  {name:<10} {text}" for name, text in rows.items()]
    return "\n".join(
        [
            "usage: trainkit COMMAND ...",
            "",
            *lines,
            "",
            "trainkit COMMAND --help explains each; lists are written [0,0.7].",
            "TRAINKIT_DEBUG=1 shows the traceback of an error.",
        ]
    )


def _help_texts(docstring: str) -> tuple[str, str]:
    """What a Google docstring says before its sections, and its examples."""
    parts = re.split(r"^(Args|Returns|Raises|Examples?):\n", docstring, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    examples = sections.get("Example", sections.get("Examples", ""))
    return parts[0].strip(), f"examples:\n{examples.rstrip()}" if examples else ""


def _formatter() -> type:
    import argparse

    import jsonargparse

    class Formatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        """Keeps the line breaks of examples."""

    return Formatter


if __name__ == "__main__":
    sys.exit(main())
