"""Reads `.wandb` files of W&B: a LevelDB log (blocks of 32 KiB, records in parts) of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<4sHB")
"""Header of the file: `:W&B`, a magic number, the version of the format."""
PART = struct.Struct("<IHB")
"""Header of each part of a record: checksum, length, type."""
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4
BLOCK = 32768


def payloads(content: bytes) -> Iterator[bytes]:
    """The records in the content of a file, with verified checksums; a truncated last record is left out."""
    name, _, version = HEADER.unpack_from(content)
    assert (name, version) == (b":W&B", 0)
    offset, record = HEADER.size, b""
    while offset + PART.size <= len(content):
        left = BLOCK - offset % BLOCK
        if left < PART.size:  # the header of a part never crosses the end of a block
            offset += left
            continue
        checksum, length, kind = PART.unpack_from(content, offset)
        data = content[offset + PART.size : offset + PART.size + length]
        if len(data) < length:
            return
        assert checksum == zlib.crc32(bytes([kind]) + data), f"broken at byte {offset}"
        assert (kind in (FULL, FIRST)) == (not record)
        record, offset = record + data, offset + PART.size + length
        if kind in (FULL, LAST):
            yield record
            record = b""


def records(path: Path) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(payload) for payload in payloads(path.read_bytes())]  # type: ignore[attr-defined]


def files(run_folder: Path) -> list[Path]:
    """The offline record files of a run folder, oldest first."""
    return sorted((run_folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent.name)


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def rows(found: list[Any]) -> list[dict[str, Any]]:
    """The logged rows, each as values by name."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for history in of_kind(found, "history")
    ]


def config(found: list[Any]) -> dict[str, Any]:
    changes = [record.config for record in of_kind(found, "run")] + of_kind(found, "config")
    return {item.key: json.loads(item.value_json) for change in changes for item in change.update}
