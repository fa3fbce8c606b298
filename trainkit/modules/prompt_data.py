"""Prompts for `PolicyModule`. It generates the responses during training, so the loader yields only step numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from trainkit.data.loader import check_settings
from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.errors import UserError
from trainkit.modules.training_data import TrainingData, global_seed
from trainkit.rl.tasks import read_tasks
from trainkit.rl.types import Task

if TYPE_CHECKING:
    from trainkit.modules.policy import PolicyModule


class PromptData(TrainingData):
    """Prompts with the columns that reward functions read.

    Args:
        train: Prompts to train on: a file, a folder, the name of a data set on the hub, or reasoning_gym:NAME?OPTION=VALUE.
        validation: Prompts to evaluate on, given in the same way; without them nothing is evaluated.
        batch_size: Validation prompts that each process answers at the same time.
        limit: Number of rows to read from `train`, from the first one.
        limit_validation: Number of rows to read from `validation`, from the first one.
        on_long_prompt: For a prompt that leaves no room for a response in the target: stop (error), or leave it out and count
            it (skip).
    """

    module: PolicyModule
    tasks: list[Task]
    """Prompts to train on; `setup` sets them."""
    validation_tasks: list[Task]
    """Prompts to evaluate on; `setup` sets them."""

    def __init__(
        self,
        train: str,
        validation: str | None = None,
        batch_size: int = 32,
        limit: int | None = None,
        limit_validation: int | None = None,
        on_long_prompt: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__(batch_size)
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; it must be at least 1")
        self.train, self.validation = train, validation
        self.limit, self.limit_validation, self.on_long_prompt = limit, limit_validation, on_long_prompt

    def setup(self, stage: str) -> None:
        if self.fingerprint is not None:
            return
        folder = self.module.tokenizer_folder
        assert folder is not None
        self.tokenizer_folder = folder
        encoder = Encoder(load_tokenizer(folder), folder)
        self.tasks = read_tasks(self.train, encoder, self.limit)
        self.validation_tasks = [] if self.validation is None else read_tasks(self.validation, encoder, self.limit_validation)
        content = [(task.index, task.tokens, dict(task.columns)) for task in (*self.tasks, *self.validation_tasks)]
        self.fingerprint = hashlib.sha256(repr((len(self.tasks), content)).encode()).hexdigest()

    def fit_prompts(self, positions: int, new_tokens: int) -> None:
        """Refuses, or leaves out, prompts after which `new_tokens` tokens do not fit into the target's `positions`.

        Raises:
            UserError: a prompt is too long, or all are.
        """
        for name, tasks in (("train", self.tasks), ("validation", self.validation_tasks)):
            long = [task for task in tasks if len(task.tokens) + new_tokens > positions]
            remedy = f"lower model.max_new_tokens ({new_tokens}), or leave such prompts out with data.on_long_prompt: skip"
            if long and (self.on_long_prompt == "error" or len(long) == len(tasks)):
                raise UserError(
                    f"data.{name}: prompt {long[0].index} has {len(long[0].tokens)} tokens and a response does not fit the "
                    f"target's {positions} positions; {remedy}"
                )
            if long:
                print(f"prompts: {len(long)} of {len(tasks)} of data.{name} left out, too long for the target")
                left_out = {task.index for task in long}
                tasks[:] = [task for task in tasks if task.index not in left_out]

    def train_dataloader(self) -> PlanLoader:
        assert self.trainer is not None
        return PlanLoader(self.module.steps_per_epoch(len(self.tasks)), self.trainer.accumulate_grad_batches, self._settings())

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        if not self.validation_tasks:
            return []
        return TaskLoader(len(self.validation_tasks), self.batch_size, self.trainer.global_rank, self.trainer.world_size)

    test_dataloader = val_dataloader

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must share; plain values."""
        assert self.trainer is not None
        settings = {"data_fingerprint": self.fingerprint, "seed": global_seed(), "world_size": self.trainer.world_size}
        return settings | self.module.generation_settings()


class PlanLoader:
    """Yields `{"step": optimiser step, "micro": micro-batch in it}` for each micro-batch, in an endless sequence of epochs.

    It has a length and a state for the reasons in `data/loader.py`; the state is the same on all ranks.

    Args:
        steps: Optimiser steps in an epoch.
        accumulate: Micro-batches of an optimiser step.
        settings: Values that a resumed run must share.
    """

    def __init__(self, steps: int, accumulate: int, settings: dict[str, Any]) -> None:
        self._steps, self._accumulate, self._settings = steps, accumulate, settings | {"accumulate": accumulate}
        self._returned = 0

    def __len__(self) -> int:
        return self._steps * self._accumulate

    def __iter__(self) -> Iterator[dict[str, int]]:
        start = self._returned - self._returned % len(self)
        while self._returned < start + len(self):
            step, micro = divmod(self._returned, self._accumulate)
            self._returned += 1
            yield {"step": step, "micro": micro}

    def state_dict(self) -> dict[str, Any]:
        """Number of micro-batches that were returned, and the settings."""
        return {"returned": self._returned, "setting": self._settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
            UserError: a setting differs.
        """
        check_settings(state["setting"], self._settings)
        self._returned = state["returned"]


class TaskLoader:
    """Yields `{"tasks": numbers of validation prompts}` for one rank; all ranks yield equally many batches, some empty."""

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        self._mine: Sequence[int] = range(rank, count, world_size)
        self._batch_size, self._length = batch_size, -(-count // (batch_size * world_size))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        for batch in range(self._length):
            yield {"tasks": list(self._mine[batch * self._batch_size : (batch + 1) * self._batch_size])}
