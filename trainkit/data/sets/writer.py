"""The resumable writer that all three kinds of generated data sets share.

A set is a folder with a manifest, which records everything that determines the contents, and with parts. A part gets its final
name only when it is complete, so an interrupted command continues with the parts that do not exist. Several processes share the
work: process `rank` writes parts rank, rank + world_size, ... A part in progress is a `.partial` file, locked by its process.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from trainkit.data.manifest import SetKind
from trainkit.errors import UserError
from trainkit.files import put_in_place, write_json


@dataclass(frozen=True)
class SetJob:
    """Which set is written, and by which of the processes that write it together.

    Attributes:
        out: Folder of the set.
        provenance: Everything that determines the contents and is not part of the set's layout, JSON-able. An existing set is
            continued only if its provenance is the same; `versions`, and in nested dictionaries names and paths, may differ.
        rank: Number of this process.
        world_size: Number of processes.
        progress: Whether this process shows a progress bar.
    """

    out: Path
    provenance: Mapping[str, Any]
    rank: int = 0
    world_size: int = 1
    progress: bool = True

    @staticmethod
    def from_environment(out: str, provenance: Mapping[str, Any]) -> SetJob:
        """The job of this process as torchrun started it, or of the only process; rank 0 shows the progress bar."""
        rank = int(os.environ.get("RANK", "0"))
        return SetJob(Path(out), provenance, rank, int(os.environ.get("WORLD_SIZE", "1")), progress=rank == 0)


@dataclass
class SetStats:
    """What one call of a set writer did.

    Attributes:
        written: Rows (distillation sets) or parts (other sets) written by this call.
        existing: Rows or parts of this process's share that already existed.
        tokens: Tokens generated, or read by the target.
        seconds: Duration of the call.
        bytes: Size of the parts written.
        ended: Rows written whose text ended with an end token.
        cut: Texts that ended before `max_new_tokens` because they fill `max_len`.
        records: Acceptance records written.
        accepted: Sum of the labels of their first proposals; divided by `records`, the share accepted.
    """

    written: int = 0
    existing: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    ended: int = 0
    cut: int = 0
    records: int = 0
    accepted: float = 0.0

    @property
    def speed(self) -> str:
        """Tokens per second, with the unit."""
        return f"{self.tokens / self.seconds if self.seconds else 0.0:,.0f} tokens/s"

    @property
    def cut_note(self) -> str:
        """How many texts were cut, for the summary; empty if none was."""
        return f"{self.cut:,} cut by max_len, before max_new_tokens; " if self.cut else ""

    def summary(self, job: SetJob, total: int, unit: str, details: str = "") -> str:
        """One line for the user; `total` counts the `unit`s of the whole set, `details` is inserted before the speed."""
        process = f" by process {job.rank} of {job.world_size}" if job.world_size > 1 else ""
        return (
            f"{job.out}: {self.written:,} of {total:,} {unit} written{process}, {self.existing:,} already existed; "
            f"{details}{self.tokens:,} tokens in {self.seconds:.0f} s, {self.speed}"
        )


def comparable(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest without library versions, names, paths and addresses, which do not change a set's contents."""
    ignored = ("name", "path", "base_url")
    return {
        key: {k: v for k, v in value.items() if k not in ignored} if isinstance(value, dict) else value
        for key, value in manifest.items()
        if key != "versions"
    }


