"""Acceptance sets: kills and ranks change no byte, training and validation share no prompt, parts of other sets are refused."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from tests.support.acceptance import LAYOUT, D, make_set, synthetic, write
from tests.support.processes import ended, files_of, fork, wait_until
from trainkit.data.loader import PackedLoader
from trainkit.data.manifest import ACCEPTANCE
from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.errors import UserError


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("straight") / "set")


def parts_in(folder) -> int:
    return len(list(folder.glob("*.safetensors")))


def test_acceptance_set_after_kills_is_identical(straight, tmp_path, seed):
    """SIGKILL three times; a part with its final name is complete, and no record is lost or doubled."""
    draw, out = random.Random(seed), tmp_path / "set"

    def slowly(*arguments):
        time.sleep(0.01)
        return synthetic(*arguments)

    for _ in range(3):
        pid = fork(lambda: write(out, slowly))
        wanted = min(len(LAYOUT.parts()) - 1, parts_in(out) + draw.randint(1, 2))
        wait_until(lambda wanted=wanted: parts_in(out) >= wanted, pid)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (-signal.SIGKILL, 0)
        there = {name: content for name, content in files_of(out).items() if not name.endswith(".partial")}
        assert there.items() <= files_of(straight).items()
    stats, there = write(out), parts_in(out)
    assert stats.written + stats.existing == there == len(LAYOUT.parts()) and stats.existing >= 3
    assert files_of(out) == files_of(straight)


def test_two_ranks_make_the_same_set_as_one(straight, tmp_path):
    """Two ranks write the set that one would; half a set cannot be read."""
    first = write(tmp_path / "set", rank=1, world_size=2)
    assert first.written == len(LAYOUT.parts()) // 2 and first.existing == 0
    with pytest.raises(UserError, match=r"5 of 10 parts are missing; run the same trainkit acceptance again"):
        AcceptanceSet.read(tmp_path / "set")
    second = write(tmp_path / "set", rank=0, world_size=2)
    assert files_of(tmp_path / "set") == files_of(straight)
    assert first.records + second.records == len(AcceptanceSet.read(straight))


def test_acceptance_set_reads_back_unchanged(straight):
    """The set that is read equals what was written."""
    records = AcceptanceSet.read(straight)
    written = [synthetic(*part, lambda tokens, cut: None) for part in LAYOUT.parts().values()]
    for name, values in records.tensors.items():
        assert torch.equal(values, torch.cat([part[name] for part in written])), name
    assert records.prompts == 40 and records.hidden_size == D and set(records.temperature.tolist()) == {0.0, 1.0}


def test_split_by_question_is_disjoint_and_complete(straight):
    """No question is in both training and validation, and every record is in one of them."""
    records = AcceptanceSet.read(straight)
    train, held = records.split(0.2, seed=3)
    seen, unseen = set(train.column("prompt").tolist()), set(held.column("prompt").tolist())
    assert not seen & unseen and len(unseen) == 8 and len(seen) == 32
    assert sorted([*train.rows_R, *held.rows_R]) == list(range(len(records)))
    assert np.array_equal(held.rows_R, records.split(0.2, seed=3)[1].rows_R)
    assert not np.array_equal(held.rows_R, records.split(0.2, seed=4)[1].rows_R)
    assert train.fingerprint != held.fingerprint != records.split(0.2, seed=4)[1].fingerprint
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match="validation_share"):
            records.split(share, 0)


def test_epoch_has_every_record_once_over_two_ranks(straight):
    """Over two ranks an epoch has every record once; only the end is padded."""
    train, _ = AcceptanceSet.read(straight).split(0.2, seed=0)
    loaders = [PackedLoader(train, 100, rank=rank, world_size=2, seed=1) for rank in (0, 1)]
    states, records = [], 0
    for batches in zip(*loaders, strict=True):
        window = {int(batch["window_count"]) for batch in batches}
        real = [batch["document_BT"][:, 0] >= 0 for batch in batches]
        assert window == {sum(int(one.sum()) for one in real)}, (
            "the loss is divided by the number of records that are no padding"
        )
        assert all(batch["label_BW"].shape == (100, 2) for batch in batches)
        states += [batch["hidden_BD"][one] for batch, one in zip(batches, real, strict=True)]
        records += window.pop()
    assert records == len(train)
    assert torch.equal(torch.cat(states).sort(0).values, train.column("hidden").sort(0).values)


def test_foreign_parts_and_sets_are_refused(straight, tmp_path):
    """Parts of another set, torn parts and sets of another format are refused."""
    other = make_set(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was started with seed 1, but now it is 0"):
        write(other)
    name = ACCEPTANCE.part_name(0)
    os.replace(other / name, straight.parent / "aside")
    (other / name).write_bytes((straight / name).read_bytes())
    with pytest.raises(UserError, match=f"{name}: belongs to another set .*; remove the file"):
        AcceptanceSet.read(other)
    (other / name).write_bytes((straight / name).read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{name}: not a complete safetensors file"):
        AcceptanceSet.read(other)
    with pytest.raises(UserError, match="no acceptance set"):
        AcceptanceSet.read(tmp_path)
    manifest = json.loads((other / "acceptance.json").read_text())
    (other / "acceptance.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(UserError, match="not an acceptance set of format 2"):
        AcceptanceSet.read(other)


def test_error_before_first_part_leaves_no_folder(tmp_path):
    """An error before the first part leaves no folder."""

    def fail(*_):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        write(tmp_path / "set", fail)
    assert not (tmp_path / "set").exists()
