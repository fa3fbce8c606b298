"""Callbacks that write the checkpoints and the other files of a run folder."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loops.fit_loop import _FitLoop

from trainkit.errors import UserError
from trainkit.files import put_in_place, remove, write_text
from trainkit.modules.base import ends_now
from trainkit.modules.csv_logger import CSVLog
from trainkit.modules.ranks import failing_together
from trainkit.modules.run_log import RunLog
from trainkit.modules.wandb_logger import WandbLog


def is_dry(trainer: Trainer) -> bool:
    """Whether this is a fast_dev_run, which leaves nothing on disk."""
    return bool(trainer.fast_dev_run)  # pyright: ignore[reportAttributeAccessIssue]


class Checkpoints(Checkpoint):
    """Writes `checkpoints/last.ckpt` and `checkpoints/best.ckpt` in the run folder.

    `last` is written at the end of an optimiser step and outside validation, so that resuming from it is exact. `best` is
    written when a validation improves on the best one so far. Each is first written to a temporary file, which then replaces
    the old checkpoint, so a kill leaves the old checkpoint or the new one (see `put_back`). A metric that is NaN or infinite is
    never the best one.

    Args:
        monitor: Logged metric that selects `best`: val/loss for LanguageModule, val/alpha or val/tau for DraftModule.
        mode: Whether a lower (`min`) or a higher (`max`) value is better.
        every_n_steps: Optimiser steps between writes of `last`; it is also written when training ends.
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min", every_n_steps: int = 500) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise UserError(f"checkpoint.mode is {mode!r}; it must be min or max")
        self.monitor, self.mode, self.every_n_steps = monitor, mode, every_n_steps
        self.best: float | None = None
        self.best_step: int | None = None
        self.validation_due = False
        """Whether the validation of the current step is not finished; saved, so that a resumed run validates first."""
        self.started = False
        self._saved_step = 0  # of the newest `last.ckpt`

    def folder(self, trainer: Trainer) -> Path:
        """Folder of this run's checkpoints, the same on all ranks."""
        return Path(trainer.strategy.broadcast(trainer.default_root_dir)) / "checkpoints"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.fit_loop.__class__ = _FinishingLoop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step, self.started = trainer.global_step, True
        folder = self.folder(trainer)
        with failing_together(trainer):
            if trainer.is_global_zero and not is_dry(trainer):
                # Remove what killed runs left; a strategy would mix its shards with those of a killed save.
                for path in [*folder.glob("*.partial"), *folder.glob("*.scratch")]:
                    remove(path)
                for path in folder.glob("*.old"):
                    put_back(path.with_suffix(".ckpt"))
                    remove(path)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last` every `every_n_steps` steps and before each validation."""
        step = trainer.global_step
        if ends_now(trainer):
            trainer.should_stop = True  # makes Lightning validate now, so that a run ends with its final metrics
        loop = trainer.fit_loop
        self.validation_due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # pyright: ignore[reportArgumentType]
        if step % self.every_n_steps == 0 or self.validation_due:
            self.save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "last.ckpt")  # again if this step is saved already, now with the metrics of the last validation

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit" or is_dry(trainer):
            return
        self.validation_due = False
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"checkpoint.monitor: {self.monitor!r} is not logged in validation; choose from {names}")
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if better and math.isfinite(value):
            self.best, self.best_step = value, trainer.global_step
            self._save(trainer, "best.ckpt")

    def state_dict(self) -> dict[str, Any]:
        values = {"monitor": self.monitor, "best": self.best, "best_step": self.best_step}
        return values | {"validation_due": self.validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation_due = state_dict.get("validation_due", False)
        if state_dict["monitor"] == self.monitor and math.isfinite(state_dict["best"] or 0.0):
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def save_last(self, trainer: Trainer) -> None:
        """Writes `last.ckpt` unless the current step is already saved."""
        if trainer.global_step != self._saved_step:
            self._save(trainer, "last.ckpt")

    def _save(self, trainer: Trainer, name: str) -> None:
        if is_dry(trainer):
            return
        if name == "last.ckpt":
            self._saved_step = trainer.global_step
        path = self.folder(trainer) / name
        partial, scratch, before = path.with_suffix(".partial"), path.with_suffix(".scratch"), tempfile.tempdir
        # Not by `trainer.save_checkpoint`: if rank 0 cannot write, the other ranks would wait in its barrier.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        try:
            with failing_together(trainer), _explained(path, partial):
                # Lightning first writes a temporary file. In /tmp, the default, space may be short and a kill would leave it.
                scratch.mkdir(parents=True, exist_ok=True)
                tempfile.tempdir = str(scratch)
                trainer.strategy.save_checkpoint(checkpoint, partial)  # a file, or a folder under sharded strategies
            with failing_together(trainer), _explained(path, partial):
                if trainer.is_global_zero:  # all ranks have written their shards
                    put_in_place(partial, path)
        finally:
            tempfile.tempdir = before
            with contextlib.suppress(OSError):  # another rank removed it first
                scratch.rmdir()


@contextlib.contextmanager
def _explained(path: Path, partial: Path) -> Iterator[None]:
    """Reports that the checkpoint `path` cannot be written, and removes its incomplete file `partial`."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            if partial.is_file():
                partial.unlink()
        reason = error.strerror or " ".join(str(error).split())
        last = path.with_name("last.ckpt")
        remedy = how_to_resume(last) if last.exists() else "start again"
        raise UserError(f"{path}: cannot be written ({reason}); free space, then {remedy}") from error


def how_to_resume(last: Path) -> str:
    """The command-line arguments that continue a run, by its checkpoint `last.ckpt`."""
    return f"continue with --ckpt_path {last} (launch.sh: --resume {last.parents[1]})"


def put_back(checkpoint: Path) -> None:
    """Restores a checkpoint after a kill between the two renames of `put_in_place`; several processes may call it at once."""
    aside = checkpoint.with_suffix(".old")
    if aside.exists() and not checkpoint.exists():
        with contextlib.suppress(FileNotFoundError):
            aside.rename(checkpoint)


class _FinishingLoop(_FitLoop):
    """Lightning's loop, which also runs if a resumed run has only its last validation left to do."""

    @property
    def skip(self) -> bool:
        checkpoints = self.trainer.checkpoint_callback
        return super().skip and not (isinstance(checkpoints, Checkpoints) and checkpoints.validation_due)


class RunFolder(Callback):
    """Writes config.yaml and log.txt into the run folder and starts the loggers there; a resumed run continues its folder.

    Args:
        config: The resolved configuration as YAML text.
        log: Messages of the libraries.
    """

    def __init__(self, config: str, log: RunLog) -> None:
        self.config, self.run_log = config, log  # not `log`, a name that Lightning sets on callbacks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = trainer.checkpoint_callback
        due = isinstance(checkpoints, Checkpoints) and checkpoints.validation_due
        with failing_together(trainer):
            self._begin(trainer)
            if trainer.is_global_zero and not is_dry(trainer):
                write_text(Path(trainer.default_root_dir) / "config.yaml", self.config)
                # Drop rows that will be logged again, even without a checkpoint: the first run may have been killed before one.
                for logger in trainer.loggers:
                    if isinstance(logger, CSVLog):
                        logger.rewind(trainer.global_step, validated=not due)
        if trainer.ckpt_path and due:
            # Run the validation that was due when the checkpoint was written; Lightning skips it on resume.
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.restarting, trainer.validating = False, True
            loop.run()
            trainer.training = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            with failing_together(trainer):
                self._begin(trainer)

    on_test_start = on_validation_start

    def _begin(self, trainer: Trainer) -> None:
        """Creates the run folder. Not called during set-up, so that a run that cannot start leaves no folder."""
        if trainer.is_global_zero and not is_dry(trainer):
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.run_log.write_to(folder / "log.txt")
            for logger in trainer.loggers:
                if isinstance(logger, (CSVLog, WandbLog)):
                    logger.begin(folder, self.config)
