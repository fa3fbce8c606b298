"""From files to packed sets: read, encode, split, pack and report; the result is cached under a digest of all its inputs."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from trainkit.data.manifest import DISTILLED
from trainkit.data.text.chat_template import (
    Document,
    Encoder,
    Tokenizer,
    load_tokenizer,
    prompt_digest,
    tokenizer_hash,
    vocabulary_hash,
)
from trainkit.data.text.formats import Chat, PlainText, Row, check_columns, parse_row
from trainkit.data.text.packing import PackedSet, pack
from trainkit.data.text.report import Report, SetReport
from trainkit.data.text.sources import RowError, content_hash, data_files, read_rows
from trainkit.errors import UserError
from trainkit.files import cache_folder, write_folder, write_json

CACHE = cache_folder("data")
"""Default folder for prepared sets."""
CODE_VERSION = 4
"""Part of every fingerprint. Increase it with any change of the code that changes the result for the same files."""
EncodedRow = tuple[str, list[Document]]
"""Digest of a row's prompt, and its documents."""


@dataclass(frozen=True)
class Prepared:
    """Both packed sets.

    Attributes:
        train: Training rows.
        validation: Validation rows.
        report: Counts of both.
        fingerprint: Digest of files, tokenizer, model, settings and code version.
        held_out: Digests of the prompts that were held out of the training rows.
    """

    train: PackedSet
    validation: PackedSet
    report: Report
    fingerprint: str
    held_out: frozenset[str] = frozenset()


