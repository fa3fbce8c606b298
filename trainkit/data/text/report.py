"""What preparation did to the rows: every row is either packed, or counted here by the reason why it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

from trainkit.data.text.packing import PackedSet


@dataclass
class SetReport:
    """Counts of one set.

    Attributes:
        name: `train` or `validation`.
        rows: Rows read; for a held-out set, the rows held out.
        held_out: Whether the rows are a share of the training rows; the `rows` of the training set then include them.
        skipped: Number of bad rows, by reason.
        examples: Location of the first bad row, by reason.
        truncated: Documents that lost their end.
        too_long: Documents left out because they are longer than a packed row.
        cut: Plain texts that were cut into several documents.
        unlabelled: Documents left out because none of their tokens counts as a label, often after truncation.
        excluded: Rows left out because their prompt is one of the held-out ones.
        unended: Assistant turns whose labels contain no end token.
        unused: Number of rows that have a column that was not read, by column.
        left_out: Files of the given folders that were not read.
        documents: Documents packed.
        tokens: Tokens packed.
        counted: Tokens that count as labels.
        packed_rows: Rows after packing.
        length: Tokens in a packed row.
        efficiency: Share of the packed positions that are not padding.
    """

    name: str
    rows: int = 0
    held_out: bool = False
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    too_long: int = 0
    cut: int = 0
    unlabelled: int = 0
    excluded: int = 0
    unended: int = 0
    unused: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    counted: int = 0
    packed_rows: int = 0
    length: int = 0
    efficiency: float = 0.0

    def skip(self, location: str, reason: str) -> None:
        """Counts a bad row."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, location)

    def count_unused(self, columns: Iterable[str]) -> None:
        """Counts the columns of a row that were not read."""
        for column in columns:
            self.unused[column] = self.unused.get(column, 0) + 1

    def measure(self, packed: PackedSet) -> None:
        """Sets the sizes to those of the packed set."""
        self.documents, self.tokens = len(packed.documents_D) - 1, len(packed.tokens_N)
        self.counted = int(packed.labels_R.sum())
        self.packed_rows, self.length = len(packed), packed.length
        self.efficiency = self.tokens / max(1, self.packed_rows * self.length)

    @property
    def notes(self) -> list[str]:
        """A line for each way in which rows, columns or files were not used as they are."""
        counts = [
            (self.truncated, f"truncated to {self.length} tokens"),
            (self.too_long, f"left out, longer than {self.length} tokens"),
            (self.cut, f"plain texts cut into pieces of {self.length}"),
            (self.unlabelled, "left out, no token is a label"),
            (self.excluded, "rows left out, their prompt is held out for validation"),
            (self.unended, "assistant turns without an end token as label; write one in the chat template's generation span"),
        ]
        for reason, count in sorted(self.skipped.items(), key=lambda item: -item[1]):
            counts.append((count, f"skipped: {reason} (first: {self.examples[reason]})"))
        notes = [f"{count:,} {effect}" for count, effect in counts if count]
        if self.unused:
            notes.append("columns not read: " + ", ".join(f"{key} ({count:,})" for key, count in sorted(self.unused.items())))
        return notes + ([f"files not read: {', '.join(self.left_out)}"] if self.left_out else [])

    def __str__(self) -> str:
        origin = "held out of train" if self.held_out else "read"
        line = (
            f"{self.name}: {self.rows:,} rows {origin}, {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.counted:,} labels; {self.packed_rows:,} packed rows of {self.length}, {self.efficiency:.1%} full"
        )
        return "\n  ".join([line, *self.notes])


@dataclass(frozen=True)
class Report:
    """The reports of both sets; its text is for the user."""

    train: SetReport
    validation: SetReport

    def __str__(self) -> str:
        return f"{self.train}\n{self.validation}"

    def warn(self) -> None:
        """Prints the notes of both sets to standard error, for commands whose output is something else."""
        for report in (self.train, self.validation):
            for note in report.notes:
                print(f"{report.name}: {note}", file=sys.stderr)
