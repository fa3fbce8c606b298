"""Metrics as one CSV file in the run folder. A resumed run appends to it; Lightning's CSVLogger deletes it at the start."""

from __future__ import annotations

import csv
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from trainkit.files import write_file


class CSVLog(Logger):
    """Appends a row to the file for each call of `log_metrics`.

    Args:
        folder: Folder of the file; the run folder by default.
        file: Name of the file.
    """

    def __init__(self, folder: str | None = None, file: str = "metrics.csv") -> None:
        super().__init__()
        self.folder, self.file = folder, file
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
        assert self.folder is not None, "`begin` sets the folder before training starts"
        return Path(self.folder) / self.file

    def begin(self, folder: str, config: str) -> None:
        """Sets the folder, unless the constructor did."""
        self.folder = self.folder or folder

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # they are in config.yaml in the run folder

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
        """Drops the rows that a resumed run will log again.

        Args:
            step: Optimiser step that the run resumes from; later rows are dropped.
            validated: Whether the validation at `step` is done; otherwise its row is dropped too.
        """
        self._columns, rows = self._read()
        repeated = lambda row: int(row["step"]) == step and not validated and any(row[n] for n in row if n.startswith("val/"))
        remaining = [row for row in rows if int(row["step"]) <= step and not repeated(row)]
        if len(remaining) < len(rows):
            self._rewrite(remaining)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return [], []
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

        write_file(self.path, write)
