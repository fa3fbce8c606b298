"""Ctrl-C and SIGTERM during training: all ranks end the run together at the end of a step, with a checkpoint.

Lightning's own handlers end with exit code 0 on SIGTERM, broadcast from within a signal handler, and on Ctrl-C stop in the
middle of a step, from where no run resumes exactly.
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
    """A signal ended training, and the state is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum  # as shells count: 130 for Ctrl-C, 143 for SIGTERM


class Signals(Callback):
    """Handles SIGINT and SIGTERM while training: raises `Interrupted` when the state is saved. A second Ctrl-C aborts at once.

    After a signal, the current optimiser step is finished and `last.ckpt` written. Within a validation the run ends at once,
    because `Checkpoints` saved the state before it.

    Args:
        checkpoints: Callback that writes `last.ckpt`.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: until here, Lightning installs its own handlers.
        if trainer.received_sigterm:
            raise Interrupted(signal.SIGTERM)
        self._handlers = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGINT, signal.SIGTERM)}

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run after a signal."""
        if signum := self._received_by_any(trainer, pl_module):
            self.checkpoints.save_last(trainer)
            raise Interrupted(signum)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and (signum := self._received_by_any(trainer, pl_module)):
            raise Interrupted(signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received:
            signal.default_int_handler(signum, frame)
        self.received = self.received or signum

    def _received_by_any(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """Number of a signal that any rank received, the same on all ranks; 0 for none."""
        if trainer.world_size == 1:
            return self.received
        received = torch.tensor(float(self.received), device=pl_module.device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))  # pyright: ignore[reportArgumentType]

    def _restore(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}
