"""Bootstrap confidence intervals that resample questions, because the tokens of one answer are not independent."""

# Q questions  S training seeds  R resamples

from __future__ import annotations

from collections.abc import Callable
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
    """Ratio of sums to counts (as in `Measured`), averaged over training seeds, with its interval over questions."""
    return _bootstrap(lambda weights_RQ: _ratio((sums, counts), weights_RQ), np.shape(sums)[-1], resamples, seed)


def gap(first: Measured, second: Measured, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Difference of the two ratios, first minus second; each resample takes the same questions of both.

    Efron and Tibshirani 1993, chapter 13. Training seeds are averaged, not resampled, because three seeds are too few to
    estimate their spread; report it separately. The two sides may have different numbers of seeds.
    """
    questions = np.shape(first[0])[-1]
    assert questions == np.shape(second[0])[-1]
    return _bootstrap(lambda w_RQ: _ratio(first, w_RQ) - _ratio(second, w_RQ), questions, resamples, seed)


def _bootstrap(statistic_R: Callable[[np.ndarray], np.ndarray], questions: int, resamples: int, seed: int) -> Interval:
    """The statistic of all questions, and its interval; weights [R, Q] state how often each resample takes each question."""
    generator, draws = np.random.default_rng(seed), []
    for start in range(0, resamples, 1000):  # in blocks, to limit memory
        size = min(1000, resamples - start)
        draws.append(statistic_R(generator.multinomial(questions, [1 / questions] * questions, size=size).astype(np.float64)))
    values_R = np.concatenate(draws)
    values_R = values_R[~np.isnan(values_R)]  # a resample of questions whose counts are all 0 has no ratio
    low, high = np.quantile(values_R, [0.025, 0.975]) if len(values_R) else (np.nan, np.nan)
    return Interval(float(statistic_R(np.ones((1, questions)))[0]), float(low), float(high))


def _ratio(measured: Measured, weights_RQ: np.ndarray) -> np.ndarray:
    """[R] weighted sum of sums / weighted sum of counts over questions, averaged over seeds."""
    sums_SQ, counts_SQ = np.atleast_2d(measured[0]), np.atleast_2d(measured[1])
    with np.errstate(invalid="ignore"):
        return ((weights_RQ @ sums_SQ.T) / (weights_RQ @ counts_SQ.T)).mean(1)
