"""The groups of one RL step: prompts by a cursor, responses, rewards, advantages, dynamic sampling; equal for any rank count.

Prompts come from an endless sequence, all tasks in random order again and again, and a step takes the next ones. Responses are
drawn by (seed, step, task, sample). So the groups of a step depend on seed, step and cursor alone. Left out on purpose: groups
that dynamic sampling generated beyond what the step needs are dropped, not carried over, so that a checkpoint has no text.
"""

# P prompts  G responses of a prompt

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isfinite, nan
from typing import Any, TypeVar

import torch

from trainkit.data.mixture import sequence
from trainkit.errors import UserError
from trainkit.rl.algorithms import Algorithm, has_signal
from trainkit.rl.infalign import InfAlign
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.rollout import Rollouts
from trainkit.rl.types import Group, Response, Task
from trainkit.runner.stats import Stats

T = TypeVar("T")
ROUNDS = 4
"""Largest number of times that dynamic sampling generates in one step."""
OVERSAMPLE = 1.5
"""Prompts that dynamic sampling tries for each group that it needs."""


@dataclass
class Collected:
    """What one rank trains on in one step.

    Attributes:
        groups: Its groups with their advantages [G], by their number among all groups of the step.
        generated: The groups that this rank generated, also those that nobody trains on.
        cursor: Prompts that were used up to the end of this step.
        valid: Number of rewards that are not missing, over all ranks.
        candidates: Number of groups generated, over all ranks.
        kept: Number of groups that are trained on, over all ranks.
        failures: Calls of reward functions that failed or took too long, as `failures/NAME` and `timeouts/NAME`.
        seconds: Time by phase.
    """

    groups: dict[int, tuple[Group, torch.Tensor]]
    generated: list[Group]
    cursor: int
    valid: int
    candidates: int
    kept: int
    failures: dict[str, float]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Collector:
    """Makes the groups of a step.

    Group number n is trained on in minibatch n % minibatches, by rank n // minibatches % world_size, so that whole groups are
    spread evenly however many there are.

    Attributes:
        rollouts: Generates responses.
        rewards: Scores them; None if nothing reads rewards.
        algorithm: Gives advantages, the penalty for length, and whether groups without signal are replaced.
        tasks: All prompts.
        prompts: Groups in a step, over all ranks.
        minibatches: Optimiser steps that share the groups.
        limit: Largest number of tokens in a response.
        seed: Seed of the order of prompts.
        rank: Number of this process.
        world_size: Number of processes.
        gather: Gives the objects of all ranks, by rank.
        transform: Changes rewards before advantages; None leaves them.
    """

    rollouts: Rollouts
    rewards: Rewards | None
    algorithm: Algorithm
    tasks: Sequence[Task]
    prompts: int
    minibatches: int
    limit: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    transform: InfAlign | None = None

    def owner(self, number: int) -> int:
        """The rank of a group."""
        return number // self.minibatches % self.world_size

    def collect(self, step: int, cursor: int) -> Collected:
        """The groups of a step; every rank must call it.

        With dynamic sampling, a round tries 1.5 prompts for each group that is still missing, and groups whose rewards are all
        equal are dropped (by the rewards before shaping, arXiv 2503.14476). After four rounds the step is as it is.

        Raises:
            UserError: the rewards of a rank raised it; then every rank does.
        """
        dynamic = self.algorithm.dynamic_sampling
        generated: dict[int, Group] = {}  # by number of the candidate
        kept: list[int] = []  # candidates with signal, of all ranks
        used, count, failures, seconds = set[int](), 0, Counter[str](), {"rollouts": 0.0, "rewards": 0.0}
        for _ in range(ROUNDS if dynamic else 1):
            wanted = self.prompts - len(kept)
            chosen, cursor = self._next(ceil(OVERSAMPLE * wanted) if dynamic else wanted, cursor, used)
            numbers = range(count, count + len(chosen))
            count += len(chosen)
            mine = [number for number in numbers if self.owner(number) == self.rank]
            start = time.perf_counter()
            groups = self.rollouts.generate([self.tasks[chosen[number - numbers.start]] for number in mine], step)
            seconds["rollouts"] += time.perf_counter() - start
            start = time.perf_counter()
            if (rewards := self.rewards) is not None:
                counts = together(self.gather, partial(rewards.score, groups, step))
                failures.update({name: n for name, n in counts.items() if name.startswith(("failures/", "timeouts/"))})
            seconds["rewards"] += time.perf_counter() - start
            generated |= zip(mine, groups, strict=True)
            found = [number for number, group in zip(mine, groups, strict=True) if not dynamic or _has_signal(group)]
            kept = sorted([*kept, *(number for part in self.gather(found) for number in part)])[: self.prompts]
            if len(kept) == self.prompts or len(used) == len(self.tasks):
                break
        mine = self._exchange({number: generated[number] for number in kept if number in generated}, kept)
        valid = sum(self.gather(sum(isfinite(r.reward) for group in generated.values() for r in group.responses)))
        return Collected(
            groups=self._with_advantages(mine),
            generated=list(generated.values()),
            cursor=cursor,
            valid=valid,
            candidates=count,
            kept=len(kept),
            failures={name: float(n) for name, n in failures.items()},
            seconds=seconds,
        )

    def _next(self, wanted: int, cursor: int, used: set[int]) -> tuple[list[int], int]:
        """Up to `wanted` tasks after the cursor that this step has not used, and the cursor after them."""
        chosen: list[int] = []
        while len(chosen) < wanted and len(used) < len(self.tasks):
            for index in sequence(len(self.tasks), cursor, wanted - len(chosen), self.seed):
                cursor += 1
                if index not in used:
                    used.add(index)
                    chosen.append(index)
        return chosen, cursor

    def _exchange(self, held: dict[int, Group], kept: list[int]) -> dict[int, Group]:
        """The groups that this rank trains on, by their number among the kept ones."""
        if self.algorithm.dynamic_sampling and self.world_size > 1:
            held = {number: group for part in self.gather(held) for number, group in part.items()}
        mine = {position: held.get(number) for position, number in enumerate(kept) if self.owner(position) == self.rank}
        assert all(group is not None for group in mine.values())
        return mine  # type: ignore[return-value]

    def _with_advantages(self, groups: dict[int, Group]) -> dict[int, tuple[Group, torch.Tensor]]:
        """The groups with their advantages; from the rewards of all ranks, so that statistics over a batch are exact."""
        mine = {number: [self._reward(group.task, r) for r in group.responses] for number, group in groups.items()}
        rewards = sorted((number, values) for part in self.gather(mine) for number, values in part.items())
        if not rewards:
            return {}
        advantage_PG = self.algorithm.advantages(torch.tensor([values for _, values in rewards], dtype=torch.float64))
        rows = {number: row for row, (number, _) in enumerate(rewards)}
        found = {number: (group, advantage_PG[rows[number]]) for number, group in groups.items()}
        for group, advantage_G in found.values():
            for response, advantage in zip(group.responses, advantage_G.tolist(), strict=True):
                response.advantage = advantage
        return found

    def _reward(self, task: Task, response: Response) -> float:
        """The reward to train on: transformed, then shaped by length; NaN if it is missing."""
        reward = response.reward
        if self.transform is not None and isfinite(reward):
            reward = self.transform.transform(task.index, reward)
        return reward + self.algorithm.shape_reward(len(response.tokens), self.limit)


