"""Tables and plots of the losses study: python recipes/studies/losses/tables.py OUT [FOLDER for plots].

OUT is the folder that run.sh wrote. Every value is a mean over training seeds, printed with half the range over seeds.
Intervals are 95 % paired bootstrap intervals over the test questions. Differences are to the first row of a table, on the
same questions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.eval import bootstrap

LOSSES = (
    "forward_kl",
    "tvdpp_position",
    "tvdpp_batch_sampled",
    "tvdpp_sharp",
    "tv",
    "lk",
    "lk_hybrid",
    "jsd",
    "reverse_kl",
    "ce",
)
POLICIES = ("forward_kl", "policy_corpus", "policy_target_corpus", "policy_draft", "policy_mixed")
PIPELINE = ("forward_kl", "alone_corpus", "alone_answers")
COLUMNS = {
    "alpha@1": "alpha, T 1",
    "alpha_coupled@1": "alpha coupled, T 1",
    "agreement@0": "alpha, T 0",
    "tau_coupled@0": "tau, T 0",
    "tau_coupled@1": "tau coupled, T 1",
    "tau_residual@1": "tau residual, T 1",
}
NAMES = {
    "forward_kl": "forward_kl (target's answers)",
    "policy_corpus": "corpus",
    "policy_target_corpus": "target 0.9, corpus 0.1",
    "policy_draft": "draft (on-policy)",
    "policy_mixed": "mixed 0.5",
    "alone_corpus": "corpus alone, cross entropy",
    "alone_answers": "target's answers alone, forward KL",
}
Row = dict[str, tuple[np.ndarray, np.ndarray]]


def read(out: Path, name: str) -> Row | None:
    """(sums, counts) [seeds, questions] for each measure of a row; None unless both temperatures were measured."""
    row: Row = {}
    for file in (out / "rows" / f"{name}.t{t}.json" for t in (0, 1)):
        if not file.is_file():
            return None
        drafters = [value["per_question"] for value in json.loads(file.read_text())["drafters"].values()]
        for measure in drafters[0]:
            if measure.startswith("tau"):
                pairs = np.array([drafter[measure] for drafter in drafters])
                row[measure] = (pairs[:, 0], pairs[:, 1])
            elif measure != "tokens":
                row[measure] = (np.array([d[measure] for d in drafters]), np.array([d["tokens"] for d in drafters]))
    return row


def table(out: Path, names: tuple[str, ...]) -> list[str]:
    """A table of the rows that exist: values with half the range over seeds, then differences to the first row."""
    rows = {name: row for name in names if (row := read(out, name)) is not None}
    if not rows:
        return ["(not run)"]
    lines = ["| row | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, row in rows.items():
        cells = []
        for measure in COLUMNS:
            sums, counts = row[measure]
            by_seed = sums.sum(1) / counts.sum(1)
            cells.append(f"{by_seed.mean():.4f} ± {np.ptp(by_seed) / 2:.4f}")
        lines.append(f"| {NAMES.get(name, name)} | {len(row['alpha@1'][0])} | " + " | ".join(cells) + " |")
    first, *others = rows
    if not others:
        return lines
    lines += ["", f"Difference to {NAMES.get(first, first)}, 95 % interval:", ""]
    lines += ["| row | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name in others:
        cells = [str(bootstrap.gap(rows[name][measure], rows[first][measure])) for measure in COLUMNS]
        lines.append(f"| {NAMES.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def scaling(out: Path, plots: Path | None) -> list[str]:
    """Acceptance by layers and distilled tokens, with the fit alpha = a + b log2(tokens) + c log2(layers)."""
    tokens = _tokens(out)
    points = []
    for layers in (1, 2, 4):
        for share in (4, 2, 1):
            name = "forward_kl" if (layers, share) == (1, 1) else f"layers{layers}_of{share}"
            row = read(out, name)
            if row is not None:
                means = {m: float((row[m][0].sum(1) / row[m][1].sum(1)).mean()) for m in ("alpha@1", "agreement@0")}
                points.append((layers, tokens / share, means))
    if len(points) < 4:
        return ["(not run)"]
    lines = ["| layers | distilled tokens | alpha, T 1 | alpha, T 0 |", "|---|---|---|---|"]
    lines += [f"| {n} | {t:,.0f} | {m['alpha@1']:.4f} | {m['agreement@0']:.4f} |" for n, t, m in points]
    for measure, shown in (("alpha@1", "alpha at T 1"), ("agreement@0", "alpha at T 0")):
        design = np.array([[1.0, np.log2(t / 50_000), np.log2(n)] for n, t, _ in points])
        values = np.array([m[measure] for *_, m in points])
        (a, b, c), *_ = np.linalg.lstsq(design, values, rcond=None)
        residuals = values - design @ [a, b, c]
        explained = 1 - residuals.var() / values.var()
        fit = f"{a:.4f} + {b:.4f} log2(tokens / 50k) + {c:.4f} log2(layers)"
        lines += ["", f"{shown} = {fit}; R² {explained:.3f}, largest residual {np.abs(residuals).max():.4f}"]
    if plots is not None:
        _plot_scaling(points, plots / "scaling.png")
    return lines


def trimmed(out: Path, name: str = "forward_kl") -> list[str]:
    """The whole draft beside the trimmed ones: tau, mbsu, wall-clock."""
    columns = "vocabulary | tau, T 0 | of whole | tau coupled, T 1 | of whole | depth | mbsu | speedup | roof | of roof"
    lines = [f"| {columns} |", "|---" * 10 + "|"]
    whole = read(out, name)
    for share in (1, 2, 4, 8):
        row = whole if share == 1 else read(out, f"trimmed_of{share}")
        if row is None or whole is None:
            continue
        cells = []
        for measure in ("tau_coupled@0", "tau_coupled@1"):
            tau, full = (float((r[measure][0].sum(1) / r[measure][1].sum(1)).mean()) for r in (row, whole))
            cells += [f"{tau:.3f}", f"{tau / full - 1:+.1%}"]
        cells += _speed(out / "rows" / f"speed-{name}-0{'' if share == 1 else f'-of{share}'}.json")
        lines.append(f"| 1/{share} | " + " | ".join(cells) + " |")
    return lines if len(lines) > 2 else ["(not run)"]


def best(out: Path) -> list[str]:
    """The draft of the group `best`, whole and trimmed: tau on 100 questions, wall-clock on 12, at temperature 0."""
    file = out / "rows" / "best.t0.json"
    if not file.is_file():
        return ["(not run)"]
    lines = ["| draft | alpha, T 0 | tau, depth 4 | depth | mbsu | speedup | roof | of roof |", "|---" * 8 + "|"]
    for folder, drafter in json.loads(file.read_text())["drafters"].items():
        means, name = drafter["means"], Path(folder).name
        cells = [f"{means[measure]['mean']:.4f}" for measure in ("agreement@0", "tau_coupled@0")]
        lines.append(f"| {name} | " + " | ".join([*cells, *_speed(out / "rows" / f"speed-{name}.json")]) + " |")
    return lines


def _speed(file: Path) -> list[str]:
    if not file.is_file():
        return ["-"] * 5
    runs: list[dict[str, Any]] = [run for run in json.loads(file.read_text())["methods"] if "speedup" in run]
    run = max(runs, key=lambda run: run["speedup"])
    share = run["speedup"] / run["roof"]
    return [str(run["depth"]), f"{run['mbsu']:.2f}", f"{run['speedup']:.2f}", f"{run['roof']:.2f}", f"{share:.0%}"]


def _tokens(out: Path) -> int:
    parts = sorted((out / "sets" / "target").glob("part-*.jsonl"))
    return sum(sum(json.loads(line)["loss_mask"]) for part in parts for line in part.open(encoding="utf-8"))


def _plot_scaling(points: list[tuple[int, float, dict[str, float]]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharex=True)
    for axis, (measure, title) in zip(axes, (("alpha@1", "temperature 1"), ("agreement@0", "temperature 0")), strict=True):
        for layers in sorted({n for n, *_ in points}):
            line = [(t, m[measure]) for n, t, m in points if n == layers]
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{layers} layer{'s' if layers > 1 else ''}")
        axis.set(xscale="log", xlabel="distilled tokens", ylabel="alpha", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def plot_differences(out: Path, names: tuple[str, ...], path: Path) -> None:
    """Plots the difference of each row to the first, with its interval, for acceptance at both temperatures."""
    from matplotlib import pyplot

    rows = {name: row for name in names if (row := read(out, name)) is not None}
    first, *others = rows
    figure, axis = pyplot.subplots(figsize=(7, 0.5 * len(others) + 1.4))
    for index, (measure, colour) in enumerate((("alpha@1", "C0"), ("alpha_coupled@1", "C1"), ("agreement@0", "C2"))):
        gaps = [bootstrap.gap(rows[name][measure], rows[first][measure]) for name in others]
        heights = np.arange(len(others)) + 0.2 * (1 - index)
        values = np.array([gap.value for gap in gaps])
        ends = np.array([[gap.value - gap.low for gap in gaps], [gap.high - gap.value for gap in gaps]])
        axis.errorbar(values, heights, xerr=ends, fmt="o", color=colour, capsize=3, label=COLUMNS[measure])
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(others)), [NAMES.get(name, name) for name in others])
    axis.set_xlabel(f"difference to {NAMES.get(first, first)}")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(out: Path, plots: Path | None) -> None:
    """Prints the tables as Markdown; writes plots if a folder is given."""
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)
    for title, names in (("Losses", LOSSES), ("Whose text", POLICIES), ("Pipeline", PIPELINE)):
        print(f"## {title}\n", *table(out, names), "", sep="\n")
        if plots is not None and sum(read(out, name) is not None for name in names) > 1:
            plot_differences(out, names, plots / f"{title.lower().replace(' ', '_')}.png")
    print("## Scaling\n", *scaling(out, plots), "", sep="\n")
    print("## Trimmed vocabulary\n", *trimmed(out), "", sep="\n")
    print("## The best draft\n", *best(out), "", sep="\n")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python recipes/studies/losses/tables.py OUT [FOLDER for plots]")
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None)
