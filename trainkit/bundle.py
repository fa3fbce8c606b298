"""Bundles: folders that other programs can load, with a `trainkit.json` that describes them and holds the sha256 of each file.

`write` replaces a bundle atomically (files.py); `read` checks everything before it returns. Nothing is unpickled, and no tensor
is loaded here: the drafter kind that wrote the tensors loads them. A bundle that a kill left moved aside is put back by the
next `read` or `write` of its path; leftovers of killed writers are removed by the next `write`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from trainkit import __version__
from trainkit.errors import UserError, note
from trainkit.files import file_digest, finite, tidy, write_folder, write_text

FORMAT_VERSION = 1
MANIFEST = "trainkit.json"
CERTIFICATE = "certificate.json"
"""What `trainkit verify` records in a bundle. Not listed in the manifest: it may be written again or removed."""
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model", ".png")
"""Suffixes of files that a bundle may hold; pickles are never among them."""

ADAPTER = "trainkit_adapter"
"""Key in a model's config.json: digest of the adapter merged into its weights, which tells it from the model before merging."""

_UNLISTED = (".md", ".txt", ".png")  # may be in a bundle without being listed: nothing loads them
_VOLATILE = {
    *("transformers_version", "_name_or_path", "dtype", "torch_dtype"),
    *("use_cache", "initializer_range", "_attn_implementation"),
}
VOCABULARY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
"""Files that hold the vocabulary of a tokenizer without tokenizer.json."""


@dataclass(frozen=True)
class Bundle:
    """The content of `trainkit.json`.

    Attributes:
        path: Folder of the bundle.
        kind: Drafter kind, or another name for what the folder holds.
        config: Constructor arguments that rebuild the drafter.
        target: `TargetShape.to_dict()` of the target it was trained for; its `fingerprint` identifies that target.
        metrics: Measured values by name.
        runner: Recommended runner settings.
        recipe: Recipe of the training run.
        seed: Seed of the training run.
        versions: Library versions at the time of writing.
        data: Fingerprint of the training data.
        files: sha256 (hex) of each file, by path relative to the folder.
        extra: Values that only the drafter kind reads.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    target: Mapping[str, Any]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    runner: Mapping[str, Any] = field(default_factory=dict)
    recipe: Any = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Any = None
    files: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def is_bundle(folder: str | Path) -> bool:
    """Whether `folder` holds a `trainkit.json`; its content is not checked."""
    return (Path(folder) / MANIFEST).is_file()


def note_drafter_as_target(folder: str | Path) -> None:
    """Prints a note if the folder of a target is a drafter's bundle, as when --target and --drafter are swapped.

    It is not refused, because a draft model is a language model too.
    """
    if is_bundle(folder) and (target := read(folder, checksums=False).target):
        name = (target.get("fingerprint") or {}).get("path") or "another model"
        note(f"{folder}: this target is a drafter, made for {name}; for the text of {name}, give its folder as the target")


def write(
    folder: str | Path,
    writer: Callable[[Path], None],
    *,
    kind: str,
    config: Mapping[str, Any],
    target: Mapping[str, Any],
    **card: Any,
) -> Bundle:
    """Writes a bundle atomically and returns it.

    Args:
        folder: Folder to create, or a bundle to replace.
        writer: Receives an empty temporary folder and writes weights, config and tokenizer there.
        kind: Drafter kind, or another name for what the folder holds.
        config: Constructor arguments that rebuild the drafter.
        target: `TargetShape.to_dict()` of the target it was trained for.
        card: Further fields of `Bundle`: `metrics`, `runner`, `recipe`, `seed`, `data`, `extra`.

    Raises:
        UserError: `folder` holds something that is not a bundle, or cannot be written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)

    def fill(temporary: Path) -> Mapping[str, str]:
        writer(temporary)
        check_replaceable(folder)
        return _hash_all(temporary)

    libraries = ("torch", "transformers", "lightning", "safetensors")
    versions = {"trainkit": __version__} | {name: metadata.version(name) for name in libraries}
    return _write(Bundle(folder, kind, dict(config), dict(target), versions=versions, **card), fill)


