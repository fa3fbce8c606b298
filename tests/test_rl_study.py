"""The tables of the RL study hold what its runs hold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"rl_{name}", Path(f"recipes/studies/rl/{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables = load("tables")


def write_run(folder: Path, rewards: list[float], sampled: float) -> None:
    folder.mkdir(parents=True)
    lines = ["step,train/reward,val/sampled_reward,val/accuracy", *(f"{2 * n + 2},{r},," for n, r in enumerate(rewards))]
    lines.append(f"{2 * len(rewards)},,{sampled},1.0")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_curve_has_first_and_last_rewards_and_steps(tmp_path):
    """Two seeds rise from 0.2 to 1 and to 0.7: means with half the range, and the second never reaches 0.8."""
    write_run(tmp_path / "GRPO-0", [0.2] * 5 + [1.0] * 10, sampled=0.9)
    write_run(tmp_path / "GRPO-1", [0.2] * 5 + [0.7] * 10, sampled=0.7)
    (row,) = tables.curves(tmp_path)[2:]
    # means of 5 values reach 0.8 with 4 of 10: (0.2 + 4 x 1) / 5 = 0.84, at the 9th value, step 18
    assert row == "| GRPO | 2 | 0.200 ± 0.000 | 0.850 ± 0.150 | 18, inf | 0.800 ± 0.100 | 1.000 ± 0.000 |"
    tables.plot(tmp_path, tmp_path / "reward.png")
    assert (tmp_path / "reward.png").stat().st_size > 5000


def test_infalign_is_compared_at_equal_kl(tmp_path):
    """Identity wins 0.5 + KL / 10, best-of 0.5 + KL / 5, at other KLs for each beta: the table reads both at the same KLs."""
    kls = {"identity": {"0.1": 2.0, "0.3": 0.5}, "best": {"0.1": 1.5, "0.3": 0.25}}
    found = {
        f"{tmp_path}/infalign/{kind}@{beta}-{seed}/policy": {"kl": kl, "best_of_1": 0.5, "best_of_4": 0.5 + kl / slope}
        for kind, slope in (("identity", 10), ("best", 5))
        for beta, kl in kls[kind].items()
        for seed in (0, 1)
    }
    (tmp_path / "infalign.json").write_text(json.dumps(found))
    lines = tables.infalign(tmp_path / "infalign", points=2)[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 0.500"] * 2 + ["| 1.500"] * 2
    assert [float(line.split(" | ")[3].split()[0]) for line in lines] == pytest.approx([0.55, 0.6, 0.65, 0.8])


def test_digit_reward_counts_places_and_length():
    """Two of three digits right; all right; one missing; nothing; one too many."""
    digits = load("rewards").digits
    texts = ["135", "132", "13", "", "1322"]
    assert digits(texts, ["132"] * 5) == pytest.approx([2 / 3, 1.0, 2 / 3 - 0.25, -0.75, 0.75])
