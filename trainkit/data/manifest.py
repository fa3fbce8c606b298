"""What a made set says of itself in a JSON beside its files, how it and its parts are written, and whose weights made it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from trainkit.errors import UserError

PROVENANCE = "distill.json"
FORMAT = 1


def part_name(part: int) -> str:
    """The file name of a whole part."""
    return f"part-{part:05d}.jsonl"


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """What `distill.json` says, or None where there is none.

    Raises:
        UserError: it is not readable.
    """
    return read_manifest(folder / PROVENANCE, FORMAT, "parts", int, "a distillation set")


def read_manifest(path: Path, format: int, key: str, kind: type, what: str) -> dict[str, Any] | None:
    """What the JSON beside a made set's files says, or None where there is none.

    Args:
        path: The JSON.
        format: The one known here.
        key: Something that it must say,
        kind: and of which type.
        what: The set, with its article, for the message.

    Raises:
        UserError: it is not readable, or of another format.
    """
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); it cannot be told from another set, make it again") from None
    if not isinstance(values, dict) or values.get("format") != format or not isinstance(values.get(key), kind):
        raise UserError(f"{path}: not {what} of format {format}; use the trainkit that made it")
    return values


def weights_digest(folder: str | Path) -> str:
    """Digest that tells a model's weights from another's: of each weight file its name, size and 16 blocks spread over it."""
    digest = hashlib.sha256()
    for file in sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".bin")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for block in range(16):
                stream.seek(block * max(0, size - 65536) // 15)
                digest.update(stream.read(65536))
    return digest.hexdigest()


def set_files(folder: Path) -> list[Path]:
    """The parts of a complete set, in order; of a folder without `distill.json`, nothing.

    Raises:
        UserError: parts are missing.
    """
    values = read_provenance(folder)
    if values is None:
        return []
    files = [folder / part_name(part) for part in range(values["parts"])]
    missing = sum(not file.is_file() for file in files)
    if missing:
        raise UserError(f"{folder}: {missing} of {len(files)} parts are not done; run the same trainkit distill again")
    return files
