"""Calibration text of compression: windows of token ids, and fingerprints by which an evaluation recognises shared text."""

# S sequences  T positions  N 32-grams of a sequence

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.data.text.formats import check_columns, parse_row
from trainkit.data.text.prepare import check_tokenizer
from trainkit.data.text.sources import LocatedRow, RowError, content_hash, read_rows
from trainkit.errors import UserError

GRAM = 32
"""Tokens of a fingerprint."""
SAMPLING = 64
"""One in so many 32-grams, chosen by its hash, is a fingerprint; a shared text of 300 tokens has four in the mean."""
_FACTOR, _MIX = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class Calibration:
    """Windows of calibration text.

    Attributes:
        tokens_ST: Token ids, int64.
        counted_ST: True at the positions that count in statistics.
        digest: SHA-256 of the tokens.
        files: The files.
        contents: SHA-256 of each file.
        seed: Seed of the order of rows.
        fingerprints: Hashes, ascending, of the text's 32-grams whose hash is a multiple of 64.
    """

    tokens_ST: Tensor
    counted_ST: Tensor
    digest: str
    files: list[str]
    contents: list[str]
    seed: int
    fingerprints: list[int]


def calibration(
    files: Sequence[str],
    tokenizer_folder: str,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
) -> Calibration:
    """The first `samples` windows of `length` tokens of the rows in an order drawn with `seed`.

    Rows are rendered as for training (chats by the template, an end token after plain text), and concatenated; windows cut
    through them, so that none has padding.

    Args:
        files: Files, folders or hub names, in any of the formats of training text.
        tokenizer_folder: Folder of the model.
        samples: Number of windows.
        length: Tokens in a window.
        seed: Seed of the order of rows.
        columns: Column mapping, from trainkit's names to the files'.

    Raises:
        UserError: a row cannot be used, or the files hold fewer windows.
    """
    # Read all rows; encode them in random order until the windows are full.
    if seed < 0:
        raise UserError(f"--seed {seed}: must be at least 0")
    columns, encoder = check_columns(columns), Encoder(load_tokenizer(tokenizer_folder))
    rows = list[LocatedRow]()
    for file in files:
        check_tokenizer(file, encoder.tokenizer)
        rows += read_rows(file)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    pieces, total = [np.zeros(0, np.int32)], 0
    with tqdm(total=samples * length, desc="calibration text", unit=" tokens", delay=2, disable=None) as bar:
        for index in order:
            if total >= samples * length:
                break
            location, values = rows[index]
            try:
                if isinstance(values, RowError):
                    raise values
                documents = encoder.documents(parse_row(values, columns)[0])
            except RowError as reason:
                raise UserError(f"{location}: {reason}; fix or remove this row") from None
            # without generation spans a chat has a document for each answer, the last of which has all turns
            pieces.append(documents[-1].tokens)
            total += len(documents[-1].tokens)
            bar.update(len(documents[-1].tokens))
    if total < samples * length:
        raise UserError(
            f"--samples {samples}: {', '.join(files)} has {total:,} tokens, only {total // length} windows of {length}; "
            "lower --samples or --length, or give more text"
        )
    # Cut windows.
    tokens_ST = torch.from_numpy(np.concatenate(pieces)[: samples * length].astype(np.int64)).view(samples, length)
    digest = hashlib.sha256(tokens_ST.numpy().data).hexdigest()
    counted_ST, contents = torch.ones_like(tokens_ST, dtype=torch.bool), [content_hash(file) for file in files]
    return Calibration(tokens_ST, counted_ST, digest, list(files), contents, seed, fingerprints(tokens_ST))


def fingerprints(tokens_ST: Tensor) -> list[int]:
    """Hashes, ascending, of the 32-grams whose hash is a multiple of 64.

    Left out are those in more than an eighth of the windows (and in more than four): they are of a chat template or system
    prompt, which other texts have too.
    """
    sampled = [row[row % SAMPLING == 0] for row in map(np.unique, _hashes(tokens_ST))]
    found, counts = np.unique(np.concatenate(sampled), return_counts=True)
    return found[counts <= max(4, len(tokens_ST) // 8)].tolist()


def shared_text(fingerprints: Collection[int], tokens_ST: Tensor) -> int:
    """Number of 32-grams of the windows that are among the fingerprints of another text with the same tokenizer."""
    known = np.asarray(sorted(fingerprints), np.uint64)
    return int(np.isin(_hashes(tokens_ST), known).sum())


def _hashes(tokens_ST: Tensor) -> np.ndarray:
    """A 63-bit hash of each 32-gram of each window, uint64 [S, N]; no 32-gram spans two windows."""
    tokens = tokens_ST.numpy().astype(np.uint64)
    count = max(0, tokens.shape[1] - GRAM + 1)
    hashes_SN = np.zeros((len(tokens), count), np.uint64)
    for offset in range(GRAM):
        hashes_SN = hashes_SN * _FACTOR + tokens[:, offset : offset + count] + np.uint64(1)
    hashes_SN = (hashes_SN ^ hashes_SN >> np.uint64(30)) * _MIX
    return (hashes_SN ^ hashes_SN >> np.uint64(27)) >> np.uint64(1)
