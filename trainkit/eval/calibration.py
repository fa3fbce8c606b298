"""Quality of an acceptance predictor's probabilities: log-loss, calibration error, AUC, recalibration, and baselines to beat.

Labels are 0 or 1, or probabilities (`residual`). Isotonic recalibration is left out on purpose: it fits any monotone curve, the
bundle would have to store that curve, and a predictor that needs it has another defect.
"""

# N records  W proposals of each  M bins

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.models.predictor import AcceptancePredictor
from trainkit.runner.policies.logistic import LIMIT, OnlineLogistic
from trainkit.runner.policy import RoundOutcome

BINS = 15
RIDGE = 1e-2
"""Weight of the prior at (1, 0) in `fit_scale`: negligible beside data, and finite results for labels that are all equal."""
_MIN_PROBABILITY = 1e-6
"""Probabilities are clamped to [this, 1 - this], because a wrong prediction of exactly 0 or 1 would cost infinite log-loss."""

Scales = Sequence[Sequence[float]]
"""(scale, shift) of logit -> scale * logit + shift, at temperature 0 and above it."""
UNSCALED: Scales = ((1.0, 0.0), (1.0, 0.0))


class Bin(NamedTuple):
    """Records with similar probabilities: mean probability, mean label, number of records."""

    probability: float
    label: float
    count: int


