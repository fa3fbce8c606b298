"""The command line: finds the command, reads its arguments by a function's signature, and reports a mistake in one line.

Heavy imports wait until a command is chosen, so that `trainkit --help` is immediate. fit, validate and test belong to
LightningCLI. For every other command the signature is the interface: positional parameters are positional, keyword-only ones
are flags, `**options` adds as flags the arguments of the class it is passed to, and the docstring is the help.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trainkit import __version__
from trainkit.errors import REMEDIES, UserError, check_unicode

TRAINING = {
    "fit": "train by a recipe: trainkit fit --config recipes/X.yaml",
    "validate": "validation metrics of a checkpoint: trainkit validate --config recipes/X.yaml --ckpt_path FILE",
    "test": "test metrics of a checkpoint: trainkit test --config recipes/X.yaml --ckpt_path FILE",
}
"""Commands that trainkit/commands/fit.py runs."""
COMMANDS = {
    "export": "turn a checkpoint into a bundle: trainkit export CHECKPOINT OUT",
    "import": "turn another program's drafter into a bundle: trainkit import FOLDER OUT --target DIR",
    "compress": "prune or quantise a model: trainkit compress TARGET OUT --method wanda --sparsity 2:4 --calibration FILE",
    "allocate": "how much to compress each layer: trainkit allocate TARGET OUT --sparsity 0.6 --calibration FILE",
    "trim": "make a drafter with a smaller vocabulary: trainkit trim BUNDLE OUT --target DIR --text SET",
    "vocab": "choose the token ids of a smaller draft vocabulary: trainkit vocab OUT --target DIR --text SET",
    "tree": "find the fastest draft tree on this machine: trainkit tree BUNDLE --target DIR --prompts FILE",
    "inspect": "show a bundle's card and check its files: trainkit inspect BUNDLE",
    "distill": "make a training set of the target's answers: trainkit distill --target DIR --prompts FILE --out DIR",
    "features": "store the target's outputs on training data: trainkit features --target DIR --data SET --out DIR",
    "infalign": "record the rewards of a policy before RL: trainkit infalign OUT --target DIR --prompts FILE --reward NAME",
    "acceptance": "record which drafted tokens are accepted, to train a predictor: trainkit acceptance --help",
    "generate": "generate text: trainkit generate --target DIR --drafter DIR --prompt TEXT",
    "serve": "answer OpenAI clients: trainkit serve --target DIR --drafter DIR",
    "evaluate": "perplexity, distance from a dense model, tasks: trainkit evaluate MODEL --text FILE --dense DIR",
    "alpha": "exact acceptance on given texts, with intervals: trainkit alpha --target DIR --drafter A --drafter B --data SET",
    "predictor": "calibration of a bundle's acceptance predictor: trainkit predictor BUNDLE --data SET",
    "verify": "check what trainkit promises of a drafter, and certify it: trainkit verify BUNDLE --target DIR",
    "bench": "speed beside plain decoding: trainkit bench --target DIR --drafter A --drafter B --prompts FILE --json OUT",
}
"""Command -> help. The command X is the function X in trainkit/commands/X.py, except for those in `OTHER_NAMES`."""
OTHER_NAMES = {"import": ("import_drafter", "import_outside")}
"""Command -> (file, function) where these have another name than the command, because it is a keyword of Python."""
RENAMED = {"eval": "evaluate measures the quality of a model, alpha the acceptance of drafters"}
"""Former name of a command -> what to use now."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C, or what training returns."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():  # transformers draws progress bars into files too; a value that the user set stays
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        if os.environ.get("TRAINKIT_DEBUG") == "1":
            raise
        if isinstance(error, UserError):
            message = str(error)
        elif error.errno in REMEDIES:
            path = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
            message = f"{path}{error.strerror}; {REMEDIES[error.errno]}"
        else:
            raise
        print(f"trainkit: error: {' '.join(message.split())}", file=sys.stderr)
        return 2


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
        default = f"did you mean {near[0]}?" if near else "trainkit --help lists all commands"
        remedy = RENAMED.get(command, default)
        raise UserError(f"unknown command {command!r}; {remedy}")
    file, name = OTHER_NAMES.get(command, (command, command))
    function = getattr(importlib.import_module(f"trainkit.commands.{file}"), name)
    result = function(**parse(command, function, arguments[1:]))
    if isinstance(result, str):
        print(result)
    return result if isinstance(result, int) else 0


def parse(command: str, function: Callable[..., Any], arguments: list[str]) -> dict[str, Any]:
    """The keyword arguments for `function` by a command line; exits after printing --help.

    Raises:
        UserError: an unknown, missing or wrong argument.
    """
    from trainkit.parser import Formatter, Parser

    about, examples = _help_texts(inspect.getdoc(function) or "")
    parser = Parser(prog=f"trainkit {command}", description=about, epilog=examples, formatter_class=Formatter)
    parameters = inspect.signature(function).parameters.values()
    positional = {parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
    flags = parser.add_function_arguments(function, as_group=False, skip={*positional})  # includes those of **options
    names = parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*flags}) + flags
    types = {action.dest: str(getattr(action, "_typehint", "")) for action in parser._actions}
    lists = {name for name in names if "list[str]" in types[name] or "tuple[str, ...]" in types[name]}
    values = parser.parse_args(_gather([_with_underscores(argument) for argument in arguments], lists))
    return {name: values[name] for name in names}


def _with_underscores(argument: str) -> str:
    """--base-url=X as --base_url=X: both spellings of a flag are understood."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _gather(arguments: list[str], lists: set[str]) -> list[str]:
    """The arguments with `--drafter A --drafter B` as `--drafter=["A", "B"]`, for the flags in `lists`.

    A single value that is a JSON list (or null) stays as it is; any other value is one string, also if it is in brackets.
    """
    others: list[str] = []
    gathered: dict[str, list[str]] = {}
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name[:2] != "--" or name[2:] not in lists:
            others.append(argument)
        elif (text := value if equals else next(remaining, None)) is None:
            others.append(argument)  # the parser reports the missing value
        else:
            gathered.setdefault(name, []).append(text)
    for name, texts in gathered.items():
        given = _json_list(texts[0]) if len(texts) == 1 else None
        text = "null" if texts == ["null"] else json.dumps(texts if given is None else given, ensure_ascii=False)
        others.append(f"{name}={check_unicode(name, text)}")
    return others


def _json_list(text: str) -> list[Any] | None:
    """The list that a JSON text holds; None for any other text."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) else None


def _overview() -> str:
    return "\n".join(
        [
            "usage: trainkit COMMAND ...",
            "",
            *(f"  {name:<10} {text}" for name, text in (TRAINING | COMMANDS).items()),
            "",
            "trainkit COMMAND --help explains a command. Lists of numbers are written [0,0.7]; a flag that takes several",
            "strings is repeated, or takes a JSON list.",
            "TRAINKIT_DEBUG=1 shows the traceback of an error.",
        ]
    )


def _help_texts(docstring: str) -> tuple[str, str]:
    """The text of a Google docstring before its sections, and its examples."""
    parts = re.split(r"^(Args|Returns|Raises|Examples?):\n", docstring, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    examples = sections.get("Example", sections.get("Examples", ""))
    return parts[0].strip(), f"examples:\n{examples.rstrip()}" if examples else ""


if __name__ == "__main__":
    sys.exit(main())
