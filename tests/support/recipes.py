"""Recipes cut down to what a test can run: the repository's own over a tiny target, and a small one written here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.support.acceptance import make_set
from tests.support.compressed_layers import prune


def tiny_flags(recipe: Path, target: Path, rows: Path, cache: Path) -> list[str]:
    """Flags of `trainkit fit` that run a recipe on a tiny target and a few rows, whatever it trains.

    Args:
        recipe: YAML file of the recipe.
        target: Folder of the tiny target.
        rows: JSONL file of questions and answers.
        cache: Folder for packed rows; the run is written to its subfolder `run`.
    """
    values = yaml.safe_load(recipe.read_text())
    run = {"trainer.accelerator": "cpu", "trainer.default_root_dir": cache / "run", "trainer.precision": "32-true"}
    run |= {"trainer.enable_progress_bar": "false"}
    if values["data"]["class_path"] == "AcceptanceData":
        return _with_flags(recipe, {"data.train": make_set(cache / "records"), "data.batch_size": 16} | run)
    if values["data"]["class_path"] == "PromptData":
        rows = _write_sums(cache / "sums.jsonl")
        data = {"model.target": target, "data.train": rows, "data.validation": rows}
        small = {"model.prompts": 4, "model.max_new_tokens": 4, "model.drafter": "null", "model.refresh": "null"}
        if "overlong" in values["model"]["init_args"]["algorithm"].get("init_args", {}):
            small["model.algorithm.overlong"] = 2
        return _with_flags(recipe, data | small | run)
    model, data = (values[part].get("init_args", {}) for part in ("model", "data"))
    flags = {f"data.{name}": rows for name in ("train", "corpus", "target", "prompts") if name in data}
    flags |= {"data.validation": rows, "data.length": 64, "data.batch_size": 2, "data.cache": cache} | run
    if "compression" in model:
        compression, flags["model.teacher"] = model["compression"]["class_path"], target
        flags["model.folder"] = prune(target, cache / "pruned") if compression == "FixedMask" else target
        if compression == "QuantAware":
            flags["model.compression.group"] = 32  # the tiny target has 64 inputs
    elif "target" in model:
        flags["model.target"] = target
        drafter = model["drafter"]  # or the path of a fragment
        if isinstance(drafter, dict) and "/" in drafter.get("init_args", {}).get("init", ""):
            flags["model.drafter.init"] = target
    else:
        flags |= {"data.tokenizer": target, "model.config.num_hidden_layers": 1}
    return _with_flags(recipe, flags)


def _write_sums(path: Path) -> Path:
    """Prompts with an answer that reward functions for text and for numbers read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(8)))
    return path


def _with_flags(recipe: Path, flags: dict[str, Any]) -> list[str]:
    return ["--config", str(recipe), *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def small_recipe(target: Path, rows: Path, cache: Path) -> dict[str, Any]:
    """Contents of a valid recipe: one step of a one-layer LM draft on the CPU."""
    data = {"train": str(rows), "length": 64, "batch_size": 2, "cache": str(cache / "data")}
    drafter = {"class_path": "LMDraft", "init_args": {"num_layers": 1, "init": "target"}}
    return {
        "model": {"class_path": "DraftModule", "init_args": {"target": str(target), "drafter": drafter}},
        "data": {"class_path": "TextData", "init_args": data},
        "trainer.max_steps": 1,
        "trainer.val_check_interval": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
    }
