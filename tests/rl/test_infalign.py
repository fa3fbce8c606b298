from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from trainkit.errors import UserError
from trainkit.rl.infalign import Calibration, InfAlign, calibrate
from trainkit.rl.types import Group, Response, Task

NAN = float("nan")
TASKS = [Task(index, [1, 2, index], f"prompt {index}") for index in range(7)]


class Reference:
    """A policy whose responses carry their reward, drawn by (step, task, sample)."""

    def __init__(self, samples: int = 5, fail_after: int | None = None) -> None:
        self.samples, self.fail_after, self.seen = samples, fail_after, []

    def generate(self, tasks: Sequence[Task], step: int) -> list[Group]:
        if self.fail_after is not None and len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += [task.index for task in tasks]
        draws = {task.index: np.random.default_rng([step + 10, task.index]).random(self.samples).round(1) for task in tasks}
        return [Group(task, [Response([1], str(x), "end", [0.0]) for x in draws[task.index]]) for task in tasks]


class Numbers:
    """The number in the text; 0.5 is missing."""

    def score(self, groups: Sequence[Group], step: int) -> None:
        for response in (response for group in groups for response in group.responses):
            response.reward = NAN if response.text == "0.5" else float(response.text)


def table(path: Path, rewards: dict[int, list[float]]) -> Path:
    Calibration({}, rewards, dict.fromkeys(rewards, "")).save(path)
    return path


def test_quantile_equals_worked_example():
    """Shares of .1 .4 .4 .7 .9 below a reward, ties half."""
    known = Calibration({}, {3: [0.1, 0.4, 0.4, 0.7, 0.9], 4: []}, {})
    values = {0: 0.0, 0.1: 0.1, 0.4: 0.4, 0.5: 0.6, 0.9: 0.9, 1: 1.0}
    assert [known.quantile(3, reward) for reward in values] == pytest.approx(list(values.values()), abs=1e-12)
    assert math.isnan(known.quantile(3, NAN)) and math.isnan(known.quantile(4, 0.5))
    with pytest.raises(UserError, match="calibration: has no task 5; make it on the training data"):
        known.quantile(5, 0.5)


def test_quantile_of_reference_is_uniform(seed):
    """The reference's own rewards have quantiles 1/2K, 3/2K, ..., whose mean is a half, also with ties."""
    rewards = np.random.default_rng(seed).integers(0, 6, 20).astype(float)
    known = Calibration({}, {0: sorted(rewards.tolist())}, {})
    assert np.mean([known.quantile(0, value) for value in rewards]) == pytest.approx(0.5, abs=1e-12)


def test_transforms_of_quantiles(tmp_path):
    """Best, worst and identity as functions of C, by hand; a missing reward stays missing."""
    path = table(tmp_path / "table.json", {3: [0.1, 0.4, 0.4, 0.7, 0.9]})
    assert InfAlign(path, "identity").transform(3, 0.5) == pytest.approx(0.6)
    assert InfAlign(path, "best", 4).transform(3, 0.5) == pytest.approx(math.exp(4 * -0.4))
    assert InfAlign(path, "best").transform(3, 2.0) == 1.0
    assert InfAlign(path, "worst").transform(3, 0.5) == pytest.approx(-math.exp(-6))
    assert InfAlign(path, "worst", -4).transform(3, 0.0) == -1.0
    assert all(math.isnan(InfAlign(path, kind).transform(3, NAN)) for kind in ("best", "worst", "identity"))  # type: ignore[arg-type]


def test_best_of_n_gains_from_its_transform():
    """At KL 0.5 to the reference, the optimum for e^(10 C) wins best-of-4 more often, and single draws less often."""
    u = (np.arange(20000) + 0.5) / 20000  # the reference's quantiles

    def wins(transform: np.ndarray) -> tuple[float, float]:
        low, high = 1e-3, 1e3  # 1 / beta, by bisection on the KL
        for _ in range(80):
            tilt = math.sqrt(low * high)
            density = np.exp(tilt * (transform - transform.max()))
            density /= density.mean()
            low, high = (tilt, high) if np.mean(density * np.log(density + 1e-300)) < 0.5 else (low, tilt)
        best = np.cumsum(density / len(u)) ** 4
        return float(np.mean(density * u)), float(np.sum(np.diff(best, prepend=0) * u**4))

    plain, best = np.array([wins(u), wins(np.exp(10 * (u - 1)))]).T
    assert plain == pytest.approx([0.7737, 0.7117], abs=2e-3) and best == pytest.approx([0.7998, 0.8715], abs=2e-3)


