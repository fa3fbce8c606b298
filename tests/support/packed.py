"""Small packed training sets, and the comparison of two batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trainkit.data.text.chat_template import Document
from trainkit.data.text.packing import PackedSet, pack


def packed_set(rows: int, seed: int = 0) -> PackedSet:
    """Rows of 8 slots, each with two documents of 4 equal tokens (10, 11, ...), under random loss masks."""
    rng = np.random.default_rng(seed)
    documents = [Document(np.full(4, 10 + n, np.int32), rng.random(4) < 0.6) for n in range(2 * rows)]
    return pack(documents, 8, "fingerprint")


def documents_of(packed: PackedSet) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, mask) of each document, in stored order."""
    bounds = packed.documents_D.tolist()
    return [(packed.tokens_N[a:b], packed.mask_N[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def same_batch(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two batches hold equal tensors, those of their windows included."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if key != "window" else all(map(same_batch, a[key], b[key])) for key in a
    )
