"""Log-loss and calibration error by hand; recalibration recovers a known scale; baselines are those of their records."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support.acceptance import make_set
from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.eval.calibration import (
    Baselines,
    auc,
    expected_calibration_error,
    fit_scale,
    fit_scales,
    learnt_online,
    log_loss,
    reliability,
    scaled,
)


def test_calibration_error_by_hand():
    """Two bins: 0.1, 0.3 | 0.5, 0.9, 1.0 with labels 0, 1 | 1, 0, 1: |0.2 - 0.5| and |0.8 - 2/3|, 2 and 3 of 5."""
    p, y = torch.tensor([0.1, 0.3, 0.5, 0.9, 1.0]), torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    assert expected_calibration_error(p, y, bins=2) == pytest.approx(2 / 5 * 0.3 + 3 / 5 * (0.8 - 2 / 3), abs=1e-7)
    low, high = reliability(p, y, bins=2)
    assert (low.probability, low.label, low.count) == (pytest.approx(0.2), 0.5, 2)
    assert (high.probability, high.label, high.count) == (pytest.approx(0.8), pytest.approx(2 / 3), 3)
    assert len(reliability(torch.tensor([0.01, 0.99]), torch.tensor([0.0, 1.0]))) == 2, "empty bins are left out"
    assert math.isnan(expected_calibration_error(torch.zeros(0), torch.zeros(0)))


def test_log_loss_with_soft_label_by_hand():
    """The log-loss with a soft label equals the one computed by hand, and stays finite."""
    p, y = torch.tensor([0.5, 0.8]), torch.tensor([1.0, 0.25])
    assert log_loss(p, y) == pytest.approx((math.log(2) - 0.25 * math.log(0.8) - 0.75 * math.log(0.2)) / 2, abs=1e-6)
    assert log_loss(torch.tensor([1.0]), torch.tensor([0.0])) == pytest.approx(-math.log(1e-6), rel=1e-3), "finite"


def test_calibration_error_separates_calibrated_from_not(seed):
    """Calibrated probabilities have a small calibration error, distorted ones a large one."""
    p = torch.rand(40_000, dtype=torch.float64)
    y = (torch.rand_like(p) < p).double()
    # the error of each bin is about sqrt(p (1 - p) / count) / sqrt(bins) = 0.003
    assert expected_calibration_error(p, y) < 0.015
    assert expected_calibration_error(p**3, y) > 0.1


def test_auc_by_hand():
    """Ones at 0.9, 0.5, zeros at 0.5, 0.1: three pairs right and one tied; soft labels weigh; one class alone gives nan."""
    p, y = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert auc(p, y) == pytest.approx(3.5 / 4) and auc(1 - p, y) == pytest.approx(0.5 / 4)
    # shares of ones 0.75 and 0.25, of zeros 0.25 and 0.75: 0.75 * 0.75 pairs right, 0.25 * 0.25 wrong, 6/16 tied
    assert auc(torch.tensor([0.8, 0.2]), torch.tensor([0.75, 0.25])) == pytest.approx(9 / 16 + 3 / 16)
    assert math.isnan(auc(p, torch.ones(4)))


@pytest.mark.parametrize(("scale", "shift"), [(2.0, -1.0), (0.5, 0.7), (1.0, 0.0)])
def test_fit_recovers_the_applied_scale_and_shift(scale, shift, seed):
    """Exactly with soft labels (up to the ridge of 1e-2 in 20,000 records), within sampling error with drawn labels."""
    logits = 2 * torch.randn(20_000, dtype=torch.float64)
    p = (scale * logits + shift).sigmoid()
    assert fit_scale(logits, p) == (pytest.approx(scale, abs=1e-4), pytest.approx(shift, abs=1e-4))
    drawn = (torch.rand_like(p) < p).double()
    assert fit_scale(logits, drawn) == (pytest.approx(scale, abs=0.15), pytest.approx(shift, abs=0.15))


def test_fit_is_finite_for_equal_or_no_labels():
    """The fit is finite for labels that are all equal, and the identity for none."""
    assert fit_scale(torch.zeros(0), torch.zeros(0)) == (1.0, 0.0)
    scale, shift = fit_scale(torch.randn(50), torch.ones(50))
    assert math.isfinite(scale) and 2 < shift < 50
    assert all(map(math.isfinite, fit_scale(torch.tensor([-40.0, 40.0]), torch.tensor([1.0, 0.0]))))


def test_each_temperature_has_its_own_scale(seed):
    """Each temperature gets a scale and a shift of its own."""
    logits, temperature = torch.randn(20_000), torch.arange(20_000).remainder(2) * 0.7
    p = torch.where(temperature > 0, 3 * logits + 1, 0.5 * logits).sigmoid()
    scales = fit_scales(logits, p, temperature)
    assert scales[0] == (pytest.approx(0.5, abs=1e-3), pytest.approx(0, abs=1e-3))
    assert scales[1] == (pytest.approx(3, abs=1e-2), pytest.approx(1, abs=1e-2))
    assert torch.allclose(scaled(logits, temperature, scales), p.double(), atol=1e-3)


def test_baselines_are_fitted_on_their_records(tmp_path):
    """The baselines are fitted on the given records and can be stored."""
    train, held = AcceptanceSet.read(make_set(tmp_path / "set")).split(0.2, 0)
    baselines = Baselines.fit(train)
    assert baselines.constant == pytest.approx(float(train.accepted.mean()), abs=1e-5)
    assert baselines == Baselines(**baselines.to_dict())
    predictions = baselines.probabilities(held)
    assert torch.equal(predictions["max_q"], held.column("max_q"))
    # max_q is independent of these labels: recalibrated it is close to the constant, uncalibrated it is far off
    label = held.accepted
    assert log_loss(predictions["max_q_fitted"], label) < log_loss(predictions["constant"], label) + 0.01
    assert log_loss(predictions["max_q"], label) > log_loss(predictions["constant"], label) + 0.1


def test_online_model_predicts_before_it_learns(seed):
    """It starts from the fixed parameters, learns from rounds that end at a rejection, and approaches the true model's loss."""
    rounds, depth, truth = 1500, 4, torch.tensor([0.9, 0.3, -0.2, 0.5])
    feature = 2 * torch.randn(rounds, depth, dtype=torch.float64) + 1
    chance = (1.4 * feature + truth).sigmoid()
    accepted = torch.rand_like(chance) < chance
    reached = torch.cat([torch.ones(rounds, 1, dtype=torch.bool), accepted.cumprod(1)[:, :-1].bool()], 1)
    f, y, p, position = (
        feature[reached],
        accepted[reached].float(),
        chance[reached],
        torch.arange(depth).expand(rounds, -1)[reached],
    )
    signals = torch.zeros(len(f), 1, 5)
    signals[:, 0, 0] = f.sigmoid().log()
    tensors = {"signals": signals, "depth": position.short(), "label": y[:, None], "max_q": (-f).sigmoid().float()}
    found = learnt_online(AcceptanceSet(tensors, np.arange(len(f)), {}, ""))
    assert found["logistic"][0].item() == pytest.approx(torch.sigmoid(0.5 * f[0] - 0.2).item(), abs=1e-5)
    assert log_loss(found["logistic"], y) < log_loss(p, y) + 0.02 < log_loss(found["logistic_max_q"], y)
