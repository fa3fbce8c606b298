"""Tables of responses: their rows, their interval, resumed runs, and Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from tests.support import wandb_records
from trainkit.errors import UserError
from trainkit.modules.completions import Completions
from trainkit.modules.wandb_logger import WandbLog
from trainkit.rl.types import Group, Response, Task


class Sampler(LightningModule):
    """Two optimiser steps per generation of two groups; the last generation is in its checkpoints, as in `PolicyModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.groups = torch.nn.Linear(1, 1), []

    def on_train_batch_start(self, batch, batch_idx) -> None:
        if self.global_step % 2 == 0:
            self.groups = generation(self.global_step)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def on_save_checkpoint(self, checkpoint) -> None:
        checkpoint["generation"] = (self.global_step - 1) // 2 * 2

    def on_load_checkpoint(self, checkpoint) -> None:
        self.groups = generation(checkpoint["generation"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def generation(step: int) -> list[Group]:
    """Two prompts, one of them a chat, with two responses each; one reward is missing."""
    answers = lambda row: [
        Response([1, 2], f"{step}.{row}.{n}", "end", [0.0] * 2, rewards={"exact": value, "length": 0.5}, reward=value)
        for n, value in enumerate((1.0, float("nan")))
    ]
    prompts = ["2+2=", [{"role": "user", "content": "2+2?"}]]
    return [Group(Task(row, [3], prompt), answers(row)) for row, prompt in enumerate(prompts)]


def fit(root: Path, steps: int, ckpt_path: Path | None = None, logger=False, **options) -> None:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=logger,
        default_root_dir=root,
        callbacks=[Completions(**options)],
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    if logger:
        logger.begin(root, "{}")
    trainer.fit(Sampler(), DataLoader(torch.ones(100, 1)), ckpt_path=ckpt_path)
    trainer.save_checkpoint(root / "last.ckpt")


def tables(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (root / "completions").iterdir()}


def test_completions_write_every_nth_generation(tmp_path):
    """Generations start at steps 0, 2, 4, 6, 8; every second one has a table, with one row for each response."""
    fit(tmp_path, 9, every=2)
    written = tables(tmp_path)
    assert sorted(written) == ["0.jsonl", "4.jsonl", "8.jsonl"]
    first, second, third, _ = map(json.loads, written["4.jsonl"].splitlines())
    assert first["completion"] == "4.0.0" and first["step"] == 4 and first["prompt"] == "2+2=" and first["finish"] == "end"
    assert first["reward"] == first["reward/exact"] == 1.0 and second["reward"] is None and second["reward/length"] == 0.5
    assert third["prompt"] == [{"role": "user", "content": "2+2?"}]


def test_completions_are_limited_to_first_prompts(tmp_path):
    """With `prompts: 1` a table has the responses to one prompt only."""
    fit(tmp_path, 1, prompts=1)
    assert len(tables(tmp_path)["0.jsonl"].splitlines()) == 2


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_resumed_completions_equal_uninterrupted(tmp_path, stop):
    """Stopped within a generation and between two: the files are those of one run, and later ones are removed."""
    fit(tmp_path / "whole", 9, every=2)
    fit(tmp_path / "parts", stop, every=2)
    late = tmp_path / "parts" / "completions" / "6.jsonl"
    late.write_text("from a killed run\n")
    fit(tmp_path / "parts", 9, tmp_path / "parts" / "last.ckpt", every=2)
    assert tables(tmp_path / "parts") == tables(tmp_path / "whole")


def test_completions_are_a_wandb_table(tmp_path, monkeypatch):
    """The offline record of W&B names a table with a column for each reward function and a row for each response."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tmp_path, 1, logger=WandbLog())
    found = [row for file in wandb_records.files(tmp_path) for row in wandb_records.rows(wandb_records.records(file))]
    (table,) = [row for row in found if "completions/path" in row]
    assert table["completions/_type"] == "table-file" and table["completions/nrows"] == 4
    (file,) = tmp_path.glob("wandb/offline-run-*/files/" + table["completions/path"])
    content = json.loads(file.read_text())
    assert content["columns"][4:7] == ["reward", "reward/exact", "reward/length"]
    assert [row[3] for row in content["data"]] == ["0.0.0", "0.0.1", "0.1.0", "0.1.1"]


def test_completions_refuse_wrong_modules_and_counts(tmp_path):
    """A count below 1, and a module that does not sample, are refused in one line."""
    with pytest.raises(UserError, match=r"Completions.every: 0 must be at least 1"):
        Completions(every=0)
    with pytest.raises(UserError, match="needs a module that samples, not LightningModule"):
        Completions().on_train_start(Trainer(logger=False, default_root_dir=tmp_path), LightningModule())
