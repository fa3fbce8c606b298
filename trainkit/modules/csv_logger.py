"""Metrics as one CSV file in the run folder that a resumed run appends to."""

from __future__ import annotations

import csv
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CSVLog(Logger):
    """Appends to `metrics.csv`; Lightning's own CSVLogger deletes an existing file when it starts.

    Args:
        folder: Where to write; the run folder by default.
        file: Name of the file.
    """

    def __init__(self, folder: str | None = None, file: str = "metrics.csv") -> None:
        super().__init__()
        self.folder = folder
        self.file = file
        self._columns: list[str] = []
        self._started = time.time()

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str | None:
        return self.folder

    @property
    def path(self) -> Path:
        assert self.folder is not None, "the run folder names it before training starts"
        return Path(self.folder) / self.file

    def begin(self, folder: str, config: str) -> None:
        """Takes `folder` to write to, unless one was given."""
        self.folder = self.folder or folder

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml in the run folder holds them

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, "seconds": round(time.time() - self._started, 3)} | metrics
        known = self._columns or self._read()[0]
        self._columns = known + [name for name in row if name not in known]
        if self._columns != known or not self.path.exists():
            self._rewrite(self._read()[1])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def rewind(self, step: int, validated: bool = True) -> None:
        """Drops rows past `step`, the step a resumed run goes on from; unless `validated`, that step's validation too."""
        self._columns, rows = self._read()
        again = lambda row: int(row["step"]) == step and not validated and any(row[n] for n in row if n.startswith("val/"))
        kept = [row for row in rows if int(row["step"]) <= step and not again(row)]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
