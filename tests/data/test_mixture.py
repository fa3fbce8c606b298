"""Mixtures: shares follow the weights, stored rows repeat evenly, a checkpoint has the generated rows, ranks agree."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.packed import packed_set, same_batch
from trainkit.data.mixture import MixedLoader, apportion, sequence
from trainkit.data.text.chat_template import Document
from trainkit.data.text.packing import PackedSet, join, pack
from trainkit.errors import UserError


class TextGenerator:
    """Generates rows of one token that counts the calls, like a draft that changes."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def __call__(self, rows: int, used: int) -> tuple[PackedSet, int]:
        self.calls.append((rows, used))
        token = 1000 + len(self.calls)
        return pack([Document(np.full(8, token, np.int32), np.ones(8, np.bool_))] * (rows + 1), 8), rows + 1


def mixed(generator: TextGenerator, **options: Any) -> MixedLoader:
    stored = {"target": packed_set(7, seed=1), "corpus": packed_set(5, seed=2)}
    weights = {"target": 2.0, "corpus": 1.0, "draft": 1.0}
    return MixedLoader(stored, {"draft": generator}, weights, 2, **{"refresh": 4, "seed": 3, **options})


def test_apportion_by_hand() -> None:
    """Rows are apportioned to weights as computed by hand."""
    assert apportion({"a": 9, "b": 1}, 20) == {"a": 18, "b": 2}
    assert apportion({"a": 1, "b": 1, "c": 1}, 8) == {"a": 3, "b": 3, "c": 2}
    assert apportion({"a": 1.0, "b": 0.001}, 4) == {"a": 4, "b": 0}


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 300))
def test_apportion_is_within_one_row_of_each_share(weights: list[float], rows: int) -> None:
    """The counts add up to all rows, and each is less than one row off its share."""
    named = {str(n): weight for n, weight in enumerate(weights)}
    counts = apportion(named, rows)
    assert sum(counts.values()) == rows
    assert all(abs(counts[name] - rows * weight / sum(weights)) < 1 for name, weight in named.items())


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60), st.integers(0, 9))
def test_sequence_visits_all_items_before_repeating(items: int, start: int, count: int, seed: int) -> None:
    """A sequence visits all items before it repeats one, and is the same however it is cut."""
    whole = sequence(items, 0, start + count, seed)
    assert whole[start:] == sequence(items, start, count, seed)
    for first in range(0, len(whole) - items + 1, items):
        assert sorted(whole[first : first + items]) == list(range(items))


def test_join_keeps_rows_unchanged() -> None:
    """Joined sets hold the rows of their parts unchanged."""
    one, other = packed_set(4, seed=1), packed_set(3, seed=2)
    joined = join([(one, [2, 0]), (other, [1])])
    both = [one.batch([2, 0], 2), other.batch([1], 1)]
    batch = joined.batch([0, 1, 2], 3)
    for name in ("tokens_BT", "positions_BT", "document_BT", "mask_BT"):
        assert torch.equal(batch[name], torch.cat([part[name] for part in both]))
    assert joined.labels_R.tolist() == [one.labels_R[2], one.labels_R[0], other.labels_R[1]]


def test_each_chapter_has_its_shares_and_new_texts() -> None:
    """Each chapter has the weighted shares, and newly generated texts."""
    generator = TextGenerator()
    loader = mixed(generator)
    for chapter in (1, 2, 3):
        tokens = torch.cat([batch["tokens_BT"] for batch in loader])
        assert tokens.shape == (8, 8)
        assert int((tokens >= 1000).all(1).sum()) == 2
        assert set(tokens[tokens >= 1000].tolist()) == {1000 + chapter}
    assert generator.calls == [(2, 0), (2, 3), (2, 6)]  # prompts continue where they stopped


def test_stored_rows_are_used_equally_often() -> None:
    """Every stored row is used equally often."""
    loader = MixedLoader({"target": packed_set(6)}, {}, {"target": 1}, 3, refresh=4)
    tokens = torch.cat([batch["tokens_BT"] for _ in range(3) for batch in loader])
    assert np.unique(tokens[:, 0].numpy(), return_counts=True)[1].tolist() == [6] * 6


def test_iter_alone_generates_no_text() -> None:
    """Calling iter() alone generates no text and skips no chapter."""
    generator = TextGenerator()
    loader = mixed(generator)
    iter(loader)
    assert not generator.calls and loader.state_dict()["chapter"] == -1


def test_mixture_batches_have_no_row_numbers() -> None:
    """Rows of a chapter are in no set, so a cache of hidden states by row index would mix them up."""
    loader = mixed(TextGenerator(), accumulate=2, attach_window=True)
    assert all("rows_B" not in part for batch in loader for part in (batch, *batch.get("window", ())))


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("taken", [1, 3, 4, 6])
def test_resumed_mixture_gives_the_same_batches(taken: int, writes: bool) -> None:
    """Also inside a chapter, when the draft has changed: the texts that it generated are in the checkpoint."""

    def endless(loader: MixedLoader) -> Any:
        while True:
            yield from loader

    options: dict[str, Any] = {} if writes else {"weights": {"target": 1.0, "corpus": 1.0}}

    def make(generator: TextGenerator) -> MixedLoader:
        loader = mixed(generator)
        return loader if writes else MixedLoader(loader.stored, {}, options["weights"], 2, refresh=4, seed=3)

    generator = TextGenerator()
    whole = make(generator)
    batches = endless(whole)
    for _ in range(taken):
        next(batches)
    state = whole.state_dict()
    buffer = torch.save(state, "/dev/null")
    assert buffer is None
    later = TextGenerator()
    later.calls = list(generator.calls)  # so that it continues to count
    resumed = make(later)
    resumed.load_state_dict(state)
    for a, b in islice(zip(batches, endless(resumed), strict=True), 7):
        assert same_batch(a, b)
    assert later.calls == generator.calls  # nothing was generated twice


def test_resume_with_other_refresh_is_refused() -> None:
    """Resuming with another refresh interval is refused."""
    state = mixed(TextGenerator()).state_dict()
    with pytest.raises(UserError, match="refresh: the checkpoint has 4, this run 5"):
        mixed(TextGenerator(), refresh=5).load_state_dict(state)


def test_two_ranks_split_a_chapter() -> None:
    """Two ranks divide the rows of a chapter and have equal window counts."""
    parts = []
    for rank in range(2):
        loader = mixed(TextGenerator(), rank=rank, world_size=2, accumulate=2, refresh=3)
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        parts.append(batches)
    assert all(torch.equal(a["window_count"], b["window_count"]) for a, b in zip(*parts, strict=True))
    rows = torch.cat([batch["tokens_BT"] for batches in parts for batch in batches])
    assert len(rows) == 24 and int((rows >= 1000).all(1).sum()) == 6
