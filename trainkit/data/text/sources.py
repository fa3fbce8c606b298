"""Rows of files, folders and hub names as dictionaries, each with the place it stands at.

JSON Lines and JSON are read here, since their errors need the line; all else goes through `datasets`, imported only then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trainkit.data.manifest import set_files
from trainkit.errors import UserError

_LINES = {".jsonl", ".ndjson"}
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class BadRow(Exception):
    """A row that cannot be used, with the reason. Whether it stops the run is the caller's policy."""


Located = tuple[str, dict[str, Any] | BadRow]


def read_rows(source: str, limit: int | None = None) -> Iterator[Located]:
    """(place, row) of each row, or (place, BadRow) where the line itself is broken; `limit` takes the first rows only.

    Args:
        source: A local file (.jsonl, .json, .parquet, .csv, .arrow) or folder (such as a distillation set), otherwise a name on
            the Hugging Face hub as `owner/name[:configuration][@split]`; the split is `train` when none is given.
        limit: Rows to read at most.

    Raises:
        UserError: there is no such file or name, or it cannot be read at all.
    """
    path = Path(source)
    if path.is_file() and path.suffix in _LINES:
        rows = _json_lines(path)
    elif path.is_file() and path.suffix == ".json":
        rows = _json_list(path)
    elif path.is_dir() and (parts := set_files(path)):
        rows = chain.from_iterable(map(_json_lines, parts))
    else:
        rows = ((f"{source}: row {n}", row) for n, row in enumerate(_datasets(source), start=1))
    return islice(rows, limit)


def content_hash(source: str) -> str:
    """Hex digest of what a source holds: a file's bytes, a folder's files, or the fingerprint of a hub data set."""
    path = Path(source)
    digest = hashlib.sha256()
    if not path.exists():
        return str(_datasets(source)._fingerprint)
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _json_lines(path: Path) -> Iterator[Located]:
    with path.open("rb") as stream:
        for n, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{n}", _as_row(json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8")))
            except UnicodeDecodeError as error:
                yield f"{path}:{n}", BadRow(f"not UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                yield f"{path}:{n}", BadRow(f"not JSON: {error.msg} at column {error.colno}")


def _json_list(path: Path) -> Iterator[Located]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        mend = "name it .jsonl if each line is a row" if error.msg == "Extra data" else "mend it or save it again"
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}; {mend}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds one JSON {type(rows).__name__}; a .json file must be a list of rows")
    for n, row in enumerate(rows, start=1):
        yield f"{path}: row {n}", _as_row(row)


def _as_row(row: Any) -> dict[str, Any] | BadRow:
    return row if isinstance(row, dict) else BadRow(f"a row must be an object, not {type(row).__name__}")


def _datasets(source: str) -> Any:
    path = Path(source)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise UserError(f"{source}: unknown kind of file {path.suffix!r}; use .jsonl, .json, {', '.join(_BUILDERS)}")
    if not path.exists() and (path.is_absolute() or path.suffix in {*_LINES, ".json", *_BUILDERS} or source.startswith(".")):
        raise UserError(f"{source}: there is no such file; give an existing file or a hub name like owner/name@split")
    from datasets import load_dataset  # seconds to import

    try:
        if path.is_file():
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        name, _, split = source.partition("@")
        name, _, configuration = name.partition(":")
        return load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # datasets raises a class of its own for every builder, reader and network fault
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: neither a readable local file nor a data set on the hub ({reason[0]})") from error
