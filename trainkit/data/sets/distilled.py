"""Distillation sets: completions that the target generated, as rows for training, in a folder that survives a kill.

A set is a folder with the manifest `distill.json` and JSONL parts (`trainkit.data.sets.writer`). Until a part is complete, its
rows are in `part-*.partial`, and each row is flushed as soon as its text ends. To continue, the rows there are read, a torn
last line is dropped, and only the remaining rows are requested. The provenance is in the manifest and not in a first row, so
that every line of every part has the same columns.

Columns: `input_ids` and `loss_mask` hold exactly the sampled tokens, and trainkit trains on these; `messages` and `tools`
(chats) or `prompt` and `response` (raw text) are for other programs and for people; `id`, `temperature`, `finish`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from trainkit.data.manifest import DISTILLED
from trainkit.data.sets.writer import SetJob, SetStats, SetWriter, lock_partial
from trainkit.data.text.prompts import Completion, Prompt
from trainkit.errors import UserError
from trainkit.files import put_in_place

OPEN_PARTS = 8
"""Number of parts in progress at the same time; their rows together fill the batches of the generator."""


class PlannedRow(NamedTuple):
    """A row that is to be generated.

    Attributes:
        id: Number of the row in the set.
        prompt: Index of its prompt.
        sample: Index of the completion among all of its prompt, over all temperatures; it selects the random draws.
        temperature: Sampling temperature.
    """

    id: int
    prompt: int
    sample: int
    temperature: float


Complete = Callable[[Sequence[PlannedRow], float], Iterator[Completion]]
"""Generates the completions of rows that all have one temperature, in any order; `Completion.id` is the row's id."""


@dataclass(frozen=True)
class DistilledLayout:
    """Rows of a set and the part of each: ordered by prompt, then by temperature, then by sample.

    Attributes:
        prompts: Number of prompts.
        temperatures: Sampling temperatures, all of which are used for each prompt.
        samples: Completions for each prompt and temperature.
        part_rows: Rows in a part.
    """

    prompts: int
    temperatures: tuple[float, ...]
    samples: int = 1
    part_rows: int = 1024

    @property
    def rows(self) -> int:
        """Number of rows in the set."""
        return self.prompts * len(self.temperatures) * self.samples

    def parts(self) -> dict[str, range]:
        """File name of each part, with the ids of its rows."""
        starts = range(0, self.rows, self.part_rows)
        return {DISTILLED.part_name(n): range(self.rows)[start : start + self.part_rows] for n, start in enumerate(starts)}

    def row(self, id: int) -> PlannedRow:
        """The row with this id."""
        prompt, sample = divmod(id, len(self.temperatures) * self.samples)
        return PlannedRow(id, prompt, sample, self.temperatures[sample // self.samples])


def write_distilled(job: SetJob, layout: DistilledLayout, prompts: Sequence[Prompt], complete: Complete) -> SetStats:
    """Writes this process's share of a set; continues where an earlier call stopped.

    Args:
        job: Folder, provenance and process.
        layout: Rows and parts of the set.
        prompts: All prompts.
        complete: Generates completions.

    Raises:
        UserError: the folder holds another set or something else, a partial file is damaged, another process writes it, or a
            prompt got no completion.
    """
    ids = layout.parts()
    manifest = {  # causes before consequences, see SetWriter
        "format": DISTILLED.format,
        "temperatures": list(layout.temperatures),
        "samples": layout.samples,
        "part_rows": layout.part_rows,
        **job.provenance,
        "rows": layout.rows,
        "parts": len(ids),
    }
    with SetWriter(job, DISTILLED, manifest, {name: len(rows) for name, rows in ids.items()}, "rows") as writer:
        stats = writer.stats
        stats.existing = sum(len(ids[name]) for name in writer.existing)
        for name in writer.existing:  # left by a process that was killed after it renamed the part
            (job.out / name).with_suffix(".partial").unlink(missing_ok=True)
        for start in range(0, len(writer.missing), OPEN_PARTS):
            with ExitStack() as stack:
                # Open a few parts, and count the rows that are already in them.
                parts = {}
                for name in writer.missing[start : start + OPEN_PARTS]:
                    part = _PartialPart(ids[name], stack.enter_context(lock_partial(job.out / name)))
                    parts |= dict.fromkeys(ids[name], part)
                    stats.existing += len(part.done)
                    writer.advance(len(part.done))
                # Generate the other rows, one temperature at a time.
                for temperature in layout.temperatures:
                    rows = [layout.row(id) for id, part in parts.items() if id not in part.done]
                    rows = [row for row in rows if row.temperature == temperature]
                    for completion in complete(rows, temperature) if rows else ():
                        row = layout.row(completion.id)
                        parts[row.id].add(row.id, _columns(row, prompts[row.prompt], completion))
                        stats.written += 1
                        stats.ended += completion.finish == "end"
                        stats.cut += completion.finish == "max_len"
                        writer.advance(1, len(completion.tokens))
                for part in dict.fromkeys(parts.values()):
                    part.finish()
    return stats


class _PartialPart:
    """A part in progress: rows are appended in any order; when all exist, they are sorted and the part gets its name.

    Args:
        ids: Ids of its rows.
        stream: The locked partial file.

    Attributes:
        done: Ids of the rows in the partial file.

    Raises:
        UserError: the partial file is damaged, or has rows of another part.
    """

    def __init__(self, ids: range, stream: IO[bytes]) -> None:
        self.ids, self.stream = ids, stream
        self.done: set[int] = set()
        end = 0  # bytes of complete lines
        stream.seek(0)
        for line in stream:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                id = int(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{stream.name}: damaged at byte {end}; remove the file to generate its rows again") from None
            if id in self.done or id not in ids:
                raise UserError(
                    f"{stream.name}: row {id} is from another part or there twice; remove the file to generate its rows again"
                )
            self.done.add(id)
            end += len(line)
        stream.truncate(end)

    def add(self, id: int, columns: Mapping[str, Any]) -> None:
        """Appends a row and flushes it."""
        assert id not in self.done
        self.stream.write(json.dumps(columns, ensure_ascii=False).encode() + b"\n")
        self.stream.flush()
        self.done.add(id)

    def finish(self) -> None:
        """Writes the sorted rows under the part's name."""
        if len(self.done) < len(self.ids):
            raise UserError(f"{self.stream.name}: some prompts got no completion; run the same command again")
        self.stream.seek(0)
        lines = sorted(self.stream.readlines(), key=lambda line: json.loads(line)["id"])
        partial = Path(self.stream.name)
        temporary = partial.with_suffix(".sorted")
        temporary.write_bytes(b"".join(lines))
        put_in_place(temporary, partial.with_suffix(DISTILLED.suffix))
        partial.unlink(missing_ok=True)


def _columns(row: PlannedRow, prompt: Prompt, completion: Completion) -> dict[str, Any]:
    columns: dict[str, Any] = {"id": row.id, "temperature": row.temperature, "finish": completion.finish}
    if prompt.messages is not None:
        columns["messages"] = [*prompt.messages, {"role": "assistant", "content": completion.text}]
        columns |= {} if prompt.tools is None else {"tools": prompt.tools}
    elif prompt.text:
        columns |= {"prompt": prompt.text, "response": completion.text}
    mask = [0] * len(prompt.tokens) + [1] * len(completion.tokens)
    return columns | {"input_ids": [*prompt.tokens, *completion.tokens], "loss_mask": mask}
