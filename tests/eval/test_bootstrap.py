"""Bootstrap intervals over questions: nominal coverage, and exact pairing."""

from __future__ import annotations

import numpy as np
import pytest

from trainkit.eval.bootstrap import gap, mean


def answers(draw: np.random.Generator, questions: int, rate: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    """Accepted tokens and tokens of each question; questions differ in length and difficulty."""
    tokens = draw.integers(5, 60, questions)
    hardness = draw.beta(8 * rate, 8 * (1 - rate), questions)
    return draw.binomial(tokens, hardness).astype(float), tokens.astype(float)


def test_ratio_and_interval_by_hand():
    """Two questions, 3 of 4 and 1 of 6: the ratio is 4/10, not the mean of 3/4 and 1/6. Resamples are 3/4, 4/10 and 1/6."""
    interval = mean(np.array([3.0, 1.0]), np.array([4.0, 6.0]))
    assert interval.value == 0.4 and (interval.low, interval.high) == pytest.approx((1 / 6, 3 / 4))
    assert str(interval) == "+0.4000 [+0.1667, +0.7500]"


def test_training_seeds_are_averaged_after_division():
    """Seeds with 4/10 and 5/20 give 0.325; adding first would give 9/30. The other side may have another number of seeds."""
    sums, counts = np.array([[3.0, 1.0], [4.0, 1.0]]), np.array([[4.0, 6.0], [10.0, 10.0]])
    assert mean(sums, counts).value == pytest.approx((0.4 + 0.25) / 2)
    interval = gap((sums, counts), (sums[0], counts[0]), resamples=1000)
    assert interval.value == pytest.approx(0.325 - 0.4)
    twice = mean(np.stack([sums[0]] * 2), np.stack([counts[0]] * 2))
    assert twice == mean(sums[0], counts[0]), "the same seed twice counts as once"


def test_interval_covers_the_truth_in_95_percent(seed):
    """95 % of 400 sets of 60 questions; the percentile bootstrap covers slightly less, and 400 sets have an error of 1.1 %."""
    draw, covered = np.random.default_rng(seed), 0
    for _ in range(400):
        interval = mean(*answers(draw, 60), resamples=600, seed=int(draw.integers(1 << 30)))
        covered += interval.low <= 0.7 <= interval.high
    assert 0.89 < covered / 400 < 0.99


def test_paired_interval_covers_and_is_narrow(seed):
    """Both drafts answer the same questions; the second accepts 5 % fewer tokens."""
    draw, covered, widths = np.random.default_rng(seed), 0, []
    for _ in range(200):
        sums, counts = answers(draw, 60)
        worse = draw.binomial(sums.astype(int), 0.95).astype(float)
        interval = gap((sums, counts), (worse, counts), resamples=600, seed=int(draw.integers(1 << 30)))
        covered += interval.low <= 0.7 * 0.05 <= interval.high
        widths.append((interval.high - interval.low) / (mean(sums, counts, 600).high - mean(sums, counts, 600).low))
    assert 0.87 < covered / 200 < 0.995 and np.mean(widths) < 0.5


def test_gap_to_itself_is_zero_and_gap_is_antisymmetric(seed):
    """The difference of a drafter to itself is 0, and exchanging the two sides changes only the sign."""
    draw = np.random.default_rng(seed)
    one, other = answers(draw, 20), answers(draw, 20, 0.5)
    same = gap(one, one)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    there, back = gap(one, other, resamples=2500), gap(other, one, resamples=2500)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there == gap(one, other, resamples=2500) != gap(one, other, resamples=2500, seed=1)


def test_resamples_with_zero_count_are_left_out():
    """A question without a round: a quarter of the resamples contain nothing else; the ratio of all others is 3/2."""
    interval = mean(np.array([0.0, 3.0]), np.array([0.0, 2.0]))
    assert (interval.value, interval.low, interval.high) == (1.5, 1.5, 1.5)
    assert gap((np.array([0.0, 3.0]), np.array([0.0, 2.0])), (np.ones(2), np.ones(2))).high == 0.5
    assert all(np.isnan(part) for part in vars(mean(np.zeros(2), np.zeros(2))).values())
