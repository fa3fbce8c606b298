"""Whether probabilities of acceptance mean what they say: log-loss, calibration error, recalibration, and what is to be beaten.

Labels are 0 or 1, or probabilities themselves (`residual`). Left out on purpose: isotonic regression. It fits any monotone
curve, and for it the bundle would have to carry one; a predictor that needs it has another fault.
"""

# N records  W proposals of each  M bins

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.models.predictor import AcceptancePredictor

BINS = 15
RIDGE = 1e-2
"""Weight of the prior at (1, 0) in `fit_scale`: nothing beside data, and labels that are all alike have an answer."""
_LEAST = 1e-6
"""Probabilities are taken from here to 1 less this: float32's one would cost infinity where it is wrong once."""

Scale = tuple[float, float]
"""logit -> first * logit + second."""
Scales = tuple[Scale, Scale]
"""One at temperature 0, one above it."""
UNSCALED: Scales = ((1.0, 0.0), (1.0, 0.0))


@dataclass(frozen=True)
class Bin:
    """Records of like probability: its mean, the mean label, and how many they are."""

    probability: float
    label: float
    count: int


def log_loss(probability_N: Tensor, label_N: Tensor) -> float:
    """Mean cross entropy, in nats per record; nan without one."""
    p_N = probability_N.double().clamp(_LEAST, 1 - _LEAST)
    return F.binary_cross_entropy(p_N, label_N.double()).item() if len(p_N) else float("nan")


def reliability(probability_N: Tensor, label_N: Tensor, bins: int = BINS) -> list[Bin]:
    """Records by probability in `bins` bins of equal width, lowest first; those without any are left out."""
    p_N, label_N = probability_N.double(), label_N.double()
    place_N = (p_N * bins).long().clamp(max=bins - 1)
    counts_M = torch.bincount(place_N, minlength=bins)
    p_M, label_M = torch.bincount(place_N, p_N, bins), torch.bincount(place_N, label_N, bins)
    return [
        Bin(p / count, label / count, count)
        for p, label, count in zip(p_M.tolist(), label_M.tolist(), counts_M.tolist(), strict=True)
        if count
    ]


def expected_calibration_error(probability_N: Tensor, label_N: Tensor, bins: int = BINS) -> float:
    """Mean over records of |mean probability - mean label| of their bin of equal width (Guo et al. 2017, arXiv 1706.04599)."""
    found = reliability(probability_N, label_N, bins)
    total = sum(one.count for one in found)
    return sum(one.count * abs(one.probability - one.label) for one in found) / total if total else float("nan")


def fit_scale(logits_N: Tensor, labels_N: Tensor) -> Scale:
    """(scale, shift) that minimise the log-loss of scale * logit + shift: Platt's recalibration, by Newton's method.

    Labels may be probabilities. (1, 0) without records, and near it with few.
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
    scale, shift = theta.tolist()
    return scale, shift


def fit_scales(logits_N: Tensor, labels_N: Tensor, temperature_N: Tensor) -> Scales:
    """`fit_scale` of the records at temperature 0, and of those above it."""
    cold_N = temperature_N == 0
    return fit_scale(logits_N[cold_N], labels_N[cold_N]), fit_scale(logits_N[~cold_N], labels_N[~cold_N])


def scaled(logits_N: Tensor, temperature_N: Tensor, scales: Scales) -> Tensor:
    """[N] probabilities of logits, recalibrated as at their temperature; float64."""
    table = torch.tensor(scales, dtype=torch.float64)[(temperature_N > 0).long()]
    return (logits_N.double() * table[:, 0] + table[:, 1]).sigmoid()


@dataclass(frozen=True)
class Baselines:
    """What a predictor has to beat, fitted on the records that it was trained on.

    Attributes:
        constant: Their mean label.
        max_q: What recalibrates the draft's highest probability, as a logit.
    """

    constant: float
    max_q: Scales

    @staticmethod
    def of(train: AcceptanceSet) -> Baselines:
        """Rounded, so that a resumed run on another machine finds them equal."""
        label_N = train.accepted
        scales = fit_scales(_logit(train.column("max_q")), label_N, train.temperature)
        (a, b), (c, d) = (tuple(round(value, 5) for value in scale) for scale in scales)
        return Baselines(round(label_N.double().mean().item(), 5), ((a, b), (c, d)))

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Baselines:
        (a, b), (c, d) = values["max_q"]
        return Baselines(float(values["constant"]), ((a, b), (c, d)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON gives them back."""
        return {"constant": self.constant, "max_q": [list(scale) for scale in self.max_q]}

    def probabilities(self, records: AcceptanceSet) -> dict[str, Tensor]:
        """`constant`, `max_q` as the draft has it, and `max_q_fitted`, of each record."""
        max_q_N = records.column("max_q")
        return {
            "constant": torch.full_like(max_q_N, self.constant),
            "max_q": max_q_N,
            "max_q_fitted": scaled(_logit(max_q_N), records.temperature, self.max_q),
        }


