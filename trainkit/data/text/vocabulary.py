"""The most frequent token ids of a text, for drafters with a trimmed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainkit.data.text.prepare import prepare
from trainkit.errors import UserError
from trainkit.models.shape import TargetShape


def frequent_ids(
    target: str, shape: TargetShape, text: str, keep: float, limit: int | None, columns: dict[str, str] | None
) -> tuple[list[int], float, str]:
    """Ids to keep, ascending; the share of the text's labels that they cover; and a line for the user about both.

    Raises:
        UserError: `keep` is not a possible share or number of ids.
    """
    size = shape.decoder.vocab_size
    number = round(keep * size) if keep <= 1 else int(keep) if float(keep).is_integer() else 0
    if not len(shape.end_ids) < number <= size:
        raise UserError(f"--keep {keep:g}: must be a share or a number of ids, above the end ids and at most all {size}")
    prepared = prepare([text], None, target, 2048, columns=columns, validation_share=0.0, limit=limit)
    prepared.report.warn()
    packed = prepared.train
    counts_V = np.bincount(packed.tokens_N[packed.mask_N], minlength=size)
    ids = most_frequent(counts_V, number, shape.end_ids)
    coverage = float(counts_V[ids].sum() / counts_V.sum())
    return ids, coverage, f"kept {number:,} of {size:,} ids, which cover {coverage:.2%} of the {counts_V.sum():,} labels"


def most_frequent(counts_V: np.ndarray, number: int, always: Sequence[int] = ()) -> list[int]:
    """`number` ids, ascending: those in `always` and then those with the largest counts, lower ids first among equals."""
    order = np.argsort(-counts_V, kind="stable")
    first = np.concatenate([np.asarray(always, np.int64), order[~np.isin(order, always)]])
    return sorted(first[:number].tolist())
