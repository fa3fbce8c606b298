"""The online logistic model: its Newton step, what it learns from truncated labels, and the bounds that keep it finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainkit.runner.policies.logistic import INTERCEPT, LIMIT, SLOPE, Labels, OnlineLogistic, log_odds, newton_step
from trainkit.runner.policy import RoundOutcome

K = 5
TRUTH = 0.9, np.array([0.6, 0.2, -0.3, 0.4, 0.1])


def model(max_depth: int = K) -> OnlineLogistic:
    return OnlineLogistic(max_depth, torch.device("cpu"))


def rounds(draw: np.random.Generator, rows: int, levels: int = K) -> RoundOutcome:
    """A round of rows whose tokens are accepted as `TRUTH` says, given features that depend on the position."""
    slope, intercept_K = TRUTH
    feature_DB = draw.normal(1.0, 2.0, (levels, rows)) + 0.3 * np.arange(levels)[:, None]
    chance_DB = 1 / (1 + np.exp(-(slope * feature_DB + intercept_K[:levels, None])))
    accepted_B = (draw.random((levels, rows)) < chance_DB).cumprod(0).sum(0)
    return RoundOutcome(rows, levels, [levels] * rows, accepted_B.tolist(), (), feature_DB.tolist())


def test_newton_step_equals_a_dense_solve(seed):
    """The step by elimination solves the whole system of slope and intercepts, and the gradient is that of the loss."""
    draw, prior = np.random.default_rng(seed), 0.7
    labels = Labels(draw.normal(0, 3, 400), draw.integers(0, K, 400), draw.random(400) < 0.6, draw.random(400))
    slope, intercept_K = 0.8, draw.normal(0, 1, K)
    before_K = np.array([INTERCEPT, *intercept_K[:-1]])
    design_NX = np.column_stack([labels.feature_N, np.eye(K)[labels.position_N]])

    def loss(theta_X: np.ndarray) -> float:
        z_N = design_NX @ theta_X
        by_label = labels.weight_N @ (np.logaddexp(0, z_N) - labels.accepted_N * z_N)
        return by_label + prior / 2 * ((theta_X[0] - SLOPE) ** 2 + ((theta_X[1:] - before_K) ** 2).sum())

    theta_X = np.array([slope, *intercept_K])
    p_N = 1 / (1 + np.exp(-design_NX @ theta_X))
    hessian = (design_NX.T * (labels.weight_N * p_N * (1 - p_N))) @ design_NX + prior * np.eye(K + 1)
    steps = np.eye(K + 1) * 1e-5
    gradient = np.array([(loss(theta_X + step) - loss(theta_X - step)) / 2e-5 for step in steps])
    exact = design_NX.T @ (labels.weight_N * (p_N - labels.accepted_N))
    exact += prior * (theta_X - np.array([SLOPE, *before_K]))
    np.testing.assert_allclose(gradient, exact, atol=1e-5)
    slope_step, step_K = newton_step(slope, intercept_K, labels, prior)
    np.testing.assert_allclose([slope_step, *step_K], -np.linalg.solve(hessian, exact), atol=1e-9)
    # with a bounded slope: the intercepts' own system, given that step
    slope_step, step_K = newton_step(slope, intercept_K, labels, prior, (0.75, 0.79))
    assert slope + slope_step in (pytest.approx(0.75), pytest.approx(0.79))
    np.testing.assert_allclose(step_K, np.linalg.solve(hessian[1:, 1:], -exact[1:] - hessian[1:, 0] * slope_step), atol=1e-9)


def test_logistic_recovers_its_parameters(seed):
    """From labels that end at the first rejection: all within 3.5 standard errors; later positions' labels are few."""
    draw, learner = np.random.default_rng(seed), model()
    for _ in range(600):
        learner.learn(rounds(draw, 8))
    f_N, position_N, _, round_N = np.array(learner._labels).T
    slope, intercept_K = TRUTH
    design_NX = np.column_stack([f_N, np.eye(K)[position_N.astype(int)]])
    p_N = 1 / (1 + np.exp(-design_NX @ np.array([slope, *intercept_K])))
    spread_X = np.sqrt(np.diag(np.linalg.inv((design_NX.T * (p_N * (1 - p_N))) @ design_NX)))
    error_X = np.array([learner.slope - slope, *(learner.intercept_K - intercept_K)])
    assert (np.abs(error_X) < 3.5 * spread_X + 0.05).all(), (error_X, spread_X)


