"""What preparing did to the rows: everything read is packed, or counted here under the reason why not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trainkit.data.text.packing import PackedSet


@dataclass
class SetReport:
    """Counts of one set.

    Attributes:
        name: `train` or `validation`.
        rows: Rows read; for a held-out set the rows that went into it.
        held_out: The rows were taken from the training rows, whose own `rows` include them.
        skipped: Bad rows by reason.
        examples: Where the first row of each reason stands.
        truncated: Documents that lost their end.
        too_long: Documents left out as longer than the packed length.
        cut: Plain texts cut into several documents.
        unlabelled: Documents left out because none of their tokens counts, often after truncation.
        unused: Columns that were not read, with the rows that had them.
        documents: Documents packed.
        tokens: Tokens packed.
        counted: Tokens that count as labels.
        packed_rows: Rows after packing.
        length: Tokens in a packed row.
        efficiency: Share of packed positions that holds a token.
    """

    name: str
    rows: int = 0
    held_out: bool = False
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    truncated: int = 0
    too_long: int = 0
    cut: int = 0
    unlabelled: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    tokens: int = 0
    counted: int = 0
    packed_rows: int = 0
    length: int = 0
    efficiency: float = 0.0

    def skip(self, place: str, reason: str) -> None:
        """Counts a bad row."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, place)

    def measure(self, packed: PackedSet) -> None:
        """Takes the sizes of the packed set."""
        self.documents = len(packed.documents_D) - 1
        self.tokens = len(packed.tokens_N)
        self.counted = int(packed.labels_R.sum())
        self.packed_rows, self.length, self.efficiency = len(packed), packed.length, packed.efficiency

    def __str__(self) -> str:
        origin = "held out of train" if self.held_out else "read"
        lines = [
            f"{self.name}: {self.rows:,} rows {origin}, {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.counted:,} counted; {self.packed_rows:,} packed rows of {self.length}, {self.efficiency:.1%} full"
        ]
        for count, what in (
            (self.truncated, f"truncated to {self.length} tokens"),
            (self.too_long, f"left out, longer than {self.length} tokens"),
            (self.cut, f"plain texts cut into pieces of {self.length}"),
            (self.unlabelled, "left out, no token of theirs counts"),
        ):
            if count:
                lines.append(f"  {count:,} {what}")
        for reason, count in self.skipped.most_common():
            lines.append(f"  {count:,} skipped: {reason} (first: {self.examples[reason]})")
        if self.unused:
            lines.append("  columns not read: " + ", ".join(f"{key} ({count:,})" for key, count in sorted(self.unused.items())))
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """The reports of both sets; `print` it."""

    train: SetReport
    validation: SetReport

    def __str__(self) -> str:
        return f"{self.train}\n{self.validation}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy; `from_dict` reads it back."""
        return {"train": _plain(self.train), "validation": _plain(self.validation)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote."""

        def read(part: Mapping[str, Any]) -> SetReport:
            counters: dict[str, Any] = {key: Counter(part[key]) for key in ("skipped", "unused")}
            return SetReport(**{**part, **counters})

        return Report(read(values["train"]), read(values["validation"]))


def _plain(report: SetReport) -> dict[str, Any]:
    # not dataclasses.asdict, which before Python 3.12 turns a Counter into one of pairs
    values = {item.name: getattr(report, item.name) for item in fields(report)}
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
