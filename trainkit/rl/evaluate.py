"""Evaluation of a policy: accuracy of greedy text, pass@k of samples and best-of-n win rates, with intervals over prompts.

A missing reward (NaN) counts nowhere: neither as right nor as wrong.
"""

# P prompts  S samples of a prompt

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from trainkit.eval.bootstrap import Interval, mean
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.rollout import Rollouts
from trainkit.rl.types import Group, Task


def evaluate(
    rollouts: Rollouts, rewards: Rewards, tasks: Sequence[Task], k: Sequence[int] = (), step: int = 0, correct: float = 1.0
) -> tuple[dict[str, float], list[Group], list[Group]]:
    """Metrics of a policy on tasks, and the groups of its greedy responses and of its samples.

    Greedy text gives `accuracy` and `reward`. Samples give `pass@K` and `sampled_reward`; they are drawn only if `k` is given.
    Each has its 95 % interval in `NAME_low` and `NAME_high`. `length` and `truncated` are of greedy text. `missing` counts the
    responses without a reward.

    Args:
        rollouts: Generates; its number of samples and its temperature are those of pass@k.
        rewards: Scores.
        tasks: What to answer.
        k: Numbers of attempts; none may exceed the number of samples.
        step: Fixes the draws of the samples, together with the seed of `rollouts`.
        correct: Reward from which a response is right.
    """
    greedy = [Group(task, [response]) for task, response in zip(tasks, rollouts.greedy(tasks), strict=True)]
    sampled = rollouts.generate(tasks, step) if k else []
    for groups in (greedy, sampled):
        rewards.score(groups, step)
    metrics = greedy_metrics(greedy, correct) | sample_metrics(sampled, k, correct)
    metrics["missing"] = float(sum(math.isnan(response.reward) for group in greedy + sampled for response in group.responses))
    return metrics, greedy, sampled


def greedy_metrics(groups: Sequence[Group], correct: float = 1.0) -> dict[str, float]:
    """Accuracy and mean reward with intervals, mean length in tokens, and the share that the length limit cut."""
    rewards_PS = reward_table(groups)
    responses = [response for group in groups for response in group.responses]
    return {
        **_named("accuracy", _mean(np.where(np.isnan(rewards_PS), np.nan, rewards_PS >= correct))),
        **_named("reward", _mean(rewards_PS)),
        "length": float(np.mean([len(response.tokens) for response in responses])),
        "truncated": float(np.mean([response.finish in ("length", "max_len") for response in responses])),
    }


def sample_metrics(groups: Sequence[Group], k: Sequence[int], correct: float = 1.0) -> dict[str, float]:
    """pass@k for each `k` and the mean reward of the samples, with intervals; nothing without groups."""
    if not groups:
        return {}
    rewards_PS = reward_table(groups)
    right_P, samples_P = (rewards_PS >= correct).sum(1), (~np.isnan(rewards_PS)).sum(1)
    metrics = _named("sampled_reward", _mean(rewards_PS))
    for attempts in k:
        metrics |= _named(f"pass@{attempts}", pass_at_k(right_P, samples_P, attempts))
    return metrics


def pass_at_k(right_P: np.ndarray, samples_P: np.ndarray | int, k: int, seed: int = 0) -> Interval:
    """Probability that at least one of `k` attempts is right, in mean over prompts, with its interval over prompts.

    Unbiased for each prompt: 1 - C(n - c, k) / C(n, k), n samples of which c are right. Chen et al. 2021, arXiv 2107.03374.
    Prompts with fewer than `k` samples are left out.

    Args:
        right_P: Number of right samples of each prompt.
        samples_P: Number of samples of each prompt, or of all.
        k: Number of attempts.
        seed: Seed of the resamples.
    """
    pairs = zip(right_P.tolist(), np.broadcast_to(samples_P, right_P.shape).tolist(), strict=True)
    values_P = np.array([1 - math.comb(n - c, k) / math.comb(n, k) if n >= k else np.nan for c, n in pairs])
    return _mean(values_P[:, None], seed)


def win_rate(first_PS: np.ndarray, second_PS: np.ndarray, n: int, seed: int = 0) -> Interval:
    """Probability that the best of `n` samples of the first policy has a higher reward than the best of `n` of the second.

    Ties count half. With more than `n` samples of a prompt it is the mean over all subsets of `n` of each side, which has less
    variance than one subset. Prompts with fewer than `n` samples on either side are left out. The interval is over prompts.

    Args:
        first_PS: Rewards of the first policy; NaN is left out.
        second_PS: Rewards of the second policy to the same prompts; the number of samples may differ.
        n: Number of samples that each side chooses from.
        seed: Seed of the resamples.
    """
    values_P = np.full(len(first_PS), np.nan)
    for p, sides in enumerate(zip(first_PS, second_PS, strict=True)):
        first_S, second_S = (np.sort(side[~np.isnan(side)]) for side in sides)
        if min(len(first_S), len(second_S)) >= n:
            below_S = np.searchsorted(second_S, first_S, "left"), np.searchsorted(second_S, first_S, "right")
            # Probability that the best of the second side is among its lowest m samples, m = 0, 1, ...
            total_M = np.concatenate([[0.0], np.cumsum(_best_of(n, len(second_S)))])
            values_P[p] = _best_of(n, len(first_S)) @ (total_M[below_S[0]] + total_M[below_S[1]]) / 2
    return _mean(values_P[:, None], seed)


def reward_table(groups: Sequence[Group]) -> np.ndarray:
    """Rewards [P, S] of groups; NaN where one is missing or a group has fewer responses than the largest."""
    table_PS = np.full((len(groups), max(len(group.responses) for group in groups)), np.nan)
    for row_S, group in zip(table_PS, groups, strict=True):
        row_S[: len(group.responses)] = [response.reward for response in group.responses]
    return table_PS


def rows(groups: Sequence[Group], **columns: Any) -> list[dict[str, Any]]:
    """A row for each response: given columns, prompt, text, rewards, advantage, length, finish, and what rewards logged."""
    return [
        columns
        | {"task": group.task.index, "prompt": group.task.prompt, "completion": response.text, "reward": response.reward}
        | {f"reward/{name}": value for name, value in response.rewards.items()}
        | {"advantage": response.advantage, "length": len(response.tokens), "finish": response.finish}
        | {f"log/{column}": value for column, value in response.extra.items()}
        for group in groups
        for response in group.responses
    ]


def _best_of(n: int, samples: int) -> np.ndarray:
    """[samples] probability of each sample, in ascending order, to be the largest of a random subset of `n`."""
    return np.array([math.comb(rank, n - 1) / math.comb(samples, n) for rank in range(samples)])


def _mean(values_PS: np.ndarray, seed: int = 0) -> Interval:
    counted_PS = ~np.isnan(values_PS)
    return mean(np.where(counted_PS, values_PS, 0.0).sum(1), counted_PS.sum(1).astype(float), seed=seed)


def _named(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
