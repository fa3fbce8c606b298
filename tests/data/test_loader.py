"""The loader: ranks share each epoch's rows, a resume is exact, and the labels of each window are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.packed import packed_set, same_batch
from trainkit.data.loader import PackedLoader
from trainkit.data.text.packing import pack
from trainkit.errors import UserError

few = st.integers(1, 4)
sizes = {"rows": st.integers(1, 23), "batch_size": few, "world_size": few, "accumulate": few}


def loaders(rows: int, batch_size: int, world_size: int, accumulate: int, **options: Any) -> list[PackedLoader]:
    return [
        PackedLoader(packed_set(rows), batch_size, rank=rank, world_size=world_size, accumulate=accumulate, **options)
        for rank in range(world_size)
    ]


def counted(batch: dict[str, Any]) -> int:
    """Number of labels by definition: tokens with mask True whose predecessor is in the same document."""
    document, mask = batch["document_BT"], batch["mask_BT"]
    return int((mask[:, 1:] & (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)).sum())


@settings(deadline=None, max_examples=60)
@given(**sizes, shuffle=st.booleans())
def test_epoch_has_every_document_once_over_ranks(
    rows: int, batch_size: int, world_size: int, accumulate: int, shuffle: bool
) -> None:
    """Over all ranks an epoch has every document exactly once."""
    seen: list[int] = []
    for loader in loaders(rows, batch_size, world_size, accumulate, shuffle=shuffle):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-rows // (batch_size * world_size))
        for batch in batches:
            assert batch["tokens_BT"].shape == (batch_size, 8)
            seen += batch["tokens_BT"][batch["document_BT"] >= 0].tolist()
    assert sorted(seen) == sorted(np.repeat(np.arange(10, 10 + 2 * rows), 4).tolist())


@settings(deadline=None, max_examples=60)
@given(**sizes, attach=st.booleans())
def test_window_count_is_all_labels_of_the_step(
    rows: int, batch_size: int, world_size: int, accumulate: int, attach: bool
) -> None:
    """`window_count` is the number of labels of the optimizer step, over all ranks and micro-batches."""
    ranks = [list(loader) for loader in loaders(rows, batch_size, world_size, accumulate, attach_window=attach)]
    for first in range(0, len(ranks[0]), accumulate):
        windows = [batches[first : first + accumulate] for batches in ranks]
        total = sum(counted(batch) for window in windows for batch in window)
        for window in windows:
            assert [float(batch["window_count"]) for batch in window] == [total] * len(window)
            assert window[0]["window_count"].shape == () and window[0]["window_count"].dtype == torch.int64
            if attach:
                plain = [{key: value for key, value in batch.items() if key != "window"} for batch in window]
                assert len(window[0]["window"]) == len(window) and all(map(same_batch, window[0]["window"], plain))
            assert all("window" not in batch for batch in window[int(attach) :])


def epochs(loader: PackedLoader, count: int) -> list[dict[str, Any]]:
    return [batch for _ in range(count) for batch in loader]


def test_resume_at_any_point_equals_uninterrupted(seed: int) -> None:
    """Resuming at any batch gives the batches of the uninterrupted run."""
    options: dict[str, Any] = {"accumulate": 3, "seed": seed, "attach_window": True}
    whole = epochs(PackedLoader(packed_set(11), 2, **options), 3)
    for stop in range(len(whole)):
        loader = PackedLoader(packed_set(11), 2, **options)
        before = []
        while len(before) < stop:  # as Lightning does: never past the last batch of an epoch
            iterator = iter(loader)
            before += [next(iterator) for _ in range(min(len(loader), stop - len(before)))]
        state = loader.state_dict()
        resumed = PackedLoader(packed_set(11), 2, **options)
        resumed.load_state_dict(state)
        assert len(resumed) == len(loader)
        after: list[dict[str, Any]] = []
        while len(before) + len(after) < len(whole):
            after += list(resumed)
        assert all(map(same_batch, before + after, whole)) and len(before + after) == len(whole)


def test_loader_state_is_plain_and_equal_on_ranks(seed: int) -> None:
    """The loader's state has plain values and is equal on all ranks."""
    states = []
    for loader in loaders(9, 2, 2, 1, seed=seed):
        iterator = iter(loader)
        assert next(iterator) is not next(iterator)
        states.append(loader.state_dict())
    assert states[0] == states[1] and states[0]["handed_out"] == 2
    assert all(isinstance(value, (int, str)) for value in states[0]["setting"].values())


