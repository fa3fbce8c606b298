"""Distillation sets: a target's answers to prompts, as rows that training reads, in a folder that a kill cannot spoil.

A set is a folder. `distill.json` says what made it: target, prompts, sampling, how many rows in how many parts. Each part is a
JSONL file, whole once it bears its name; before that its rows lie in `part-*.partial`, each flushed when its answer ends. So
resuming reads what is there, drops a torn last line, and asks for the rest; ranks own parts, so any number of them can go on.
Provenance stands beside the rows, not in a first row, so that every line of every part has the same columns.

Rows: `input_ids` and `loss_mask`, exactly what was sampled, which trainkit trains on; `messages` (chats) or `prompt` and
`response` (raw text) for other programs and human eyes; `id`, `temperature`, `finish`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from trainkit.data.answer import Answer
from trainkit.data.manifest import FORMAT, PROVENANCE, part_name, read_provenance
from trainkit.data.sets.writer import begin
from trainkit.data.text.prompts import Asked
from trainkit.errors import UserError

WINDOW = 8
"""Parts worked on together, so that a batch seldom runs dry."""

Item = tuple[int, int, int]
"""A row to be made: its number in the set, its prompt's place, and which of the prompt's answers it is."""
Answerer = Callable[[Sequence[Item], float], Iterator[Answer]]
"""Answers the items at one temperature, in any order; `Answer.number` is the item's number."""


