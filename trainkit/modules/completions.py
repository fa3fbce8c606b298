"""Tables of sampled responses with their rewards, as files of the run folder and in Weights & Biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainkit.errors import UserError
from trainkit.files import finite, remove, write_text
from trainkit.modules.callbacks import is_dry
from trainkit.modules.ranks import failing_together
from trainkit.modules.wandb_logger import WandbLog
from trainkit.rl.evaluate import rows
from trainkit.rl.types import Group


class Completions(Callback):
    """Writes the responses of every n-th generation to `completions/STEP.jsonl` in the run folder, and to W&B if it is used.

    STEP is the number of optimiser steps before the generation. A row holds prompt, completion, reward, rewards by function,
    advantage, length in tokens and finish reason. A resumed run first removes the tables that it will write again.

    Args:
        every: Generations between two tables; the first generation has one.
        prompts: Number of prompts in a table, the first ones of rank 0; null for all of rank 0.
    """

    def __init__(self, every: int = 10, prompts: int | None = 8) -> None:
        for name, value in (("every", every), ("prompts", prompts)):
            if value is not None and value < 1:
                raise UserError(f"Completions.{name}: {value} must be at least 1")
        self.every, self.prompts = every, prompts
        self._generations, self._step = 0, 0
        self._groups: list[Group] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._groups = getattr(pl_module, "groups", None)  # in a resumed run those of the checkpoint, which are counted
        if self._groups is None:
            raise UserError(f"trainer.callbacks: Completions needs a module that samples, not {type(pl_module).__name__}")
        with failing_together(trainer):
            if trainer.is_global_zero and not is_dry(trainer):
                for path in _folder(trainer).glob("*.jsonl"):
                    if path.stem.isdigit() and int(path.stem) >= trainer.global_step:
                        remove(path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning calls this before the module's own hook, which saves checkpoints, so the count is saved with them.
        groups: list[Group] = pl_module.groups  # pyright: ignore[reportAssignmentType]
        if groups is self._groups:
            return
        self._groups, number = groups, self._generations
        self._generations += 1
        if number % self.every == 0:
            with failing_together(trainer):
                if trainer.is_global_zero and not is_dry(trainer):
                    self._write(trainer, groups[: self.prompts])

    def state_dict(self) -> dict[str, Any]:
        return {"generations": self._generations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._generations = state_dict["generations"]

    def _write(self, trainer: Trainer, groups: list[Group]) -> None:
        table = rows(groups, step=self._step)
        text = "".join(json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in table)
        write_text(_folder(trainer) / f"{self._step}.jsonl", text)
        columns = list(table[0])
        cells = [[_cell(row.get(column)) for column in columns] for row in table]
        for logger in trainer.loggers:
            if isinstance(logger, WandbLog) and logger.experiment is not None:
                logger.log_table("completions", columns=columns, data=cells, step=self._step)


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "completions"


def _cell(value: Any) -> Any:
    """A value that a W&B table can hold in one column: a chat becomes JSON text."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
