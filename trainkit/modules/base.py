"""What every training module shares: loss scaling over the optimiser step, keyed randomness, optimiser, metrics, speed."""

from __future__ import annotations

import hashlib
import math
import os
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.losses.output import LossOutput
from trainkit.modules.meter import Meter, means

CHECKPOINT_KEY = "trainkit"
Batch = dict[str, Any]
"""From `PackedLoader`: tokens_BT, positions_BT, document_BT, mask_BT, window_count and, when asked for, the whole window."""


def key_of(*parts: int) -> int:
    """A 63-bit key from integers, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def global_seed() -> int:
    """The seed that seed_everything set for this run."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def differences(name: str, then: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two plain values differ, innermost keys first to last: (dotted name, one, other)."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            yield from differences(f"{name}.{key}", then.get(key), now.get(key))
    elif then != now:
        yield name, then, now


def _log_interval(trainer: Trainer) -> int:
    return trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]


@runtime_checkable
class AfterStep(Protocol):
    """A callback with something to do after each optimiser step, once the step is logged."""

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None: ...


class TrainingModule(LightningModule):
    """One optimiser, one loss that comes as sums, and the numbers worth watching.

    The loss of an optimiser step is the sum over its labels, on all ranks and micro-batches, divided by their number: each
    micro-batch gives sum / window_count * ranks * micro-batches, which Lightning's and DDP's averaging turn into exactly that.

    Args:
        optimizer: Optimiser class with its arguments.
        lr_scheduler: Scheduler class with its arguments, stepped each optimiser step; by default linear warm-up, then cosine.
        warmup_steps: Of the default schedule.
        final_lr: Where the default schedule ends, as a share of the peak learning rate.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 50,
        final_lr: float = 0.1,
    ) -> None:
        super().__init__()
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler
        self.warmup_steps, self.final_lr = warmup_steps, final_lr
        self._training, self._validation = Meter(), Meter()
        self._given_groups: list[dict[str, Any]] = []
        self._done_step = 0
        self._gradient_norm: Tensor | None = None
        self.recipe: str | None = None
        self._left = self._entered = time.perf_counter()
        self._busy = self._waited = 0.0

    # What a subclass says of itself

    @property
    @abstractmethod
    def network(self) -> nn.Module | None:
        """What is trained; None before it is set up."""

    @abstractmethod
    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        """The loss as sums of micro-batch number `micro` of an optimiser step, or of a validation batch (None)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What, beside the weights, rebuilds `network`: plain values, kept in checkpoints under `CHECKPOINT_KEY`."""

    @property
    @abstractmethod
    def tokenizer_folder(self) -> str | None:
        """Folder of the tokenizer its data must be read with, when it knows."""

    def data_tokenizer(self) -> Path:
        """Folder of the tokenizer that the data is read with."""
        data: Any = getattr(self.trainer, "datamodule", None)
        return Path(getattr(data, "tokenizer_folder", None) or self.tokenizer_folder or ".").resolve()

    @property
    def needs_window(self) -> bool:
        """Whether the first micro-batch of a step must bring all of the step's, for a loss with statistics over them."""
        return False

    def check_fits(self, vocab_size: int, max_positions: int) -> None:
        """Holds the data against the model's sizes.

        Raises:
            UserError: rows longer than its positions, or a token id outside its vocabulary.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        length, largest = getattr(data, "length", 0), getattr(data, "largest_id", 0)
        if length > max_positions:
            raise UserError(f"data.length is {length}, the model has {max_positions} positions; lower data.length")
        if largest >= vocab_size:
            raise UserError(
                f"data.tokenizer gives token id {largest}, the model's vocabulary has {vocab_size}; use its own tokenizer"
            )

    # Training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._entered = time.perf_counter()
        self._waited += self._entered - self._left

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        micro = batch_idx % self.trainer.accumulate_grad_batches
        self.key_randomness(micro)
        output = self.loss(batch, micro)
        self._training.add_output(output)
        self._training.add("tokens", (batch["document_BT"] >= 0).sum())
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return output.sum / torch.as_tensor(batch["window_count"], device=output.sum.device).clamp(min=1) * scale

    def key_randomness(self, micro: int) -> None:
        """Seeds torch for this micro-batch from (seed, step, micro-batch, rank), so that a resumed run draws the same."""
        torch.manual_seed(key_of(global_seed(), self.trainer.global_step, micro, self.trainer.global_rank))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        every = _log_interval(self.trainer)
        step = self.trainer.global_step + 1
        if every and (step % every == 0 or step == self.trainer.max_steps):
            grads = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
            if grads:  # sharded strategies keep theirs elsewhere
                self._gradient_norm = torch.nn.utils.get_total_norm(grads)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        step, every = self.trainer.global_step, _log_interval(self.trainer)
        if step != self._done_step:
            self._done_step = step
            last = self.trainer.should_stop or step == self.trainer.max_steps
            if every and (step % every == 0 or last):
                self._log_training()
            # Here and not in the callbacks' own hook, which runs before this one: what they save has then been logged.
            for callback in self.trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
                if isinstance(callback, AfterStep):
                    callback.after_step(self.trainer, self)
        self._left = time.perf_counter()
        self._busy += self._left - self._entered

    def _log_training(self) -> None:
        sums = self._training.take(self._reduce, self.device)
        spent = self._busy + self._waited + time.perf_counter() - self._entered
        values = {f"train/{name}": value for name, value in means(sums, apart=("tokens",)).items()}
        values["optim/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        if self._gradient_norm is not None:
            values["optim/grad_norm"] = float(self._gradient_norm)
            self._gradient_norm = None
        values["speed/tokens_per_second"] = sums["tokens"] / spent
        values["speed/data_wait"] = self._waited / spent
        for name in ("train/loss", "speed/tokens_per_second"):
            self.log(name, values[name], prog_bar=True, logger=False)
        for logger in self.trainer.loggers:  # at once: what Lightning is given it writes later, and when stopping twice
            logger.log_metrics(values, self.trainer.global_step)
        self._busy = self._waited = 0.0
        self._entered = time.perf_counter()

    def on_train_start(self) -> None:
        self._done_step = self.trainer.global_step
        self._prefer_given_values()
        self._left = time.perf_counter()

    # Validation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation.add_output(self.loss(batch, None))

    def on_validation_epoch_end(self) -> None:
        sums = self._validation.take(self._reduce, self.device)
        if not sums.get("count"):
            raise UserError("data.validation: no counted tokens in it; give rows with assistant text")
        for name, value in self.validation_values(sums).items():
            self.log(
                f"val/{name}", value, prog_bar=name == "loss", sync_dist=True
            )  # equal on all ranks: their mean is the value
        self.log("step", float(self.trainer.global_step), sync_dist=True)

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        """What is logged under `val/` from the sums over ranks."""
        return means(sums)

    def on_validation_end(self) -> None:
        self._left = time.perf_counter()  # not counted as waiting for data

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def _gather(self, values: Tensor) -> Tensor:
        """[ranks, ...] of the same values on every rank."""
        ranks = values.new_zeros(self.trainer.world_size, *values.shape)
        ranks[self.trainer.global_rank] = values
        return self._reduce(ranks)

    def _reduce(self, values: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(values, reduce_op="sum")  # pyright: ignore[reportReturnType]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Lightning's save_hyperparameters would let --ckpt_path override YAML and flags without a word.
        metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")}
        data = getattr(getattr(self.trainer, "datamodule", None), "fingerprint", None)
        info = {
            "recipe": self.recipe,
            "seed": global_seed(),
            "metrics": metrics,
            "data": data,
            "step": self.trainer.global_step,
            "tokenizer": str(self.data_tokenizer()),
            "module": type(self).__name__,
        }
        checkpoint[CHECKPOINT_KEY] = {"format": 1, "info": info, **self.describe()}
        checkpoint[f"{CHECKPOINT_KEY}_sums"] = self._training.peek(self._gather)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint.get(f"{CHECKPOINT_KEY}_sums", [])
        if len(ranks) == self.trainer.world_size:  # so that the first line logged is that of an uninterrupted run
            self._training.put_back(ranks[self.trainer.global_rank])
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None:
            raise UserError(f"{self.trainer.ckpt_path}: not a checkpoint of trainkit; give a last.ckpt or best.ckpt of a run")
        mend = "resume with the recipe that it was made with"
        described = self.describe()
        if described.keys() != saved.keys() - {"format", "info"}:
            was = saved["info"].get("module") or "another module"
            raise UserError(f"{self.trainer.ckpt_path}: made by {was}, this run's is {type(self).__name__}; {mend}")
        for name, value in described.items():
            for key, then, now in differences(name, saved[name], value):
                raise UserError(f"{self.trainer.ckpt_path}: its {key} is {then}, this run's is {now}; {mend}")

    # Optimiser

    def configure_optimizers(self) -> Any:
        """Matrices with weight decay, vectors (norms, biases) without; the schedule is per optimiser step."""
        groups, shares = [], []
        for network, share in self.trained():
            given = [parameter for parameter in network.parameters() if parameter.requires_grad]
            matrices, vectors = [p for p in given if p.dim() > 1], [p for p in given if p.dim() < 2]
            for group in ({"params": matrices}, {"params": vectors, "weight_decay": 0.0}):
                if group["params"]:
                    groups.append(group)
                    shares.append(share)
        optimizer = self._make_optimizer(groups)
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] *= share
        total = int(self.trainer.estimated_stepping_batches) if self._make_scheduler is None else 0
        if self._make_scheduler is not None:
            scheduler = self._make_scheduler(optimizer)
        else:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule(step, total))
        self._given_groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def trained(self) -> list[tuple[nn.Module, float]]:
        """What is trained, each with its learning rate as a share of the optimiser's."""
        assert self.network is not None
        return [(self.network, 1.0)]

    def schedule(self, step: int, total: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to `final_lr`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def _prefer_given_values(self) -> None:
        # A checkpoint restores the optimiser's hyper-parameters too; what recipe and flags say now goes before them.
        optimizer = self.trainer.optimizers[0]
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for index, (group, given) in enumerate(zip(optimizer.param_groups, self._given_groups, strict=True)):
            old, new = group.get("initial_lr"), given.get("initial_lr")
            group.update(given)
            if old and new and old != new:
                group["lr"] *= new / old
                for scheduler in schedulers:
                    scheduler.base_lrs[index] = new
