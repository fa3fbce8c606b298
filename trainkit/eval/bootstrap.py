"""Confidence intervals by resampling questions: tokens of one answer are not independent, answers are."""

# Q questions  S training seeds  R resamples

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000

Measured = tuple[np.ndarray, np.ndarray]
"""Sums over each question, and what they are divided by (tokens, rounds): [Q], or [S, Q] of several training seeds."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the 95 % interval of the percentile bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (round(part, 4) + 0.0 for part in (self.value, self.low, self.high))  # no minus before 0
        return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def mean(sums: np.ndarray, counts: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Ratio of sums to counts, averaged over training seeds, with its interval over questions.

    Args:
        sums: [Q] or [S, Q].
        counts: Of the same shape.
        resamples: R.
        seed: Of the resampling.
    """
    draws = [_ratio((sums, counts), weights_RQ) for weights_RQ in _weights(np.shape(sums)[-1], resamples, seed)]
    return _interval(_ratio((sums, counts)), draws)


def gap(first: Measured, second: Measured, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The first's ratio minus the second's, questions paired: each resample takes the same questions of both.

    Efron and Tibshirani 1993, chapter 13. Training seeds are averaged over, not resampled: three say too little of their
    spread; print it beside. The numbers of seeds may differ.
    """
    assert np.shape(first[0])[-1] == np.shape(second[0])[-1]
    weights = _weights(np.shape(first[0])[-1], resamples, seed)
    draws = [_ratio(first, weights_RQ) - _ratio(second, weights_RQ) for weights_RQ in weights]
    return _interval(_ratio(first) - _ratio(second), draws)


def _interval(value: np.ndarray, draws: list[np.ndarray]) -> Interval:
    told = np.concatenate(draws)
    told = told[~np.isnan(told)]  # a resample of questions that count nothing says nothing
    low, high = np.quantile(told, [0.025, 0.975]) if len(told) else (np.nan, np.nan)
    return Interval(float(value), float(low), float(high))


def _ratio(measured: Measured, weights_RQ: np.ndarray | None = None) -> np.ndarray:
    """Sum over questions of the one by that of the other, averaged over seeds; [R] with weights."""
    sums_SQ, counts_SQ = np.atleast_2d(measured[0]), np.atleast_2d(measured[1])
    with np.errstate(invalid="ignore"):
        if weights_RQ is None:
            return (sums_SQ.sum(1) / counts_SQ.sum(1)).mean()
        return ((weights_RQ @ sums_SQ.T) / (weights_RQ @ counts_SQ.T)).mean(1)


def _weights(questions: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each question is taken, a thousand resamples at a time."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        yield generator.multinomial(questions, [1 / questions] * questions, size=size).astype(np.float64)
