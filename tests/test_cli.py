"""The command line: fast help, one line for a mistake, signatures as the interface."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.targets import make_target
from trainkit import bundle, cli
from trainkit.errors import UserError
from trainkit.parser import one_line


def cook(
    dish: Path,
    plates: int,
    *,
    target: Path,
    temperatures: list[float] | None = None,
    depth: int | None = None,
    verify: Literal["coupled", "residual"] = "coupled",
) -> str:
    """Cooks a dish; the second line is not lost.

    Args:
        dish: What to cook.
        plates: How many.
        target: For whom.
        temperatures: At which temperatures.
        depth: How deep.
        verify: Who tastes it.

    Example:
        trainkit cook soup 3 --target DIR
        trainkit cook soup 3 --target DIR --temperatures [0,0.7]

    Raises:
        UserError: no such dish.
    """
    if dish.name == "mud":
        raise UserError(f"{dish}: is not food;\nchoose another")
    if dish.name == "bug":
        raise RuntimeError("a bug")
    if dish.name == "ctrl-c":
        raise KeyboardInterrupt
    if dish.name == "file":
        Path("/nowhere/at/all").read_text()
    return repr((dish, plates, target, temperatures, depth, verify))


@dataclass(frozen=True)
class Service:
    """How a dish is served.

    Attributes:
        plates: Number of plates.
        toasts: Words before the meal.
        table: Where it stands.
    """

    plates: int = 2
    toasts: tuple[str, ...] = ()
    table: Literal["window", "door"] = "window"


def serve(dish: str, *, guests: list[str] | None = None, **options: Any) -> str:
    """Serves a dish.

    Args:
        dish: What to serve.
        guests: Names of the guests.
        options: Fields of `Service`.
    """
    return repr((dish, guests, Service(**options)))


@pytest.fixture(autouse=True)
def kitchen(monkeypatch):
    for function in (cook, serve):
        name = function.__name__
        module = types.ModuleType(name)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, f"trainkit.commands.{name}", module)
        monkeypatch.setitem(cli.COMMANDS, name, f"{name}s")
    monkeypatch.delenv("TRAINKIT_DEBUG", raising=False)


def test_help_needs_no_heavy_imports():
    """`trainkit --help` lists all commands without importing torch or other large packages."""
    code = "import sys; from trainkit.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_seconds < 1.0  # typically 0.1; wall-clock time would depend on what else the machine does
    assert not {"torch", "transformers", "lightning", "numpy", "datasets", "jsonargparse"} & set(done.stderr.split())
    for command in (*cli.TRAINING, *cli.COMMANDS):
        if command not in ("cook", "serve"):
            assert f"\n  {command} " in done.stdout


def test_arguments_come_from_the_signature(capsys):
    """Positional arguments, flags and lists are read from the function's signature."""
    assert cli.main("cook soup 3 --target here --temperatures [0,0.7] --depth 4 --verify residual".split()) == 0
    expected = (Path("soup"), 3, Path("here"), [0.0, 0.7], 4, "residual")
    assert capsys.readouterr().out.strip() == repr(expected)
    assert cli.main("cook soup 3 --target=here".split()) == 0
    assert capsys.readouterr().out.strip() == repr((Path("soup"), 3, Path("here"), None, None, "coupled"))


