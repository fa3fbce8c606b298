from __future__ import annotations

import pytest
import torch

from tests.support.layers import INPUT_TK, statistics_of
from trainkit.compress.statistics import Statistics
from trainkit.errors import UserError

SUMS = ("sum_K", "square_K", "within_K", "gram_KK")


def test_statistics_of_the_layer_computed_by_hand() -> None:
    """Sums of squares, sums of a sequence in the mean, and variances within sequences."""
    statistics = statistics_of(INPUT_TK.view(2, 6, 8))
    assert (statistics.tokens, statistics.sequences) == (12, 2)
    assert (16 * statistics.square_K).tolist() == [194, 103, 26, 151, 104, 932, 158, 231]
    assert (statistics.sum_K / 2).tolist() == [0.5, 0.125, 0.5, 1.875, -0.75, 13, 1.5, 2.375]
    variance_K = [0.710069, 0.525174, 0.126736, 0.563368, 0.524306, 0.157986, 0.758681, 1.042535]
    assert (statistics.within_K / 12).tolist() == pytest.approx(variance_K, abs=1e-6)


def test_statistics_equal_plain_formulas(seed: int) -> None:
    """Sequences of unequal length, by torch's own variance; float64, so to rounding."""
    x_BTK, counted_BT = torch.randn(3, 10, 6, dtype=torch.float64) + 1, torch.rand(3, 10) < 0.6
    counted_BT[:, :2] = True
    statistics = Statistics(6, gram=True)
    statistics.add(x_BTK, counted_BT)
    sequences = [x[counted] for x, counted in zip(x_BTK, counted_BT, strict=True)]
    x_NK = torch.cat(sequences)
    within_K = sum(len(x) * x.var(0, unbiased=False) for x in sequences)
    for name, expected in zip(SUMS, (x_NK.sum(0), x_NK.square().sum(0), within_K, x_NK.T @ x_NK), strict=True):
        torch.testing.assert_close(getattr(statistics, name), expected, rtol=1e-12, atol=1e-12)
    assert (statistics.tokens, statistics.sequences) == (int(counted_BT.sum()), 3)


def test_statistics_do_not_depend_on_the_batch(seed: int) -> None:
    """Bit for bit: a batch is added one sequence at a time."""
    x_BTK = torch.randn(6, 9, 5)
    whole = statistics_of(x_BTK)
    parts = Statistics(5, gram=True)
    for part in (x_BTK[:1], x_BTK[1:5], x_BTK[5:]):
        parts.add(part, torch.ones(part.shape[:2], dtype=torch.bool))
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in SUMS)


def test_padding_does_not_count(seed: int) -> None:
    """Padded sequences give the sums of those cut to length, whatever the padding holds; one of padding alone is none."""
    x_BTK = torch.randn(3, 8, 5)
    counted_BT = torch.arange(8) < torch.tensor([[8], [5], [0]])
    padded = x_BTK.masked_fill(~counted_BT.unsqueeze(2), torch.nan)
    statistics, cut = Statistics(5, gram=True), Statistics(5, gram=True)
    statistics.add(padded, counted_BT)
    cut.add(x_BTK[:1], counted_BT[:1])
    cut.add(x_BTK[1:2, :5], counted_BT[1:2, :5])
    assert all(torch.equal(getattr(statistics, name), getattr(cut, name)) for name in SUMS)
    assert (statistics.tokens, statistics.sequences) == (13, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_statistics_refuse_what_is_not_finite(value: float) -> None:
    """One line names the flag and a remedy; the sums stay as they were."""
    x_BTK = torch.ones(2, 4, 3)
    x_BTK[1, 2, 1] = value
    statistics = Statistics(3, gram=True)
    with pytest.raises(UserError, match="--calibration: the model computes NaN or infinity on this text"):
        statistics.add(x_BTK, torch.ones(2, 4, dtype=torch.bool))
    assert statistics.tokens == 4 and torch.isfinite(statistics.gram_KK).all()  # type: ignore[arg-type]