def log_loss(probability_N: Tensor, label_N: Tensor) -> float:
    """Mean cross entropy in nats per record; nan without records."""
    p_N = probability_N.double().clamp(_MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    return F.binary_cross_entropy(p_N, label_N.double()).item() if len(p_N) else float("nan")


def reliability(probability_N: Tensor, label_N: Tensor, bins: int = BINS) -> list[Bin]:
    """The records in `bins` probability bins of equal width, lowest first, without empty bins."""
    p_N, label_N = probability_N.double(), label_N.double()
    bin_N = (p_N * bins).long().clamp(max=bins - 1)
    counts_M = torch.bincount(bin_N, minlength=bins)
    p_M, label_M = torch.bincount(bin_N, p_N, bins), torch.bincount(bin_N, label_N, bins)
    bins_M = zip(p_M.tolist(), label_M.tolist(), counts_M.tolist(), strict=True)
    return [Bin(p / count, label / count, count) for p, label, count in bins_M if count]


def expected_calibration_error(probability_N: Tensor, label_N: Tensor, bins: int = BINS) -> float:
    """Mean over records of |mean probability - mean label| in their bin of equal width (Guo et al. 2017, arXiv 1706.04599)."""
    filled, total = reliability(probability_N, label_N, bins), len(label_N)
    return sum(bin.count * abs(bin.probability - bin.label) for bin in filled) / total if total else float("nan")


def auc(probability_N: Tensor, label_N: Tensor) -> float:
    """Probability that a record with label 1 has the higher prediction than one with label 0, ties counted half.

    A label that is a probability counts as that share of a 1 and the rest of a 0. nan where one of the two is missing.
    """
    p_N, rank_N = probability_N.double().unique(return_inverse=True)
    ones_M, all_M = torch.bincount(rank_N, label_N.double(), len(p_N)), torch.bincount(rank_N, minlength=len(p_N))
    zeros_M = all_M - ones_M
    pairs = ones_M.sum() * zeros_M.sum()
    below_M = zeros_M.cumsum(0) - zeros_M / 2
    return float((ones_M * below_M).sum() / pairs) if pairs > 0 else float("nan")


def fit_scale(logits_N: Tensor, labels_N: Tensor) -> tuple[float, float]:
    """(scale, shift) that minimise the log-loss of scale * logit + shift: Platt scaling, by Newton's method.

    Labels may be probabilities. Without records the result is (1, 0), and with few records it is close to it.
    """
    x_N, y_N = logits_N.double(), labels_N.double()
    prior = theta = torch.tensor([1.0, 0.0], dtype=torch.float64)
    design_N2 = torch.stack([x_N, torch.ones_like(x_N)], -1)

    def loss(theta: Tensor) -> float:
        z_N = design_N2 @ theta
        return float((F.softplus(z_N) - y_N * z_N).sum() + RIDGE / 2 * (theta - prior).square().sum())

    for _ in range(100):
        p_N = (design_N2 @ theta).sigmoid()
        gradient = design_N2.T @ (p_N - y_N) + RIDGE * (theta - prior)
        hessian = (design_N2.T * (p_N * (1 - p_N))) @ design_N2 + RIDGE * torch.eye(2, dtype=torch.float64)
        step, length = torch.linalg.solve(hessian, gradient), 1.0
        while loss(theta - length * step) > loss(theta) and length > 1e-8:
            length /= 2
        theta = theta - length * step
        if float(step.abs().max()) < 1e-9:
            break
    return float(theta[0]), float(theta[1])


def fit_scales(logits_N: Tensor, labels_N: Tensor, temperature_N: Tensor) -> Scales:
    """`fit_scale` of the records at temperature 0, and of those above it."""
    return [fit_scale(logits_N[rows_N], labels_N[rows_N]) for rows_N in (temperature_N == 0, temperature_N > 0)]


def scaled(logits_N: Tensor, temperature_N: Tensor, scales: Scales) -> Tensor:
    """[N] recalibrated probabilities, float64; each record uses the scale of its temperature."""
    table = torch.tensor(scales, dtype=torch.float64)[(temperature_N > 0).long()]
    return (logits_N.double() * table[:, 0] + table[:, 1]).sigmoid()


@dataclass(frozen=True)
class Baselines:
    """Simple predictions that a predictor must beat, fitted on its training records.

    Attributes:
        constant: Mean label of the training records.
        max_q: Scales that recalibrate the logit of the draft's highest probability.
    """

    constant: float
    max_q: Scales

    @staticmethod
    def fit(train: AcceptanceSet) -> Baselines:
        """Fits the baselines; rounded, so that a run resumed on another machine finds equal ones."""
        label_N = train.accepted
        scales = fit_scales(_logit(train.column("max_q")), label_N, train.temperature)
        rounded = [[round(value, 5) for value in scale] for scale in scales]
        return Baselines(round(label_N.double().mean().item(), 5), rounded)

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-able."""
        return asdict(self)

    def probabilities(self, records: AcceptanceSet) -> dict[str, Tensor]:
        """The predictions for each record: `constant`, `max_q` (the draft's own), `max_q_fitted` (recalibrated)."""
        max_q_N = records.column("max_q")
        return {
            "constant": torch.full_like(max_q_N, self.constant),
            "max_q": max_q_N,
            "max_q_fitted": scaled(_logit(max_q_N), records.temperature, self.max_q),
        }


def _logit(probability_N: Tensor) -> Tensor:
    return probability_N.double().clamp(_MIN_PROBABILITY, 1 - _MIN_PROBABILITY).logit()


@torch.no_grad()
def predicted(predictor: Any, records: AcceptanceSet, device: torch.device | None = None, batch: int = 8192) -> Tensor:
    """[N, W] uncalibrated logits of an `AcceptancePredictor`, on the CPU."""
    logits = [torch.zeros(0, records.tensors["label"].shape[1])]
    for start in range(0, len(records), batch):
        rows = range(start, min(start + batch, len(records)))
        tensors = {name: value.to(device) for name, value in records.batch(rows, len(rows)).items()}
        logits.append(logits_of(predictor, tensors).float().cpu())
    return torch.cat(logits)


def logits_of(predictor: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B, W] uncalibrated logits for a batch from `AcceptanceSet.batch`."""
    return predictor(batch["hidden_BD"][:, None], batch["signals_BWC"][:, None], batch["depth_B"][:, None])[:, 0]


def learnt_online(records: AcceptanceSet) -> dict[str, Tensor]:
    """[N] predictions of `OnlineLogistic`, each made before its label was seen: `logistic`, and `logistic_max_q`.

    The first reads the draft's highest probability with its noise, the second without. A model for each temperature reads the
    rounds in stored order, as if the texts were decoded one after the other.
    """
    log_p_N, depth_N, label_N = records.column("signals")[:, 0, 0], records.column("depth").long(), records.accepted
    starts_N = torch.cat([depth_N[:1], depth_N[:-1]]) >= depth_N  # of a round
    others_N = (-torch.expm1(log_p_N.double())).clamp(min=0.0).log()
    features = {"logistic": log_p_N - others_N, "logistic_max_q": _logit(records.column("max_q"))}
    predictions = {name: torch.empty(len(records), dtype=torch.float64) for name in features}
    for name, feature_N in features.items():
        for temperature in records.temperature.unique().tolist():
            index_M = (records.temperature == temperature).nonzero()[:, 0]
            learner = OnlineLogistic(int(depth_N.max()) + 1, torch.device("cpu"))
            bounds = [*starts_N[index_M].nonzero()[:, 0].tolist(), len(index_M)]
            for round_M in (index_M[start:end] for start, end in pairwise(bounds)):
                feature_D, count = feature_N[round_M].clamp(-LIMIT, LIMIT), len(round_M)
                logit_D = learner.slope * feature_D + torch.from_numpy(learner.intercept_K)[depth_N[round_M]]
                predictions[name][round_M] = logit_D.sigmoid()
                accepted = count - 1 + int(label_N[round_M[-1]] > 0.5)
                learner.learn(RoundOutcome(1, count, [count], [accepted], (), feature_D[:, None].tolist()))
    return predictions


Table = dict[str, Any]
"""A group of records: `group`, `records`, `accepted` (mean label); `log_loss`, `ece`, `auc` and `reliability` by source."""


def measure(network: AcceptancePredictor, records: AcceptanceSet) -> list[Table]:
    """Tables of all records, of those at each temperature, and of those at each draft position, counted from 1."""
    logits_N, label_N, temperature_N = predicted(network, records)[:, 0], records.accepted, records.temperature
    sources = {"predictor": network.calibrated(logits_N, temperature_N), "raw": logits_N.sigmoid()}
    sources |= Baselines(**network.seen["baselines"]).probabilities(records) | learnt_online(records)
    position_N = records.column("depth").long() + 1
    groups = {"all": torch.ones_like(temperature_N, dtype=torch.bool)}
    groups |= {f"temperature {value:g}": temperature_N == value for value in temperature_N.unique().tolist()}
    groups |= {f"position {value}": position_N == value for value in position_N.unique().tolist()}
    return [
        _table(group, {name: p_N[in_group_N] for name, p_N in sources.items()}, label_N[in_group_N])
        for group, in_group_N in groups.items()
    ]


def measure_ranks(network: AcceptancePredictor, records: AcceptanceSet) -> list[Table]:
    """A table of every record's most probable proposal, one of the second, and so on; sources are predictor and draft."""
    p_NW = network.calibrated(predicted(network, records), records.temperature[:, None])
    draft_NW, label_NW = records.column("signals")[..., 1], records.column("label")
    return [
        _table(f"proposal {rank + 1}", {"predictor": p_NW[:, rank], "draft": draft_NW[:, rank]}, label_NW[:, rank])
        for rank in range(label_NW.shape[1])
    ]


def _table(group: str, sources: Mapping[str, Tensor], label_N: Tensor) -> Table:
    return {
        "group": group,
        "records": len(label_N),
        "accepted": label_N.double().mean().item(),
        "log_loss": {name: log_loss(p_N, label_N) for name, p_N in sources.items()},
        "ece": {name: expected_calibration_error(p_N, label_N) for name, p_N in sources.items()},
        "auc": {name: auc(p_N, label_N) for name, p_N in sources.items()},
        "reliability": {name: [list(bin) for bin in reliability(p_N, label_N)] for name, p_N in sources.items()},
    }
