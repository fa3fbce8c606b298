"""Ctrl-C and SIGTERM during training: a flag, agreed on by all ranks, that ends the run at a step's end with a checkpoint.

Lightning's own handling ends with exit code 0 on SIGTERM, broadcasts within a signal handler, and on Ctrl-C stops in mid-step,
from where nothing resumes exactly.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from trainkit.modules.callbacks import Checkpoints


class Interrupted(Exception):
    """Training ended by a signal, its state saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


class Signals(Callback):
    """Takes SIGINT and SIGTERM as flags while training; a second Ctrl-C aborts at once.

    Raises `Interrupted` after the optimiser step in which one came, `last.ckpt` written; within a validation at once, since
    `Checkpoints` has saved the state before it.

    Args:
        checkpoints: What saves.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: Lightning puts its own handlers in place up to here.
        if trainer.received_sigterm:
            raise Interrupted(signal.SIGTERM)
        self._before = {signum: signal.signal(signum, self._take) for signum in (signal.SIGINT, signal.SIGTERM)}

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called by the module once a step is done and logged."""
        if signum := self._agreed(trainer, pl_module):
            self.checkpoints.save_last(trainer)
            raise Interrupted(signum)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and (signum := self._agreed(trainer, pl_module)):
            raise Interrupted(signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received:
            signal.default_int_handler(signum, frame)
        self.received = self.received or signum

    def _agreed(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The signal that any rank has received, on all ranks; 0 for none."""
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(float(self.received), device=pl_module.device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))  # pyright: ignore[reportArgumentType]

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