def test_labels_after_a_rejection_are_left_out():
    """Verified 4, accepted 1: position 0 has label 1, position 1 label 0, and no other position any."""
    learner = model()
    learner.learn(RoundOutcome(2, 5, [4, 2], [1, 2], (), [[float(10 * level + row) for row in range(2)] for level in range(5)]))
    assert [label[:3] for label in learner._labels] == [(0.0, 0, True), (10.0, 1, False), (1.0, 0, True), (11.0, 1, True)]


def test_truncated_labels_do_not_bias(seed):
    """Labels past the rejection, taken as rejections, would lower the intercepts of later positions by more than 1."""
    draw, learner, wrong = np.random.default_rng(seed), model(), model()
    for _ in range(400):
        outcome = rounds(draw, 8)
        learner.learn(outcome)
        for row, accepted in enumerate(outcome.accepted):
            for position in range(K):
                wrong._labels.append((outcome.features[position][row], position, position < accepted, 400))
    wrong._rounds = 400
    for _ in range(20):
        wrong._step()
    assert abs(learner.intercept_K[3] - TRUTH[1][3]) < 0.7 and wrong.intercept_K[3] < TRUTH[1][3] - 1


@pytest.mark.parametrize("is_accepted", [True, False])
def test_one_sided_labels_stay_finite(is_accepted, seed):
    """If all tokens are accepted, or none, parameters stay finite and probabilities are on the right side of 0.5."""
    draw, learner = np.random.default_rng(seed), model()
    for _ in range(3000):
        features = draw.choice([-LIMIT, 0.0, 3.0, LIMIT], (K, 1)).tolist()
        learner.learn(RoundOutcome(1, K, [K], [K if is_accepted else 0], (), features))
    assert 0 <= learner.slope <= 4 and (np.abs(learner.intercept_K) <= 8).all()
    chance_B, _ = learner(torch.tensor([[1.0, 0.0]]), 0)
    assert (chance_B > 0.7) if is_accepted else (chance_B < 0.6)


def test_a_confident_miss_moves_little():
    """The rejection of one confident proposal moves slope and intercept by at most 1."""
    learner = model(1)
    learner._labels.append((LIMIT, 0, 0, 0))
    learner._step()
    assert abs(learner.slope - SLOPE) <= 1 and abs(learner.intercept_K[0] - INTERCEPT) <= 1


def test_overflowed_features_are_not_learnt():
    """A feature that is NaN is left out, and the parameters stay finite."""
    learner = model(1)
    for _ in range(8):
        learner.learn(RoundOutcome(1, 1, [1], [0], (), [[float("nan")]]))
    assert (learner.slope, *learner.intercept_K) == (SLOPE, INTERCEPT)


def test_log_odds_by_hand_and_clamped():
    """Of probabilities 0.5, 0.3, 0.2 it is 0; where 1 - q1 has no float32 digits it is still right; at q1 = 1 it is clamped."""
    scores = torch.tensor([[0.2, 0.5, 0.3], [1.0, 1e-20, 1e-20]]).log()
    torch.testing.assert_close(log_odds(scores), torch.tensor([0.0, LIMIT]), atol=1e-6, rtol=0)
    torch.testing.assert_close(log_odds(torch.tensor([[30.0, 0.0, 0.0]])), torch.tensor([30 - np.log(2)]).float())
    assert log_odds(torch.tensor([[0.0, float("-inf")]])).item() == LIMIT and log_odds(torch.zeros(1, 1)).item() == LIMIT
    assert log_odds(torch.zeros(1, 100_000)).item() == pytest.approx(-np.log(99_999), abs=1e-4)


def test_probability_is_that_of_the_parameters(seed):
    """The device's probabilities follow each step: sigmoid(w f + b) of the position."""
    draw, learner = np.random.default_rng(seed), model()
    for _ in range(40):
        learner.learn(rounds(draw, 4))
    scores = torch.randn(3, 20)
    for depth in range(K):
        chance_B, feature_B = learner(scores, depth)
        expected_B = (learner.slope * feature_B.double() + learner.intercept_K[depth]).sigmoid()
        torch.testing.assert_close(chance_B.double(), expected_B, atol=1e-6, rtol=0)
    assert learner.slope != SLOPE