class SetWriter:
    """Writes this process's share of a set; starts the set, or continues one that an earlier call left incomplete.

    A context manager. If it is left by an error before anything is written, a set that this call started is removed again.

    Args:
        job: Folder and process.
        kind: Kind of the set.
        manifest: Contents of the manifest, JSON-able, causes before their consequences: the first key that differs from an
            existing set is reported.
        sizes: File name of each part of the whole set, with its number of units for the progress bar.
        unit: Name of these units, in the plural.

    Attributes:
        missing: File names of this process's parts that must be written.
        existing: File names of its parts that exist.
        stats: What this call has done so far.

    Raises:
        UserError: the folder holds another set or something else.
    """

    def __init__(self, job: SetJob, kind: SetKind, manifest: Mapping[str, Any], sizes: Mapping[str, int], unit: str) -> None:
        self.out, self.kind, self.manifest = job.out, kind, manifest
        self._removable = self._begin() and job.world_size == 1
        share = list(sizes)[job.rank :: job.world_size]
        self.missing = [name for name in share if not (self.out / name).exists()]
        self.existing = [name for name in share if name not in set(self.missing)]
        self.stats, self._start = SetStats(existing=len(self.existing)), perf_counter()
        total, initial = (sum(sizes[name] for name in names) for names in (share, self.existing))
        label, hidden = kind.command.split()[-1], None if job.progress else True  # None hides the bar in a log file
        self._bar = tqdm(total=total, initial=initial, desc=label, unit=f" {unit}", smoothing=0.05, disable=hidden)

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.stats.seconds = perf_counter() - self._start
        self._bar.close()
        if error is not None and self._removable and not self.stats.written:
            for path in (*self.out.glob("*.partial"), self.out / self.kind.manifest):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # the folder holds something else
                self.out.rmdir()

    def advance(self, units: int, tokens: int = 0) -> None:
        """Moves the progress bar by `units`, and counts tokens."""
        self.stats.tokens += tokens
        self.stats.seconds = perf_counter() - self._start
        self._bar.set_postfix_str(self.stats.speed, refresh=False)
        self._bar.update(units)

    def write_tensors(self, make: Callable[[str], Mapping[str, Tensor]]) -> None:
        """Writes every missing part with the tensors that `make` returns for its name.

        Raises:
            UserError: another process is writing the same part.
        """
        for path in (self.out / name for name in self.missing):
            with lock_partial(path) as stream:
                partial = Path(stream.name)
                try:
                    if path.exists():  # completed by the previous holder of the lock
                        self.stats.existing += 1
                        continue
                    # one metadata key only: safetensors writes several in random order
                    metadata = {Path(self.kind.manifest).stem: self.manifest["id"]}
                    content = safetensors.torch.save(dict(make(path.name)), metadata)
                    stream.truncate(0)  # what a killed process left
                    stream.write(content)
                    stream.flush()
                    put_in_place(partial, path)
                finally:
                    partial.unlink(missing_ok=True)
            self.stats.written, self.stats.bytes = self.stats.written + 1, self.stats.bytes + len(content)

    def _begin(self) -> bool:
        """Writes the manifest, or compares it with the existing one; returns whether the folder is new."""
        out, file, now = self.out, self.kind.manifest, json.loads(json.dumps(self.manifest))
        # listed before the manifest is read: another process that is just starting the set writes its manifest first
        foreign = out.exists() and (
            not out.is_dir() or any(path.name != file and not path.name.startswith(".") for path in out.iterdir())
        )
        before = self.kind.read(out)
        if before is None:
            if foreign:
                raise UserError(f"--out {out}: holds something else; use a new folder, or one that {self.kind.command} started")
            new = not out.exists()
            write_json(out / file, now)
            return new
        before, now = comparable(before), comparable(now)
        for key in {**now, **before}:
            old, new = before.get(key), now.get(key)
            if old != new:
                if isinstance(old, dict) and isinstance(new, dict):
                    inner = next(name for name in {**new, **old} if old.get(name) != new.get(name))
                    key, old, new = f"{key} {inner}", old.get(inner), new.get(inner)
                digests = " (digests: its content is another)" if _is_digest(old) and _is_digest(new) else ""
                raise UserError(
                    f"--out {out}: the set there was started with {key} {_short(old)}, but now it is {_short(new)}{digests}; "
                    "use the same settings to continue it, or another folder"
                )
        return False


@contextmanager
def lock_partial(path: Path) -> Iterator[IO[bytes]]:
    """The `.partial` file of part `path`, open for reading and appending, and locked by this process.

    Raises:
        UserError: another process holds the lock.
    """
    with path.with_suffix(".partial").open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{stream.name}: another process is writing this file; wait for it, or stop it first") from None
        yield stream


def check_positive(**counts: int | None) -> None:
    """Raises UserError for a command's option below 1; None is an option that is not set."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")


def local_device(device: str) -> str:
    """The torch device of this process: under torchrun, `cuda` and `auto` are the GPU of its local rank, if there are GPUs."""
    rank = os.environ.get("LOCAL_RANK")
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return f"cuda:{rank}" if on_gpu and rank is not None else device


def quiet_libraries() -> None:
    """Turns off progress bars and notices of transformers and datasets, for commands that print their own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read by datasets when it is imported, which takes seconds


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _short(value: Any) -> str:
    if _is_digest(value):
        return value[:8]
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
