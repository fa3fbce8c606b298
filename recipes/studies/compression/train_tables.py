"""Tables of the study of compression during training: python recipes/studies/compression/train_tables.py OUT.

OUT is the folder that train.sh wrote. Recovered share = (start - row) / (start - dense), of perplexities; the dense row has the
same training, which with a loss against its own distribution changes nothing.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np


def last(run: Path) -> dict[str, float]:
    """The last validation of a run."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/kl"]]
    return {name.removeprefix("val/"): float(value) for name, value in rows[-1].items() if name.startswith("val/") and value}


def recovery(out: Path) -> list[str]:
    """Perplexity, KL and agreement after each loss, and the share of the lost perplexity that came back."""
    lines = ["| model | loss | perplexity | recovered | KL | TV | agreement |", "|---|---|---|---|---|---|---|"]
    dense = {run.name: last(run) for run in sorted((out / "dense").iterdir())}
    for folder in ("dense", "2:4", "0.6"):
        for run in sorted((out / folder).glob("*")):
            if not (run / "done").exists() or "-" in run.name:
                continue
            found, share = last(run), ""
            if folder != "dense" and run.name != "start":
                start, control = last(out / folder / "start"), dense.get(run.name, dense["start"])
                share = f"{(start['perplexity'] - found['perplexity']) / (start['perplexity'] - control['perplexity']):.0%}"
            values = f"{found['kl']:.4f} | {found['tv']:.4f} | {found['agreement']:.4f}"
            lines.append(f"| {folder} | {run.name} | {found['perplexity']:.3f} | {share} | {values} |")
    return lines


def flow(out: Path) -> list[str]:
    """Means over seeds with half the range."""
    rows = defaultdict[tuple[str, str], list[dict[str, float]]](list)
    for run in sorted(out.glob("?:8/*-*")):
        if (run / "done").exists():
            rows[run.parent.name, run.name.rpartition("-")[0]].append(last(run))
    lines = ["| sparsity | method | seeds | perplexity | KL | agreement |", "|---|---|---|---|---|---|"]
    for (sparsity, method), found in sorted(
        rows.items(), key=lambda item: (item[0][0], np.mean([row["kl"] for row in item[1]]))
    ):
        cells = []
        for name in ("perplexity", "kl", "agreement"):
            values = np.array([row[name] for row in found])
            cells.append(f"{values.mean():.4f} ± {np.ptp(values) / 2:.4f}")
        lines.append(f"| {sparsity} | {method} | {len(found)} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python recipes/studies/compression/train_tables.py OUT")
    for table in (recovery, flow):
        print(*table(Path(sys.argv[1])), "", sep="\n")
