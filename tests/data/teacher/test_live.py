"""Cached hidden states: read back bit-identical, and never those of another target, set or precision."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.processes import ended, fork
from trainkit.data.teacher import live
from trainkit.data.teacher.live import FeatureCache, LiveTeacher
from trainkit.data.text.chat_template import Document
from trainkit.data.text.packing import PackedSet, pack
from trainkit.errors import UserError
from trainkit.losses.topk import TopKHead, compress
from trainkit.models.target import FrozenTarget


def store(folder: Path, dtype: torch.dtype = torch.float32, **key: Any) -> FeatureCache:
    return FeatureCache(folder, {"set": "a"} | key, (5, 3, 4), dtype)


@pytest.fixture
def packed(seed: int) -> PackedSet:
    """A few rows of random documents, the last row not full."""
    lengths = torch.randint(4, 20, (9,)).tolist()
    documents = [Document(np.array(torch.randint(0, 320, (n,)).tolist(), np.int32), np.arange(n) > 1) for n in lengths]
    return pack(documents, 24)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one whenever the target is run."""
    calls, forward = [], FrozenTarget.forward

    def counted(self: FrozenTarget, *args: Any) -> Any:
        calls.append(1)
        return forward(self, *args)

    monkeypatch.setattr(FrozenTarget, "forward", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cached_rows_are_bit_exact_in_any_order(dtype, tmp_path, seed):
    """Cached rows come back bit for bit, in any order, also in a later run."""
    values = torch.randn(5, 3, 4).to(dtype)
    values[2, 1, 3] = float("nan")
    kept = store(tmp_path, dtype)
    assert kept.get(torch.tensor([0])) is None and kept.filled == 0 and kept.size == 60 * dtype.itemsize
    kept.put(torch.tensor([4, 2]), values[[4, 2]])
    assert kept.get(torch.tensor([2, 3])) is None, "all rows or none"
    for reader in (kept, store(tmp_path, dtype)):  # in this process, and in a later run
        found = reader.get(torch.tensor([2, 4, 2]))
        assert found is not None and found.dtype == dtype and reader.filled == 2
        assert torch.equal(found.view(torch.uint8), values[[2, 4, 2]].view(torch.uint8))


def test_padding_rows_are_not_cached(tmp_path, seed):
    """Padding rows are neither stored nor counted as missing."""
    kept, values = store(tmp_path), torch.randn(3, 3, 4)
    kept.put(torch.tensor([-1, 1, -1]), values)
    assert kept.filled == 1 and kept.get(torch.tensor([4])) is None, "-1 must not index from the end"
    found = kept.get(torch.tensor([-1, 1]))
    assert found is not None and torch.equal(found[1], values[1]) and not found[0].any()
    kept.put(torch.tensor([4]), values[:1])
    alone = kept.get(torch.tensor([-1, -1]))
    assert alone is not None and alone.shape == (2, 3, 4) and not alone.any()


def test_each_key_has_its_own_store(tmp_path):
    """Each other key, dtype or size has a store of its own."""
    first = store(tmp_path)
    others = [
        store(tmp_path, torch.bfloat16),
        store(tmp_path, set="b"),
        store(tmp_path, top_k=3),
        FeatureCache(tmp_path, {"set": "a"}, (6, 3, 4), torch.float32),
        FeatureCache(tmp_path, {"set": "a"}, (5, 4, 3), torch.float32),
    ]
    first.put(torch.arange(5), torch.ones(5, 3, 4))
    assert len({one.path for one in (first, *others)}) == 6 and not any(one.filled for one in others)
    assert store(tmp_path).path == first.path and json.loads((first.path / "key.json").read_text())["set"] == "a"


def test_killed_process_leaves_its_written_rows(tmp_path, seed):
    """What a killed process had written can be read."""
    values = torch.randn(5, 3, 4)

    def work() -> None:
        store(tmp_path).put(torch.tensor([3]), values[3:4])
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(fork(work)) == -signal.SIGKILL
    found = store(tmp_path).get(torch.tensor([3]))
    assert found is not None and torch.equal(found, values[3:4]) and store(tmp_path).filled == 1


def test_full_disk_is_reported_before_the_work(tmp_path, monkeypatch):
    """Too little disk space is reported before the work begins."""
    monkeypatch.setattr(live.shutil, "disk_usage", lambda path: SimpleNamespace(free=239))
    with pytest.raises(UserError, match="take 0.0 GB, 0.0 GB are free") as caught:
        store(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(live.shutil, "disk_usage", lambda path: SimpleNamespace(free=240))
    assert store(tmp_path).filled == 0


def read_all(
    reader: LiveTeacher, packed: PackedSet, taps: tuple[int, ...] = (), size: int = 2
) -> list[tuple[Tensor, Tensor | None]]:
    kept, found = reader.open_store("set", packed, taps), []
    for start in range(0, len(packed), size):
        rows = list(range(start, min(start + size, len(packed))))
        found.append(reader.read(packed.batch(rows, size), taps, kept))
    return found


def assert_same(one: list, other: list, packed: PackedSet, size: int = 2) -> None:
    for number, (ours, theirs) in enumerate(zip(one, other, strict=True)):
        used = min(size, len(packed) - number * size)
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a[:used], b[:used])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("taps", [(), (1, -1)])
def test_cached_teacher_equals_live_teacher(dtype, top_k, taps, tiny_target, packed, tmp_path, runs):
    """Values and dtypes of hidden states or top-k rows, and of taps; by the same teacher and by the next one."""
    target = FrozenTarget(tiny_target, dtype)
    plain = read_all(LiveTeacher(target, None, top_k), packed, taps)
    reader = LiveTeacher(target, str(tmp_path), top_k)
    first, count = read_all(reader, packed, taps), len(runs)
    again, later = read_all(reader, packed, taps), read_all(LiveTeacher(target, str(tmp_path), top_k), packed, taps)
    assert count == 2 * -(-len(packed) // 2) == len(runs)
    for one in (first, again, later):
        assert_same(plain, one, packed)
    hidden, taps_BTAD = plain[0]
    assert hidden.dtype == (dtype if top_k is None else torch.float32)
    assert (taps_BTAD is None) == (not taps) and (taps_BTAD is None or taps_BTAD.dtype == dtype)


def test_top_k_rows_come_from_the_target_logits(tiny_target, packed, tmp_path):
    """The top-k rows are those of the target's logits."""
    target = FrozenTarget(tiny_target)
    (hidden, _), *_ = read_all(LiveTeacher(target), packed)
    reader = LiveTeacher(target, str(tmp_path), 5)
    (rows, _), *_ = read_all(reader, packed)
    assert torch.equal(rows.flatten(0, 1), compress(target.handle().head(hidden.flatten(0, 1)), 5))
    head = reader.stored_head()
    assert isinstance(head, TopKHead) and (head.k, head.vocab_size) == (5, 320)
    for k in (0, 321):
        with pytest.raises(UserError, match="teacher_top_k"):
            LiveTeacher(target, None, k)


def test_each_target_precision_and_taps_has_a_store(tiny_target, packed, tmp_path, runs):
    """Other weights under the same config, another config over the same weights, bfloat16 weights, autocast, taps, top_k."""
    weights, config = (Path(shutil.copytree(tiny_target, tmp_path / name)) for name in ("weights", "config"))
    raw = bytearray((weights / "model.safetensors").read_bytes())
    raw[-2] ^= 64
    (weights / "model.safetensors").write_bytes(raw)
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    batches, seen = -(-len(packed) // 2), []
    for top_k in (None, 4):
        for folder, dtype, autocast, taps in (
            (tiny_target, torch.float32, False, ()),
            (weights, torch.float32, False, ()),
            (config, torch.float32, False, ()),
            (tiny_target, torch.bfloat16, False, ()),
            (tiny_target, torch.float32, True, ()),
            (tiny_target, torch.float32, False, (1,)),
        ):
            before = len(runs)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                plain = read_all(LiveTeacher(FrozenTarget(folder, dtype), None, top_k), packed, taps)
                kept = read_all(LiveTeacher(FrozenTarget(folder, dtype), str(tmp_path / "kept"), top_k), packed, taps)
            assert len(runs) == before + 2 * batches
            assert_same(plain, kept, packed)
            seen.append(kept[0][0])
    assert len(list((tmp_path / "kept").iterdir())) == 12
    copy = shutil.copytree(tiny_target, tmp_path / "elsewhere")
    before = len(runs)
    read_all(LiveTeacher(FrozenTarget(copy), str(tmp_path / "kept")), packed)
    assert len(runs) == before, "a copy of the same target is the same target"
    assert all(not torch.equal(seen[0], other) for other in seen[1:5])


def test_reader_separates_sets_and_taps(tiny_target, packed, tmp_path):
    """One reader has a store for each set and choice of taps."""
    reader = LiveTeacher(FrozenTarget(tiny_target), str(tmp_path))
    stores = [reader.open_store(name, packed, taps) for name in ("a", "b") for taps in ((), (1,), (1, 2))]
    assert len({one.path for one in stores if one is not None}) == 6
    assert reader.open_store("a", packed, (1,)) is stores[1]
    assert LiveTeacher(FrozenTarget(tiny_target)).open_store("a", packed, ()) is None
