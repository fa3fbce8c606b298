"""Bootstrap confidence intervals that resample questions, because the tokens of one answer are not independent."""

# Q questions  S training seeds  R resamples

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000

Measured = tuple[np.ndarray, np.ndarray]
"""Sums over each question, and the counts that divide them (tokens, rounds): [Q], or [S, Q] for several training seeds."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the 95 % interval of the percentile bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (round(part, 4) + 0.0 for part in (self.value, self.low, self.high))  # + 0.0 turns -0 into 0
        return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def mean(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Ratio of sums to counts, averaged over training seeds, with its interval over questions.

    Args:
        sums: Sum for each question, [Q] or [S, Q].
        counts: Divisor of each sum, in the same shape.
        resamples: Number of resamples, R.
        seed: Seed for resampling.
    """
    draws = [_ratio((sums, counts), weights_RQ) for weights_RQ in _weights(np.shape(sums)[-1], resamples, seed)]
    return _interval(_ratio((sums, counts)), draws)


def gap(first: Measured, second: Measured, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Difference of the two ratios, first minus second; each resample takes the same questions of both.

    Efron and Tibshirani 1993, chapter 13. Training seeds are averaged, not resampled, because three seeds are too few to
    estimate their spread; report it separately. The two sides may have different numbers of seeds.
    """
    assert np.shape(first[0])[-1] == np.shape(second[0])[-1]
    weights = _weights(np.shape(first[0])[-1], resamples, seed)
    draws = [_ratio(first, weights_RQ) - _ratio(second, weights_RQ) for weights_RQ in weights]
    return _interval(_ratio(first) - _ratio(second), draws)


def _interval(value: np.ndarray, draws: list[np.ndarray]) -> Interval:
    ratios = np.concatenate(draws)
    ratios = ratios[~np.isnan(ratios)]  # a resample of questions whose counts are all 0 has no ratio
    low, high = np.quantile(ratios, [0.025, 0.975]) if len(ratios) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _ratio(measured: Measured, weights_RQ: np.ndarray | None = None) -> np.ndarray:
    """Weighted sum of sums / weighted sum of counts over questions, averaged over seeds; [R], or a scalar without weights."""
    sums_SQ, counts_SQ = np.atleast_2d(measured[0]), np.atleast_2d(measured[1])
    with np.errstate(invalid="ignore"):
        if weights_RQ is None:
            return (sums_SQ.sum(1) / counts_SQ.sum(1)).mean()
        return ((weights_RQ @ sums_SQ.T) / (weights_RQ @ counts_SQ.T)).mean(1)


def _weights(questions: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample takes each question, in blocks of at most a thousand resamples."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        yield generator.multinomial(questions, [1 / questions] * questions, size=size).astype(np.float64)
