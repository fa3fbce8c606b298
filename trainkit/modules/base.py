"""Base class of all training modules: loss scaling, keyed randomness, optimiser, schedule, metrics, checkpoint contents."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from trainkit.errors import UserError
from trainkit.losses.output import LossOutput
from trainkit.modules.meter import Meter, means
from trainkit.modules.ranks import failing_together, stop_all
from trainkit.modules.training_data import TrainingData, global_seed

CHECKPOINT_KEY = "trainkit"
Batch = dict[str, Any]
"""From `PackedLoader`: tokens_BT, positions_BT, document_BT, mask_BT, window_count and, if `needs_window`, window."""


def differences(name: str, saved: Any, current: Any) -> Iterator[tuple[str, Any, Any]]:
    """All differences between two nested dicts of plain values, as (dotted key, saved value, current value)."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for key in [*saved, *(key for key in current if key not in saved)]:
            yield from differences(f"{name}.{key}", saved.get(key), current.get(key))
    elif saved != current:
        yield name, saved, current


def ends_now(trainer: Trainer) -> bool:
    """Whether the last trained batch is the last one of the run, by `max_steps` or `max_epochs`."""
    is_last_batch: bool = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return trainer.global_step == trainer.max_steps or (is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs)


class TrainingModule(LightningModule):
    """Trains a network with one optimiser and a loss that is returned as a sum and a count.

    The loss of an optimiser step is the sum over its labels, on all ranks and micro-batches, divided by the number of labels.
    Each micro-batch returns sum / window_count * ranks * micro-batches; the averages of Lightning and DDP turn that into this
    loss exactly. After each step the module calls `after_step(trainer, module)` of every callback that has it.

    Args:
        optimizer: Optimiser class with its arguments.
        lr_scheduler: Scheduler class with its arguments, stepped each optimiser step; by default linear warm-up, then cosine.
        warmup_steps: Optimiser steps of warm-up in the default schedule.
        final_lr: Last learning rate of the default schedule, as a share of the peak learning rate.
        on_nonfinite: For an optimiser step whose loss or gradient norm is NaN or infinite: stop the run (error), or leave the
            weights and the optimiser's state unchanged, count the step in `optim/skipped_steps` and continue (skip).
    """

    data_class: ClassVar[type[TrainingData]] = TrainingData
    """Class of the data modules that this module can train on."""
    data: TrainingData
    tokenizer_folder: str | None = None
    """Folder of the tokenizer that the training data must be encoded with; None if the module has none."""
    needs_window = False
    """Whether the first micro-batch of each optimiser step must carry all of them, for statistics over the step."""

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 50,
        final_lr: float = 0.1,
        on_nonfinite: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self.warmup_steps, self.final_lr, self.on_nonfinite = warmup_steps, final_lr, on_nonfinite
        self.recipe: str | None = None
        # Sums of the current optimiser step, of all steps since the last log line, and of the validation.
        self._step, self._training, self._validation = Meter(), Meter(), Meter()
        self._configured_groups: list[dict[str, Any]] = []
        self._logged_step = 0
        self._gradient_norm: Tensor | None = None
        # Seconds in training steps, and between them (waiting for data), since the last log line.
        self._step_end = self._step_start = time.perf_counter()
        self._busy = self._waited = 0.0

    # What a subclass defines

    @abstractmethod
    def trained(self) -> list[tuple[nn.Module, float]]:
        """The networks to train, each with its learning rate as a share of the optimiser's learning rate."""

    @abstractmethod
    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        """Loss of one batch, as sums.

        Args:
            batch: Batch of the data module, on this module's device.
            micro: Index of the micro-batch within its optimiser step; None in validation.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Plain values that rebuild the networks, except their weights; saved in checkpoints under `CHECKPOINT_KEY`."""

    # Data

    def configure_callbacks(self) -> list[Callback]:
        """Connects the data module and adds no callback. Lightning calls no other hook of a module before data preparation."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, self.data_class):
            raise UserError(
                f"data.class_path: {type(self).__name__} cannot train on {type(data).__name__}; "
                f"set data.class_path: {self.data_class.__name__}"
            )
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy):
            if strategy.zero_stage_3:  # it releases the output head before the backward pass computes the logits again
                raise UserError("trainer.strategy: DeepSpeed stage 3 cannot train here; use configs/strategy/fsdp.yaml")
            if self.on_nonfinite == "skip":
                raise UserError("model.on_nonfinite: DeepSpeed runs the optimiser itself and cannot skip a step; leave it out")
        self.data = data
        data.connect(self)
        return []

    def data_tokenizer(self) -> Path:
        """Folder of the tokenizer that the data is encoded with."""
        return Path(self.data.tokenizer_folder or self.tokenizer_folder or ".").resolve()

    # Training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._step_start = time.perf_counter()
        self._waited += self._step_start - self._step_end

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        micro = batch_idx % self.trainer.accumulate_grad_batches
        self.key_randomness(micro)
        output = self.loss(batch, micro)
        self._step.add_output(output)
        self._training.add("tokens", (batch["document_BT"] >= 0).sum())
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return output.sum / torch.as_tensor(batch["window_count"], device=output.sum.device).clamp(min=1) * scale

    def key_randomness(self, micro: int) -> None:
        """Seeds torch with a digest of (seed, step, micro-batch, rank), so that a resumed run draws the same random numbers."""
        parts = (global_seed(), self.trainer.global_step, micro, self.trainer.global_rank)
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Computes the norm of the gradient, clips the gradient, and checks before the optimiser steps that both are finite."""
        by_norm = gradient_clip_algorithm in (None, "norm")
        limit = gradient_clip_val if by_norm and gradient_clip_val and gradient_clip_val > 0 else math.inf
        root = self.trainer.strategy.model
        with_grad = [parameter for parameter in self.parameters() if parameter.grad is not None]
        norm = None
        if isinstance(root, FullyShardedDataParallel):  # each rank holds a part of the gradient
            norm = root.clip_grad_norm_(limit)
        elif with_grad:  # none under DeepSpeed, which stores and clips gradients itself
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in with_grad if parameter.grad is not None])
            if limit < math.inf:
                torch.nn.utils.clip_grads_with_norm_(with_grad, limit, norm)
        if not by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self._gradient_norm = norm
        self._check_finite()

    def _check_finite(self) -> None:
        """Stops the run, or skips the optimiser step, on all ranks if the loss or gradient norm is not finite on any rank."""
        checked = {"train/loss": self._step.sums["loss"]}
        # In 16-bit precision a gradient may overflow: the scaler then skips the step and lowers its scale.
        if self._gradient_norm is not None and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            checked["optim/grad_norm"] = self._gradient_norm
        faults = self._reduce(torch.stack([(~value.isfinite()).float() for value in checked.values()])).tolist()
        wrong = " and ".join(name for name, ranks in zip(checked, faults, strict=True) if ranks)
        found = f"{wrong} {'are' if ' and ' in wrong else 'is'} NaN or infinite at step {self.trainer.global_step + 1}"
        if wrong and self.on_nonfinite == "error":
            stop_all(
                self.trainer,
                f"{found}; lower the learning rate or trainer.gradient_clip_val, or skip such steps with model.on_nonfinite: "
                "skip; the checkpoints of earlier steps are kept",
            )
        if wrong:
            for parameter in self.parameters():
                parameter.grad = None  # optimisers skip parameters without a gradient
            self._gradient_norm = None
            if self.trainer.is_global_zero:
                tqdm.write(f"{found}; the step is skipped", file=sys.stderr)
        else:
            self._training.merge(self._step)
        if self.on_nonfinite == "skip":  # the sum over ranks is logged, so only one rank counts
            self._training.add("skipped_steps", float(bool(wrong) and self.trainer.is_global_zero))
        self._step = Meter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step != self._logged_step:
            self._logged_step = step
            if self._logs_at(step, last=self.trainer.should_stop or ends_now(self.trainer)):
                self._log_training()
            # Lightning calls the callbacks' own on_train_batch_end before this hook, but the step must be logged before a
            # checkpoint is saved.
            for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if after_step := getattr(callback, "after_step", None):
                    after_step(self.trainer, self)
        self._step_end = time.perf_counter()
        self._busy += self._step_end - self._step_start

    def _logs_at(self, step: int, last: bool) -> bool:
        interval: int = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return bool(interval) and (last or step % interval == 0)

    def _log_training(self) -> None:
        sums = self._training.take(self._reduce, self.device)
        seconds = self._busy + self._waited + time.perf_counter() - self._step_start
        values = {f"train/{name}": value for name, value in self.training_means(sums).items()}
        values |= self.training_values()
        values["optim/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        if self._gradient_norm is not None:
            values["optim/grad_norm"] = float(self._gradient_norm)
            self._gradient_norm = None
        if "skipped_steps" in sums:
            values["optim/skipped_steps"] = sums["skipped_steps"]
        values["speed/tokens_per_second"] = sums["tokens"] / seconds
        values["speed/data_wait"] = self._waited / seconds
        for name in ("train/loss", "train/reward", "train/alpha", "speed/tokens_per_second"):
            if name in values:
                self.log(name, values[name], prog_bar=True, logger=False)
        # Not through `self.log`, which writes later, and twice when a run stops between two log intervals.
        self._write(values)
        self._busy = self._waited = 0.0
        self._step_start = time.perf_counter()

    def training_means(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics to log under `train/`, by name, from the sums over all ranks and the steps since the last log line."""
        return means(sums, exclude=("tokens", "skipped_steps"))

    def training_values(self) -> dict[str, float]:
        """Further metrics of a training log line, by name, equal on all ranks."""
        return {}

    def _write(self, values: dict[str, float]) -> None:
        """Writes metrics to the loggers."""
        with failing_together(self.trainer):
            for logger in self.trainer.loggers:
                logger.log_metrics(values, self.trainer.global_step)

    def on_train_start(self) -> None:
        self._logged_step = self.trainer.global_step
        self._restore_configured_values()
        narrow = {p.dtype for p in self.parameters() if p.requires_grad and torch.finfo(p.dtype).bits < 32}
        if narrow and self.trainer.is_global_zero and "DeepSpeed" not in type(self.trainer.strategy).__name__:
            lost = max(torch.finfo(dtype).eps / 2 for dtype in narrow)
            print(
                f"trainer.precision {self.trainer.precision}: the trained weights are not float32, so an update below "
                f"{lost:.2g} of a weight is lost; bf16-mixed keeps them in float32",
                file=sys.stderr,
            )
        self._step_end = time.perf_counter()

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation.add_output(self.loss(batch, None))

    def on_validation_epoch_end(self) -> None:
        values = {f"val/{name}": value for name, value in self.validation_metrics().items()}
        fits = self.trainer.state.fn == "fit"
        for name, value in values.items():  # Lightning takes the mean over ranks; the values are equal on all ranks
            self.log(name, value, prog_bar=name == "val/loss", logger=not fits, sync_dist=True)
        if not fits:  # Lightning writes them, and `Trainer.validate` returns them
            self.log("step", float(self.trainer.global_step), sync_dist=True)
        elif not self.trainer.sanity_checking:
            self._write(values)

    def validation_metrics(self) -> dict[str, float]:
        """Metrics of a finished validation, by name, equal on all ranks."""
        sums = self._validation.take(self._reduce, self.device)
        if not sums.get("count"):
            raise UserError("data.validation: no token counts in the loss; give rows with assistant text")
        return self.validation_values(sums)

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        """Metrics to log under `val/`, by name, from the sums over all ranks."""
        return means(sums)

    def on_validation_end(self) -> None:
        self._step_end = time.perf_counter()  # validation is not time spent waiting for data

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def _gather(self, values: Tensor) -> Tensor:
        """The values of all ranks, [ranks, ...], on every rank."""
        ranks = values.new_zeros(self.trainer.world_size, *values.shape)
        ranks[self.trainer.global_rank] = values
        return self._reduce(ranks)

    def _reduce(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # pyright: ignore[reportReturnType]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning's save_hyperparameters is not used: with it, --ckpt_path would silently override YAML and flags.
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")}
        info = {
            "recipe": self.recipe,
            "seed": global_seed(),
            "metrics": metrics,
            "data": self.data.fingerprint,
            "step": self.trainer.global_step,
            "tokenizer": str(self.data_tokenizer()),
            "module": type(self).__name__,
        }
        checkpoint[CHECKPOINT_KEY] = {"format": 1, "info": info, **self.describe()}
        checkpoint[f"{CHECKPOINT_KEY}_sums"] = self._training.gather(self._gather)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Restore the sums since the last log line, so that the next line equals that of an uninterrupted run.
        ranks = checkpoint.get(f"{CHECKPOINT_KEY}_sums", [])
        if len(ranks) == self.trainer.world_size:
            self._training.restore(ranks[self.trainer.global_rank])
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise UserError(f"{self.trainer.ckpt_path}: not a checkpoint of trainkit; give a last.ckpt or best.ckpt of a run")
        # Refuse a checkpoint of another network.
        remedy = "resume with the recipe that the checkpoint was trained with"
        described = self.describe()
        if described.keys() != saved.keys() - {"format", "info"}:
            writer = saved["info"].get("module") or "another module"
            raise UserError(f"{self.trainer.ckpt_path}: written by {writer}, but this run uses {type(self).__name__}; {remedy}")
        for name, value in described.items():
            for key, before, now in differences(name, saved[name], value):
                raise UserError(f"{self.trainer.ckpt_path}: {key} is {before} in the checkpoint, {now} in this run; {remedy}")

    # Optimiser

    def configure_optimizers(self) -> Any:
        """The optimiser, with weight decay for matrices but not for vectors (norms, biases), and its learning rate schedule."""
        groups, shares = [], []
        for network, share in self.trained():
            trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
            matrices, vectors = [p for p in trainable if p.dim() > 1], [p for p in trainable if p.dim() < 2]
            parts = [group for group in ({"params": matrices}, {"params": vectors, "weight_decay": 0.0}) if group["params"]]
            groups += parts
            shares += [share] * len(parts)
        optimizer = self._make_optimizer(groups)
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] *= share
        if self._make_scheduler is not None:
            scheduler = self._make_scheduler(optimizer)
        else:
            total = self.trainer.estimated_stepping_batches
            if math.isinf(total):
                raise UserError(
                    "trainer.max_steps and trainer.max_epochs are -1, but the default schedule needs a last step; "
                    "set one of them, or model.lr_scheduler"
                )
            scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, int(total)))
        self._configured_groups = [
            {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def schedule(self, step: int, total: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to `final_lr`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def _restore_configured_values(self) -> None:
        # Loading a checkpoint restores the optimiser's hyper-parameters too; replace them by those of this run.
        optimizer = self.trainer.optimizers[0]
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for index, (group, configured) in enumerate(zip(optimizer.param_groups, self._configured_groups, strict=True)):
            old, new = group.get("initial_lr"), configured.get("initial_lr")
            group.update(configured)
            if old and new and old != new:
                group["lr"] *= new / old
                for scheduler in schedulers:
                    scheduler.base_lrs[index] = new
        # The restored learning rate follows the checkpoint's schedule, which differs if the number of steps changed.
        for scheduler in schedulers:
            if isinstance(scheduler, LambdaLR):
                for group, rate, share in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
                    group["lr"] = rate * share(scheduler.last_epoch)
