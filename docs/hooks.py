"""MkDocs hook: takes pages that live beside the code into the site, and writes the command reference from the parser.

Pages stay where a reader of the repository looks for them (README, studies, strategies, drafters); nothing is copied by hand.
Their relative links are rewritten: to a page of the site where there is one, otherwise to the plain path.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "recipes" / "studies"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the repository, the pictures of the studies and the command reference."""
    for source, page in pages().items():
        files.append(File.generated(config, page, content=rewritten(source, page)))
    for picture in STUDIES.glob("*/*.png"):
        files.append(File.generated(config, f"studies/{picture.parent.name}/{picture.name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "cli.md", content=command_reference()))
    return files


def pages() -> dict[str, str]:
    """Repository path of each page that is taken over -> its path in the site."""
    found = {
        "README.md": "index.md",
        "CHANGELOG.md": "changelog.md",
        "CONTRIBUTING.md": "contributing.md",
        "configs/strategy/README.md": "many-gpus.md",
        "data/README.md": "bundled-data.md",
        "recipes/README.md": "recipes.md",
        "recipes/when-a-run-dies.md": "when-a-run-dies.md",
        "trainkit/drafters/README.md": "add-a-kind.md",
    }
    for path in STUDIES.rglob("*.md"):
        place = path.relative_to(STUDIES).as_posix()
        found[f"recipes/studies/{place}"] = f"studies/{place.replace('README.md', 'index.md')}"
    return found


def rewritten(source: str, page: str) -> str:
    """The text of a repository page with its relative links made to fit the site."""
    site = pages()

    def link(match: re.Match[str]) -> str:
        image, text, path, anchor = match[1], match[2], match[3], match[4] or ""
        if "://" in path:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target.startswith("recipes/studies/") and target.endswith(".png"):
            goal = target.removeprefix("recipes/")
        elif target.startswith("docs/"):
            goal = target.removeprefix("docs/")
        elif target in site:
            goal = site[target]
        elif (folder := f"{target}/README.md") in site:
            goal = site[folder]
        else:
            return text if text.strip("`") == target else f"{text} (`{target}`)"
        return f"{image}[{text}]({posixpath.relpath(goal, posixpath.dirname(page) or '.')}{anchor})"

    return LINK.sub(link, (ROOT / source).read_text(encoding="utf-8"))


def command_reference() -> str:
    """`--help` of every command, as a page."""
    os.environ["COLUMNS"] = "120"
    from trainkit.cli import COMMANDS, TRAINING

    intro = """# Commands

Written by `trainkit COMMAND --help` when the site is built. `./launch.sh COMMAND` also sets up the environment first.

Every flag of `fit` is a key of a recipe, and the other way round. To see the flags of a class: `trainkit fit --model.help
DraftModule`, `--data.help TextData` and so on.
"""
    sections = [f"## trainkit\n\n```text\n{help_of([])}\n```"]
    sections += [f"## trainkit {name}\n\n```text\n{help_of([name])}\n```" for name in [*COMMANDS, *TRAINING]]
    return "\n\n".join([intro, *sections]) + "\n"


def help_of(command: list[str]) -> str:
    """What `trainkit COMMAND --help` prints."""
    from trainkit.cli import main

    printed, program = io.StringIO(), sys.argv[0]
    sys.argv[0] = "trainkit"  # the name that Lightning's parser prints
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        sys.argv[0] = program
    text = printed.getvalue().replace(str(ROOT) + "/", "").replace(str(Path.home()), "~").rstrip()
    assert text, f"trainkit {' '.join(command)} --help printed nothing"
    return text
