"""Metrics in one CSV file of the run folder. A resumed run appends to it; Lightning's CSVLogger would delete it."""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from trainkit.errors import UserError
from trainkit.files import write_file


class CSVLog(Logger):
    """Appends a row to `metrics.csv` for each call of `log_metrics`."""

    name, version = property(lambda self: "csv"), property(lambda self: "")  # Lightning requires both

    def __init__(self) -> None:
        super().__init__()
        self._columns: list[str] = []
        self._started = time.time()

    def begin(self, folder: Path, config: str) -> None:
        """Sets the folder of the file; called before the first row."""
        self.path = folder / "metrics.csv"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml in the run folder contains them

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, "seconds": round(time.time() - self._started, 3)} | metrics
        known = self._columns or self._read()[0]
        self._columns = known + [name for name in row if name not in known]
        if self._columns != known or not self.path.exists():
            self._rewrite(self._read()[1])
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); free space, then resume the run") from error

    def rewind(self, step: int, validated: bool = True) -> None:
        """Drops the rows that a resumed run will log again: those after `step`, and its validation if not `validated` yet.

        An incomplete last row, written before a full disk or a kill, is dropped too.
        """
        self._columns, rows = self._read()
        repeated = lambda row: int(row["step"]) == step and not validated and any(row[n] for n in row if n.startswith("val/"))
        remaining = [row for row in rows if int(row["step"]) <= step and not repeated(row)]
        if self.path.exists():
            self._rewrite(remaining)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(line for line in file if line.endswith("\n"))
            return list(reader.fieldnames or []), list(reader)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

        write_file(self.path, write)
