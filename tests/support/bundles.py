"""Bundles of a drafter kind that does not exist, with a tiny weight file: quick to write, and enough to read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from trainkit import bundle

TARGET = {"decoder": {"vocab_size": 320, "hidden_size": 64, "num_layers": 4}, "fingerprint": {"path": "tiny"}}


def fill(folder: Path, value: float = 1.0) -> None:
    """Writes the contents of a bundle; `value` is in all weights."""
    save_file({"a.weight": np.full((3, 5), value, np.float32), "map": np.arange(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.md").write_text("notes")


def make(folder: Path, value: float = 1.0, **changes: Any) -> bundle.Bundle:
    """Writes a bundle at `folder`; `changes` replaces arguments of `bundle.write`."""
    keywords = {"kind": "fake", "config": {"depth": 4}, "target": TARGET, "seed": 7} | changes
    return bundle.write(folder, lambda path: fill(path, value), **keywords)


def add(folder: Path) -> None:
    """Writes a further file into the subfolder `more` of a bundle that is being amended."""
    (folder / "more").mkdir()
    fill(folder / "more", 2.0)
