"""InfAlign-CTRL: rewards for a policy whose answers are chosen by best-of-N or worst-of-N at inference.

A reward becomes the share of the reference policy's own responses to the same prompt that it beats, and a function of this
share makes best-of-N or worst-of-N the goal. Balashankar et al. 2024, arXiv 2412.19792. The theory is for KL-regularised RL,
whose optimum is pi_ref exp(transformed reward / beta): use beta > 0 and `scale: none` or `batch`, since `group` divides each
group by a spread of its own. Compare transforms at an equal measured KL to the reference, not at equal beta.
"""

# K calibration samples of a prompt

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

from tqdm import tqdm

from trainkit.errors import UserError
from trainkit.files import write_text
from trainkit.rl.types import Group, Task

FORMAT = 1
STEP = -1
"""Step by which calibration samples are drawn; training steps begin at 0, so these draw other samples with the same seed."""


class Generator(Protocol):
    """What calibration needs of `Rollouts`."""

    def generate(self, tasks: Sequence[Task], step: int) -> list[Group]:
        """A group for each task."""
        ...


class Scorer(Protocol):
    """What calibration needs of `Rewards`."""

    def score(self, groups: Sequence[Group], step: int) -> Any:
        """Fills `reward` of each response."""
        ...


@dataclass
class Calibration:
    """The reference policy's rewards on each task.

    Attributes:
        settings: What the rewards depend on; a table is continued only with equal settings.
        rewards: For each task index its K rewards in ascending order, without missing ones.
        prompts: For each task index the digest of its prompt's tokens.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    rewards: dict[int, list[float]] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of settings and table, whatever the order in which the tasks were sampled."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def quantile(self, task_index: int, reward: float) -> float:
        """Share of the task's rewards below `reward`, ties half; NaN if the reward or all of the task's are missing.

        Raises:
            UserError: the table does not have the task.
        """
        if task_index not in self.rewards:
            raise UserError(f"calibration: has no task {task_index}; make it on the training data by trainkit infalign")
        known = self.rewards[task_index]
        if not known or math.isnan(reward):
            return math.nan
        return (bisect_left(known, reward) + bisect_right(known, reward)) / (2 * len(known))

    def add(self, group: Group) -> None:
        """Adds a scored group of the reference policy."""
        values = [response.reward for response in group.responses]
        if not all(math.isfinite(value) or math.isnan(value) for value in values):
            raise UserError(f"task {group.task.index}: an infinite reward cannot be calibrated; bound the reward function")
        self.rewards[group.task.index] = sorted(value for value in values if not math.isnan(value))
        self.prompts[group.task.index] = prompt_digest(group.task)

    def save(self, path: Path) -> None:
        """Writes the table atomically."""
        write_text(path, json.dumps({"format": FORMAT, "digest": self.digest, **self._content()}) + "\n")

    @staticmethod
    def load(path: Path) -> Calibration:
        """Reads a table that `save` wrote.

        Raises:
            UserError: there is no such file, or it is not a complete table.
        """
        if not path.is_file():
            raise UserError(f"{path}: no such file; make it by trainkit infalign")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = {int(index): row for index, row in values["tasks"].items()}
            table = Calibration(
                values["settings"],
                {n: row["rewards"] for n, row in rows.items()},
                {n: row["prompt"] for n, row in rows.items()},
            )
            fits = values["format"] == FORMAT and values["digest"] == table.digest
        except (ValueError, TypeError, KeyError, AttributeError):
            fits, table = False, Calibration()
        if not fits:
            raise UserError(f"{path}: not a calibration table, or a changed one; make it by trainkit infalign")
        return table

    def _content(self) -> dict[str, Any]:
        rows = {str(n): {"prompt": self.prompts[n], "rewards": self.rewards[n]} for n in sorted(self.rewards)}
        return {"settings": dict(self.settings), "tasks": rows}


def prompt_digest(task: Task) -> str:
    """Hex digest of a prompt's tokens."""
    return hashlib.sha256(json.dumps(task.tokens).encode()).hexdigest()[:16]


