"""Rows of files, folders and hub data sets as dictionaries, each with its location for error messages.

JSON Lines, JSON and CSV are parsed here: their errors must name the line, and their texts must stay strings, even if they look
like dates, numbers or None. Everything else is read by `datasets`, which is imported only when it is needed. The files of a
folder are listed here too, because `datasets` reads only those whose names it recognises as a training set.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from trainkit.data.manifest import distilled_files
from trainkit.errors import UserError, lone_surrogate

_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape \\uD800 to \\uDFFF in JSON, one half of a surrogate pair; alone it is not valid Unicode, so the row is checked."""
_HELD_OUT = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|val|valid|validation|dev)(?![a-z])", re.IGNORECASE)
"""Names of files that are a test or validation set, as `datasets` recognises them."""


class RowError(Exception):
    """The reason why a row cannot be used. The caller decides whether it stops the run."""


LocatedRow = tuple[str, dict[str, Any] | RowError]
"""Location of a row, such as `file.jsonl:3`, with its values, or with the error if the line cannot be parsed."""


def read_rows(source: str, limit: int | None = None) -> Iterator[LocatedRow]:
    """The rows of a source, in order.

    Args:
        source: A local file (.jsonl, .ndjson, .json, .csv, .parquet, .arrow) or folder (see `data_files`), otherwise a name on
            the Hugging Face hub as `owner/name[:configuration][@split]`; the default split is `train`.
        limit: Number of rows to read, from the beginning; None reads all.

    Raises:
        UserError: there is no such file or name, it cannot be read at all, or `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} must be at least 1; leave it out to read all rows")
    path = Path(source)
    files = data_files(path)[0] if path.is_dir() else [path] if path.exists() else None
    return islice(_dataset_rows(source) if files is None else chain.from_iterable(map(_read_file, files)), limit)


def data_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a folder whose rows are read, in order, and those that are left out.

    A distillation set has its parts. In any other folder and its subfolders all data files are read, but not hidden ones,
    those named as a test or validation set (if there are others), and .json files that hold no list.

    Raises:
        UserError: the folder holds no data file.
    """
    if parts := distilled_files(folder):
        return parts, []
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    data = [name for name in visible if _holds_rows(folder / name)]
    chosen = [name for name in data if not _HELD_OUT.search(str(name))] or data
    if not chosen:
        raise UserError(f"{folder}: holds no data file; give a folder with {', '.join([*_READERS, *_BUILDERS])} files")
    return [folder / name for name in chosen], [folder / name for name in visible if name not in set(chosen)]


def _holds_rows(path: Path) -> bool:
    """Whether a file of a folder is data by its suffix; a .json file must also start as a list."""
    if path.suffix != ".json":
        return path.suffix in _READERS or path.suffix in _BUILDERS
    with path.open("rb") as stream:
        return stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_file(path: Path) -> Iterator[LocatedRow]:
    return _READERS[path.suffix](path) if path.suffix in _READERS else _dataset_rows(str(path))


def _dataset_rows(source: str) -> Iterator[LocatedRow]:
    return ((f"{source}: row {n}", _without_null(row)) for n, row in enumerate(_load_dataset(source), start=1))


def _without_null(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the null values inside its columns, which Arrow adds to give all objects of a column the same keys."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(inner) for key, inner in value.items() if inner is not None}
        return [clean(inner) for inner in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in row.items()}


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
                row = _check_row(json.loads(line.decode("utf-8-sig" if n == 1 else "utf-8")), bool(_SURROGATE.search(line)))
            except UnicodeDecodeError as error:
                row = RowError(f"not UTF-8 at byte {error.start + 1} of the line")
            except json.JSONDecodeError as error:
                row = RowError(f"not JSON: {error.msg} at column {error.colno}")
            yield f"{path}:{n}", row


def _json_list(path: Path) -> Iterator[LocatedRow]:
    content = path.read_bytes()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        fix = "name it .jsonl if each line is a row" if error.msg == "Extra data" else "correct the file"
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}; {fix}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: holds one JSON {type(rows).__name__}; a .json file must be a list of rows")
    doubtful = bool(_SURROGATE.search(content))
    for n, row in enumerate(rows, start=1):
        yield f"{path}: row {n}", _check_row(row, doubtful)


def _csv_lines(path: Path) -> Iterator[LocatedRow]:
    """Rows of a CSV file with a header; all values are texts."""
    csv.field_size_limit(2**31 - 1)
    line = 0  # of the end of the last record
    with path.open("rb") as stream:
        # decoded line by line, so that an error of either kind is in the record that begins at the next line
        lines = (text.decode("utf-8-sig" if n == 0 else "utf-8") for n, text in enumerate(stream))
        reader = csv.reader(lines, strict=True)
        try:
            header, line = next(reader, []), reader.line_num
            for fields in reader:
                start, line = line + 1, reader.line_num
                if len(fields) == len(header):
                    yield f"{path}:{start}", dict(zip(header, fields, strict=True))
                elif fields:  # not a blank line
                    counts = f"{len(fields)} fields, but the header has {len(header)}"
                    yield f"{path}:{start}", RowError(f"{counts}; put quotes around texts that hold a comma")
        except (csv.Error, UnicodeDecodeError) as error:
            reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not CSV: {error}"
            raise UserError(f"{path}:{line + 1}: {reason}; correct the file") from None


def _check_row(row: Any, doubtful: bool) -> dict[str, Any] | RowError:
    """The row, or what is wrong with it; a `doubtful` one is searched for lone surrogates."""
    if not isinstance(row, dict):
        return RowError(f"a row must be an object, not {type(row).__name__}")
    try:
        if doubtful:
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return RowError(lone_surrogate(error))
    return row


_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_list, ".csv": _csv_lines}


def _load_dataset(source: str) -> Any:
    path = Path(source)
    known = {*_READERS, *_BUILDERS}
    if path.is_file() and path.suffix not in _BUILDERS:
        types = ", ".join([*_READERS, *_BUILDERS])
        row = '{"prompt": "..."} for a prompt or {"text": "..."} for a text'
        raise UserError(
            f"{source}: unknown file type {path.suffix!r}; use {types}; in .jsonl each line is a row, such as {row}"
        )
    if not path.exists() and (path.is_absolute() or path.suffix in known or source.startswith(".")):
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
