"""Progress of a run: one bar of at most 100 columns on a terminal; elsewhere one line per log interval."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

COLUMNS = 100
METRICS = ("loss", "reward", "alpha", "perplexity", "tau")
"""Metrics to show, if the module logs them."""


class Progress(ProgressBar):
    """Shows optimiser step, loss, alpha, tokens per second and remaining time on stderr, and one line per validation on stdout.

    `step 120/400 |█████▌            | loss 1.309  alpha 0.661  4,300 tokens/s  01:12 left`
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown = True
        self._bar: tqdm | None = None
        self._text = ""
        self._drawn = self._started = time.monotonic()
        self._first_step, self._total = 0, None

    def disable(self) -> None:  # called by Lightning on all ranks except 0
        self._shown = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._total = None if math.isinf(total) else int(total)
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._open("step", self._total, trainer.global_step)

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows an optimiser step with the metrics of the last log interval."""
        step, values = trainer.global_step, trainer.progress_bar_metrics
        self._text = _metrics(values, "train/")
        if "speed/tokens_per_second" in values:
            self._text += f"  {values['speed/tokens_per_second']:,.0f} tokens/s"
        interval: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if self._bar is not None:
            self._draw(step, self._text)
        elif self._shown and interval and (step % interval == 0 or step == self._total):
            total, left = "", ""
            if self._total is not None:
                seconds = (time.monotonic() - self._started) / (step - self._first_step) * (self._total - step)
                total, left = f"/{self._total}", f"  {tqdm.format_interval(seconds)} left"
            print(f"step {step}{total}  {self._text}{left}", file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._open("batch", _validation_batches(trainer), 0)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit":
            self._draw(trainer.global_step, f"validation {batch_idx + 1}/{_validation_batches(trainer)}")
        else:
            self._draw(batch_idx + 1, "")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self.on_train_end()
        elif self._shown and not trainer.sanity_checking:
            self._draw(trainer.global_step, self._text, force=True)
            if not trainer.should_stop:  # the summary shows the metrics of the last validation
                with tqdm.external_write_mode(sys.stdout):
                    print(f"step {trainer.global_step}: validation {_metrics(trainer.callback_metrics, 'val/')}", flush=True)

    on_test_start, on_test_batch_end, on_test_end = on_validation_start, on_validation_batch_end, on_validation_end

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_exception = on_train_end

    def _open(self, unit: str, total: int | None, initial: int) -> None:
        if self._shown and sys.stderr.isatty():
            layout = f"{unit} {{n_fmt}}" + ("/{total_fmt} |{bar}| {desc}  {remaining} left" if total else "  {desc}")
            self._bar = tqdm(total=total, initial=initial, bar_format=layout, ncols=_columns(), file=sys.stderr)

    def _draw(self, n: int, text: str, force: bool = False) -> None:
        """Draws the bar at position `n`, at most ten times a second unless forced."""
        if self._bar is not None and (force or time.monotonic() - self._drawn > 0.1 or n == self._bar.total):
            self._bar.n, self._bar.ncols, self._drawn = n, _columns(), time.monotonic()
            self._bar.set_description_str(text)


def _validation_batches(trainer: Trainer) -> int:
    return sum(int(batches) for batches in (trainer.num_test_batches if trainer.testing else trainer.num_val_batches))


def _metrics(values: Any, prefix: str) -> str:
    return "  ".join(f"{name} {float(values[prefix + name]):.4g}" for name in METRICS if prefix + name in values)


def _columns() -> int:
    return min(COLUMNS, shutil.get_terminal_size().columns)
