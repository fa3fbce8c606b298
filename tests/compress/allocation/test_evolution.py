"""The evolutionary search: budgets hold exactly, the optimum is found, and neither kills nor processes change the result."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.support.processes import ended, fork
from trainkit.compress.allocation.evolution import Candidate, Search, Space, Stage
from trainkit.errors import UserError

STEPS = Space([[10 * layer + 7 * level for level in range(5)] for layer in range(6)], 6 * 14 + 150)
"""Six layers of five levels whose steps all cost the same; the budget is the middle level of each."""
MIDDLE = (2,) * 6
SETTINGS = Search(8, 12, (Stage(3, 2), Stage(1, 8)), windows=16, seed=3)


class Separable:
    """A fitness of independent errors of layers and levels, plus noise of the windows that vanishes over many of them."""

    def __init__(self, seed: int, layers: int, levels: int, noise: float = 0.0) -> None:
        draw = random.Random(seed)
        scales = [draw.uniform(0.1, 3) for _ in range(layers)]
        self.errors = [sorted((scale * draw.random() for _ in range(levels)), reverse=True) for scale in scales]
        self.noise = noise
        self.calls: list[tuple[Candidate, tuple[int, ...]]] = []

    def __call__(self, candidate: Candidate, windows: Sequence[int]) -> float:
        self.calls.append((candidate, tuple(windows)))
        exact = sum(errors[level] for errors, level in zip(self.errors, candidate, strict=True))
        wobble = sum(random.Random(f"{candidate} {window}").gauss(0, self.noise) for window in windows)
        return exact + wobble / len(windows)


def test_exchange_keeps_the_cost_where_steps_are_equal(seed: int) -> None:
    """One layer goes a level up and one down, so that the cost is exactly that of the start, also at the ends of the levels."""
    draw, candidate = random.Random(seed), MIDDLE
    seen = set()
    for _ in range(300):
        after = STEPS.exchange(candidate, draw)
        moves = sorted(new - old for new, old in zip(after, candidate, strict=True))
        assert moves == [-1, 0, 0, 0, 0, 1]
        assert STEPS.cost(after) == STEPS.budget and all(0 <= level < 5 for level in after)
        candidate = after
        seen |= set(after)
    assert seen == {0, 1, 2, 3, 4}


def test_exchange_fills_a_budget_of_unequal_steps(seed: int) -> None:
    """Where steps cost differently, the cost stays within the budget, and what is left over is too little for any step."""
    draw = random.Random(seed)
    costs = [[(base := draw.randrange(50)), base + draw.choice([3, 10, 25])] for _ in range(12)]
    lowest, highest = (sum(cost[end] for cost in costs) for end in (0, 1))
    space = Space(costs, (lowest + highest) // 2)
    candidate = space.fill([0] * 12, draw)
    for _ in range(200):
        changed = space.exchange(candidate, draw)
        assert changed != candidate or not any(candidate)
        candidate = changed
        spare = space.budget - space.cost(candidate)
        left = [cost[1] - cost[0] for cost, level in zip(costs, candidate, strict=True) if level == 0]
        assert 0 <= spare < min(left)


def test_exchange_without_a_layer_to_pay_changes_nothing() -> None:
    """A raise that nothing can pay for, or that is impossible because all layers are at their last level, is refused."""
    draw = random.Random(0)
    assert Space([[0, 5], [0, 9]], 4).exchange((0, 0), draw) == (0, 0)
    assert Space([[0, 5], [0, 9]], 14).exchange((1, 1), draw) == (1, 1)


def test_search_finds_the_optimum_of_equal_steps(seed: int) -> None:
    """Where each further level helps a layer less, exchanges lead to the optimum; the search finds that of brute force."""
    fitness = Separable(seed, layers=6, levels=5)
    fitness.errors = [[scale * 0.6**level for level in range(5)] for scale in (torch.rand(6) + 0.1).tolist()]
    best = min(fitness(candidate, (0,)) for candidate in itertools.product(range(5), repeat=6) if sum(candidate) == 12)
    found = Search(20, 24, (Stage(6, 1), Stage(1, 1)), windows=1, seed=seed).run(STEPS, fitness, MIDDLE)
    assert found[-1][0] == pytest.approx(best, abs=1e-12)
    assert [value for value, _ in found] == sorted((value for value, _ in found), reverse=True)  # the parent competes


def test_search_finds_the_optimum_of_unequal_steps(seed: int) -> None:
    """With two levels whose costs differ by layer, as of int4 and int8, the search finds the optimum of brute force."""
    draw = random.Random(seed)
    costs = [[50, 50 + draw.choice([3, 9, 24])] for _ in range(8)]
    space = Space(costs, 8 * 50 + sum(high - low for low, high in costs) // 3)
    fitness = Separable(seed, layers=8, levels=2)
    every = [candidate for candidate in itertools.product(range(2), repeat=8) if space.cost(candidate) <= space.budget]
    found = Search(20, 64, (Stage(1, 1),), windows=1, seed=seed).run(space, fitness)
    assert found[-1][0] == pytest.approx(min(fitness(candidate, (0,)) for candidate in every), abs=1e-12)


def test_search_compares_a_stage_on_equal_windows(seed: int) -> None:
    """All candidates of a stage see the same windows; generations and stages draw others; no candidate comes twice in one."""
    fitness = Separable(seed, 6, 5)
    Search(4, 12, (Stage(3, 2), Stage(1, 8)), windows=16, seed=seed).run(STEPS, fitness, MIDDLE)
    stages = [list(calls) for _, calls in itertools.groupby(fitness.calls, key=lambda call: call[1])]
    assert [len(stage) for stage in stages] == [12, 4] * 4  # three survivors and the parent in the last stage
    assert [len(stage[0][1]) for stage in stages] == [2, 8] * 4
    assert len({stage[0][1] for stage in stages}) > 4
    assert all(len({candidate for candidate, _ in stage}) == len(stage) for stage in stages)


def test_search_keeps_its_parent_if_nothing_is_better() -> None:
    """With equal fitness everywhere the start stays the parent, and each generation has other offspring of it."""
    measured: list[Candidate] = []
    assert {candidate for _, candidate in SETTINGS.run(STEPS, lambda c, _: measured.append(c) or 1.0, MIDDLE)} == {MIDDLE}
    generations = [frozenset(measured[first : first + 12]) for first in range(0, len(measured), 16)]
    assert len(set(generations)) == len(generations) == 8


def test_search_never_takes_a_candidate_without_a_value() -> None:
    """NaN is worse than any value, whether the parent has it or its offspring."""
    only_start = lambda candidate, _: 1.0 if candidate == MIDDLE else math.nan
    assert {candidate for _, candidate in SETTINGS.run(STEPS, only_start, MIDDLE)} == {MIDDLE}
    not_start = lambda candidate, _: math.nan if candidate == MIDDLE else 1.0
    assert MIDDLE not in {candidate for _, candidate in SETTINGS.run(STEPS, not_start, MIDDLE)}


def test_search_ends_where_only_one_candidate_exists() -> None:
    """A budget that leaves no choice gives the only candidate."""
    found = SETTINGS.run(Space([[0, 5], [0, 9]], 4), lambda *_: 1.0)
    assert {candidate for _, candidate in found} == {(0, 0)}


def test_search_killed_and_resumed_is_the_same(tmp_path: Path, seed: int) -> None:
    """A search stopped in the middle of a generation and started again gives the parents of one that ran through."""
    fitness = Separable(seed, 6, 5, noise=0.1)
    through = SETTINGS.run(STEPS, fitness, MIDDLE)
    calls = 0

    def stopping(candidate: Candidate, windows: Sequence[int]) -> float:
        nonlocal calls
        calls += 1
        if calls == 16 * 3 + 5:
            raise KeyboardInterrupt
        return fitness(candidate, windows)

    with pytest.raises(KeyboardInterrupt):
        SETTINGS.run(STEPS, stopping, MIDDLE, tmp_path)
    (state,) = tmp_path.iterdir()
    assert len(json.loads(state.read_text())) == 3
    fitness.calls.clear()
    assert SETTINGS.run(STEPS, fitness, MIDDLE, tmp_path) == through
    assert len(fitness.calls) == 16 * 5
    fitness.calls.clear()
    assert Search(5, 12, SETTINGS.stages, 16, 3).run(STEPS, fitness, MIDDLE, tmp_path) == through[:5] and not fitness.calls


def test_search_in_two_processes_is_that_of_one(tmp_path: Path, seed: int) -> None:
    """Candidates dealt over two processes give the parents of one process, on both."""

    def work(rank: int) -> None:
        store = f"file://{tmp_path / 'store'}"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        fitness = Separable(seed, 6, 5, noise=0.1)
        found = SETTINGS.run(STEPS, fitness, MIDDLE, tmp_path / "work")
        (tmp_path / f"rank{rank}.json").write_text(json.dumps([found, len(fitness.calls)]))

    children = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    alone = json.loads(json.dumps(SETTINGS.run(STEPS, Separable(seed, 6, 5, noise=0.1), MIDDLE)))
    for rank in range(2):
        found, calls = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found == alone
        assert calls == 8 * (12 + 4) // 2


def test_search_refuses_a_damaged_state(tmp_path: Path) -> None:
    """A damaged state file is refused by name; one of other settings is another file, and stays."""
    SETTINGS.run(STEPS, lambda *_: 1.0, MIDDLE, tmp_path, identity="a")
    (state,) = tmp_path.iterdir()
    SETTINGS.run(STEPS, lambda *_: 2.0, MIDDLE, tmp_path, identity="b")
    assert len(list(tmp_path.iterdir())) == 2 and json.loads(state.read_text())[0]["fitness"] == 1
    for text in ("{", '{"levels": 1}', '[{"levels": [1]}]'):
        state.write_text(text)
        with pytest.raises(UserError, match=r"search-\w+\.json: not a state of a search .*; remove it to start again"):
            SETTINGS.run(STEPS, lambda *_: 1.0, MIDDLE, tmp_path, identity="a")


def test_search_refuses_a_start_beyond_the_budget() -> None:
    """A first candidate that costs more than the budget is refused with both numbers."""
    with pytest.raises(UserError, match=r"budget 233: the first candidate costs 234; raise the budget"):
        SETTINGS.run(Space(STEPS.costs, 233), lambda *_: 1.0, MIDDLE)
