"""The contract on disk: a folder that the outside world understands, plus `trainkit.json`: what it is, and every file's hash.

`write` fills a temporary sibling and renames it into place; `read` trusts nothing it has not checked. Nothing is unpickled, and
no tensor is loaded here: that is the business of the kind that wrote them.

What a kill or a power cut leaves is said in placing.py; a bundle that a kill caught between two renames is put back by the next
`read` or `write` of that path, and leftovers of killed writers are removed by the next `write`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from trainkit.errors import UserError
from trainkit.files import put_in_place, sync, temporary_sibling, tidy

FORMAT_VERSION = 1
MANIFEST = "trainkit.json"
SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".md", ".model", ".png")
"""Files a bundle may hold; a pickle is never among them."""

ADAPTER = "trainkit_adapter"
"""Key of a config.json that names the adapter merged into a model's weights: such a model has the sizes of the one before."""

_INERT = (".md", ".txt", ".png")  # may lie in a bundle unlisted: nothing loads them
_VOLATILE = {
    "transformers_version",
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "use_cache",
    "initializer_range",
    "_attn_implementation",
}
_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG}
_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")


@dataclass(frozen=True)
class Bundle:
    """What `trainkit.json` says.

    Attributes:
        path: The folder.
        kind: Drafter kind, or what else the folder holds.
        config: Constructor arguments that rebuild it.
        target: `TargetShape.to_dict()` of the target it was trained for; its `fingerprint` says which.
        metrics: What was measured, by name.
        runner: Recommended runner settings.
        recipe: The recipe that made it.
        seed: The run's seed.
        versions: Library versions at the time of writing.
        data: Fingerprint of the training data.
        files: sha256 (hex) of each file, by path relative to the folder.
        extra: What only the kind itself understands.
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
    """Whether `folder` holds a `trainkit.json`; says nothing of its state."""
    return (Path(folder) / MANIFEST).is_file()


# ------------------------------------------------------------------------------------------------------------------- writing


def write(
    folder: str | Path,
    writer: Callable[[Path], None],
    *,
    kind: str,
    config: Mapping[str, Any],
    target: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    runner: Mapping[str, Any] | None = None,
    recipe: Any = None,
    seed: int | None = None,
    data: Any = None,
    extra: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes a bundle whole or not at all (the head of this file says what a kill leaves), and returns it.

    `writer` fills the empty temporary folder it is given with weights, config and tokenizer; the keywords are fields of
    `Bundle`. A bundle that stands at `folder` already is replaced.

    Raises:
        UserError: `folder` holds something that is not a bundle, or cannot be written.
    """
    folder = Path(folder).resolve()
    bundle = Bundle(
        folder,
        kind,
        dict(config),
        dict(target),
        dict(metrics or {}),
        dict(runner or {}),
        recipe,
        seed,
        _versions(),
        data,
        {},
        dict(extra or {}),
    )
    _to_json(bundle)  # what is no JSON is found before the work, not after it
    _check_replaceable(folder)
    with _writable(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        tidy(folder)
        with temporary_sibling(folder) as temporary:
            writer(temporary)
            bundle = replace(bundle, files=_hash_all(temporary))
            (temporary / MANIFEST).write_text(_to_json(bundle), encoding="utf-8")
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            _check_replaceable(folder)
            put_in_place(temporary, folder)
    return bundle


def amend(folder: str | Path, *, runner: Mapping[str, Any]) -> Bundle:
    """Replaces the recommended runner settings of the bundle at `folder` by one rename of its manifest; returns the bundle.

    Raises:
        UserError: `folder` holds no sound bundle, or cannot be written.
    """
    folder = Path(folder).resolve()
    bundle = replace(read(folder), runner=dict(runner))
    text, manifest = _to_json(bundle), folder / MANIFEST
    with _writable(folder):
        made = folder / f".{MANIFEST}.{secrets.token_hex(6)}.partial"
        try:
            made.write_text(text, encoding="utf-8")
            put_in_place(made, manifest)
        finally:
            made.unlink(missing_ok=True)
    return bundle


def extend(folder: str | Path, writer: Callable[[Path], None], *, runner: Mapping[str, Any]) -> Bundle:
    """Adds files to the bundle at `folder` and replaces its recommended runner settings, whole or not at all; returns it.

    `writer` fills the empty temporary folder it is given; a file of the same name as one that is there replaces it, every other
    file stays, as does what else the manifest says. Those that stay are linked, not copied, where the disk can.

    Raises:
        UserError: `folder` holds no sound bundle, or cannot be written.
    """
    folder = Path(folder).resolve()
    bundle = replace(read(folder), runner=dict(runner))
    _to_json(bundle)
    with _writable(folder):
        tidy(folder)
        with temporary_sibling(folder) as temporary:
            writer(temporary)
            added = _hash_all(temporary)
            for path in folder.rglob("*"):
                name = path.relative_to(folder)
                hidden = any(part.startswith(".") for part in name.parts)
                if path.is_file() and not hidden and name.as_posix() not in added and name.as_posix() != MANIFEST:
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(path.resolve(), temporary / name)
            bundle = replace(bundle, files=dict(sorted({**bundle.files, **added}.items())))
            (temporary / MANIFEST).write_text(_to_json(bundle), encoding="utf-8")
            for path in [*temporary.rglob("*"), temporary]:
                sync(path)
            put_in_place(temporary, folder)
    return bundle


def _link(source: Path, place: Path) -> None:
    try:
        place.hardlink_to(source)
    except OSError:  # a file system without links
        shutil.copy2(source, place)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Says in one line why the disk took no bundle; after any failure, parents made for it are gone again."""
    made = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # another process wrote there meanwhile
            for parent in made:
                parent.rmdir()
        reason = error.strerror if isinstance(error, OSError) and error.errno in _REFUSALS else None
        if isinstance(error, SafetensorError):  # of its own for whatever the system said
            reason = str(error)
        if reason is None:
            raise
        raise UserError(f"{folder}: cannot be written ({reason}); free space there or choose another folder") from error


def _versions() -> dict[str, str]:
    found = {}
    for name in ("trainkit", "torch", "transformers", "lightning", "safetensors"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _to_json(bundle: Bundle) -> str:
    values = {item.name: getattr(bundle, item.name) for item in fields(bundle) if item.name != "path"}
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a bundle's {name} must be finite JSON: {error}") from error
    return json.dumps({"format": FORMAT_VERSION} | values, indent=2) + "\n"


def _check_replaceable(folder: Path) -> None:
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
        files[name] = _sha256(path)
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------------- reading


def read(folder: str | Path, checksums: bool = True) -> Bundle:
    """The bundle in `folder`, after checking its version, its list of files and (unless told not to) every file's sha256.

    Raises:
        UserError: not a bundle, from a newer trainkit, or missing, changed, unlisted or ill-named files.
    """
    folder = Path(folder)
    if not folder.exists() and folder.parent.is_dir():
        tidy(folder.resolve())
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder}: not a bundle (no {MANIFEST}); make one with `trainkit export CHECKPOINT {folder}`")
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{manifest}: not readable as JSON ({str(error).splitlines()[0]}); export it again") from error
    bundle = _from_json(folder, manifest, values)
    for name, expected in bundle.files.items():
        path = _inside(folder, name)
        if not path.is_file():
            raise UserError(f"{path}: missing, though {MANIFEST} lists it; export it again")
        if checksums and _sha256(path) != expected:
            raise UserError(f"{path}: changed since it was written (sha256 differs); export it again")
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        known = name.as_posix() in bundle.files or name.as_posix() == MANIFEST
        if not (known or path.is_dir() or path.suffix in _INERT or any(part.startswith(".") for part in name.parts)):
            raise UserError(f"{path}: not listed in {MANIFEST}; remove it or export again")
    return bundle


def _from_json(folder: Path, manifest: Path, values: Any) -> Bundle:
    version = values.pop("format", None) if isinstance(values, dict) else None
    if type(version) is not int or version < 1:
        raise UserError(f"{manifest}: no format version; this is not a bundle of trainkit")
    if version > FORMAT_VERSION:
        raise UserError(f"{manifest}: format {version} is newer than {FORMAT_VERSION}, the one known here; upgrade trainkit")
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
        raise UserError(f"{manifest}: target says no vocabulary or width; export it again")
    return Bundle(path=folder, **values)


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused if it leads out of the folder, by its name or through a link."""
    pure = PurePosixPath(name)
    plain = name and "\\" not in name and not pure.is_absolute() and ".." not in pure.parts and pure.as_posix() == name
    if not plain or pure.suffix not in SUFFIXES or name == MANIFEST:
        raise UserError(f"{folder / MANIFEST}: {name!r} is no file a bundle may hold; do not use this bundle")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: a link that leads out of the bundle; copy the file in its place")
    return path


# ------------------------------------------------------------------------------------------------- which target it belongs to


def fingerprint(model_folder: str | Path) -> dict[str, str]:
    """Which model a folder holds: hashes of its config and tokenizer, its vocabulary size and its name; reads no weights.

    `config` hashes config.json without what another library version or precision would change; `tokenizer` hashes
    tokenizer.json without version, padding and truncation, so that saving it again changes nothing (else the vocabulary files;
    "" without any); `adapter`, only of a model that was tuned together with a drafter, tells it from others of its config.

    Raises:
        UserError: no readable config.json in the folder.
    """
    folder = Path(model_folder)
    config = read_json(folder / "config.json")
    text_config = config.get("text_config")
    text_config = text_config if isinstance(text_config, dict) and text_config else config
    stable = {key: value for key, value in config.items() if key not in _VOLATILE}
    found = {
        "config": _sha256_json(stable),
        "tokenizer": _tokenizer_hash(folder),
        "vocab_size": str(text_config.get("vocab_size", "")),
        "path": folder.resolve().name,
    }
    return found | {"adapter": str(config[ADAPTER])} if config.get(ADAPTER) else found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder.

    Raises:
        UserError: no such file, or not such an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a Hugging Face model folder") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({str(error).splitlines()[0]}); mend it or copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; mend it or copy it again")
    return values