def test_command_help_is_the_docstring(capsys):
    """A command's help is its docstring with the examples."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["cook", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "usage: trainkit cook",
        "second line is not lost",
        "What to cook.",
        "At which temperatures.",
        "    trainkit cook soup 3 --target DIR\n    trainkit cook",
    ):
        assert part in text
    assert "no such dish" not in text


def test_options_come_from_their_dataclass(capsys):
    """Fields of a dataclass behind `**options` are flags with their help; defaults are passed on too."""
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = capsys.readouterr().out
    for part in ("--plates PLATES", "Number of plates.", "--table {window,door}", "Names of the guests."):
        assert part in text
    assert "--options" not in text
    assert "--guests GUESTS  " in text and "--guests+" not in text
    assert "type: list[str] | null" in text and "type: 'window' or 'door'" in text
    given = cli.parse("serve", serve, ["soup", "--table", "door"])
    assert given == {"dish": "soup", "guests": None, "plates": 2, "toasts": (), "table": "door"}
    assert cli.main("serve soup --plates 3 --toasts a --guests b --toasts c".split()) == 0
    assert capsys.readouterr().out.strip() == repr(("soup", ["b"], Service(3, ("a", "c"))))
    assert cli.main(["serve", "soup", "--plats", "3"]) == 2
    assert "did you mean --plates?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[X]", ("[X]",)),
        ("[a,b]", ("[a,b]",)),
        ('["a", "b"]', ("a", "b")),
        ("[]", ()),
        ("grün 😀", ("grün 😀",)),
        ("null and void", ("null and void",)),
        ("1", ("1",)),
        ('{"a": 1}', ('{"a": 1}',)),
    ],
)
def test_only_a_json_list_is_a_list_of_strings(text, value):
    """Only a JSON list is read as a list of strings; any other text is one string."""
    assert cli.parse("serve", serve, ["soup", "--toasts", text])["toasts"] == value
    assert cli.parse("serve", serve, ["soup", "--guests", text])["guests"] == list(value)
    assert cli.parse("serve", serve, ["soup", f"--toasts={text}", "--toasts=x"])["toasts"] == (text, "x")


@pytest.mark.parametrize("text", ["a\udcff", '["\\ud83d"]'])
def test_text_that_is_not_unicode_is_one_line(text, capsys):
    """A string flag with a lone surrogate, from bytes that are not UTF-8 or from JSON, gives one line."""
    assert cli.main(["serve", "soup", "--toasts", text]) == 2
    assert capsys.readouterr().err.startswith("trainkit: error: --toasts: has a lone surrogate, ")


# Each row: a wrong command line, and text that its one line must contain.
MISTAKES = {
    "cook soup 3 --target x --temperatrues [0]": ["--temperatrues", "did you mean --temperatures?"],
    "cook soup 3 --target x --depth deep": ["depth", "int", "got deep"],
    "cook soup 3 --target x --verify sloppy": ["verify: expected one of 'coupled', 'residual', got sloppy"],
    "cook soup 3 --target x --temperatures [0,hot]": ["temperatures", "float", "hot"],
    "cook soup 3 --target x --temperatures 0,0.7": ["temperatures", "expected a list, got 0,0.7; write [0,0.7]"],
    "cook soup 3 --target x --temperatures 1": ["temperatures", "write [1]"],
    "cook soup 3": ["missing --target; --help explains"],
    "cook soup --target x": ["missing PLATES; --help explains"],
    "cook soup 3 4 --target x": ["unrecognized arguments: 4", "--help"],
    "cook mud 3 --target x": ["mud: is not food; choose another"],
    "cook file 3 --target x": ["/nowhere/at/all: No such file or directory"],
    "coook soup": ["unknown command 'coook'", "did you mean cook?"],
    "eval --target x": ["unknown command 'eval'", "evaluate", "alpha"],
    "zzz": ["unknown command 'zzz'", "--help"],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistake_gives_one_line_and_code_2(capsys, line):
    """A mistake gives a one-line error and exit code 2."""
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trainkit: error: ")
    assert err.count("\n") == 1
    for part in MISTAKES[line]:
        assert part in err


def test_debug_shows_the_traceback(monkeypatch):
    """With TRAINKIT_DEBUG=1 a mistake keeps its traceback."""
    monkeypatch.setenv("TRAINKIT_DEBUG", "1")
    with pytest.raises(UserError):
        cli.main("cook mud 3 --target x".split())


def test_bug_is_not_hidden_as_a_user_error():
    """An error that is not the user's keeps its traceback."""
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main("cook bug 3 --target x".split())