def together(gather: Callable[[Any], list[Any]], work: Callable[[], T]) -> T:
    """The result of `work`. If it raises UserError on one rank, every rank raises it, because the others would wait."""
    result, message = None, ""
    try:
        result = work()
    except UserError as error:
        message = str(error)
    if messages := [text for text in gather(message) if text]:
        raise UserError(messages[0])
    return result  # type: ignore[return-value]


def _has_signal(group: Group) -> bool:
    return bool(has_signal(torch.tensor([[response.reward for response in group.responses]])))


def statistics(groups: Sequence[Group]) -> tuple[dict[str, float], dict[str, float]]:
    """Sums over groups, which `rollout_means` divides once they are added over ranks and steps, and the longest length."""
    responses = [response for group in groups for response in group.responses]
    sums = {"groups": float(len(groups)), "responses": float(len(responses))}
    sums["zero_variance"] = float(sum(not _has_signal(group) for group in groups))
    sums["tokens"] = float(sum(len(response.tokens) for response in responses))
    sums["truncated"] = float(sum(response.finish in ("length", "max_len") for response in responses))
    named = [("reward", [response.reward for response in responses])]
    for name in sorted({name for response in responses for name in response.rewards}):
        named.append((f"reward/{name}", [response.rewards.get(name, nan) for response in responses]))
    for name, values in named:
        known = [value for value in values if isfinite(value)]
        sums |= {f"sum {name}": float(sum(known)), f"known {name}": float(len(known))}
    stats = Stats.merge(response.stats for response in responses)
    first, drafts = stats.first_drafts
    sums |= {
        "first": float(first),
        "drafts": float(drafts),
        "rounds": float(stats.rounds),
        "paused": float(stats.paused),
        "emitted": stats.rounds * stats.tau if stats.rounds else 0.0,
    }
    for k, offered in enumerate(stats.offered):
        if k:
            sums |= {f"offered {k}": float(offered), f"accepted {k}": float(sum(stats.accepted[k:]))}
    return sums, {"length_max": float(max((len(response.tokens) for response in responses), default=0))}


def rollout_means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of the generated responses, by name, from the sums of `statistics`."""
    responses = max(sums["responses"], 1.0)
    values = {
        name[4:]: v / sums[f"known{name[3:]}"] for name, v in sums.items() if name[:4] == "sum " and sums[f"known{name[3:]}"]
    }
    known = {name.removeprefix("known reward"): v for name, v in sums.items() if name.startswith("known reward/")}
    values |= {f"missing{name}": 1 - v / responses for name, v in known.items()}
    values |= {
        "missing": 1 - sums["known reward"] / responses,
        "zero_variance": sums["zero_variance"] / max(sums["groups"], 1.0),
    }
    values |= {"length": sums["tokens"] / responses, "truncated": sums["truncated"] / responses}
    values |= {name: v for name, v in sums.items() if name.startswith(("failures/", "timeouts/"))}
    if sums.get("drafts"):
        values["first_accepted"] = sums["first"] / sums["drafts"]
    depth = sum(name.startswith("offered ") for name in sums)
    if depth:  # something was drafted
        rounds = max(sums["rounds"], 1.0)
        values |= {"tau": sums["emitted"] / rounds, "paused": sums["paused"] / rounds}
        values |= {f"alpha_{k}": sums[f"accepted {k}"] / max(sums[f"offered {k}"], 1.0) for k in range(1, depth + 1)}
    return values
