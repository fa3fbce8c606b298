"""FLAP's scores, choice and bias on a layer small enough to work out by hand."""

# K inputs  R outputs

import torch

from trainkit.compress.statistics import Statistics
from trainkit.compress.structured.flap import fluctuation, group_scores, removed_bias, standardised
from trainkit.compress.structured.width import head_importance, heads_within_groups, highest, importance

# fmt: off
WEIGHT_RK = torch.tensor([[-29, 30, 4, -18, -31, -26, -13, 28], [11, 21, -32, -1, -24, 16, -12, -14],
                          [-9, 10, 19, -7, -2, -3, 27, 17], [15, 5, 8, -23, 6, 22, -20, -25]]).double() / 16
X_TK = torch.tensor([[0, 3, 2, 3, 2, 10, -1, 4], [4, 2, 1, 2, -4, 8, 5, -1], [6, 3, -2, 5, -2, 7, 1, 5],
                     [2, -1, -1, 0, -1, 10, -4, 3], [4, -3, 1, 5, -5, 6, 0, 1], [-1, -1, 0, 1, 6, 10, 4, -4],
                     [-6, 3, 2, 3, -2, 11, 6, 5], [0, -4, 1, 5, 1, 10, 5, 6], [6, 2, 2, 1, 0, 6, 1, 4],
                     [-2, 4, -2, -6, 0, 9, -6, -5], [-3, -4, -1, -4, 2, 8, 0, -5], [-6, -3, 1, 0, -3, 9, 1, 6]]).double() / 4
# fmt: on


def statistics() -> Statistics:
    sums = Statistics(8)
    sums.add(X_TK.view(2, 6, 8), torch.ones(2, 6, dtype=torch.bool))
    return sums


def near(ours: torch.Tensor, theirs: list[float]) -> bool:
    return torch.allclose(ours, torch.tensor(theirs).double(), atol=1e-6)


def test_neurons_of_the_worked_example():
    """Scores, the two neurons of the lowest score, their bias, and the error without and with it."""
    score_K = fluctuation(statistics(), WEIGHT_RK)
    assert near(score_K, [5.422171, 3.348629, 0.802039, 2.650518, 3.535090, 0.969904, 4.672674, 8.445849])
    scaled_K = standardised(score_K)
    assert near(scaled_K, [0.678224, -0.153276, -1.174470, -0.433222, -0.078504, -1.107155, 0.377672, 1.890732])
    kept = highest(scaled_K, 6)
    assert kept == [0, 1, 3, 4, 6, 7]
    removed_K = torch.ones(8, dtype=torch.bool)
    removed_K[kept] = False
    bias_R = removed_bias(statistics(), WEIGHT_RK, removed_K)
    assert near(bias_R, [-3.5, 2.0, -0.307292, 3.020833])
    lost_TR = X_TK[:, removed_K] @ WEIGHT_RK[:, removed_K].T
    assert near(torch.stack([lost_TR.square().sum(), (lost_TR - bias_R).square().sum()]), [324.563477, 18.925130])


def test_heads_of_the_worked_example():
    """Scores of two heads of four channels, the bias of the lower one, and the errors."""
    score_K = fluctuation(statistics(), WEIGHT_RK)
    scaled_K = [0.432980, -0.351387, -0.807261, -0.532013, -0.296029, -0.794432, 0.106665, 2.241476]
    assert near(standardised(score_K.square()), scaled_K)
    assert near(group_scores(score_K, 2), [-0.314420, 0.314420])
    plain_U = [(0.678224 - 0.153276 - 1.174470 - 0.433222) / 4, (-0.078504 - 1.107155 + 0.377672 + 1.890732) / 4]
    assert near(group_scores(score_K, 2, squared=False), plain_U)
    removed_K = torch.arange(8) < 4
    bias_R = removed_bias(statistics(), WEIGHT_RK, removed_K)
    assert near(bias_R, [-0.442708, -0.101562, -0.071615, -0.322917])
    lost_TR = X_TK[:, removed_K] @ WEIGHT_RK[:, removed_K].T
    assert near(torch.stack([lost_TR.square().sum(), (lost_TR - bias_R).square().sum()]), [135.632080, 131.843567])


def test_scores_of_constant_inputs_are_finite():
    """Inputs that never change have score 0, and standardising equal scores divides by no zero."""
    sums = Statistics(4)
    sums.add(torch.full((1, 5, 4), 0.7), torch.ones(1, 5, dtype=torch.bool))
    score_K = fluctuation(sums, torch.ones(3, 4))
    assert score_K.abs().max() < 1e-12
    assert standardised(torch.zeros(4).double()).tolist() == [0.0] * 4
    assert highest(score_K.round(), 2) == [2, 3], "among equal scores the lower index goes first"


def test_importance_by_hand():
    """Root of the summed squares of each sequence's mean magnitude; padding does not count; heads rank within their group."""
    sums = Statistics(4)
    x_BTK = torch.tensor([[[3.0, -1, 0, 2], [-5, 1, 0, 2]], [[-3.0, 2, 1, 0], [99, 99, 99, 99]]])
    sums.add(x_BTK, torch.tensor([[True, True], [True, False]]))
    assert near(importance(sums), [5.0, 5**0.5, 1.0, 2.0])
    assert near(head_importance(sums, 1, 2)[0], [30**0.5, 5**0.5])
    assert heads_within_groups(torch.tensor([[9.0, 8, 7], [1, 3, 2]]), 2) == [0, 1, 4, 5]
