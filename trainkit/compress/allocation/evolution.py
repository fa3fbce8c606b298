"""Evolutionary search for one level of compression per layer under a common budget.

EvoPress, Sieberling et al. 2024, arXiv 2410.14649. The search knows layers by the costs of their levels, and quality as a
function to minimise. Offspring of a generation pass stages of fewer candidates and more text; the parent competes in the last
stage, so the search never moves to a candidate that measures worse. Everything random is drawn from (seed, generation, index):
the result does not depend on interruptions or on the number of processes.

Left out on purpose: crossover of two parents, which the paper does not use either.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from trainkit.compress.work import rank, world
from trainkit.errors import UserError
from trainkit.files import write_json

Candidate = tuple[int, ...]
"""The level of each layer."""
Fitness = Callable[[Candidate, Sequence[int]], float]
"""The value to minimise of a candidate, measured on the windows of text with these numbers."""


@dataclass(frozen=True)
class Space:
    """The candidates whose cost is at most a budget.

    Attributes:
        costs: Cost of each level of each layer, in any unit; ascending within a layer.
        budget: Largest cost of a candidate.
    """

    costs: Sequence[Sequence[int]]
    budget: int

    def cost(self, candidate: Sequence[int]) -> int:
        """Sum over layers of the cost of their levels."""
        return sum(costs[level] for costs, level in zip(self.costs, candidate, strict=True))

    def fill(self, candidate: Sequence[int], draw: Random, avoid: frozenset[int] = frozenset()) -> Candidate:
        """The candidate with random layers raised until no further level fits; layers in `avoid` only if no other fits."""
        levels, spare = list(candidate), self.budget - self.cost(candidate)
        while fitting := [layer for layer in range(len(levels)) if self._step(layer, levels[layer]) <= spare]:
            layer = draw.choice([layer for layer in fitting if layer not in avoid] or fitting)
            spare -= int(self._step(layer, levels[layer]))
            levels[layer] += 1
        return tuple(levels)

    def exchange(self, candidate: Candidate, draw: Random) -> Candidate:
        """The candidate with a random layer one level up, and others down until the budget holds.

        Where all steps cost the same, exactly one other layer goes down, and the cost stays the same. Where they differ, the
        budget that is left over is filled. Half of the time only layers whose step costs the same go down, if there are any.
        Unchanged if no layer can be raised, or none lowered to pay for it.
        """
        levels = list(candidate)
        raised = draw.choice([layer for layer in range(len(levels)) if levels[layer] + 1 < len(self.costs[layer])] or [-1])
        if raised < 0:
            return candidate
        step = self._step(raised, levels[raised])
        levels[raised] += 1
        lowered: set[int] = set()
        equal_only, excess = draw.random() < 0.5, self.cost(levels) - self.budget
        while excess > 0:
            able = [layer for layer, level in enumerate(levels) if level and layer != raised]
            equal = [layer for layer in able if self._step(layer, levels[layer] - 1) == step]
            if not able:
                return candidate
            lowered.add(layer := draw.choice((equal_only and equal) or able))
            levels[layer] -= 1
            excess -= int(self._step(layer, levels[layer]))
        return self.fill(levels, draw, frozenset(lowered))

    def _step(self, layer: int, level: int) -> float:
        """Extra cost of the next level; infinite at the last level."""
        costs = self.costs[layer]
        return costs[level + 1] - costs[level] if level + 1 < len(costs) else math.inf


@dataclass(frozen=True)
class Stage:
    """A round of selection within a generation: how many candidates survive it, measured on how many windows."""

    survivors: int
    windows: int


@dataclass(frozen=True)
class Search:
    """Settings of a search.

    Attributes:
        generations: Number of generations.
        offspring: Candidates in a generation, all different.
        stages: Rounds of selection; one candidate survives the last.
        windows: Number of windows of text; each stage draws its own from them.
        seed: Seed for mutations and windows.
    """

    generations: int
    offspring: int
    stages: Sequence[Stage]
    windows: int
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.stages and self.stages[-1].survivors == 1
        assert all(1 <= stage.windows <= self.windows for stage in self.stages)

    def run(
        self, space: Space, fitness: Fitness, start: Candidate | None = None, work: Path | None = None, identity: Any = None
    ) -> list[tuple[float, Candidate]]:
        """The parent after each generation, with its fitness on the windows of that generation's last stage.

        Under torch.distributed the candidates of a stage are distributed over the processes, and all return the same.

        Args:
            space: Costs and budget.
            fitness: Value to minimise; NaN counts as infinite.
            start: First parent; None: the first generation consists of random candidates that fill the budget.
            work: Folder of a file with the parents so far, written after each generation; a search whose settings are the same,
                except for the number of generations, continues from it.
            identity: JSON-able value of all that determines `fitness`.

        Raises:
            UserError: `start`, or every candidate, costs more than the budget; or the state file is damaged.
        """
        # Check the budget.
        lowest = tuple(0 for _ in space.costs)
        if space.cost(start or lowest) > space.budget:
            raise UserError(
                f"budget {space.budget:,}: the first candidate costs {space.cost(start or lowest):,}; raise the budget"
            )
        # Continue a search of the same settings.
        settings = [self.offspring, [[stage.survivors, stage.windows] for stage in self.stages], self.windows, self.seed]
        settings += [[list(costs) for costs in space.costs], space.budget, start, identity]
        state = work and work / f"search-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.json"
        parents = _read_state(state)[: self.generations] if state else []
        # Run the generations that are left.
        hidden = True if rank() else None
        with tqdm(total=self.generations, initial=len(parents), desc="search", unit=" generations", disable=hidden) as bar:
            while len(parents) < self.generations:
                parent = parents[-1][1] if parents else start
                parents.append(self._generation(space, fitness, parent, len(parents)))
                if state and rank() == 0:
                    write_json(state, [{"fitness": value, "levels": list(candidate)} for value, candidate in parents])
                bar.set_postfix_str(f"fitness {parents[-1][0]:.5g}", refresh=False)
                bar.update()
        return parents

    def _generation(self, space: Space, fitness: Fitness, parent: Candidate | None, generation: int) -> tuple[float, Candidate]:
        """The next parent and its fitness."""
        alive, value = list(self._offspring(space, parent, generation)), math.nan
        for number, stage in enumerate(self.stages):
            if parent is not None and (number == len(self.stages) - 1 or not alive):
                alive = [parent, *(candidate for candidate in alive if candidate != parent)]  # first, so that it wins a tie
            draw = Random(f"{self.seed} {generation} windows {number}")
            values = _evaluate(fitness, alive, sorted(draw.sample(range(self.windows), stage.windows)))
            order = sorted(range(len(alive)), key=values.__getitem__)[: stage.survivors]
            alive, value = [alive[index] for index in order], values[order[0]]
        return value, alive[0]

    def _offspring(self, space: Space, parent: Candidate | None, generation: int) -> Iterator[Candidate]:
        """Different candidates; fewer than `offspring` if 100 draws in a row give none that is new."""
        seen = {parent}
        for index in range(self.offspring):
            draw = Random(f"{self.seed} {generation} offspring {index}")
            for _ in range(100):
                if parent is None:
                    candidate = space.fill([0] * len(space.costs), draw)
                else:
                    candidate = parent
                    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
                        candidate = space.exchange(candidate, draw)
                if candidate not in seen:
                    seen.add(candidate)
                    yield candidate
                    break
            else:
                return


def _evaluate(fitness: Fitness, candidates: Sequence[Candidate], windows: Sequence[int]) -> list[float]:
    """The fitness of all candidates on the same windows; each process measures its share."""
    device = "cuda" if world() > 1 and dist.get_backend() == "nccl" else "cpu"
    values_C = torch.zeros(len(candidates), dtype=torch.float64, device=device)
    for index in range(rank(), len(candidates), world()):
        value = fitness(candidates[index], windows)
        values_C[index] = math.inf if math.isnan(value) else value
    if world() > 1:
        dist.all_reduce(values_C)
    return values_C.tolist()


def _read_state(state: Path) -> list[tuple[float, Candidate]]:
    if not state.is_file():
        return []
    try:
        stored = json.loads(state.read_text(encoding="utf-8"))
        return [(math.inf if entry["fitness"] is None else entry["fitness"], tuple(entry["levels"])) for entry in stored]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{state}: not a state of a search ({error}); remove it to start again") from error