def test_epoch_order_is_seeded(seed: int) -> None:
    """Epochs differ in order, and the same seed repeats them."""

    def order(seed: int) -> list[list[int]]:
        loader = PackedLoader(packed_set(40), 1, seed=seed)
        return [[int(batch["tokens_BT"][0, 0]) for batch in loader] for _ in range(2)]

    first, second = order(seed)
    assert first != second and sorted(first) == sorted(second)
    assert order(seed) == [first, second] and order(seed + 1)[0] != first


def test_unshuffled_pass_restarts_unless_resumed() -> None:
    """Without shuffling each pass starts at the first row unless it was just resumed."""
    loader = PackedLoader(packed_set(6), 2, shuffle=False)
    whole = list(loader)
    next(iter(loader))  # Lightning's sanity check leaves early
    assert all(map(same_batch, list(loader), whole)) and len(whole) == 3
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert all(map(same_batch, list(loader), whole[1:]))
    assert all(map(same_batch, list(loader), whole))


def test_iter_alone_does_not_change_the_state() -> None:
    """Calling iter() alone does not change the loader's state."""
    loader = PackedLoader(packed_set(6), 2)
    state = loader.state_dict()
    iter(loader)
    assert loader.state_dict() == state


@pytest.mark.parametrize(("option", "value"), [("batch_size", 3), ("world_size", 2), ("seed", 5), ("accumulate", 2)])
def test_state_of_other_settings_is_refused(option: str, value: int) -> None:
    """A state of another batch size, world size, seed or accumulation is refused."""
    state = PackedLoader(packed_set(6), 2).state_dict()
    other: dict[str, Any] = {"batch_size": 2} | {option: value}
    with pytest.raises(UserError, match=f"^{option}: the checkpoint has"):
        PackedLoader(packed_set(6), **other).load_state_dict(state)


def test_empty_set_has_no_batches() -> None:
    """An empty set has no batches."""
    loader = PackedLoader(pack([], 8), 2)
    assert len(loader) == 0 and list(loader) == []


def test_lightning_resume_loses_or_repeats_no_batch(tmp_path: Any, seed: int) -> None:
    """Lightning can save and resume at any step, and no batch is lost or repeated."""

    import lightning as L

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            if module.steps and module.steps[-1] == len(module.seen):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    class Recorder(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.seen: list[list[int]] = []
            self.steps: list[int] = []  # micro-batches seen at each optimiser step

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
            self.seen.append(batch["tokens_BT"].flatten().tolist())
            return self.weight.sum()

        def optimizer_step(self, *args: Any, **options: Any) -> None:
            super().optimizer_step(*args, **options)
            self.steps.append(len(self.seen))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def run(callbacks: list[L.Callback], checkpoint: str | None = None) -> Recorder:
        module = Recorder()
        trainer = L.Trainer(
            max_steps=13,
            accumulate_grad_batches=2,
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, PackedLoader(packed_set(9), 1, accumulate=2, seed=seed), ckpt_path=checkpoint, weights_only=True)
        return module

    whole = run([Save()])
    assert whole.steps == [2, 4, 6, 8, 9, 11, 13, 15, 17, 18, 20, 22, 24]
    for stop in (1, 4, 5, 6, 10):  # in the first epoch, at its end, in the second, at its end
        rest = run([], str(tmp_path / f"{stop}.ckpt"))
        done = whole.steps[stop - 1]
        assert rest.seen == whole.seen[done:] and [done + step for step in rest.steps] == whole.steps[stop:]
