"""Trains an acceptance predictor on the records of an acceptance set; the drafter is frozen, and not even loaded."""

# B records of a batch  W proposals of each  D hidden  C signals  N validation records

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.errors import UserError
from trainkit.eval.calibration import (
    UNSCALED,
    Baselines,
    Scales,
    expected_calibration_error,
    fit_scales,
    log_loss,
    logits_of,
    predicted,
    scaled,
)
from trainkit.losses.output import LossOutput
from trainkit.models.predictor import AcceptancePredictor
from trainkit.modules.acceptance_data import AcceptanceData
from trainkit.modules.base import Batch, TrainingModule, global_seed
from trainkit.modules.meter import means


class PredictorModule(TrainingModule):
    """Trains the probability that the target keeps a proposed token, given that it kept those before.

    The loss is binary cross entropy, y the label: -(y log P + w (1 - y) log(1 - P)) / mean(y + w (1 - y)), w
    `rejection_weight`, the mean over the training records; so what is divided by their number is divided by their total weight.
    Of a record it is the sum over the proposals that it has labels of: the one that a chain drafts, and those beside it.

    Of the former alone validation logs `loss` (log-loss, unweighted) and `ece` (expected calibration error) of the predictor
    as it is, `fitted_*` recalibrated (on these same records: four numbers), and the same of what it has to beat: `constant`,
    the training records' mean label; `max_q`, the draft's highest probability; `max_q_fitted`, that recalibrated on the
    training records. Every checkpoint holds the recalibration of its own weights.

    Args:
        width: Of the predictor's hidden layer.
        max_depth: Draft positions told apart.
        rejection_weight: w. 1 gives probabilities. SpecDec++ takes 6, which biases them downwards and wants a threshold chosen
            with it; the recalibration takes most of that back out.
        optimizer: Optimiser class with its arguments.
        lr_scheduler: Scheduler class with its arguments, stepped each optimiser step; by default linear warm-up, then cosine.
        warmup_steps: Of the default schedule.
        final_lr: Where the default schedule ends, as a share of the peak learning rate.
    """

    def __init__(
        self,
        width: int = 64,
        max_depth: int = 16,
        rejection_weight: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 50,
        final_lr: float = 0.1,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, final_lr)
        if not 0 < rejection_weight < float("inf"):
            raise UserError(f"model.rejection_weight is {rejection_weight}; it must be above 0")
        self.rejection_weight = rejection_weight
        self._sizes = {"width": width, "max_depth": max_depth}
        self.predictor: AcceptancePredictor | None = None
        self._mean_weight = 1.0
        self._baselines: Baselines | None = None
        self._drafter: dict[str, Any] = {}

    @property
    def network(self) -> nn.Module | None:
        return self.predictor

    @property
    def tokenizer_folder(self) -> str | None:
        return None

    def setup(self, stage: str) -> None:
        if self.predictor is not None:
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, AcceptanceData):
            raise UserError("data: a predictor is trained on an acceptance set; set data.class_path: AcceptanceData")
        train, _ = self._sets
        about, label_NW = train.manifest, train.column("label").double()
        self._baselines = Baselines.fit(train)
        self._mean_weight = float((label_NW + self.rejection_weight * (1 - label_NW)).mean())
        self._drafter = dict(about["drafter"])
        seen = {
            "verify": about["verify"],
            "temperatures": about["temperatures"],
            "depth": about["depth"],
            "set": about["id"],
            "ranks": label_NW.shape[1],
            "validation_share": data.validation_share,
            "split_seed": global_seed(),
            "records": len(train),
            "rejection_weight": self.rejection_weight,
            "baselines": self._baselines.to_dict(),
        }
        self.predictor = AcceptancePredictor(train.hidden_size, **self._sizes, seen=seen)

    @property
    def _sets(self) -> tuple[AcceptanceSet, AcceptanceSet]:
        sets = getattr(getattr(self.trainer, "datamodule", None), "sets", None)
        assert sets is not None
        return sets

    def describe(self) -> dict[str, Any]:
        assert self.predictor is not None
        return {"predictor": self.predictor.config(), "drafter": self._drafter}

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        assert self.predictor is not None
        real_B = batch["document_BT"][:, 0] >= 0
        logits_BW, label_BW = logits_of(self.predictor, batch)[real_B], batch["label_BW"][real_B]
        kept, not_kept = label_BW * F.softplus(-logits_BW), (1 - label_BW) * F.softplus(logits_BW)
        plain = (kept + not_kept)[:, 0].sum()
        if micro is None:
            return LossOutput(plain, real_B.sum().float())
        weighted = (kept + self.rejection_weight * not_kept).sum() / self._mean_weight
        return LossOutput(weighted, real_B.sum().float(), {"log_loss": plain.detach()})

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        assert self._baselines is not None
        _, held = self._sets
        logits_N, scales = self._recalibrated()
        found = {"": scaled(logits_N, held.temperature, UNSCALED), "fitted_": scaled(logits_N, held.temperature, scales)}
        found |= {f"{name}_": p_N for name, p_N in self._baselines.probabilities(held).items()}
        label_N = held.accepted
        values = {f"{name}loss": log_loss(p_N, label_N) for name, p_N in found.items() if name}
        return means(sums) | values | {f"{name}ece": expected_calibration_error(p_N, label_N) for name, p_N in found.items()}

    def _recalibrated(self) -> tuple[Tensor, Scales]:
        """The validation records' logits under the weights as they are, and what recalibrates them; the same on every rank."""
        assert self.predictor is not None
        _, held = self._sets
        logits_N = predicted(self.predictor, held, self.device)[:, 0]
        return logits_N, fit_scales(logits_N, held.accepted, held.temperature)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        _, scales = self._recalibrated()
        table = torch.tensor(scales)
        checkpoint["state_dict"] |= {"predictor.scale": table[:, 0].clone(), "predictor.shift": table[:, 1].clone()}
