"""Trains an acceptance predictor on an acceptance set. Its records hold the drafter's signals, so no drafter is loaded."""

# B records of a batch  W proposals per record  N validation records

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.eval import calibration
from trainkit.losses.output import LossOutput
from trainkit.models.predictor import AcceptancePredictor
from trainkit.modules.acceptance_data import AcceptanceData
from trainkit.modules.base import Batch, TrainingModule
from trainkit.modules.meter import means
from trainkit.modules.training_data import global_seed


class PredictorModule(TrainingModule):
    """Trains the probability P that a proposed token is accepted, given that those before it in the draft were accepted.

    The loss is binary cross entropy with label y and weight w = `rejection_weight`, divided by the mean weight of the training
    records, so that it keeps the scale of the unweighted loss:

        -(y log P + w (1 - y) log(1 - P)) / mean(y + w (1 - y))

    A record contributes the sum over all its labelled proposals: the first, which a chain drafts, and its siblings.

    Validation uses the first proposal only. It logs `loss` (log loss, unweighted) and `ece` (expected calibration error) of the
    trained predictor, and `fitted_*` after recalibration on these same records (four numbers). The same metrics are logged for
    the baselines: `constant`, the mean label of the training records; `max_q`, the draft's highest probability; `max_q_fitted`,
    that probability recalibrated on the training records. Each checkpoint holds the recalibration of its weights.

    Args:
        width: Width of the predictor's hidden layer.
        max_depth: Number of draft positions with own parameters; deeper positions share those of the last one.
        rejection_weight: Weight w of rejected proposals. 1 gives probabilities. SpecDec++ uses 6, which biases P downwards and
            needs a threshold chosen with it; the recalibration removes most of that bias.
        **optim: As in `TrainingModule`.
    """

    data_class = AcceptanceData
    data: AcceptanceData
    predictor: AcceptancePredictor  # from `setup` on

    def __init__(self, width: int = 64, max_depth: int = 16, rejection_weight: float = 1.0, **optim: Any) -> None:
        super().__init__(**optim)
        if not 0 < rejection_weight < float("inf"):
            raise UserError(f"model.rejection_weight is {rejection_weight}; it must be above 0 and finite")
        self.rejection_weight = rejection_weight
        self._sizes = {"width": width, "max_depth": max_depth}

    def trained(self) -> list[tuple[nn.Module, float]]:
        return [(self.predictor, 1.0)]

    def setup(self, stage: str) -> None:
        if hasattr(self, "predictor"):
            return
        train, _ = self.data.rows
        about, label_NW = train.manifest, train.column("label").double()
        self._baselines = calibration.Baselines.fit(train)
        self._mean_weight = float((label_NW + self.rejection_weight * (1 - label_NW)).mean())
        seen = {
            **{name: about[name] for name in ("verify", "temperatures", "depth")},
            "set": about["id"],
            "ranks": label_NW.shape[1],
            "validation_share": self.data.validation_share,
            "split_seed": global_seed(),
            "records": len(train),
            "rejection_weight": self.rejection_weight,
            "baselines": self._baselines.to_dict(),
        }
        self.predictor = AcceptancePredictor(train.hidden_size, **self._sizes, seen=seen)

    def describe(self) -> dict[str, Any]:
        return {"predictor": self.predictor.config(), "drafter": dict(self.data.rows[0].manifest["drafter"])}

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        real_B = batch["document_BT"][:, 0] >= 0
        logits_BW, label_BW = calibration.logits_of(self.predictor, batch)[real_B], batch["label_BW"][real_B]
        accepted, rejected = label_BW * F.softplus(-logits_BW), (1 - label_BW) * F.softplus(logits_BW)
        plain = (accepted + rejected)[:, 0].sum()
        if micro is None:
            return LossOutput(plain, real_B.sum().float())
        weighted = (accepted + self.rejection_weight * rejected).sum() / self._mean_weight
        return LossOutput(weighted, real_B.sum().float(), {"log_loss": plain.detach()})

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        _, validation = self.data.rows
        logits_N, scales = self._recalibrated()
        methods = {
            "": calibration.scaled(logits_N, validation.temperature, calibration.UNSCALED),
            "fitted_": calibration.scaled(logits_N, validation.temperature, scales),
            **{f"{name}_": p_N for name, p_N in self._baselines.probabilities(validation).items()},
        }
        values = means(sums)  # with `loss`, the log loss of the predictor itself
        for name, p_N in methods.items():
            values[f"{name}ece"] = calibration.expected_calibration_error(p_N, validation.accepted)
            if name:
                values[f"{name}loss"] = calibration.log_loss(p_N, validation.accepted)
        return values

    def _recalibrated(self) -> tuple[Tensor, calibration.Scales]:
        """Logits of the validation records with the current weights, and their recalibration; the same on every rank."""
        _, validation = self.data.rows
        logits_N = calibration.predicted(self.predictor, validation, self.device)[:, 0]
        return logits_N, calibration.fit_scales(logits_N, validation.accepted, validation.temperature)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        _, scales = self._recalibrated()
        table = torch.tensor(scales)
        checkpoint["state_dict"] |= {"predictor.scale": table[:, 0].clone(), "predictor.shift": table[:, 1].clone()}