def amend(
    folder: str | Path,
    writer: Callable[[Path], None] | None = None,
    *,
    runner: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Bundle:
    """Replaces the recommended runner settings of a bundle, and adds metrics and files, atomically; returns the new bundle.

    Files already there stay, as hard links where the file system has them, unless a new file has the same name.

    Args:
        folder: Folder of the bundle.
        writer: Receives an empty temporary folder and writes the new files there; None if there are none.
        runner: New runner settings; None keeps the present ones.
        metrics: Metrics to add; one of the same name is replaced, or removed by None.

    Raises:
        UserError: `folder` holds no valid bundle, or cannot be written.
    """
    folder = Path(folder).resolve()
    bundle = read(folder)
    added = {name: value for name, value in {**bundle.metrics, **(metrics or {})}.items() if value is not None}
    bundle = replace(bundle, runner=bundle.runner if runner is None else dict(runner), metrics=added)
    if writer is None:
        write_text(folder / MANIFEST, _to_json(bundle))
        return bundle

    def fill(temporary: Path) -> Mapping[str, str]:
        writer(temporary)
        added = _hash_all(temporary)
        for path in folder.rglob("*"):
            name = path.relative_to(folder)
            if path.is_file() and not _is_hidden(name) and name.as_posix() not in {*added, MANIFEST}:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                try:
                    (temporary / name).hardlink_to(path.resolve())
                except OSError:  # a file system without links
                    shutil.copy2(path, temporary / name)
        return dict(sorted({**bundle.files, **added}.items()))

    return _write(bundle, fill)


def _write(bundle: Bundle, fill: Callable[[Path], Mapping[str, str]]) -> Bundle:
    """Writes the folder with the files that `fill` writes; `fill` returns the sha256 of each."""
    _to_json(bundle)  # refuses values that are not JSON before the work, not after it

    def fill_all(temporary: Path) -> Bundle:
        written = replace(bundle, files=fill(temporary))
        (temporary / MANIFEST).write_text(_to_json(written), encoding="utf-8")
        return written

    return write_folder(bundle.path, fill_all)


def _to_json(bundle: Bundle) -> str:
    values = {item.name: getattr(bundle, item.name) for item in fields(bundle) if item.name != "path"}
    values["metrics"] = finite(values["metrics"])  # a run may have measured NaN
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a bundle's {name} must be finite JSON: {error}") from error
    return json.dumps({"format": FORMAT_VERSION} | values, indent=2) + "\n"


def check_replaceable(folder: Path) -> None:
    if folder.exists() and not is_bundle(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a bundle (it has no {MANIFEST}); choose another folder or remove it")


def _hash_all(folder: Path) -> dict[str, str]:
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.suffix not in SUFFIXES or name == MANIFEST:
            raise ValueError(f"a bundle may not hold {name!r}; it takes plain files ending in {', '.join(SUFFIXES)}")
        files[name] = file_digest(path)
    return files


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def read(folder: str | Path, checksums: bool = True) -> Bundle:
    """The bundle in `folder`, after checking its version, its list of files and, by default, the sha256 of each file.

    Raises:
        UserError: not a bundle, written by a newer trainkit, or with files that are missing, changed, unlisted or not allowed.
    """
    folder = Path(folder)
    if not folder.exists() and folder.parent.is_dir():
        tidy(folder.resolve())
    manifest = folder / MANIFEST
    if not manifest.is_file():
        reason = f"not a bundle (no {MANIFEST})" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {reason}; give a folder that `trainkit export CHECKPOINT FOLDER` wrote")
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{manifest}: not readable as JSON ({str(error).splitlines()[0]}); export it again") from error
    bundle = _from_json(folder, values)
    for name, expected in bundle.files.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise UserError(f"{path}: missing, though {MANIFEST} lists it; export it again")
        if checksums and file_digest(path) != expected:
            raise UserError(f"{path}: changed since it was written (sha256 differs); export it again")
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        listed = name.as_posix() in {*bundle.files, MANIFEST, CERTIFICATE}
        if not (listed or path.is_dir() or path.suffix in _UNLISTED or _is_hidden(name)):
            raise UserError(f"{path}: not listed in {MANIFEST}; remove it or export again")
    return bundle


def _from_json(folder: Path, values: Any) -> Bundle:
    manifest = folder / MANIFEST
    version = values.pop("format", None) if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise UserError(f"{manifest}: no format version, so it is not a bundle of trainkit; export it again")
    if version > FORMAT_VERSION:
        raise UserError(f"{manifest}: format {version} is newer than {FORMAT_VERSION}, the newest known here; upgrade trainkit")
    names = {item.name for item in fields(Bundle)} - {"path"}
    types = dict.fromkeys(("config", "target", "metrics", "runner", "versions", "files", "extra"), dict) | {"kind": str}
    for name in sorted(names | set(values)):
        if name not in names:
            raise UserError(f"{manifest}: unknown key {name!r}; export it again")
        if name not in values or not isinstance(values[name], types.get(name, object)):
            raise UserError(f"{manifest}: {name} is missing or not a {types.get(name, object).__name__}; export it again")
    decoder = values["target"].get("decoder")
    sizes = [decoder.get(key) for key in ("vocab_size", "hidden_size")] if isinstance(decoder, dict) else [None]
    if values["target"] and not all(type(size) is int for size in sizes):
        raise UserError(f"{manifest}: target has no vocab_size or hidden_size; export it again")
    return Bundle(path=folder, **values)


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, unless the name or a link leads out of the folder."""
    pure = PurePosixPath(name)
    plain = name and "\\" not in name and not pure.is_absolute() and ".." not in pure.parts and pure.as_posix() == name
    if not plain or pure.suffix not in SUFFIXES or name == MANIFEST:
        raise UserError(f"{folder / MANIFEST}: {name!r} is not a file that a bundle may hold; do not use this bundle")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: a link that leads out of the bundle; copy the file in its place")
    return path


def fingerprint(model_folder: str | Path) -> dict[str, str]:
    """Identifies the model in a folder: digests of config and tokenizer, vocabulary size and name; reads no weights.

    `config` is the digest of config.json without the keys that another library version or precision changes. `tokenizer` is the
    digest of tokenizer.json without version, padding and truncation, so that saving it again changes nothing; without that file
    it is the digest of the vocabulary files, or "" if there are none. `adapter` exists only for a model that was tuned together
    with a drafter, and tells it from other models with the same config.

    Raises:
        UserError: no readable config.json in the folder.
    """
    folder = Path(model_folder)
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    text_config = text_config if isinstance(text_config, dict) and text_config else config
    digests = {
        "config": _sha256_json({key: value for key, value in config.items() if key not in _VOLATILE}),
        "tokenizer": tokenizer_digest(folder),
        "vocab_size": str(text_config.get("vocab_size", "")),
        "path": folder.resolve().name,
    }
    return digests | {"adapter": str(config[ADAPTER])} if config.get(ADAPTER) else digests


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a Hugging Face model folder") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({str(error).splitlines()[0]}); fix it or copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; fix it or copy it again")
    return values


def tensor_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> `dtype`, `shape`, `data_offsets` of each tensor in a safetensors file; reads only its header.

    The header is 8 bytes of length, then JSON (huggingface.co/docs/safetensors).

    Raises:
        UserError: not a safetensors file, or truncated.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 <= length <= path.stat().st_size - 8:
            raise UserError(f"{path}: not a safetensors file, or cut short; copy or export it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: not a safetensors file (its header is not JSON); copy it again") from None
    header.pop("__metadata__", None)
    return header


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """Digest of a folder's tokenizer files, empty if there are none; `fingerprint` has it as `tokenizer`."""
    if (folder / "tokenizer.json").is_file():
        values = read_json(folder / "tokenizer.json")
        for key in ("version", "padding", "truncation"):
            values.pop(key, None)
        model = values.get("model", {})
        if isinstance(model, dict) and model.get("merges"):  # older versions write "a b", newer ones ["a", "b"]
            model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return _sha256_json(values)
    files = {name: file_digest(folder / name) for name in VOCABULARY_FILES if (folder / name).is_file()}
    return _sha256_json(files) if files else ""


def check_fit(bundle: Bundle, fingerprint: Mapping[str, str], decoder: Mapping[str, Any]) -> list[str]:
    """Notes on harmless differences between a target and the one a bundle was made for; refuses a target that does not fit.

    Hidden sizes must agree only if the drafter reads hidden states of the target (`extra["taps"]`).

    Args:
        bundle: A drafter with its `target`.
        fingerprint: `fingerprint` of the target's folder.
        decoder: `DecoderShape.to_dict()` of the target.

    Raises:
        UserError: vocabulary size, hidden size or tokenizer differ, or it is not the target that was tuned with the drafter.
    """
    made_for = bundle.target.get("fingerprint") or {}
    target = fingerprint.get("path") or "target"
    source = f" ({made_for['path']})" if made_for.get("path") else ""
    remedy = "use the target it was trained for"
    for key in ("vocab_size", "hidden_size") if bundle.extra.get("taps") else ("vocab_size",):
        if (size := bundle.target["decoder"][key]) != decoder[key]:
            raise UserError(f"{target}: {key} {decoder[key]} does not fit the bundle, made for {size}{source}; {remedy}")
    tokenizers = made_for.get("tokenizer"), fingerprint.get("tokenizer")
    if all(tokenizers) and tokenizers[0] != tokenizers[1]:
        raise UserError(f"{target}: its tokenizer is not the one the bundle was made for{source}; {remedy}")
    if made_for.get("adapter") and made_for["adapter"] != fingerprint.get("adapter"):
        raise UserError(
            f"{target}: not the target that the drafter was tuned together with{source}; use the one exported beside it"
        )
    if made_for.get("config") and made_for["config"] != fingerprint.get("config"):
        return [f"{target}: its config is not the one the bundle was made for{source}; acceptance may be lower than measured"]
    return []