def calibrate(
    rollouts: Generator, rewards: Scorer, tasks: Sequence[Task], path: Path, settings: Mapping[str, Any], part: int = 32
) -> Calibration:
    """Samples the reference policy on each task, scores the samples, and writes the table of their rewards.

    Tasks that the file has already are not sampled again, so a killed job continues. The table is the same whether or not it
    was killed, and for any `part`.

    Args:
        rollouts: Generates K responses to each task, by the reference policy.
        rewards: Scores them.
        tasks: The training tasks.
        path: File of the table. It is written after each part, or less often where writing would take over 5 % of the time, and
            when the job ends, also by Ctrl-C or an error.
        settings: What the rewards depend on.
        part: Tasks that are generated and scored together.

    Raises:
        UserError: the file has a table with other settings or of other prompts.
    """
    table = Calibration(settings)
    if path.exists():
        table = Calibration.load(path)
        if changed := [name for name in {**table.settings, **settings} if table.settings.get(name) != settings.get(name)]:
            raise UserError(f"{path}: its {changed[0]} differs from what is given now; choose another file, or remove this one")
        check_tasks(table, [task for task in tasks if task.index in table.rewards], str(path))
    missing = [task for task in tasks if task.index not in table.rewards]
    began = saved = perf_counter()
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc="calibrating", unit=" prompts", disable=None)
    try:
        for start in range(0, len(missing), part):
            groups = rollouts.generate(missing[start : start + part], STEP)
            rewards.score(groups, STEP)
            for group in groups:
                table.add(group)
            bar.update(len(groups))
            if perf_counter() - saved > 20 * (saved - began):
                began = perf_counter()
                table.save(path)
                saved = perf_counter()
    finally:
        bar.close()
        if table.rewards:
            table.save(path)
    return table


def check_tasks(table: Calibration, tasks: Sequence[Task], name: str) -> None:
    """Raises UserError if the table lacks one of the tasks, or has another prompt for it."""
    for task in tasks:
        if task.index not in table.rewards:
            raise UserError(f"{name}: has no task {task.index}; make it on the training data by trainkit infalign")
        if table.prompts[task.index] != prompt_digest(task):
            raise UserError(
                f"{name}: has another prompt for task {task.index}; make it on the training data by trainkit infalign"
            )


class InfAlign:
    """Transforms a reward by its quantile C among the reference policy's rewards for the same task.

    `identity`: C. `best`, for the best of N responses: e^(t (C - 1)), t > 0. `worst`, for the worst of N: -e^(t C), t < 0. All
    lie within -1 and 1. In simulations of the optimum at equal KL, t = 4 is best for N = 2 and t = 10 for N = 4.

    Args:
        calibration: File that `trainkit infalign` wrote, for the training data and the reference policy.
        kind: The transform.
        t: Exponent; by default 10 for `best` and -10 for `worst`.

    Attributes:
        digest: Digest of the table, for the provenance of a run.

    Raises:
        UserError: no table, one of binary rewards (on which every transform is a rescaling), or a t of the wrong sign.
    """

    def __init__(
        self, calibration: str | Path, kind: Literal["best", "worst", "identity"] = "best", t: float | None = None
    ) -> None:
        if kind not in ("best", "worst", "identity"):
            raise UserError(f"model.transform.kind is {kind!r}; it must be best, worst or identity")
        if kind == "identity" and t is not None:
            raise UserError("model.transform.t: identity has no exponent; leave it out")
        self.t = {"best": 10.0, "worst": -10.0, "identity": 0.0}[kind] if t is None else t
        if (kind == "best" and not self.t > 0) or (kind == "worst" and not self.t < 0):
            raise UserError(
                f"model.transform.t is {self.t:g}; it must be {'above' if kind == 'best' else 'below'} 0 for {kind}"
            )
        self.kind, self.path, self.table = kind, Path(calibration), Calibration.load(Path(calibration))
        if len({value for values in self.table.rewards.values() for value in values}) <= 2:
            raise UserError(
                f"{calibration}: its rewards have at most two values, which a transform only rescales; leave it out"
            )
        self.digest = self.table.digest

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises UserError if the table was not made on these tasks."""
        check_tasks(self.table, tasks, str(self.path))

    def transform(self, task_index: int, reward: float) -> float:
        """The reward to train on; NaN if the reward is, or if the table has no reward for the task."""
        quantile = self.table.quantile(task_index, reward)
        if self.kind == "identity":
            return quantile
        return math.exp(self.t * (quantile - 1)) if self.kind == "best" else -math.exp(self.t * quantile)
