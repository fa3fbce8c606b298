"""Every drafter kind and variant that tests run: trainkit's own, one defined by the tests, and the example of the README."""

from __future__ import annotations

import atexit
import re
import shutil
import sys
import tempfile
from pathlib import Path

from trainkit.drafters.base import add_kinds_from, discover

README = Path("trainkit/drafters/README.md")


def install_example(page: Path) -> str:
    """Copies the example kind of `page`, unchanged, into the new package `kinds_of_the_page`; returns the kind's name."""
    (name,) = re.findall(r"`trainkit/drafters/(\w+)/__init__\.py`", page.read_text())
    (code,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    (folder / "kinds_of_the_page" / name).mkdir(parents=True)
    (folder / "kinds_of_the_page" / name / "__init__.py").write_text(code)
    sys.path.append(str(folder))
    return name


add_kinds_from("tests.support.kinds")
EXAMPLE = install_example(README)
add_kinds_from("kinds_of_the_page")
KINDS = sorted(discover())
VARIANTS = {kind: (kind, {}) for kind in KINDS} | {
    "hydra++": ("hydra", {"prefix": True, "num_layers": 2}),
    "eagle": ("eagle", {"steps": 3}),
}
"""Kind and constructor arguments, by name of the variant."""