def tensor_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> `dtype`, `shape`, `data_offsets` of a safetensors file's tensors: its header, and nothing of its values.

    8 bytes of length, then JSON (huggingface.co/docs/safetensors).

    Raises:
        UserError: not a safetensors file, or cut short.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 0 <= length <= path.stat().st_size - 8:
            raise UserError(f"{path}: not a safetensors file, or cut short; export it again")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise UserError(f"{path}: not a safetensors file (its header is no JSON); copy it again") from None
    header.pop("__metadata__", None)
    return header


def _sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _tokenizer_hash(folder: Path) -> str:
    if (folder / "tokenizer.json").is_file():
        values = read_json(folder / "tokenizer.json")
        for key in ("version", "padding", "truncation"):
            values.pop(key, None)
        model = values.get("model", {})
        if isinstance(model, dict) and model.get("merges"):  # older versions write "a b", newer ones ["a", "b"]
            model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        return _sha256_json(values)
    files = {name: _sha256(folder / name) for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return _sha256_json(files) if files else ""


def check_fit(
    bundle_target: Mapping[str, Any],
    target_fingerprint: Mapping[str, str],
    target_decoder: Mapping[str, Any],
    *,
    hidden: bool = True,
) -> list[str]:
    """Refuses a target that the bundle cannot serve; returns notes on what differs but does no harm.

    Args:
        bundle_target: `Bundle.target`.
        target_fingerprint: `fingerprint` of the target's folder.
        target_decoder: `DecoderShape.to_dict()` of the target.
        hidden: Whether the drafter reads the target's hidden states, so that their width must agree.

    Raises:
        UserError: vocabulary size, hidden size or tokenizer differ, or it is not the target that was tuned with the drafter.
    """
    trained, made = bundle_target["decoder"], bundle_target.get("fingerprint") or {}
    target = f"target {target_fingerprint.get('path', '')}".strip()
    source = f" ({made['path']})" if made.get("path") else ""
    for key, counts in (("vocab_size", True), ("hidden_size", hidden)):
        if counts and trained[key] != target_decoder[key]:
            raise UserError(
                f"{target}: {key} {target_decoder[key]} does not fit the bundle, made for {trained[key]}{source}; "
                "use the target it was trained for"
            )
    if made.get("tokenizer") and target_fingerprint.get("tokenizer") and made["tokenizer"] != target_fingerprint["tokenizer"]:
        raise UserError(
            f"{target}: its tokenizer is not the one the bundle was made for{source}; use the target it was trained for"
        )
    if made.get("adapter") and made["adapter"] != target_fingerprint.get("adapter"):
        raise UserError(
            f"{target}: not the target that the drafter was tuned together with{source}; use the one exported beside it"
        )
    if made.get("config") and made["config"] != target_fingerprint.get("config"):
        return [f"{target}: its config is not the one the bundle was made for{source}; acceptance may be lower than measured"]
    return []