def _logit(probability_N: Tensor) -> Tensor:
    return probability_N.double().clamp(_LEAST, 1 - _LEAST).logit()


@torch.no_grad()
def predicted(predictor: Any, records: AcceptanceSet, device: torch.device | None = None, batch: int = 8192) -> Tensor:
    """[N, W] uncalibrated logits of an `AcceptancePredictor`, on the CPU."""
    found = [torch.zeros(0, records.tensors["label"].shape[1])]
    for start in range(0, len(records), batch):
        rows: Sequence[int] = range(start, min(start + batch, len(records)))
        made = {name: value.to(device) for name, value in records.batch(rows, len(rows)).items()}
        found.append(logits_of(predictor, made).float().cpu())
    return torch.cat(found)


def logits_of(predictor: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B, W] uncalibrated logits of a batch of `AcceptanceSet.batch`."""
    return predictor(batch["hidden_BD"][:, None], batch["signals_BWC"][:, None], batch["depth_B"][:, None])[:, 0]


Table = dict[str, Any]


"""One group of records: `group`, `records`, `accepted` (mean label), and by source `log_loss`, `ece` and `reliability`."""


def measure(network: AcceptancePredictor, records: AcceptanceSet) -> list[Table]:
    """All records, then those of each temperature, then those of each draft position, from 1."""
    logits_N, label_N, temperature_N = predicted(network, records)[:, 0], records.accepted, records.temperature
    sources = {"predictor": network.calibrated(logits_N, temperature_N), "raw": logits_N.sigmoid()}
    sources |= Baselines.from_dict(network.seen["baselines"]).probabilities(records)
    position_N = records.column("depth").long() + 1
    groups = {"all": torch.ones_like(temperature_N, dtype=torch.bool)}
    groups |= {f"temperature {heat:g}": temperature_N == heat for heat in temperature_N.unique().tolist()}
    groups |= {f"position {place}": position_N == place for place in position_N.unique().tolist()}
    return [_table(group, sources, label_N, chosen_N) for group, chosen_N in groups.items()]


def measure_ranks(network: AcceptancePredictor, records: AcceptanceSet) -> list[Table]:
    """Of every record the likeliest proposal, the second and so on; beside the predictor the draft's probability of each."""
    p_NW = network.calibrated(predicted(network, records), records.temperature[:, None])
    own_NW, label_NW = records.column("signals")[..., 1], records.column("label")
    every_N = torch.ones(len(records), dtype=torch.bool)
    return [
        _table(f"proposal {rank + 1}", {"predictor": p_NW[:, rank], "draft": own_NW[:, rank]}, label_NW[:, rank], every_N)
        for rank in range(label_NW.shape[1])
    ]


def _table(group: str, sources: Mapping[str, Tensor], label_N: Tensor, chosen_N: Tensor) -> Table:
    label_N, chosen = label_N[chosen_N], {name: p_N[chosen_N] for name, p_N in sources.items()}
    return {
        "group": group,
        "records": len(label_N),
        "accepted": label_N.double().mean().item(),
        "log_loss": {name: log_loss(p_N, label_N) for name, p_N in chosen.items()},
        "ece": {name: expected_calibration_error(p_N, label_N) for name, p_N in chosen.items()},
        "reliability": {
            name: [[bin.probability, bin.label, bin.count] for bin in reliability(p_N, label_N)] for name, p_N in chosen.items()
        },
    }