def prepare(
    train: Sequence[str],
    validation: Sequence[str] | None,
    tokenizer: str | Tokenizer,
    length: int,
    *,
    model: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    on_long_row: Literal["truncate", "skip", "error"] = "truncate",
    validation_share: float = 0.05,
    limit: int | None = None,
    limit_validation: int | None = None,
    exclude: Collection[str] = (),
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Prepared:
    """Packed training and validation sets of files.

    Any number of processes may call this with the same `cache_dir` at the same time: one does the work, the others wait and
    load the result. A kill leaves a complete cache entry or none.

    Args:
        train: Files, folders or hub names.
        validation: Files, folders or hub names; None holds out a share of the training rows, drawn with `seed`. All rows of a
            prompt, such as its answers at several temperatures, are held out together, unless there is only one prompt.
        tokenizer: A loaded tokenizer, or its folder or hub name.
        length: Tokens in a packed row, and the maximum length of a document. Longer plain text is cut into several documents.
        model: Folder of the model that will read the rows, as in `Encoder`.
        columns: Column mapping, from trainkit's names to the files', e.g. `{"prompt": "instruction", "response": "output"}`.
        on_bad_row: Stop at a bad row, or skip and count it.
        on_long_row: A row longer than `length` that is not plain text: truncate it (counted), skip it (counted), or stop.
        validation_share: Share of the rows to hold out if there are no validation files; 0 holds out none.
        limit: Number of training rows to read, from the beginning and over all files; None reads all.
        limit_validation: Number of validation rows to read; None reads all.
        exclude: Digests of prompts whose training rows are left out, such as the `held_out` ones of another set.
        seed: Seed for drawing the held-out rows.
        cache_dir: Folder for prepared sets; None prepares in memory, without a cache.

    Raises:
        UserError: a file or row cannot be used, or either none or all of the tokens in chats are labels.
    """
    # Check the settings.
    if length < 2:
        raise UserError(f"length: {length} must be at least 2")
    if not 0 <= validation_share < 1:
        raise UserError(f"validation_share: {validation_share} must be at least 0 and below 1")
    choices = {"on_bad_row": (on_bad_row, "error", "skip"), "on_long_row": (on_long_row, "truncate", "skip", "error")}
    for name, (value, *known) in choices.items():
        if value not in known:
            raise UserError(f"{name}: {value!r} is unknown; choose from {', '.join(known)}")
    for name, count in (("limit", limit), ("limit_validation", limit_validation)):
        if count is not None and count < 1:
            raise UserError(f"{name}: {count} must be at least 1; leave it out to read all rows")
    if seed < 0:
        raise UserError(f"seed: {seed} must be at least 0")
    if not train:
        raise UserError("train: no files given; name at least one")
    columns, loaded = check_columns(columns), load_tokenizer(tokenizer)
    for file in (*train, *(validation or ())):
        check_tokenizer(file, loaded)
    encoder = Encoder(loaded, model)
    # Compute the digest of everything that determines the result.
    policy = {"columns": columns, "on_bad_row": on_bad_row, "on_long_row": on_long_row, "length": length}
    settings = policy | {
        "validation_share": None if validation else validation_share,
        "seed": None if validation else seed,
        "limit": limit,
        "limit_validation": limit_validation if validation else None,
        "train": [content_hash(file) for file in train],
        "validation": [content_hash(file) for file in validation or ()],
        "tokenizer": tokenizer_hash(loaded),
        "model": [sorted(encoder.end_ids), encoder.vocab_size],
        "exclude": sorted(exclude),
        "code": CODE_VERSION,
    }
    fingerprint = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def work() -> Prepared:
        prompts: frozenset[str] = frozenset()
        rows, train_report = _encode("train", train, encoder, limit, policy, exclude)
        if validation:
            held_out, validation_report = _encode("validation", validation, encoder, limit_validation, policy)
        else:
            rows, held_out, prompts = _hold_out(rows, validation_share, seed)
            validation_report = SetReport("validation", rows=len(held_out), held_out=True)
        train_set, validation_set = (
            pack(list(chain.from_iterable(documents for _, documents in part)), length, fingerprint)
            for part in (rows, held_out)
        )
        train_report.measure(train_set)
        validation_report.measure(validation_set)
        return Prepared(train_set, validation_set, Report(train_report, validation_report), fingerprint, prompts)

    return work() if cache_dir is None else _cached(Path(cache_dir), fingerprint, work)


def check_tokenizer(source: str, tokenizer: Tokenizer) -> None:
    """Raises UserError for a distillation set whose token ids are from another tokenizer."""
    manifest = DISTILLED.read(Path(source)) if Path(source).is_dir() else None
    if manifest is not None and manifest.get("vocabulary") not in (None, vocabulary_hash(tokenizer)):
        raise UserError(
            f"{source}: its token ids are from another tokenizer than {tokenizer.name_or_path}; run trainkit distill again"
        )


def _encode(
    name: str,
    files: Sequence[str],
    encoder: Encoder,
    limit: int | None,
    policy: Mapping[str, Any],
    exclude: Collection[str] = (),
) -> tuple[list[EncodedRow], SetReport]:
    """Each row that has documents with labels, and the counts."""
    report, rows = SetReport(name), list[EncodedRow]()
    chat_tokens = chat_labels = 0
    for file in files:
        if limit is not None and report.rows >= limit:
            break
        remaining = None if limit is None else limit - report.rows
        is_ours = Path(file).is_dir() and DISTILLED.read(Path(file)) is not None  # has columns that only other programs read
        if Path(file).is_dir():
            report.left_out += [str(path.relative_to(file)) for path in data_files(Path(file))[1]]
        bar = {"desc": f"{name}: {Path(file).name}", "unit": " rows", "delay": 2, "disable": None}  # no bar for small files
        for location, values in tqdm(read_rows(file, remaining), **bar):
            report.rows += 1
            # Parse and encode the row, or count it as bad.
            try:
                if isinstance(values, RowError):
                    raise values
                row, unused = parse_row(values, policy["columns"])
                documents = encoder.documents(row)
            except RowError as reason:
                if policy["on_bad_row"] == "error":
                    raise UserError(f"{location}: {reason}; fix this row, or skip bad rows with on_bad_row: skip") from None
                report.skip(location, str(reason))
                continue
            tools = getattr(row, "tools", None)
            report.count_unused(
                [*([] if is_ours else unused), *(["tools"] if tools and not encoder.reads_tools(tools) else [])]
            )
            if (prompt := _prompt_of(row, documents)) in exclude:
                report.excluded += 1
                continue
            # Fit its documents into the packed length.
            report.unended += sum(document.unended for document in documents)
            chats = [document for document in documents if document.chat]
            chat_tokens += sum(len(document.mask) for document in chats)
            chat_labels += sum(int(document.mask.sum()) for document in chats)
            if fitted := [piece for document in documents for piece in _fit(document, location, policy, report)]:
                rows.append((prompt, fitted))
    # Refuse masks that cannot be right, and a set without rows.
    if chat_tokens and chat_labels in (0, chat_tokens):
        share = "every token" if chat_labels else "no token"
        raise UserError(f"{name}: {share} of the chats is a label; the chat template must mark the assistant's tokens only")
    if not rows:
        skipped = sum(report.skipped.values())
        counts = f"{report.rows} read, {skipped} bad, {report.excluded} with a held-out prompt, the others without labels"
        raise UserError(f"{name}: no usable row in {', '.join(files)} ({counts}); give rows with assistant turns or plain text")
    return rows, report


def _prompt_of(row: Row, documents: Sequence[Document]) -> str:
    """Digest of the tokens before a row's first label; of all its tokens if it has no user prompt."""
    first = documents[0]
    roles = [message["role"] for message in row.messages] if isinstance(row, Chat) else []
    has_no_prompt = isinstance(row, PlainText) or ("assistant" in roles and "user" not in roles[: roles.index("assistant")])
    start = 0 if has_no_prompt else int(first.mask.argmax())
    return prompt_digest(first.tokens[:start] if start else first.tokens)


def _fit(document: Document, location: str, policy: Mapping[str, Any], report: SetReport) -> list[Document]:
    """The document as pieces of at most `length` tokens, cut or truncated by the policy; pieces without labels are left out."""
    length, size = policy["length"], len(document.tokens)
    pieces = [document]
    if size > length and document.divisible:
        spans = [slice(start, start + length) for start in range(0, size, length)]
        pieces = [replace(document, tokens=document.tokens[span], mask=document.mask[span]) for span in spans]
        report.cut += 1
    elif size > length:
        if policy["on_long_row"] == "error":
            raise UserError(
                f"{location}: {size} tokens, longer than length {length}; raise length or set on_long_row: truncate"
            )
        if policy["on_long_row"] == "skip":
            report.too_long += 1
            return []
        pieces = [replace(document, tokens=document.tokens[:length], mask=document.mask[:length])]
        report.truncated += 1
    labelled = [piece for piece in pieces if piece.mask[1:].any()]
    report.unlabelled += len(pieces) - len(labelled)
    return labelled


def _hold_out(rows: list[EncodedRow], share: float, seed: int) -> tuple[list[EncodedRow], list[EncodedRow], frozenset[str]]:
    """Training rows, held-out rows (at least one unless `share` is 0), and the digests of the prompts of the latter.

    Prompts are taken in random order, except those whose rows would exceed the share. If that leaves none, the prompt with the
    fewest rows is taken.
    """
    count = max(1, round(len(rows) * share)) if share else 0
    if count >= len(rows):
        raise UserError(f"validation_share: {share} of {len(rows)} rows leaves none to train on; give validation files")
    groups: dict[Any, list[int]] = {}
    by_prompt = len({prompt for prompt, _ in rows}) > 1  # rows are drawn if all have the same prompt
    for n, (prompt, _) in enumerate(rows):
        groups.setdefault(prompt if by_prompt else n, []).append(n)
    members = list(groups.values())
    chosen: set[int] = set()
    for index in np.random.default_rng(seed).permutation(len(members)).tolist():
        if len(chosen) + len(members[index]) <= count:
            chosen.update(members[index])
    if count and not chosen:
        chosen.update(min(members, key=len))
    held_out = [row for n, row in enumerate(rows) if n in chosen]
    train = [row for n, row in enumerate(rows) if n not in chosen]
    return train, held_out, frozenset(prompt for prompt, _ in held_out if by_prompt)


def _cached(cache_dir: Path, fingerprint: str, work: Callable[[], Prepared]) -> Prepared:
    """The cache entry of this fingerprint; if it does not exist, `work` computes it."""
    entry = cache_dir / fingerprint
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f"{fingerprint}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process works; the system releases the lock if that process dies
        if not entry.is_dir():
            prepared = work()

            def fill(folder: Path) -> None:
                prepared.train.save(folder / "train")
                prepared.validation.save(folder / "validation")
                write_json(folder / "report.json", asdict(prepared.report) | {"held_out": sorted(prepared.held_out)})

            write_folder(entry, fill)
    values = json.loads((entry / "report.json").read_text(encoding="utf-8"))
    report = Report(SetReport(**values["train"]), SetReport(**values["validation"]))
    return Prepared(
        PackedSet.load(entry / "train"),
        PackedSet.load(entry / "validation"),
        report,
        fingerprint,
        frozenset(values["held_out"]),
    )