def test_ctrl_c_is_130():
    """Ctrl-C ends a command with exit code 130."""
    assert cli.main("cook ctrl-c 3 --target x".split()) == 130


@pytest.mark.parametrize("command", cli.TRAINING)
def test_training_gets_arguments_and_returns_its_code(monkeypatch, command):
    """Training commands get their arguments unparsed, and their exit code is returned."""
    called = []
    training = types.ModuleType("trainkit.commands.fit")
    training.run = lambda *given: called.append(given) or 143  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trainkit.commands.fit", training)
    assert cli.main([command, "--config", "x.yaml", "--help"]) == 143
    assert called == [(command, ["--config", "x.yaml", "--help"])]


# Error messages of jsonargparse for recipes, and the line made of each.
RECIPE_ERRORS = {
    "Subcommand 'fit' does not accept option 'trainer.max_stpes'": (
        "Subcommand 'fit' does not accept option 'trainer.max_stpes'; did you mean trainer.max_steps?"
    ),
    "Parser key \"trainer.max_steps\":\n  Expected a <class 'int'>. Got value: abc": "trainer.max_steps: expected int, got abc",
    "Parser key \"limit\":\n  Does not validate against any of the Union subtypes\n  Errors:\n    - Expected <class 'int'>\n"
    "    - Expected <class 'NoneType'>\n  Given value: a": "limit: expected int, got a",
    "Parser key \"config\": File does not exist: 'x.yaml'": "config: File does not exist: 'x.yaml'; give a file that exists",
    'Parser key "model.drafter":\n  Does not validate against any of the Union subtypes\n  Subtypes: [a, b]\n  Errors:\n'
    "    - Type typing.Callable[[int], M] expects a function or a callable class: Option 'denominatr' is not accepted. "
    "Got value: Namespace(class_path='fractions.Fraction', init_args=Namespace(denominatr=1))\n"
    "    - Expected a <class 'NoneType'>\n  Given value type: <class 'dict'>\n  Given value: {'denominatr': 1}": (
        "model.drafter: Option 'denominatr' is not accepted, got {'denominatr': 1}; did you mean denominator?"
    ),
}


@pytest.mark.parametrize("message", RECIPE_ERRORS)
def test_recipe_errors_become_one_line(message):
    """The parser's errors are shortened to one line."""
    assert one_line(message, ["trainer.max_steps", "trainer.max_time"]) == RECIPE_ERRORS[message]


def test_inspect_shows_and_verifies_a_bundle(tmp_path, capsys):
    """`trainkit inspect` shows a bundle, compares it with a target and verifies its digests."""
    target = make_target(tmp_path / "target")
    decoder = {"vocab_size": 320, "hidden_size": 64, "num_layers": 4}
    bundle.write(
        tmp_path / "b",
        lambda path: save_file({"w": np.zeros((2, 3), np.float32)}, path / "model.safetensors"),
        kind="fake",
        config={},
        target={"decoder": decoder, "fingerprint": bundle.fingerprint(target)},
    )
    assert cli.main(["inspect", str(tmp_path / "b"), "--target", str(target)]) == 0
    text = capsys.readouterr().out
    assert "fake" in text
    assert "6 parameters" in text
    assert "It fits" in text

    other = make_target(tmp_path / "other", vocab_size=400)
    assert cli.main(["inspect", str(tmp_path / "b"), "--target", str(other)]) == 2
    assert "vocab_size 400" in capsys.readouterr().err

    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert cli.main(["inspect", str(tmp_path / "b")]) == 2
    assert "model.safetensors: changed" in capsys.readouterr().err


def test_module_run_returns_the_exit_code():
    """`python -m trainkit.cli` returns the command's exit code."""
    done = subprocess.run([sys.executable, "-m", "trainkit.cli", "inspect", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert json.dumps(done.stderr).count("\\n") == 1