def test_calibration_continues_after_a_kill(tmp_path):
    """A table that was interrupted and continued equals one made at once, and no task is sampled twice."""
    whole = calibrate(Reference(), Numbers(), TASKS, tmp_path / "whole.json", {"seed": 1}, part=3)
    path, first, second = tmp_path / "table.json", Reference(fail_after=4), Reference()
    with pytest.raises(KeyboardInterrupt):
        calibrate(first, Numbers(), TASKS, path, {"seed": 1}, part=2)
    assert len(Calibration.load(path).rewards) == 4
    again = calibrate(second, Numbers(), TASKS, path, {"seed": 1}, part=2)
    assert first.seen + second.seen == list(range(7))
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes() and again.digest == whole.digest
    assert all(values == sorted(values) and 0.5 not in values for values in whole.rewards.values())
    assert InfAlign(path).digest == whole.digest
    InfAlign(path).check(TASKS)


def test_calibration_refuses_other_settings_and_prompts(tmp_path):
    """A table is continued only with its own settings and prompts, and used only on its own tasks."""
    path = tmp_path / "table.json"
    calibrate(Reference(), Numbers(), TASKS[:4], path, {"seed": 1}, part=3)
    with pytest.raises(
        UserError, match=r"table.json: its seed differs from what is given now; choose another file, or remove this one"
    ):
        calibrate(Reference(), Numbers(), TASKS, path, {"seed": 2})
    other = [Task(3, [9], "other")]
    with pytest.raises(UserError, match=r"table.json: has another prompt for task 3"):
        calibrate(Reference(), Numbers(), other, path, {"seed": 1})
    with pytest.raises(UserError, match=r"table.json: has another prompt for task 3"):
        InfAlign(path).check(other)
    with pytest.raises(UserError, match=r"table.json: has no task 4"):
        InfAlign(path).check(TASKS)


def test_infalign_refuses_what_it_cannot_use(tmp_path):
    """Binary rewards, a changed file, other kinds and exponents of the wrong sign are refused in one line."""
    binary = table(tmp_path / "binary.json", {0: [0, 0, 1], 1: [0, 1, 1]})
    with pytest.raises(UserError, match=r"binary.json: its rewards have at most two values"):
        InfAlign(binary)
    good = table(tmp_path / "good.json", {0: [0.1, 0.2, 0.3]})
    changed = json.loads(good.read_text())
    changed["tasks"]["0"]["rewards"][0] = 0.15
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    for content in (json.dumps(changed), "{", "[]", '{"tasks": {}}'):
        (tmp_path / "changed.json").write_text(content)
        with pytest.raises(UserError, match=r"nowhere.json: no such file; make it by"):
            InfAlign(tmp_path / "nowhere.json")
        with pytest.raises(UserError, match=r"changed.json: not a calibration table, or a changed one"):
            InfAlign(tmp_path / "changed.json")
    for options, message in (
        ({"kind": "median"}, "model.transform.kind is 'median'; it must be best, worst or identity"),
        ({"kind": "best", "t": -1.0}, "model.transform.t is -1; it must be above 0 for best"),
        ({"kind": "worst", "t": 1.0}, "model.transform.t is 1; it must be below 0 for worst"),
        ({"kind": "identity", "t": 1.0}, "identity has no exponent; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            InfAlign(good, **options)
    with pytest.raises(UserError, match="task 0: an infinite reward cannot be calibrated"):
        Calibration().add(Group(TASKS[0], [Response([1], "", "end", [0.0], reward=math.inf)]))
