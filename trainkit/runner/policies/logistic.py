"""Online logistic regression of acceptance: one feature of the draft, one slope, and an intercept for each draft position.

    P(position k is accepted | all before it are) = sigmoid(w f + b_k),   f = log q1 - log(1 - q1)

q1 is the largest probability of softmax(log q + G). G is the Gumbel noise that the token was drawn with: with shared noise the
draw is determined, so log q alone predicts less. Under `residual` q1 is the largest of q, because the target does not share
the draft's noise there. Source: vLLM's pull request 52228, with two differences. It clears its sums after each step; here
older rounds have less weight, and each step reads all stored rounds at the current parameters. It shortens steps where it has
seen few labels; here a prior does that, and it also gives seldom reached positions the intercept of the position before.
Left out on purpose: other features. A trained predictor (models/predictor.py) reads the draft's hidden state as well.
"""

# B rows  N labelled positions  K draft vocabulary in scores_BK, draft positions in intercept_K and sums by position

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainkit.runner.policy import RoundOutcome

SLOPE, INTERCEPT = 0.5, -0.2
"""Initial parameters, and means of the prior."""

LIMIT = 40.0
"""Features are clamped to plus and minus this value."""

_FADE = 0.998
"""Weight of a round relative to the next one: an average over about 500 rounds."""

_REMEMBERED = 4096
"""Largest number of labelled positions that are stored; a step reads all of them."""

_REFIT = 50
"""Rounds between steps; the first ones come after 4, 8, 16 and 32 rounds."""

_PRIOR = 4.0
"""Precision of the Gaussian prior: slope around `SLOPE`, intercepts around the one before, the first around `INTERCEPT`."""

_LARGEST_STEP, _LARGEST_SLOPE, _LARGEST_INTERCEPT = 1.0, 4.0, 8.0


class Labels(NamedTuple):
    """Labelled draft positions.

    Attributes:
        feature_N: f.
        position_N: Draft position, 0 for the first.
        accepted_N: 1 if accepted, else 0.
        weight_N: Weight.
    """

    feature_N: np.ndarray
    position_N: np.ndarray
    accepted_N: np.ndarray
    weight_N: np.ndarray


def newton_step(
    slope: float,
    intercept_K: np.ndarray,
    labels: Labels,
    prior: float = _PRIOR,
    slopes: tuple[float, float] = (-math.inf, math.inf),
) -> tuple[float, np.ndarray]:
    """The Newton step of slope and intercepts for the log-loss of the labels plus the prior; float64.

    With p = sigmoid(w f + b_k) and s = p (1 - p) times the weight, the system has an arrow's shape: only the slope is coupled
    to all others. So the intercepts are eliminated:

        dw = (g - sum_k B_k g_k / C_k) / (A - sum_k B_k^2 / C_k),   db_k = (g_k - B_k dw) / C_k

    A = sum s f^2 + prior, B_k = sum s f and C_k = sum s + prior over position k; g and g_k are the negative gradient. The mean
    of an intercept's prior is the present value of the one before, and no variable. If the new slope would lie outside
    `slopes`, it is set to the nearer end, and the intercepts are the best ones for that slope.
    """
    f_N, position_N, accepted_N, weight_N = labels
    p_N = 1 / (1 + np.exp(-(slope * f_N + intercept_K[position_N])))
    s_N, error_N = weight_N * p_N * (1 - p_N), weight_N * (accepted_N - p_N)

    def by_position(value_N: np.ndarray) -> np.ndarray:
        return np.bincount(position_N, value_N, len(intercept_K))

    A = s_N @ f_N**2 + prior
    B_K, C_K = by_position(s_N * f_N), by_position(s_N) + prior
    g = error_N @ f_N + prior * (SLOPE - slope)
    g_K = by_position(error_N) + prior * (np.concatenate([[INTERCEPT], intercept_K[:-1]]) - intercept_K)
    slope_step = (g - B_K @ (g_K / C_K)) / (A - B_K @ (B_K / C_K))
    slope_step = np.clip(slope_step, slopes[0] - slope, slopes[1] - slope)
    return float(slope_step), (g_K - B_K * slope_step) / C_K


class OnlineLogistic:
    """The model and its training. The parameters are on the device, where captured rounds read them.

    Args:
        max_depth: Largest number of draft positions; each has an intercept.
        device: Device of the rounds.
        reads_noise: Whether f is computed from the draft logits with noise.

    Attributes:
        slope: w.
        intercept_K: b_k, float64.
    """

    def __init__(self, max_depth: int, device: torch.device, reads_noise: bool = True) -> None:
        self.reads_noise = reads_noise
        self.slope, self.intercept_K = SLOPE, np.full(max_depth, INTERCEPT)
        self._weights = torch.empty(max_depth + 1, device=device)
        self._labels: deque[tuple[float, int, int, int]] = deque(maxlen=_REMEMBERED)
        self._rounds, self._next_step = 0, 4
        self._store()

    def __call__(self, scores_BK: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Probability that the best proposal at a draft position is accepted, and its feature f; [B] each, float32.

        Args:
            scores_BK: Processed draft logits, with noise if the model reads it.
            depth: The draft position, 0 for the first.
        """
        feature_B = log_odds(scores_BK)
        return torch.addcmul(self._weights[depth], feature_B, self._weights[-1]).sigmoid(), feature_B

    def learn(self, outcome: RoundOutcome) -> None:
        """Adds a round's verified positions up to the first that was rejected, and takes a step after some rounds."""
        if not outcome.features:
            return
        self._rounds += 1
        for row, (verified, accepted) in enumerate(zip(outcome.verified, outcome.accepted, strict=True)):
            for position in range(min(verified, accepted + 1)):
                feature = outcome.features[position][row]
                if feature == feature:  # NaN, from a draft that overflowed, would make the parameters NaN
                    self._labels.append((feature, position, position < accepted, self._rounds))
        if self._rounds >= self._next_step and self._labels:
            self._next_step += min(self._next_step, _REFIT)
            self._step()

    def _step(self) -> None:
        f_N, position_N, accepted_N, round_N = np.array(self._labels, np.float64).T
        labels = Labels(f_N, position_N.astype(np.int64), accepted_N, _FADE ** (self._rounds - round_N))
        # A trust region: otherwise one confident proposal that is rejected moves an intercept to -20.
        slopes = max(self.slope - _LARGEST_STEP, 0.0), min(self.slope + _LARGEST_STEP, _LARGEST_SLOPE)
        slope_step, step_K = newton_step(self.slope, self.intercept_K, labels, slopes=slopes)
        intercept_K = self.intercept_K + step_K.clip(-_LARGEST_STEP, _LARGEST_STEP)
        self.slope += slope_step
        self.intercept_K = intercept_K.clip(-_LARGEST_INTERCEPT, _LARGEST_INTERCEPT)
        self._store()

    def _store(self) -> None:
        self._weights.copy_(torch.tensor([*self.intercept_K, self.slope]), non_blocking=True)


def log_odds(scores_BK: Tensor) -> Tensor:
    """[B] log q1 - log(1 - q1) of the largest probability q1 of softmax(scores), clamped to `LIMIT`.

    Computed as the best score minus the log-sum-exp of all others, because 1 - q1 loses all digits in float32 if q1 is near 1.
    """
    best = scores_BK.float().max(-1, keepdim=True)
    others_B = scores_BK.float().scatter(-1, best.indices, float("-inf")).logsumexp(-1)
    return (best.values[:, 0] - others_B).clamp(-LIMIT, LIMIT)
