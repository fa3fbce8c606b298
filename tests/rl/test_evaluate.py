"""Accuracy, pass@k and win rates against enumeration and hand calculation; missing rewards count nowhere."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from trainkit.rl.evaluate import evaluate, pass_at_k, rows, win_rate
from trainkit.rl.types import Group, Response, Task

NAN = float("nan")


def response(text: str, reward: float = NAN, finish: str = "end") -> Response:
    return Response([1] * len(text), text, finish, [0.0] * len(text), rewards={"exact": reward}, reward=reward)


class Fixed:
    """Stands for rollouts: greedy text is the task's answer for even tasks, and of 4 samples the first `index` are right."""

    def greedy(self, tasks):
        return [response(task.columns["answer"] if task.index % 2 == 0 else "no", finish="end") for task in tasks]

    def generate(self, tasks, step):
        assert step == 7
        texts = [[task.columns["answer"] if n < task.index else "no" for n in range(4)] for task in tasks]
        return [Group(task, [response(text, finish="length") for text in row]) for task, row in zip(tasks, texts, strict=True)]


class Exact:
    """Stands for rewards: 1 for the answer, 0 otherwise, none for the first response to task `missing`."""

    def __init__(self, missing: int | None = None) -> None:
        self.missing = missing

    def score(self, groups, step):
        for group in groups:
            for n, each in enumerate(group.responses):
                lost = group.task.index == self.missing and n == 0
                each.reward = NAN if lost else float(each.text == group.task.columns["answer"])
                each.rewards = {"exact": each.reward}


TASKS = [Task(index, [5], f"{index}+0=", {"answer": str(index)}) for index in range(5)]


def test_evaluate_gives_metrics_and_groups():
    """Tasks 0, 2, 4 are right greedily; of 4 samples 0 to 4 are right, so pass@1 is 1/2 and pass@2 (0 + 1/2 + 5/6 + 2) / 5."""
    metrics, greedy, sampled = evaluate(Fixed(), Exact(), TASKS, k=(1, 2), step=7)
    assert metrics["accuracy"] == metrics["reward"] == 0.6 and metrics["accuracy_low"] < 0.6 < metrics["accuracy_high"]
    assert metrics["pass@1"] == pytest.approx(0.5) and metrics["pass@2"] == pytest.approx((0 + 1 / 2 + 5 / 6 + 1 + 1) / 5)
    assert metrics["sampled_reward"] == 0.5 and metrics["missing"] == metrics["truncated"] == 0
    assert metrics["length"] == pytest.approx((1 + 2 + 1 + 2 + 1) / 5)
    assert [len(group.responses) for group in greedy + sampled] == [1] * 5 + [4] * 5


def test_evaluate_without_k_draws_no_samples():
    """Without `k` there is no metric of samples and `generate` is not called."""
    metrics, _, sampled = evaluate(Fixed(), Exact(), TASKS)
    assert sampled == [] and not [name for name in metrics if "pass" in name or "sampled" in name]


def test_missing_rewards_count_nowhere():
    """Task 4's greedy reward and first sample are missing: 2 of 4 are right, and its pass@2 is over its other 3 samples."""
    metrics, *_ = evaluate(Fixed(), Exact(missing=4), TASKS, k=(1, 4), step=7)
    assert metrics["accuracy"] == 0.5 and metrics["missing"] == 2
    assert metrics["pass@1"] == pytest.approx((0 + 1 / 4 + 1 / 2 + 3 / 4 + 1) / 5)
    assert metrics["pass@4"] == pytest.approx((0 + 1 + 1 + 1) / 4), "a prompt with fewer than k samples is left out"


def test_pass_at_k_equals_enumeration(seed):
    """For random counts, the share of all subsets of k samples that hold a right one."""
    draw = np.random.default_rng(seed)
    samples_P, k = draw.integers(3, 8, 6), int(draw.integers(1, 4))
    right_P = np.array([draw.integers(0, n + 1) for n in samples_P])
    expected = [
        np.mean([any(n < right for n in subset) for subset in combinations(range(samples), k)])
        for right, samples in zip(right_P, samples_P, strict=True)
    ]
    interval = pass_at_k(right_P, samples_P, k)
    assert interval.value == pytest.approx(np.mean(expected)) and interval.low <= interval.value <= interval.high


def test_pass_at_k_of_one_attempt_is_the_mean_and_grows_with_k():
    """3 of 10 and 0 of 10: pass@1 is 0.15, pass@10 is 0.5, as in arXiv 2107.03374's formula."""
    values = [pass_at_k(np.array([3, 0]), 10, k).value for k in (1, 5, 10)]
    assert values == pytest.approx([0.15, (1 - math.comb(7, 5) / math.comb(10, 5)) / 2, 0.5])


def test_win_rate_equals_enumeration_of_subsets(seed):
    """For random rewards with ties and missing ones: all pairs of subsets of n, ties half."""
    draw = np.random.default_rng(seed)
    first_PS, second_PS = (draw.integers(0, 5, (3, samples)).astype(float) for samples in (6, 5))
    first_PS[0, 2] = NAN
    for n in (1, 2, 4):
        expected = []
        for first, second in zip(first_PS, second_PS, strict=True):
            pairs = [
                (max(a) > max(b)) + (max(a) == max(b)) / 2
                for a in combinations(first[~np.isnan(first)], n)
                for b in combinations(second, n)
            ]
            expected.append(np.mean(pairs))
        assert win_rate(first_PS, second_PS, n).value == pytest.approx(np.mean(expected))
        assert win_rate(first_PS, first_PS, n).value == pytest.approx(0.5)


def test_win_rate_by_hand():
    """Best of 2 of (1, 3) against (2, 2): 3 wins. Against (3, 0): a tie. Prompts with fewer than n samples are left out."""
    first, second = np.array([[1.0, 3.0], [1.0, 3.0], [9.0, NAN]]), np.array([[2.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    interval = win_rate(first, second, 2)
    assert interval.value == 0.75 and (interval.low, interval.high) == (0.5, 1.0)


def test_rows_hold_the_given_columns_first():
    """Columns of the caller come first, then prompt, completion, rewards, advantage, length, finish, what functions logged."""
    known = response("abc", 0.5)
    known.advantage, known.extra = 1.5, {"parsed": "a"}
    (row,) = rows([Group(TASKS[1], [known])], step=3)
    names = "step task prompt completion reward reward/exact advantage length finish log/parsed"
    assert list(row) == names.split() and (row["advantage"], row["log/parsed"]) == (1.5, "a")
