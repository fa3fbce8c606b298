"""Documents packed into rows of one length, stored as flat arrays that are loaded memory-mapped.

Positions and document numbers are not stored; they are computed from the documents' boundaries.
"""

# N tokens  D documents  R packed rows  B batch rows  T positions (the packed length)

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainkit.data.text.chat_template import Document
from trainkit.files import write_json

ARRAYS = ("tokens_N", "mask_N", "documents_D", "rows_R")
"""Arrays of a `PackedSet`."""


@dataclass(frozen=True)
class PackedSet:
    """Packed rows of `length` tokens.

    Attributes:
        tokens_N: Token ids of all documents, row after row, without padding; int32.
        mask_N: True where the token counts as a label; never at a document's first token, which nothing predicts.
        documents_D: Start of each document in `tokens_N`, and the end of the last one: D + 1 entries, int64.
        rows_R: Start of each row in `documents_D`, and the end of the last one: R + 1 entries, int64.
        length: Tokens in a padded row.
        fingerprint: Digest of the data and settings that determine the set.
    """

    tokens_N: np.ndarray
    mask_N: np.ndarray
    documents_D: np.ndarray
    rows_R: np.ndarray
    length: int
    fingerprint: str = ""

    def __len__(self) -> int:
        return len(self.rows_R) - 1

    @cached_property
    def labels_R(self) -> np.ndarray:
        """Number of labels in each row, int64."""
        return np.add.reduceat(self.mask_N, self.documents_D[self.rows_R[:-1]], dtype=np.int64)

    @cached_property
    def tokens_R(self) -> np.ndarray:
        """Number of tokens in each row, without padding, int64."""
        return np.diff(self.documents_D[self.rows_R])

    @cached_property
    def content(self) -> str:
        """SHA-256 of everything a model reads: the tokens and the boundaries of rows and documents, but not the loss mask."""
        digest = hashlib.sha256(f"{self.length}".encode())
        for array in (self.tokens_N, self.documents_D, self.rows_R):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def batch(self, rows: Sequence[int], size: int) -> dict[str, Tensor]:
        """Tensors of `size` rows: those at `rows`, then rows that are only padding.

        Returns:
            tokens_BT and positions_BT, int64; document_BT, int64, numbered from 0 in each row and -1 on padding; mask_BT, bool;
            rows_B, int64, the rows' indices and -1 for a row of padding. Padding has the id 0, which every model knows (the
            tokenizer's padding id may be outside its vocabulary), and positions that count up from 0, as if it were one more
            document.
        """
        tokens_BT = np.zeros((size, self.length), np.int64)
        positions_BT = np.tile(np.arange(self.length, dtype=np.int64), (size, 1))
        document_BT = np.full((size, self.length), -1, np.int64)
        mask_BT = np.zeros((size, self.length), np.bool_)
        for b, row in enumerate(rows):
            bounds = self.documents_D[self.rows_R[row] : self.rows_R[row + 1] + 1]
            start, used = int(bounds[0]), int(bounds[-1] - bounds[0])
            sizes, starts = np.diff(bounds), bounds[:-1] - start
            tokens_BT[b, :used] = self.tokens_N[start : start + used]
            mask_BT[b, :used] = self.mask_N[start : start + used]
            positions_BT[b, :used] -= np.repeat(starts, sizes)
            positions_BT[b, used:] -= used
            document_BT[b, :used] = np.repeat(np.arange(len(sizes)), sizes)
        return {
            "tokens_BT": torch.from_numpy(tokens_BT),
            "positions_BT": torch.from_numpy(positions_BT),
            "document_BT": torch.from_numpy(document_BT),
            "mask_BT": torch.from_numpy(mask_BT),
            "rows_B": torch.from_numpy(np.array([*rows, *[-1] * (size - len(rows))], np.int64)),
        }

    def save(self, folder: Path) -> None:
        """Writes the arrays as .npy files, and the other attributes as packed.json, into a new folder."""
        folder.mkdir()
        for name in ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        write_json(folder / "packed.json", {name: getattr(self, name) for name in ("length", "fingerprint")})

    @staticmethod
    def load(folder: Path) -> PackedSet:
        """The set that `save` wrote, memory-mapped, so that processes share the memory."""
        files = {name: folder / f"{name}.npy" for name in ARRAYS}
        # a file of 128 bytes has only a header, and an empty array cannot be mapped
        arrays = {name: np.load(file, "r" if file.stat().st_size > 128 else None) for name, file in files.items()}
        return PackedSet(**arrays, **json.loads((folder / "packed.json").read_text(encoding="utf-8")))


def join(parts: Sequence[tuple[PackedSet, Sequence[int]]]) -> PackedSet:
    """One set of the selected rows of several sets, in order; all must have the same length."""
    first = parts[0][0]
    assert all(packed.length == first.length for packed, _ in parts)
    tokens, masks, sizes, rows = [first.tokens_N[:0]], [first.mask_N[:0]], [0], [0]
    for packed, chosen in parts:
        for row in chosen:
            bounds = packed.documents_D[packed.rows_R[row] : packed.rows_R[row + 1] + 1]
            tokens.append(packed.tokens_N[bounds[0] : bounds[-1]])
            masks.append(packed.mask_N[bounds[0] : bounds[-1]])
            sizes.extend(np.diff(bounds).tolist())
            rows.append(rows[-1] + len(bounds) - 1)
    arrays = np.concatenate(tokens), np.concatenate(masks), np.cumsum(sizes, dtype=np.int64), np.asarray(rows, np.int64)
    return PackedSet(*arrays, first.length)


def pack(documents: Sequence[Document], length: int, fingerprint: str = "") -> PackedSet:
    """Documents packed into rows by best fit, longest first; deterministic, and each document is whole in exactly one row.

    Args:
        documents: Documents of 1 to `length` tokens.
        length: Tokens in a row.
        fingerprint: Digest of the data and settings.
    """
    # Each document goes into the fullest row that still has room for it, otherwise into a new row.
    bins: list[list[int]] = []
    room: list[int] = []  # distinct free spaces, ascending
    open_bins: dict[int, list[int]] = {}  # free space -> rows that have it
    order = sorted(range(len(documents)), key=lambda d: -len(documents[d].tokens))
    for d in order:
        size = len(documents[d].tokens)
        assert 0 < size <= length
        index = bisect_left(room, size)
        if index < len(room):
            space = room[index]
            chosen = open_bins[space].pop()
            if not open_bins[space]:
                del open_bins[space], room[index]
        else:
            space, chosen = length, len(bins)
            bins.append([])
        bins[chosen].append(d)
        if left := space - size:
            if left not in open_bins:
                insort(room, left)
            open_bins.setdefault(left, []).append(chosen)

    # Lay the documents out row by row; the empty arrays are for a set without documents.
    placed = [documents[d] for row in bins for d in row]
    starts = np.cumsum([0, *(len(document.tokens) for document in placed)], dtype=np.int64)
    mask_N = np.concatenate([np.zeros(0, np.bool_), *(document.mask for document in placed)])
    mask_N[starts[:-1]] = False
    tokens_N = np.concatenate([np.zeros(0, np.int32), *(document.tokens for document in placed)])
    return PackedSet(tokens_N, mask_N, starts, np.cumsum([0, *map(len, bins)], dtype=np.int64), length, fingerprint)
