"""Gradients and schedules of N:M sparsity that still changes its mask, by hand."""

import math

import pytest
import torch

from tests.support.compressed_layers import effective, gradient, layer
from trainkit.compress.masks import Pattern, mask_from_scores
from trainkit.errors import UserError
from trainkit.modules.compression.flow import SRSTE, MaskDecay, StructureDecay, frames
from trainkit.modules.compression.masks import HardMask

W, G = torch.tensor([[0.9, -0.2, 0.5, 0.1]]), torch.tensor([[1.0, 2.0, -1.0, 0.5]])


def at(compression, step: int, total: int = 10, weight=W):
    """The layer after a refresh at `step`."""
    linear = layer(weight, compression)
    compression.refresh(step, total, None)
    return linear


def test_gradients_of_sparse_rivals_by_hand():
    """Straight-through gives pruned entries their whole gradient, SR-STE pulls them to zero, a hard mask gives 0."""
    linear = at(rival := SRSTE("2:4", decay=2e-4, dense=0), 0)
    torch.testing.assert_close(effective(linear), torch.tensor([[0.9, 0, 0.5, 0]]))
    torch.testing.assert_close(gradient(linear, G), G, rtol=0, atol=0)
    rival.adjust_gradients()
    torch.testing.assert_close(linear.weight.grad, torch.tensor([[1, 1.99996, -1, 0.50002]]), rtol=0, atol=1e-7)
    hard = at(HardMask("2:4", dense=0), 0)
    torch.testing.assert_close(gradient(hard, G), torch.tensor([[1.0, 0, -1, 0]]), rtol=0, atol=0)
    assert torch.equal(linear.weight, W), "pruned weights stay in memory and may come back"


def test_negative_decay_is_refused():
    """It would push pruned weights away from zero."""
    with pytest.raises(UserError, match="model.compression.decay is -0.1; it must not be negative"):
        SRSTE("2:4", decay=-0.1)


@pytest.mark.parametrize(("kind", "wanted"), [("ste", [[1.0, 2, -1, 0.5]]), ("decayed", [[1.0, 1, -1, 0.25]])])
def test_mask_decay_by_hand(kind, wanted):
    """With beta 0.5, the weights and both gradients."""
    linear = at(decay := MaskDecay("2:4", "linear", gradient=kind, dense=0, hard=0.2), 4)
    assert decay.beta == 0.5
    torch.testing.assert_close(effective(linear), torch.tensor([[0.9, -0.1, 0.5, 0.05]]))
    torch.testing.assert_close(gradient(linear, G), torch.tensor(wanted), rtol=0, atol=0)


def test_decayed_gradient_equals_finite_difference(seed):
    """With its mask held fixed, `decayed` is the derivative of the layer's output."""
    weight, x = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    linear = at(MaskDecay("2:8", gradient="decayed", dense=0), 3, 20, weight)
    loss = lambda: (linear(x) ** 3).sum()
    loss().backward()
    numeric, step = torch.zeros_like(weight), 1e-6
    with torch.no_grad():
        for index in range(weight.numel()):
            values = []
            for sign in (1, -1):
                linear.weight.view(-1)[index] += sign * step
                values.append(loss())
                linear.weight.view(-1)[index] -= sign * step
            numeric.view(-1)[index] = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(linear.weight.grad, numeric, rtol=1e-5, atol=1e-6)  # central difference: error about step^2


def test_mask_decay_phases():
    """Dense, then beta from 1 down to about 0, then a fixed mask with beta 0."""
    for kind in ("linear", "exponential"):
        decay = MaskDecay("1:4", kind, dense=0.1, hard=0.2)
        linear, betas = layer(W, decay), []
        for step in range(101):
            decay.refresh(step, 100, None)
            betas.append(decay.beta)
            assert decay.holds == (step >= 80)
        t = torch.arange(70) / 70
        wanted = 1 - t if kind == "linear" else torch.exp(-math.log(1000) * t)
        assert betas[:10] == [1.0] * 10 and betas[80:] == [0.0] * 21
        assert betas[10:80] == pytest.approx(wanted.tolist(), abs=1e-6)
        assert torch.equal(linear.weight, torch.tensor([[0.9, 0, 0, 0]])), "pruned in the last phase"
        torch.testing.assert_close(gradient(linear, G), torch.tensor([[1.0, 0, 0, 0]]), rtol=0, atol=0)


def test_structure_frames_by_hand():
    """The patterns of both forms, from the first frame to the last."""
    names = lambda text, kind: [str(frame) for frame in frames(Pattern(0, *map(int, text.split(":"))), kind)]
    assert names("1:8", "stepwise") == ["7:8", "4:8", "2:8", "1:8"]
    assert names("2:8", "stepwise") == ["7:8", "4:8", "2:8"]
    assert names("1:16", "stepwise") == ["15:16", "8:16", "4:16", "2:16", "1:16"]
    assert names("2:4", "stepwise") == ["3:4", "2:4"] and names("3:4", "stepwise") == ["3:4"]
    assert names("1:8", "geometric") == ["8:64", "4:32", "2:16", "1:8"]


def test_structure_decay_tightens_in_equal_frames(seed):
    """Kept weights of each group by step, and the straight-through gradient; the last frame's pattern stays."""
    decay = StructureDecay("1:8", dense=0.1, hard=0.1)
    linear, kept = layer(torch.randn(2, 16), decay), []
    for step in range(51):
        decay.refresh(step, 50, None)
        kept.append(int(decay.masks["a.q_proj.weight"].view(-1, 8).sum(1).unique().item()))
    assert kept == [8] * 5 + [7] * 10 + [4] * 10 + [2] * 10 + [1] * 16
    assert int((linear.weight == 0).sum()) == 28


def test_masks_follow_the_weights_each_step(seed):
    """A pruned weight that grows takes the place of a kept one, and the flips are counted."""
    linear = at(rival := SRSTE("2:4", dense=0), 0)
    assert rival.metrics() == {"sparsity": 0.5, "mask_flips": 0.5}
    with torch.no_grad():
        linear.weight[0, 1] = -0.7
    rival.refresh(0, 10, None)
    assert torch.equal(effective(linear), torch.tensor([[0.9, 0, 0.5, 0]])), "not within an optimiser step"
    rival.refresh(1, 10, None)
    assert torch.equal(rival.masks["a.q_proj.weight"], mask_from_scores(linear.weight.abs(), Pattern(0.5, 2, 4)))
    assert torch.equal(effective(linear), torch.tensor([[0.9, -0.7, 0, 0]]))
    assert rival.metrics() == {"sparsity": 0.5, "mask_flips": 0.5} and rival.metrics()["mask_flips"] == 0


def test_srste_refuses_low_rank():
    """A low-rank addition has no entries to pull to zero."""
    with pytest.raises(UserError, match="lora_rank"):
        layer(W, SRSTE("2:4"), rank=2)
