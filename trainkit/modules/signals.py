"""Ctrl-C and SIGTERM during training: all ranks stop together at the end of a step, after writing a checkpoint.

Lightning's own handlers are not used. On SIGTERM they broadcast from within a signal handler and end with exit code 0. On
Ctrl-C they stop in the middle of a step, from which a run cannot resume exactly.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from trainkit.modules.callbacks import Checkpoints, how_to_resume
from trainkit.modules.ranks import largest


class Interrupted(Exception):
    """A signal stopped training after the state was saved. The text names the signal and how to continue."""

    def __init__(self, signum: int, last: Path) -> None:
        state = f"the state is saved, {how_to_resume(last)}" if last.exists() else "before the first step; start again"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {state}")
        self.exit_code = 128 + signum  # as shells count: 130 for Ctrl-C, 143 for SIGTERM


class Signals(Callback):
    """Handles SIGINT and SIGTERM during training: raises `Interrupted` once the state is saved. A second Ctrl-C aborts at once.

    After a signal, training finishes the current optimiser step and writes `last.ckpt`. A signal during validation ends the run
    at once, because `Checkpoints` saved the state before the validation.

    Args:
        checkpoints: Callback that writes `last.ckpt`.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has installed its own handlers before this hook.
        if largest(trainer, trainer.received_sigterm):
            self._stop(trainer, signal.SIGTERM)
        self._handlers = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGINT, signal.SIGTERM)}

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run if any rank received a signal."""
        if signum := largest(trainer, self.received):
            self.checkpoints.save_last(trainer)
            self._stop(trainer, signum)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and (signum := largest(trainer, self.received)):
            self._stop(trainer, signum)

    def _stop(self, trainer: Trainer, signum: int) -> NoReturn:
        raise Interrupted(signum, self.checkpoints.folder(trainer) / "last.ckpt")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    on_exception = on_train_end

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.received:
            signal.default_int_handler(signum, frame)
        self.received = self.received or signum
