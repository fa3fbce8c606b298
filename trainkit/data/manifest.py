"""Manifests of generated data sets (the JSON file beside a set's parts), and the digest of the weights of their target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainkit.errors import UserError
from trainkit.files import file_digest
from trainkit.models.weights import weight_files


@dataclass(frozen=True)
class SetKind:
    """One kind of generated data set: its manifest, its parts, and the command that writes it.

    Attributes:
        title: Name of the kind, with its article.
        manifest: File name of the manifest; its stem is also the metadata key under which a safetensors part has the set's id.
        command: Command that writes such sets.
        format: Version of the file format.
        suffix: Suffix of the parts' file names.
    """

    title: str
    manifest: str
    command: str
    format: int
    suffix: str = ".safetensors"

    def read(self, folder: Path) -> dict[str, Any] | None:
        """The manifest in a folder, or None if there is none.

        Raises:
            UserError: the manifest is not readable, or has another format.
        """
        path = folder / self.manifest
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not JSON ({error}); remove the folder and run {self.command} again") from None
        known = isinstance(values, dict) and values.get("format") == self.format
        if not known or not (isinstance(values.get("parts"), int) or isinstance(values.get("sets"), dict)):
            raise UserError(f"{path}: not {self.title} of format {self.format}; use the trainkit version that wrote it")
        return values

    def part_name(self, number: int) -> str:
        """File name of a complete part, for kinds whose parts are numbered."""
        return f"part-{number:05d}{self.suffix}"

    def part_files(self, folder: Path, names: Iterable[str]) -> list[Path]:
        """Paths of the parts, all of which exist.

        Raises:
            UserError: parts are missing.
        """
        files = [folder / name for name in names]
        if missing := sum(not file.is_file() for file in files):
            raise UserError(f"{folder}: {missing} of {len(files)} parts are missing; run the same {self.command} again")
        return files

    def open_part(self, path: Path, set_id: str) -> Any:
        """A safetensors part, opened for reading (`safe_open`).

        Raises:
            UserError: the file is damaged, or belongs to another set.
        """
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            reason = f"not a complete safetensors file ({error})"
        else:
            if (opened.metadata() or {}).get(Path(self.manifest).stem) == set_id:
                return opened
            reason = f"belongs to another set than {self.manifest} beside it"
        raise UserError(f"{path}: {reason}; remove the file and run the same {self.command} again")


DISTILLED = SetKind("a distillation set", "distill.json", "trainkit distill", 1, ".jsonl")
FEATURES = SetKind("a feature set", "features.json", "trainkit features", 1)
ACCEPTANCE = SetKind("an acceptance set", "acceptance.json", "trainkit acceptance", 2)


def distilled_files(folder: Path) -> list[Path]:
    """The parts of a complete distillation set, in order; empty for a folder that is not a distillation set.

    Raises:
        UserError: parts are missing.
    """
    values = DISTILLED.read(folder)
    return [] if values is None else DISTILLED.part_files(folder, map(DISTILLED.part_name, range(values["parts"])))


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of the names and contents of a model folder's weight files; `file_digest` caches that of each file."""
    digests = {path.name: file_digest(path, cached=True) for path in weight_files(folder)}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
