"""Killed at any change of the file system, an export leaves the old or the new bundle, and a run the old or the new checkpoint.

The killing and the checking run in a process of their own: no training has left threads in it, so it can fork.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from tests.support.faults import Faults, in_fork
from tests.support.processes import code_of, start
from tests.support.recipes import tiny_flags
from trainkit import bundle
from trainkit.commands.export import export
from trainkit.commands.fit import run
from trainkit.errors import UserError
from trainkit.modules.callbacks import Checkpoints, put_back

UNSEEN = ((safetensors.torch, "serialize_file"),)
"""Functions that change files without raising an audit event."""
TEARABLE = ("open", "serialize_file")


def kill_everywhere(
    work: Callable[[int], Any], prepare: Callable[[int], None], check: Callable[[int], str], some: int = 0
) -> list[str]:
    """The states that `check` returns after kills of `work(n)` before each of its changes and within each file it writes.

    Args:
        work: Function to kill; it changes the file system in the same steps each time.
        prepare: Called with the number of the kill before it.
        check: Called with the number of the kill after it; returns the state it found.
        some: Number of kills to draw at random, besides those around the renaming; 0 takes all kills.
    """

    def count() -> str:
        faults = Faults(also=UNSEEN)
        work(0)
        return json.dumps(faults.seen)

    prepare(0)
    code, text = in_fork(count)
    assert code == 0
    seen = json.loads(text)
    kills = [(at, torn) for at, name in enumerate(seen, 1) for torn in (False, True) if name in TEARABLE or not torn]
    if some:
        last = max(at for at, name in enumerate(seen, 1) if name == "os.rename")
        drawn = {*random.sample(kills, some), *((at, False) for at in range(last - 1, last + 3))}
        kills = [kill for kill in kills if kill in drawn]
    states = []
    for number, (at, torn) in enumerate(kills, 1):
        prepare(number)
        code, _ = in_fork(lambda: (Faults(at, torn, UNSEEN), work(number)))  # noqa: B023
        assert code == 9, f"not killed at {at} of {len(seen)}"
        print(f"{'in' if torn else 'before'} {seen[at - 1]}, {at} of {len(seen)}:", end=" ", flush=True)
        states.append(check(number))
        print(states[-1])
    print(f"{len(kills)} kills at {len(seen)} changes: " + ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)))
    return states


def logged(log: Path, work: Callable[..., int], *arguments: Any) -> int:
    """`work(*arguments)` with its output in a file, because the output of this process does not reach the test."""
    with log.open("w", buffering=1) as stream, contextlib.redirect_stdout(stream):
        return work(*arguments)


# ------------------------------------------------------------------------------------------------------------------- exports


def kill_exports(checkpoint: str, base: Path, old: bool, some: int, seed: int) -> int:
    random.seed(seed)
    files = {}
    for name, dtype in (("old", "bfloat16"), ("new", "float32")):
        export(checkpoint, str(base / name), dtype=dtype)  # also imports all modules that the kills need
        files[name] = bundle.read(base / name).files
    assert files["old"] != files["new"]
    out_of = lambda number: base / str(number) / "out"

    def prepare(number: int) -> None:
        out_of(number).parent.mkdir()
        if old:
            shutil.copytree(base / "old", out_of(number))

    def check(number: int) -> str:
        out = out_of(number)
        try:
            found = bundle.read(out)
            state = next(name for name in files if files[name] == found.files)
        except UserError as error:
            assert not old and "no such folder" in str(error)
            assert not out.exists()
            state = "absent"
        export(checkpoint, str(out))
        assert bundle.read(out).files == files["new"]
        assert os.listdir(out.parent) == ["out"], "the next export did not tidy up"
        shutil.rmtree(out.parent)
        return state

    states = kill_everywhere(lambda number: export(checkpoint, str(out_of(number))), prepare, check, some)
    before = "old" if old else "absent"
    assert states == [before] * states.count(before) + ["new"] * states.count("new") and len(set(states)) == 2
    return 0


@pytest.fixture(scope="module")
def checkpoint(tiny_target, tmp_path_factory) -> Callable[[str], Path]:
    """The checkpoint of a recipe, trained once."""
    base = tmp_path_factory.mktemp("runs")
    rows = base / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"It is {n + 1}."}) + "\n" for n in range(24)))

    @functools.cache
    def trained(recipe: str) -> Path:
        flags = tiny_flags(Path(f"recipes/{recipe}.yaml"), tiny_target, rows, base / recipe)
        assert code_of(start(run, "fit", [*flags, "--trainer.max_steps", "1", "--trainer.logger", "false"])) == 0
        return base / recipe / "run" / "checkpoints" / "last.ckpt"

    return trained


@pytest.mark.parametrize("recipe", ["draft_tiny", pytest.param("target_tiny", marks=pytest.mark.slow)])
@pytest.mark.parametrize("some", [3, pytest.param(0, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
def test_killed_export_leaves_old_or_new_bundle(old, some, recipe, checkpoint, tmp_path, seed):
    """An export killed at any change of the file system leaves the old bundle or the new one."""
    arguments = str(checkpoint(recipe)), tmp_path, old, some, seed
    assert code_of(start(logged, tmp_path / "log", kill_exports, *arguments), 600) == 0
    print((tmp_path / "log").read_text())


# --------------------------------------------------------------------------------------------------------------- checkpoints


class FakeTrainer:
    """Saves like Lightning with one process: a file, or a folder of files as sharded strategies do."""

    is_global_zero, fast_dev_run, world_size, global_rank = True, False, 1, 0

    def __init__(self, root: Path, step: int, shards: int) -> None:
        self.default_root_dir, self.global_step, self.shards = str(root), step, shards
        self.strategy = self._checkpoint_connector = self

    def broadcast(self, value: Any) -> Any:
        return value

    def dump_checkpoint(self, weights_only: bool) -> dict[str, Any]:
        return {"step": self.global_step, "weights": torch.zeros(100)}

    def save_checkpoint(self, content: dict[str, Any], path: Path) -> None:
        if not self.shards:
            return TorchCheckpointIO().save_checkpoint(content, path)
        path.mkdir(parents=True, exist_ok=True)
        for shard in range(self.shards):
            torch.save(content, path / f"{shard}.distcp")


def step_of(checkpoint: Path) -> int:
    """The step of a complete checkpoint: a file, or a folder with as many shards as its step."""
    files = sorted(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]
    steps = {torch.load(file, weights_only=True)["step"] for file in files}
    assert len(steps) == 1 and (checkpoint.is_file() or len(files) in steps), "shards of two checkpoints"
    return steps.pop()


def kill_saves(base: Path, before: str, after: str) -> int:
    scratch = base / "scratch"
    scratch.mkdir()
    tempfile.tempdir = str(scratch)
    root = lambda number: base / str(number)
    last = lambda number: root(number) / "checkpoints" / "last.ckpt"

    def save(number: int, step: int, shape: str) -> None:
        trainer: Any = FakeTrainer(root(number), step, step if shape == "folder" else 0)
        checkpoints = Checkpoints()
        checkpoints.on_train_start(trainer, None)  # type: ignore[arg-type]
        checkpoints._save(trainer, "last.ckpt")

    def prepare(number: int) -> None:
        if before != "nothing":
            save(number, 3, before)

    def check(number: int) -> str:
        checkpoint = last(number)
        if before == after == "file":
            assert checkpoint.exists(), "absent for a moment"
        put_back(checkpoint)
        state = str(step_of(checkpoint)) if checkpoint.exists() else "nothing"
        save(number, 1, after)
        assert step_of(checkpoint) == 1
        assert os.listdir(checkpoint.parent) == ["last.ckpt"], "the next run did not tidy up"
        assert os.listdir(scratch) == [], "left in a folder that nothing tidies up"
        return state

    states = kill_everywhere(lambda number: save(number, 2, after), prepare, check)
    old = "nothing" if before == "nothing" else "3"
    assert states == [old] * states.count(old) + ["2"] * states.count("2") and len(set(states)) == 2
    return 0


@pytest.mark.parametrize("after", ["file", "folder"])
@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
def test_killed_save_leaves_old_or_new_checkpoint(before, after, tmp_path):
    """A save killed at any change of the file system leaves the old checkpoint or the new one."""
    assert code_of(start(logged, tmp_path / "log", kill_saves, tmp_path, before, after)) == 0
    print((tmp_path / "log").read_text())