@dataclass(frozen=True)
class Layout:
    """Which rows a set has, and which part holds each: prompt by prompt, temperature by temperature, sample by sample.

    Attributes:
        prompts: Prompts asked.
        temperatures: Each prompt is answered at each.
        samples: Answers to a prompt at a temperature.
        part_rows: Rows in a part.
    """

    prompts: int
    temperatures: tuple[float, ...]
    samples: int = 1
    part_rows: int = 1024

    @property
    def rows(self) -> int:
        """Rows of the whole set."""
        return self.prompts * len(self.temperatures) * self.samples

    @property
    def parts(self) -> int:
        """Files of the whole set."""
        return -(-self.rows // self.part_rows)

    def numbers(self, part: int) -> range:
        """The rows that a part holds."""
        return range(part * self.part_rows, min((part + 1) * self.part_rows, self.rows))

    def item(self, number: int) -> tuple[Item, float]:
        """The row's item and its temperature."""
        prompt, answer = divmod(number, len(self.temperatures) * self.samples)
        return (number, prompt, answer), self.temperatures[answer // self.samples]


@dataclass
class Made:
    """What a call of `write_set` did: rows written by it and found there, new tokens, seconds, and how many texts ended."""

    rows: int = 0
    found: int = 0
    tokens: int = 0
    ended: int = 0
    seconds: float = 0.0


def write_set(
    out: Path,
    layout: Layout,
    prompts: Sequence[Asked],
    answer: Answerer,
    provenance: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Made:
    """Writes this rank's share of a set into `out`, going on where an earlier call stopped.

    Args:
        out: Folder of the set.
        layout: Its rows.
        prompts: What is asked, by place.
        answer: Where answers come from.
        provenance: What else determines the rows, JSON-able; a set begun with another one is not gone on with.
        rank: This process's number; it makes every `world_size`-th part.
        world_size: Processes that share the work.
        progress: Show a bar with tokens per second and the time left.

    Raises:
        UserError: `out` holds another set or something else, a partial row is broken, or another process writes there.
    """
    begun = _begin(out, layout, provenance)
    shared = range(rank, layout.parts, world_size)
    mine = [part for part in shared if not (out / part_name(part)).exists()]
    for part in set(shared) - set(mine):  # of a process killed between giving the part its name and this
        (out / part_name(part)).with_suffix(".partial").unlink(missing_ok=True)
    share = sum(len(layout.numbers(part)) for part in shared)
    made, began = Made(found=share - sum(len(layout.numbers(part)) for part in mine)), perf_counter()
    bar = _bar(share, made.found) if progress else None
    try:
        for start in range(0, len(mine), WINDOW):
            with ExitStack() as files:
                parts = {n: files.enter_context(_Part(out, n, layout)) for n in mine[start : start + WINDOW]}
                found = sum(len(part.done) for part in parts.values())
                made.found += found
                if bar is not None:
                    bar.update(found)
                for temperature, items in _pending(parts.values(), layout).items():
                    for given in answer(items, temperature):
                        parts[given.number // layout.part_rows].add(given, prompts)
                        made.rows, made.tokens = made.rows + 1, made.tokens + len(given.tokens)
                        made.ended += given.finish == "end"
                        if bar is not None:
                            bar.set_postfix_str(f"{made.tokens / (perf_counter() - began):,.0f} tokens/s", refresh=False)
                            bar.update()
                for part in parts.values():
                    part.finish()
    except BaseException:
        if begun and not made.rows and world_size == 1:  # nothing in it to go on with
            _discard(out)
        raise
    finally:
        made.seconds = perf_counter() - began
        if bar is not None:
            bar.close()
    return made


def _discard(out: Path) -> None:
    """Takes away a set that was begun without a row."""
    for path in (*out.glob("part-*.partial"), out / PROVENANCE):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # something else lies there
        out.rmdir()


def _begin(out: Path, layout: Layout, provenance: Mapping[str, Any]) -> bool:
    """Writes `distill.json`, or holds it against the one that is there; returns whether it wrote it."""
    values = {  # what follows from the others comes last, so that a difference is told by its cause
        "format": FORMAT,
        "temperatures": list(layout.temperatures),
        "samples": layout.samples,
        "part_rows": layout.part_rows,
        **provenance,
        "rows": layout.rows,
        "parts": layout.parts,
    }
    return begin(out, PROVENANCE, values, read_provenance, "trainkit distill")


def _pending(parts: Any, layout: Layout) -> dict[float, list[Item]]:
    """Items not yet answered, by temperature."""
    pending: dict[float, list[Item]] = {}
    for part in parts:
        for number in layout.numbers(part.number):
            if number not in part.done:
                item, temperature = layout.item(number)
                pending.setdefault(temperature, []).append(item)
    return pending


class _Part:
    """A part being made: append-only until its last row, then sorted and renamed."""

    def __init__(self, out: Path, number: int, layout: Layout) -> None:
        self.path = out / part_name(number)
        self.partial = self.path.with_suffix(".partial")
        self.number, self.layout = number, layout
        self.done: set[int] = set()
        self.stream: IO[bytes] | None = None

    def __enter__(self) -> _Part:
        self.stream = self.partial.open("a+b")
        try:
            self._read(self.stream)
        except BaseException:
            self.stream.close()  # and so gives up the lock
            raise
        return self

    def _read(self, stream: IO[bytes]) -> None:
        """Takes the file for this process alone and finds which rows are there."""
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.partial}: another process is writing it; let it finish, or stop it first") from None
        stream.seek(0)
        whole = 0
        for line in stream:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            try:
                number = int(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.partial}: broken at byte {whole}; remove the file, its rows are made again") from None
            if number in self.done or number not in self.layout.numbers(self.number):
                raise UserError(f"{self.partial}: holds row {number}, of another part or twice; remove the file")
            self.done.add(number)
            whole += len(line)
        stream.truncate(whole)

    def __exit__(self, *_: Any) -> None:
        assert self.stream is not None
        self.stream.close()

    def add(self, answer: Answer, prompts: Sequence[Asked]) -> None:
        assert self.stream is not None and answer.number not in self.done
        (_, place, _), temperature = self.layout.item(answer.number)
        self.stream.write(json.dumps(_row(answer, prompts[place], temperature), ensure_ascii=False).encode() + b"\n")
        self.stream.flush()
        self.done.add(answer.number)

    def finish(self) -> None:
        """Gives the part its name once all its rows are there."""
        assert self.stream is not None
        if len(self.done) < len(self.layout.numbers(self.number)):
            raise UserError(f"{self.partial}: some prompts got no answer; run the same command again")
        self.stream.seek(0)
        lines = sorted(self.stream, key=lambda line: json.loads(line)["id"])
        temporary = self.path.with_suffix(".sorted")
        with temporary.open("wb") as stream:
            stream.writelines(lines)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.path)
        self.partial.unlink(missing_ok=True)


def _row(answer: Answer, asked: Asked, temperature: float) -> dict[str, Any]:
    ids = [*asked.tokens, *answer.tokens]
    row: dict[str, Any] = {"id": answer.number, "temperature": temperature, "finish": answer.finish}
    if asked.messages is not None:
        row["messages"] = [*asked.messages, {"role": "assistant", "content": answer.text}]
    elif asked.text:
        row |= {"prompt": asked.text, "response": answer.text}
    return row | {"input_ids": ids, "loss_mask": [0] * len(asked.tokens) + [1] * len(answer.tokens)}


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="distill", unit=" rows", smoothing=0.05, disable=None)
