from __future__ import annotations

import pytest
import torch

from tests.support.layers import INPUT_TK, WEIGHT_RK, error, picture, random_layer, statistics_of
from trainkit.compress.masks import Scope, mask_from_scores, parse_pattern
from trainkit.compress.scores import magnitude, wanda


@pytest.mark.parametrize(
    ("sparsity", "scope", "mask", "lost"),
    [
        ("0.5", "matrix", "..x...x. x..x.xxx xx.xxx.. xxx.x...", None),
        ("0.5", "row", "..xx.xx. x..x..xx x..xxx.. xxx.x...", 276.5095),
        ("2:4", "row", "..xx.xx. x..x..xx x..xxx.. .xx.x.x.", 280.2107),
    ],
)
def test_magnitude_prunes_as_computed_by_hand(sparsity: str, scope: Scope, mask: str, lost: float | None) -> None:
    """Magnitude prunes the smallest weights of the matrix, the output or the group."""
    mask_RK = mask_from_scores(magnitude(WEIGHT_RK), parse_pattern(sparsity), scope)
    assert picture(mask_RK) == mask
    assert lost is None or error(WEIGHT_RK * mask_RK) == pytest.approx(lost, abs=5e-5)


@pytest.mark.parametrize(
    ("sparsity", "mask", "lost"),
    [
        ("0.5", ".xxx..x. x.xx..x. ..xxxx.. xxx.x...", 97.4138),
        ("4:8", ".xxx..x. x.xx..x. ..xxxx.. xxx.x...", 97.4138),
        ("2:4", "..xxx.x. x..x..xx ..xxxx.. .xx.x.x.", 87.8201),
    ],
)
def test_wanda_prunes_as_computed_by_hand(sparsity: str, mask: str, lost: float) -> None:
    """Wanda's scores, masks and error on a layer of 4 outputs."""
    score_RK = wanda(WEIGHT_RK, statistics_of(INPUT_TK.view(2, 6, 8)))
    expected_K = [6.311301, 4.757293, 0.318689, 3.456058, 4.939675, 12.402274, 2.553242, 6.649424]
    assert score_RK.dtype == torch.float32 and score_RK[0].tolist() == pytest.approx(expected_K, abs=1e-6)
    mask_RK = mask_from_scores(score_RK, parse_pattern(sparsity))
    assert picture(mask_RK) == mask
    assert error(WEIGHT_RK * mask_RK) == pytest.approx(lost, abs=5e-5)


def test_wanda_equals_a_plain_loop(seed: int) -> None:
    """The mask of each output, weight by weight from the formula."""
    weight_RK, x_TK = random_layer(5, 20)
    mask_RK = mask_from_scores(wanda(weight_RK, statistics_of(x_TK.view(4, 16, 20))), parse_pattern("0.3"))
    for r in range(5):
        scores = [abs(float(weight_RK[r, j])) * float(x_TK[:, j].norm()) for j in range(20)]
        lowest = sorted(range(20), key=scores.__getitem__)[:6]
        assert sorted(lowest) == (~mask_RK[r]).nonzero()[:, 0].tolist()
