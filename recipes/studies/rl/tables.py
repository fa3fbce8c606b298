"""Tables and plots of RL runs, from their metrics.csv.

    python recipes/studies/rl/tables.py curve OUT [--plot FILE]    # reward of the runs OUT/NAME-SEED over training
    python recipes/studies/rl/tables.py policies OUT               # the policies that run.sh measured into OUT.json
    python recipes/studies/rl/tables.py infalign OUT               # best-of-4 win rate of both transforms at equal measured KL

OUT is a folder that recipes/rl_digits.sh wrote, or a group's folder of recipes/studies/rl/run.sh.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

WINDOW = 5
"""Logged values that a reward of the table is the mean of."""


def series(run: Path, column: str) -> np.ndarray:
    """[rows, 2] optimiser step and value of a metric, where it was logged."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    return np.array(rows).reshape(-1, 2)


def runs(out: Path) -> dict[str, list[Path]]:
    """The runs OUT/NAME-SEED by name, in order of the seeds."""
    found = defaultdict[str, list[Path]](list)
    for path in sorted(out.glob("*-*/metrics.csv")):
        name, _, seed = path.parent.name.rpartition("-")
        if seed.isdigit():
            found[name].append(path.parent)
    return dict(found)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean over seeds, and half the range of more than one."""
    half = f" ± {np.ptp(values) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{half}"


def reached(curve: np.ndarray, reward: float) -> float:
    """Optimiser steps until the mean of `WINDOW` logged rewards reaches `reward`; infinite if it never does."""
    means = np.convolve(curve[:, 1], np.ones(WINDOW) / WINDOW, "valid")
    above = np.flatnonzero(means >= reward)
    return float(curve[above[0] + WINDOW - 1, 0]) if len(above) else float("inf")


def curves(out: Path) -> list[str]:
    """Reward at the beginning and end of training, and the steps until 0.8, over seeds; validation of the last step."""
    lines = [
        "| run | seeds | reward at first | at last | steps to 0.8 | validation, sampled | greedy |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, folders in runs(out).items():
        found = [series(folder, "train/reward") for folder in folders]
        first, last = (
            [float(curve[part, 1].mean()) for curve in found] for part in (slice(None, WINDOW), slice(-WINDOW, None))
        )
        steps = ", ".join(f"{reached(curve, 0.8):.0f}" for curve in found)
        cells = [spread(first), spread(last), steps]
        for column in ("val/sampled_reward", "val/accuracy"):
            values = [series(folder, column) for folder in folders]
            cells.append(spread([float(value[-1, 1]) for value in values if len(value)]) if all(map(len, values)) else "")
        lines.append(f"| {name} | {len(folders)} | {' | '.join(cells)} |")
    return lines


def measured(out: Path) -> dict[str, list[dict[str, float]]]:
    """What measure.py found for the policies of a group, by name of the run, in order of the seeds."""
    found = defaultdict[str, list[dict[str, float]]](list)
    for folder, values in sorted(json.loads(out.with_suffix(".json").read_text()).items()):
        name = Path(folder).parent.name.rpartition("-")[0] if Path(folder).name == "policy" else "start"
        found[name].append(values)
    return dict(found)


def policies(out: Path) -> list[str]:
    """Means over seeds of what was measured of each policy."""
    columns = {"accuracy": "greedy", "pass@1": "pass@1", "pass@4": "pass@4", "pass@16": "pass@16"}
    columns |= {"sampled_reward": "reward", "best_of_1": "win rate", "best_of_4": "best of 4", "kl": "KL"}
    lines = [f"| run | seeds | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in measured(out).items():
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(spread([row[column] for row in seeds]) for column in columns)} |")
    return lines


def infalign(out: Path, points: int = 4) -> list[str]:
    """Win rates of the two transforms at the same KL, by linear interpolation between betas of a seed; means over seeds.

    The KLs lie evenly within the range that every seed covers with both transforms.
    """
    curves: dict[str, list[list[dict[str, float]]]] = {"identity": [], "best": []}
    for kind in curves:
        betas = [seeds for name, seeds in measured(out).items() if name.partition("@")[0] == kind]
        curves[kind] = [sorted(rows, key=lambda row: row["kl"]) for rows in zip(*betas, strict=True)]
    every = [rows for kind in curves.values() for rows in kind]
    low, high = max(rows[0]["kl"] for rows in every), min(rows[-1]["kl"] for rows in every)
    lines = ["| KL | transform | win rate | best of 4 |", "|---|---|---|---|"]
    for kl in np.linspace(low, high, points) if low < high else []:
        for kind, seeds in curves.items():
            at = lambda rows, name, kl=kl: float(np.interp(kl, [row["kl"] for row in rows], [row[name] for row in rows]))
            cells = [spread([at(rows, name) for rows in seeds], 4) for name in ("best_of_1", "best_of_4")]
            lines.append(f"| {kl:.3f} | {kind} | {' | '.join(cells)} |")
    return lines


def plot(out: Path, file: Path) -> None:
    """Mean reward of the sampled responses over optimiser steps, a line for each run."""
    figure, axes = pyplot.subplots(figsize=(6, 3.5), constrained_layout=True)
    for number, (name, folders) in enumerate(runs(out).items()):
        for index, folder in enumerate(folders):
            curve = series(folder, "train/reward")
            axes.plot(curve[:, 0], curve[:, 1], color=f"C{number}", linewidth=1, label=None if index else name)
    axes.set(xlabel="optimiser steps", ylabel="mean reward", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("curve", "policies", "infalign"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    print("\n".join({"curve": curves, "policies": policies, "infalign": infalign}[args.table](args.out)))
    if args.plot is not None:
        plot(args.out, args.plot)


if __name__ == "__main__":
    main()
