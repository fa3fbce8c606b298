"""Packing and batches: no document is lost, doubled or split, and the tensors give the documents' boundaries."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.data.text.chat_template import Document
from trainkit.data.text.packing import PackedSet, pack

LENGTH = 16
documents = st.lists(st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=LENGTH), max_size=40)


def make_documents(pairs: list[list[tuple[int, bool]]]) -> list[Document]:
    return [Document(np.array([t for t, _ in d], np.int32), np.array([m for _, m in d], np.bool_)) for d in pairs]


def read_back(packed: PackedSet) -> list[tuple[list[int], list[bool]]]:
    """Documents as (tokens, mask), read from the tensors only."""
    batch = packed.batch(range(len(packed)), len(packed))
    result = []
    for b in range(len(packed)):
        for number in range(int(batch["document_BT"][b].max()) + 1):
            at = batch["document_BT"][b] == number
            assert batch["positions_BT"][b, at].tolist() == list(range(int(at.sum())))
            result.append((batch["tokens_BT"][b, at].tolist(), batch["mask_BT"][b, at].tolist()))
    return result


@settings(deadline=None)
@given(documents)
def test_every_document_is_packed_once_and_whole(pairs: list[list[tuple[int, bool]]]) -> None:
    """Every document is packed exactly once and is not split."""
    expected = [([t for t, _ in d], [False] + [m for _, m in d][1:]) for d in pairs]
    assert sorted(read_back(pack(make_documents(pairs), LENGTH))) == sorted(expected)


@settings(deadline=None)
@given(documents)
def test_documents_are_contiguous_and_padding_is_last(pairs: list[list[tuple[int, bool]]]) -> None:
    """Documents are contiguous, padding comes last, and no two rows would fit in one."""
    packed = pack(make_documents(pairs), LENGTH)
    batch = packed.batch(range(len(packed)), len(packed))
    used = []
    for b in range(len(packed)):
        document, padding = batch["document_BT"][b], batch["document_BT"][b] < 0
        used.append(int((~padding).sum()))
        assert (document[: used[-1]].diff() >= 0).all() and padding[used[-1] :].all()
        assert (batch["tokens_BT"][b, padding] == 0).all() and not batch["mask_BT"][b, padding].any()
        assert batch["positions_BT"][b, padding].tolist() == list(range(LENGTH - used[-1]))
    assert sum(sorted(used)[:2]) > LENGTH or len(used) < 2


@settings(deadline=None)
@given(documents)
def test_labels_are_counted_as_in_training(pairs: list[list[tuple[int, bool]]]) -> None:
    """The number of labels per row is what the drafters' losses count."""
    packed = pack(make_documents(pairs), LENGTH)
    expected = []
    for row in range(len(packed)):
        batch = packed.batch([row], 1)
        same = batch["document_BT"][:, 1:] == batch["document_BT"][:, :-1]
        expected.append(int((batch["mask_BT"][:, 1:] & same & (batch["document_BT"][:, 1:] >= 0)).sum()))
    assert packed.labels_R.tolist() == expected
    assert sum(expected) == sum(m for d in pairs for _, m in d[1:])


def test_batch_by_hand() -> None:
    """Tensors and dtypes of a batch equal those written by hand."""
    packed = pack(make_documents([[(5, False), (6, True), (7, True)], [(8, True), (9, True)]]), 6)
    batch = packed.batch([0], 2)
    assert batch["tokens_BT"].tolist() == [[5, 6, 7, 8, 9, 0], [0] * 6]
    assert batch["positions_BT"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch["document_BT"].tolist() == [[0, 0, 0, 1, 1, -1], [-1] * 6]
    assert batch["mask_BT"].int().tolist() == [[0, 1, 1, 0, 1, 0], [0] * 6]
    assert batch["rows_B"].tolist() == [0, -1]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "tokens_BT": torch.int64,
        "positions_BT": torch.int64,
        "document_BT": torch.int64,
        "mask_BT": torch.bool,
        "rows_B": torch.int64,
    }


def test_packing_leaves_little_padding(seed: int) -> None:
    """More than 98 % of the slots hold tokens."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 60, size=2000)
    packed = pack([Document(np.ones(n, np.int32), np.ones(n, np.bool_)) for n in sizes], 128)
    assert len(packed.tokens_N) / (len(packed) * packed.length) > 0.98
