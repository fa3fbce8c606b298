"""From files to packed sets: read, encode, split, pack, report, and keep the result under a digest of all that shaped it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trainkit.data.manifest import read_provenance
from trainkit.data.text.chat_template import Document, Encoder, load_tokenizer, tokenizer_hash, vocabulary_hash
from trainkit.data.text.formats import check_columns, parse
from trainkit.data.text.packing import PackedSet, pack
from trainkit.data.text.report import Report, SetReport
from trainkit.data.text.sources import BadRow, content_hash, read_rows
from trainkit.errors import UserError
from trainkit.files import cache_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE = cache_folder("data")
"""Where prepared sets are kept unless somebody says otherwise."""
CODE_VERSION = 1
"""Part of every fingerprint: raise it with any change that alters what comes out of the same files."""


@dataclass(frozen=True)
class Prepared:
    """Both packed sets, what happened on the way, and the digest of files, tokenizer, settings and code version."""

    train: PackedSet
    validation: PackedSet
    report: Report
    fingerprint: str


def prepare(
    train: Sequence[str],
    validation: Sequence[str] | None,
    tokenizer: str | PreTrainedTokenizerBase,
    length: int,
    *,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    on_long_row: Literal["truncate", "skip", "error"] = "truncate",
    validation_share: float = 0.05,
    limit: int | None = None,
    limit_validation: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Packed training and validation sets of the files given.

    Any number of processes may call this with the same `cache_dir` at once: one does the work, the others wait and load it.
    A kill leaves a whole entry or none.

    Args:
        train: Files, folders or hub names.
        validation: The same; without it a share of the training rows is held out, whole rows, drawn by `seed`.
        tokenizer: A loaded tokenizer, or its folder or hub name.
        length: Tokens in a packed row; no document is longer. Plain text is cut into documents of this length.
        columns: Our column names -> the files', e.g. `{"prompt": "instruction", "response": "output"}`.
        on_bad_row: Stop at a bad row, or count it and go on.
        on_long_row: What to do with a row longer than `length` that is not plain text: keep its beginning, leave it out (both
            are counted), or stop.
        validation_share: Share of rows held out where no validation files are given; 0 holds out none.
        limit: First rows of the training files to take, over all of them.
        limit_validation: The same of the validation files.
        seed: Seed of the held-out rows.
        cache_dir: Folder for prepared sets; None prepares anew, in memory.

    Raises:
        UserError: a file or row cannot be used, or the loss mask of the chats is empty or covers everything.
    """
    if length < 2:
        raise UserError(f"length: {length} must be at least 2")
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share: {validation_share} must be at least 0 and below 1")
    for name, value, known in (
        ("on_bad_row", on_bad_row, ("error", "skip")),
        ("on_long_row", on_long_row, ("truncate", "skip", "error")),
    ):
        if value not in known:
            raise UserError(f"{name}: {value!r} is unknown; choose {', '.join(known)}")
    if not train:
        raise UserError("train: no files given")
    columns, loaded = check_columns(columns), load_tokenizer(tokenizer)
    for file in (*train, *(validation or ())):
        _check_made_with(file, loaded)
    policy = {"columns": columns, "on_bad_row": on_bad_row, "on_long_row": on_long_row, "length": length}
    settings = policy | {
        "validation_share": None if validation else validation_share,
        "seed": None if validation else seed,
        "limit": limit,
        "limit_validation": limit_validation if validation else None,
        "train": [content_hash(file) for file in train],
        "validation": [content_hash(file) for file in validation or ()],
        "tokenizer": tokenizer_hash(loaded),
        "code": CODE_VERSION,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def work() -> Prepared:
        encoder = Encoder(loaded)
        rows, train_report = _encode("train", train, encoder, limit, policy)
        if validation:
            held, held_report = _encode("validation", validation, encoder, limit_validation, policy)
        else:
            rows, held, held_report = _hold_out(rows, validation_share, seed)
        pad_id = loaded.pad_token_id if isinstance(loaded.pad_token_id, int) else encoder.end_id
        train_set = pack(list(chain.from_iterable(rows)), length, pad_id, fingerprint)
        validation_set = pack(list(chain.from_iterable(held)), length, pad_id, fingerprint)
        train_report.measure(train_set)
        held_report.measure(validation_set)
        return Prepared(train_set, validation_set, Report(train_report, held_report), fingerprint)

    return work() if cache_dir is None else _cached(Path(cache_dir), fingerprint, work)


def _check_made_with(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a distillation set whose token ids are another tokenizer's."""
    made = read_provenance(Path(source)) if Path(source).is_dir() else None
    if made is not None and made.get("vocabulary") not in (None, vocabulary_hash(tokenizer)):
        raise UserError(f"{source}: its token ids are of another tokenizer than {tokenizer.name_or_path}; distil it anew")


def _encode(
    name: str, files: Sequence[str], encoder: Encoder, limit: int | None, policy: Mapping[str, Any]
) -> tuple[list[list[Document]], SetReport]:
    """The documents of each row that has any."""
    from tqdm import tqdm

    report, rows = SetReport(name), []
    chat_tokens = chat_counted = 0
    for file in files:
        left = None if limit is None else limit - report.rows
        bar = {"desc": f"{name}: {Path(file).name}", "unit": " rows", "delay": 2, "disable": None}  # small sets are done before
        for place, values in tqdm(read_rows(file, left), **bar):
            report.rows += 1
            try:
                if isinstance(values, BadRow):
                    raise values
                row, unused = parse(values, policy["columns"])
                documents = encoder.documents(row)
            except BadRow as reason:
                if policy["on_bad_row"] == "error":
                    raise UserError(f"{place}: {reason}; mend this row (on_bad_row: skip goes on without it)") from None
                report.skip(place, str(reason))
                continue
            report.unused.update(unused)
            for document in documents:
                if document.chat:
                    chat_tokens += len(document.mask)
                    chat_counted += int(document.mask.sum())
            if kept := [fit for document in documents for fit in _fit(document, place, policy, report)]:
                rows.append(kept)
    if chat_tokens and chat_counted in (0, chat_tokens):
        share = "every token" if chat_counted else "no token"
        raise UserError(f"{name}: {share} of the chats counts in the loss; the chat template must mark the assistant's alone")
    if not rows:
        bad = sum(report.skipped.values())
        counts = f"{report.rows} read, {bad} bad, others without label"
        raise UserError(f"{name}: no usable row in {', '.join(files)} ({counts}); give rows with assistant or plain text")
    return rows, report


def _fit(document: Document, place: str, policy: Mapping[str, Any], report: SetReport) -> list[Document]:
    """The document within `length`: whole, cut into pieces (plain text), or shortened by the policy; none without a label."""
    length, size = policy["length"], len(document.tokens)
    pieces = [document]
    if size > length and document.divisible:
        spans = [slice(start, start + length) for start in range(0, size, length)]
        pieces = [replace(document, tokens=document.tokens[span], mask=document.mask[span]) for span in spans]
        report.cut += 1
    elif size > length:
        if policy["on_long_row"] == "error":
            raise UserError(f"{place}: {size} tokens, longer than length {length}; raise length or set on_long_row: truncate")
        if policy["on_long_row"] == "skip":
            report.too_long += 1
            return []
        pieces = [replace(document, tokens=document.tokens[:length], mask=document.mask[:length])]
        report.truncated += 1
    kept = [piece for piece in pieces if piece.mask[1:].any()]
    report.unlabelled += len(pieces) - len(kept)
    return kept


def _hold_out(
    rows: list[list[Document]], share: float, seed: int
) -> tuple[list[list[Document]], list[list[Document]], SetReport]:
    """Training rows, held-out rows (at least one where `share` is not 0), and the report of the latter."""
    count = max(1, round(len(rows) * share)) if share else 0
    if count >= len(rows):
        raise UserError(f"validation_share: {share} of {len(rows)} rows leaves none to train on; give validation files")
    chosen = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    held = [row for n, row in enumerate(rows) if n in chosen]
    return [row for n, row in enumerate(rows) if n not in chosen], held, SetReport("validation", rows=count, held_out=True)


def _cached(cache_dir: Path, fingerprint: str, work: Callable[[], Prepared]) -> Prepared:
    """The entry of this fingerprint, made by `work` where there is none."""
    entry = cache_dir / fingerprint
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir / f"{fingerprint}.lock"):
        if not entry.is_dir():
            for left_over in cache_dir.glob(f"{fingerprint[:16]}.*.tmp"):  # of a killed process: we hold its lock
                shutil.rmtree(left_over)
            prepared = work()
            temporary = Path(tempfile.mkdtemp(prefix=f"{fingerprint[:16]}.", suffix=".tmp", dir=cache_dir))
            try:
                prepared.train.save(temporary / "train")
                prepared.validation.save(temporary / "validation")
                (temporary / "report.json").write_text(json.dumps(prepared.report.to_dict()), encoding="utf-8")
                os.replace(temporary, entry)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    report = Report.from_dict(json.loads((entry / "report.json").read_text(encoding="utf-8")))
    return Prepared(PackedSet.load(entry / "train"), PackedSet.load(entry / "validation"), report, fingerprint)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system releases it when that process dies."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
