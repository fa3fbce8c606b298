"""Rows of files, folders and hub data sets as dictionaries, each with its location for error messages.

JSON Lines and JSON are parsed here, because their errors must name the line. Everything else is read by `datasets`, which is
imported only when it is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trainkit.data.manifest import distilled_files
from trainkit.errors import UserError

_LINES = {".jsonl", ".ndjson"}
_BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}


class RowError(Exception):
    """The reason why a row cannot be used. The caller decides whether it stops the run."""


LocatedRow = tuple[str, dict[str, Any] | RowError]
"""Location of a row, such as `file.jsonl:3`, with its values, or with the error if the line cannot be parsed."""


def read_rows(source: str, limit: int | None = None) -> Iterator[LocatedRow]:
    """The rows of a source, in order.

    Args:
        source: A local file (.jsonl, .ndjson, .json, .parquet, .csv, .arrow) or folder (such as a distillation set), otherwise
            a name on the Hugging Face hub as `owner/name[:configuration][@split]`; the default split is `train`.
        limit: Number of rows to read, from the beginning; None reads all.

    Raises:
        UserError: there is no such file or name, or it cannot be read at all.
    """
    path = Path(source)
    if path.is_file() and path.suffix in _LINES:
        rows = _json_lines(path)
    elif path.is_file() and path.suffix == ".json":
        rows = _json_list(path)
    elif path.is_dir() and (parts := distilled_files(path)):
        rows = chain.from_iterable(map(_json_lines, parts))
    else:
        rows = ((f"{source}: row {n}", row) for n, row in enumerate(_load_dataset(source), start=1))
    return islice(rows, limit)


def content_hash(source: str) -> str:
    """Hex SHA-256 of a file's bytes or of all files in a folder; for a hub data set, its fingerprint."""
    path = Path(source)
    if not path.exists():
        return str(_load_dataset(source)._fingerprint)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _json_lines(path: Path) -> Iterator[LocatedRow]:
    with path.open("rb") as stream:
        for n, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = _check_row(json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8")))
            except UnicodeDecodeError as error:
                row = RowError(f"not UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                row = RowError(f"not JSON: {error.msg} at column {error.colno}")
            yield f"{path}:{n}", row


def _json_list(path: Path) -> Iterator[LocatedRow]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        fix = "name it .jsonl if each line is a row" if error.msg == "Extra data" else "correct the file"
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}; {fix}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds one JSON {type(rows).__name__}; a .json file must be a list of rows")
    for n, row in enumerate(rows, start=1):
        yield f"{path}: row {n}", _check_row(row)


def _check_row(row: Any) -> dict[str, Any] | RowError:
    return row if isinstance(row, dict) else RowError(f"a row must be an object, not {type(row).__name__}")


def _load_dataset(source: str) -> Any:
    path = Path(source)
    if path.is_file() and path.suffix not in _BUILDERS:
        raise UserError(f"{source}: unknown file type {path.suffix!r}; use .jsonl, .json, {', '.join(_BUILDERS)}")
    if not path.exists() and (path.is_absolute() or path.suffix in {*_LINES, ".json", *_BUILDERS} or source.startswith(".")):
        raise UserError(f"{source}: there is no such file; give an existing file or a hub name like owner/name@split")
    from datasets import load_dataset  # takes seconds to import

    try:
        if path.is_file():
            return load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
        name, _, split = source.partition("@")
        name, _, configuration = name.partition(":")
        return load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # datasets has an exception class of its own for each builder, reader and network failure
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{source}: neither a readable local file nor a data set on the hub ({reason[0]}); check the path or the name"
        ) from error
