"""README, docs, recipes: every command parses, every Python snippet runs, every relative link has a target.

Commands are parsed by trainkit.cli itself and stopped before they run. Python snippets run in order, page by page, in a folder
with a tiny target (`target`) and a drafter for it (`my-draft`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.targets import make_target
from trainkit import cli
from trainkit.commands.fit import TrainingCLI
from trainkit.drafters.base import load_kind
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", *sorted((ROOT / "recipes").rglob("*.md")), ROOT / "configs/strategy/README.md"]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".yaml", ".sh"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")
ENTRIES = ("quickstart", "test", "lint")
"""First arguments of launch.sh that are no trainkit command and no recipe."""


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The code blocks of a page in these languages."""
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield code


def words_of(line: str) -> list[str] | None:
    """The words of a command line after `./launch.sh` or `trainkit`, without environment variables; None if it is another."""
    line = re.sub(r"(?<!\\)\$\{[^}]*\}[^ ]*", "", line).removeprefix("$ ")  # shell arrays stand for any flags
    try:
        words = shlex.split(line.replace("$PWD", str(ROOT)), comments=True)
    except ValueError:
        return None
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words[1:] if words and words[0] in ("./launch.sh", "trainkit") else None


def commands(page: Path) -> list[list[str]]:
    """Every command of a page: from its code blocks, or from the comments of a recipe."""
    if page.suffix == ".md":
        text = "\n".join(blocks(page, "bash", "console"))
    else:
        text = "\n".join(re.findall(r"^#   (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [words for line in lines if (words := words_of(line.strip())) is not None]


@pytest.fixture
def parse(monkeypatch) -> Callable[[list[str]], int]:
    """Parses the words after `trainkit` as the command line does; returns the exit code and runs nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr("trainkit.commands.fit.run", lambda command, arguments: TrainingCLI(command, arguments) and 0)

    original = cli.parse

    def stop(*arguments: Any) -> None:
        original(*arguments)
        raise Parsed

    monkeypatch.setattr(cli, "parse", stop)

    def run(words: list[str]) -> int:
        try:
            return cli.main(words)
        except Parsed:
            return 0

    return run


class Parsed(Exception):
    """Raised in place of running a command whose arguments were parsed."""


@pytest.mark.parametrize(
    "page", [page for page in [*PAGES, *RECIPES] if commands(page)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands_of_a_page_parse(page, parse, capsys):
    """Every command on a documentation page parses."""
    for words in commands(page):
        if words[0] in ENTRIES:
            continue
        if words[0].endswith((".yaml", ".sh")):
            recipe = ROOT / words[0]
            if words[0] == "RECIPE.yaml":  # stands for any
                recipe = ROOT / "recipes/draft_tiny.yaml"
            assert recipe.is_file(), f"{page}: no recipe {words[0]}"
            if recipe.suffix == ".sh":
                continue
            flags = [word for word in words[1:] if word not in ("--resume", "RUN_DIR")]
            words = ["fit", "--config", str(recipe.relative_to(ROOT)), *flags]
        code = parse(words)
        assert code == 0, f"{page}: trainkit {shlex.join(words)}: {capsys.readouterr().err}"


def test_unknown_commands_flags_and_values_are_detected(parse):
    """The fixture itself: without this a parser that accepts anything would go unseen."""
    assert parse(["trim", "a", "b", "--target", "T", "--text", "S"]) == 0
    assert parse(["trim", "a", "b", "--target", "T", "--text", "S", "--kepp", "0.5"]) == 2
    assert parse(["trimm", "a"]) == 2
    assert parse(["fit", "--config", "recipes/draft_tiny.yaml", "--model.divergence", "JSD"]) == 0
    assert parse(["fit", "--config", "recipes/draft_tiny.yaml", "--model.divergence", "JSQ"]) == 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tiny target and a drafter for it, under the names that the pages use."""
    folder = tmp_path_factory.mktemp("snippets")
    target = make_target(folder / "target")
    drafter = load_kind("lm")(target_shape(target))
    drafter.initialise(FrozenTarget(target))
    export_drafter(drafter, folder / "my-draft", tokenizer=target, target=target)
    return folder


@pytest.mark.parametrize(
    "page", [page for page in GUIDES if any(blocks(page, "python")) and page.name != "serve.md"], ids=lambda p: p.name
)
def test_python_of_a_page_runs(page, folder, monkeypatch):
    """The Python examples of a page run."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(code, f"{page.name}, snippet {number}", "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_page_have_targets(page):
    """Every link of a page has an existing target."""
    generated = {"studies", "cli.md", "add-a-kind.md", "recipes.md"}  # made by docs/hooks.py; mkdocs build --strict checks them
    for path, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in path:
            continue
        target = (page.parent / path).resolve()
        if (ROOT / "docs") in target.parents and target.relative_to(ROOT / "docs").parts[0] in generated:
            continue
        assert target.exists(), f"{page}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_readme_is_short():
    """The README has at most 130 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
