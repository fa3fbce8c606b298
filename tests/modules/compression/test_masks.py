"""Fixed and growing masks: schedules, zeros, gradients and optimiser state."""

import pytest
import torch

from tests.support.compressed_layers import effective, gradient, layer
from trainkit.errors import UserError
from trainkit.modules.compression.base import Masks
from trainkit.modules.compression.flow import SRSTE, MaskDecay, StructureDecay
from trainkit.modules.compression.masks import FixedMask, GradualMagnitude, HardMask

W = torch.tensor([[0.9, -0.2, 0.5, 0.1]])


def pruned(R: int = 6, K: int = 16) -> torch.Tensor:
    """A random weight with 2:4 zeros."""
    weight = torch.randn(R, K)
    weight.view(-1, 4)[torch.arange(R * K // 4)[:, None], torch.rand(R * K // 4, 4).argsort(1)[:, :2]] = 0
    return weight


def test_gradual_schedule_by_hand():
    """Zhu & Gupta's cubic schedule: s_f 0.8 from step 100, ten updates every 50 steps."""
    schedule = GradualMagnitude(0.8, begin=100, end=600, every=50)
    shares = [schedule.share(step, None) for step in (0, 100, 150, 200, 350, 550, 600, 900)]
    assert shares == pytest.approx([0, 0, 0.2168, 0.3904, 0.7, 0.7992, 0.8, 0.8], abs=1e-9)


@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_gradual_masks_are_nested_and_exact(scope, seed):
    """Each update prunes exactly its share, of the smallest weights, and a pruned weight never comes back."""
    schedule = GradualMagnitude(0.75, begin=2, end=13, every=4, scope=scope)
    linear = layer(torch.randn(5, 12), schedule)
    before, counts = schedule.masks["a.q_proj.weight"], []
    for step in range(16):
        schedule.refresh(step, None, None)
        mask = schedule.masks["a.q_proj.weight"]
        assert not bool((mask & ~before).any()) and bool((linear.weight[~mask] == 0).all())
        if not torch.equal(mask, before):
            share = schedule.share(step, None)
            assert int((~mask).sum()) == (5 * int(12 * share) if scope == "row" else int(60 * share))
            counts.append(step)
        before = mask
        with torch.no_grad():
            linear.weight.add_(torch.randn(5, 12))  # pruned entries move too, as with an optimiser that does not skip them
    assert counts == [6, 10, 13]


def test_pruned_entries_lose_gradient_and_moments(seed):
    """Gradients of pruned entries are zero before any norm is computed; moments are zero once an entry is pruned."""
    schedule = HardMask("2:4", dense=0.25)
    linear = layer(torch.randn(4, 8), schedule)
    optimizer = torch.optim.AdamW([linear.weight], lr=0.1, weight_decay=0.1)
    for step in range(8):
        schedule.refresh(step, 8, optimizer)
        mask = schedule.masks["a.q_proj.weight"]
        assert (int((~mask).sum()) == 16) == (step >= 2)
        (g,) = gradient(linear, torch.randn(4, 8)).unsqueeze(0)
        moments = optimizer.state[linear.weight]
        for value in (g, linear.weight, *(moments[name] for name in ("exp_avg", "exp_avg_sq") if moments)):
            assert bool((value[~mask] == 0).all()) and bool((value[mask] != 0).all())
        optimizer.step()
        assert bool((linear.weight[~mask] == 0).all())


def test_fixed_mask_is_the_zeros(seed):
    """The mask is the zeros of the weight; the layer's function does not change."""
    weight = pruned()
    linear = layer(weight, mask := FixedMask("2:4"))
    assert torch.equal(mask.masks["a.q_proj.weight"], weight != 0)
    torch.testing.assert_close(effective(linear), weight, rtol=0, atol=0)
    assert mask.metrics()["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("compression", "weight", "message"),
    [
        (lambda: FixedMask(), torch.ones(2, 4), "none of its weights is zero"),
        (lambda: FixedMask("1:4"), torch.tensor([[1.0, 0, 2, 0]]), "do not have the pattern 1:4"),
        (lambda: FixedMask("0.75"), torch.tensor([[1.0, 0, 2, 0]]), "do not have the pattern 0.75"),
        (lambda: FixedMask("4:2"), W, "sparsity: 4:2: N:M keeps"),
        (lambda: HardMask(124), W, "sparsity: 124: give the share"),
        (lambda: HardMask("2:8"), W, "has 4 inputs, not a multiple of 8"),
        (lambda: HardMask("2:4", dense=2), W, "dense is 2"),
        (lambda: GradualMagnitude(1.5), W, "sparsity: 1.5"),
        (lambda: GradualMagnitude(0.5, initial=0.6), W, "initial is 0.6"),
        (lambda: GradualMagnitude(0.5, every=0), W, "every 0"),
        (lambda: GradualMagnitude(0.5, begin=9, end=9), W, "begin 9, end 9"),
        (lambda: MaskDecay("2:4", dense=0.6, hard=0.6), W, "more than the whole run"),
        (lambda: MaskDecay("2:4", rate=0), W, "rate is 0"),
        (lambda: StructureDecay("0.5"), W, "StructureDecay needs N:M"),
        (lambda: StructureDecay("2:4", "geometric"), W, "has 4 inputs, not a multiple of 32"),
    ],
)
def test_bad_options_give_one_line(compression, weight, message):
    """Each wrong option gives one line that names it."""
    with pytest.raises(UserError) as caught:
        layer(weight, compression())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_schedule_that_never_prunes_is_refused():
    """Dense steps until the end would leave masks only to the export."""
    mask = SRSTE("2:4", dense=1.0)
    layer(W, mask)
    with pytest.raises(UserError, match=r"dense 1.0: leaves none of the 10 steps a mask; lower it"):
        mask.refresh(0, 10, None)


def test_schedule_without_last_step_is_refused():
    """A schedule in shares of the run needs its length."""
    mask = HardMask("2:4")
    layer(W, mask)
    with pytest.raises(UserError, match="set trainer.max_steps"):
        mask.refresh(0, None, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradualMagnitude(0.5, end=6, every=2),
        lambda: HardMask("2:4", dense=0.3),
        lambda: SRSTE("2:4"),
        lambda: MaskDecay("2:4"),
        lambda: StructureDecay("1:4"),
    ],
)
def test_restored_state_continues_equally(make, seed):
    """Restored at any step, masks, weights and flips equal those of an uninterrupted run."""
    weights = [torch.randn(4, 8) for _ in range(12)]

    def run(first: int, last: int, compression: Masks) -> list:
        linear = next(iter(compression.linears.values()))
        seen = []
        for step in range(first, last):
            if step:
                linear.weight.data = linear.weight.data + weights[step]
            compression.refresh(step, 10, None)
            seen += [effective(linear).clone(), compression.flips, compression.step]
        return seen

    start = torch.randn(4, 8)
    layer(start, whole := make())
    straight = run(0, 11, whole)
    for stop in range(1, 11):
        linear = layer(start, first := make())
        seen = run(0, stop, first)
        again = layer(linear.weight.detach(), second := make())
        second.restore(first.state())
        second.refresh(stop - 1, 10, None)  # as a resumed run does at its start
        assert torch.equal(effective(again), effective(linear))
        seen += run(stop, 11, second)
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(seen, straight, strict=True))
