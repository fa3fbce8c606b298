"""The groups of a step do not depend on how many ranks share them."""

from __future__ import annotations

import random
import threading
from functools import partial

import pytest
import torch

from trainkit.errors import UserError
from trainkit.rl.algorithms import DAPO, GRPO, Algorithm
from trainkit.rl.collect import Collected, Collector, rollout_means, statistics
from trainkit.rl.types import Group, Response, Task

TASKS = [Task(index, [index], f"prompt {index}") for index in range(40)]


class Rollouts:
    """Two to four tokens for each response, fixed by (step, task, sample)."""

    def generate(self, tasks, step: int) -> list[Group]:
        return [Group(task, [self.response(step, task.index, sample) for sample in range(4)]) for task in tasks]

    def response(self, step: int, task: int, sample: int) -> Response:
        draw = random.Random(f"{step} {task} {sample}")
        tokens = [draw.randrange(9) for _ in range(draw.randint(2, 4))]
        return Response(tokens, "", "end", [0.0] * len(tokens))


class Rewards:
    """1 if the first token is below `bound`, missing for some; raises for the tasks in `bad`."""

    def __init__(self, bound: int = 4, bad: tuple[int, ...] = ()) -> None:
        self.bound, self.bad = bound, bad

    def score(self, groups, step: int) -> dict[str, int]:
        for group in groups:
            if group.task.index in self.bad:
                raise UserError(f"task {group.task.index} has no answer")
            for response in group.responses:
                missing = response.tokens[-1] == 8 and len(response.tokens) == 4
                response.reward = float("nan") if missing else float(response.tokens[0] < self.bound)
                response.rewards = {"first": response.reward}
        return {"failures/first": 1, "timeouts/first": 0, "missing": 5}


class Ranks:
    """Runs a collector per rank in threads; `gather` waits for all of them."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.values = size, threading.Barrier(size, timeout=20), [None] * size

    def gather(self, rank: int, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found

    def run(self, step: int, cursor: int, **options) -> list[Collected | Exception]:
        results: list = [None] * self.size

        def work(rank: int) -> None:
            values = {"rollouts": Rollouts(), "rewards": Rewards(), "algorithm": GRPO(), "tasks": TASKS, "prompts": 8}
            values |= {"minibatches": 2, "limit": 4, "seed": 3, "rank": rank, "world_size": self.size}
            collector = Collector(**(values | options), gather=partial(self.gather, rank))
            try:
                results[rank] = collector.collect(step, cursor)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def merged(parts: list[Collected]) -> list[tuple]:
    """All groups by number, as task, tokens and advantages."""
    numbered = sorted((number, group, advantage) for part in parts for number, (group, advantage) in part.groups.items())
    return [(n, g.task.index, [r.tokens for r in g.responses], a.tolist()) for n, g, a in numbered]


@pytest.mark.parametrize("algorithm", [GRPO, partial(GRPO, scale="batch"), DAPO], ids=["group", "batch", "dynamic"])
def test_groups_do_not_depend_on_ranks(algorithm, seed):
    """Groups, numbers, advantages and cursor with 1, 2 and 4 ranks, whatever is dropped and refilled."""
    for step in range(6):
        cursor = random.randint(0, 200)
        bound = random.choice([1, 4, 8])
        one, *others = (Ranks(size).run(step, cursor, algorithm=algorithm(), rewards=Rewards(bound)) for size in (1, 2, 4))
        wanted = merged(one)
        assert wanted and len({task for _, task, _, _ in wanted}) == len(wanted)
        for parts in others:
            assert merged(parts) == wanted
            assert {(p.cursor, p.valid, p.candidates, p.kept) for p in parts} == {
                (one[0].cursor, one[0].valid, one[0].candidates, one[0].kept)
            }
            sizes = [len(part.groups) for part in parts]
            assert max(sizes) - min(sizes) <= 2, "groups are dealt evenly"  # one per minibatch


def test_refill_replaces_groups_without_signal(seed):
    """Every kept group has two different rewards; the first candidates with signal are kept, in order."""
    (part,) = Ranks(1).run(0, 5, algorithm=DAPO(), rewards=Rewards(2))
    assert part.failures["failures/first"] > 1 and part.failures["timeouts/first"] == 0, "one in each round"
    assert part.candidates > 12 and part.cursor == 5 + part.candidates
    informative = [g for g in part.generated if len({r.reward for r in g.responses if r.reward == r.reward}) > 1]
    assert [group.task.index for group, _ in part.groups.values()] == [g.task.index for g in informative[:8]]
    assert part.kept == min(8, len(informative))


def test_refill_stops_after_four_rounds(seed):
    """With rewards that are always equal nothing is kept, and no prompt is tried twice."""
    (part,) = Ranks(1).run(0, 0, algorithm=DAPO(), rewards=Rewards(9))
    assert part.kept == 0 and not part.groups
    assert part.candidates == len({group.task.index for group in part.generated}) == 40
    tasks = [Task(index, [index], "") for index in range(400)]
    (part,) = Ranks(1).run(0, 0, algorithm=DAPO(), rewards=Rewards(9), tasks=tasks)
    assert part.candidates == 4 * 12


def test_prompts_continue_at_the_cursor(seed):
    """Steps without refill go through all prompts once before any comes again."""
    cursor, found = 0, []
    for step in range(5):
        (part,) = Ranks(1).run(step, cursor)
        cursor = part.cursor
        found += [group.task.index for group, _ in part.groups.values()]
    assert sorted(found) == list(range(40))


def test_error_on_one_rank_ends_all(seed):
    """A reward that cannot be computed is raised on every rank, none of which waits."""
    found = Ranks(4).run(0, 0, prompts=40, rewards=Rewards(bad=(7,)))
    assert [str(error) for error in found] == ["task 7 has no answer"] * 4


def test_penalty_for_length_is_added_before_advantages(seed):
    """With equal rewards the advantages, which the responses hold too, order responses by length."""

    class Longer(Algorithm):
        def shape_reward(self, length: int, limit: int) -> float:
            return -length / limit

        def terms(self, tokens, log_ratio_RT):
            raise NotImplementedError

    (part,) = Ranks(1).run(0, 0, algorithm=Longer(), rewards=Rewards(9))
    for group, advantage_G in part.groups.values():
        assert [response.advantage for response in group.responses] == advantage_G.tolist()
        kept = [(len(r.tokens), -a) for r, a in zip(group.responses, advantage_G.tolist(), strict=True) if r.reward == 1.0]
        by_length = dict(kept)
        assert all(by_length[length] == pytest.approx(minus) for length, minus in kept)
        assert [by_length[length] for length in sorted(by_length)] == sorted(by_length.values())


def test_statistics_add_up_over_ranks(seed):
    """Means from the sums of two halves equal those of all groups."""
    (part,) = Ranks(1).run(0, 0, prompts=40)
    groups = part.generated
    halves = [statistics(groups[:15])[0], statistics(groups[15:])[0]]
    total = {name: halves[0].get(name, 0.0) + halves[1].get(name, 0.0) for name in halves[0]}
    values = rollout_means(total)
    assert values == pytest.approx(rollout_means(statistics(groups)[0]))
    rewards = torch.tensor([response.reward for group in groups for response in group.responses])
    assert values["missing"] == pytest.approx(float(rewards.isnan().float().mean()))
    assert values["reward"] == values["reward/first"] == pytest.approx(float(rewards.nanmean()), rel=1e-6)
    assert 0 < values["zero_variance"] < 1
