"""Quantisers with straight-through gradients: the worked example, learned scales, and the codes that are exported."""

import pytest
import torch

from tests.support.compressed_layers import effective, gradient, layer
from trainkit.compress.quantise import Grid
from trainkit.errors import UserError
from trainkit.modules.compression.quantised import QuantAware, _Rounded

W = torch.tensor([[0.9, -0.31, 0.5, 0.07]])


def test_rounding_and_both_gradients_by_hand():
    """Codes 7 -3 4 1 of scale 0.12; the first weight is clipped: no gradient to it, 7 to the scale."""
    grid = Grid(4, rule="full")
    weight, scale = W.clone().requires_grad_(), torch.tensor([[0.12]], requires_grad=True)
    rounded = _Rounded.apply(weight, scale, grid)
    torch.testing.assert_close(rounded, torch.tensor([[0.84, -0.36, 0.48, 0.12]]))
    wanted = [7, -0.416667, -0.166667, 0.416667]
    for index, value in enumerate(wanted):
        (to_weight, to_scale) = torch.autograd.grad(rounded[0, index], (weight, scale), retain_graph=True)
        one = torch.zeros(1, 4)
        one[0, index] = float(index > 0)
        torch.testing.assert_close(to_weight, one)
        torch.testing.assert_close(to_scale, torch.tensor([[value / (4 * 7) ** 0.5]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_minmax_scales_clip_no_gradient(bits, dtype, seed):
    """The whole gradient passes, also at the extremes and with scales rounded to their storage dtype."""
    linear = layer(torch.randn(5, 64), QuantAware(bits, 32, scale_dtype=dtype))
    g = torch.randn(5, 64)
    assert torch.equal(gradient(linear, g), g)


@pytest.mark.parametrize("group", [0, -32])
def test_group_below_one_is_refused(group):
    """A negative divisor of the inputs would pass the check of sizes and fail in the first step; 0 would mean the default."""
    with pytest.raises(UserError, match=f"model.compression.group is {group}; it must be at least 1"):
        QuantAware(4, group)


@pytest.mark.parametrize("scales", ["minmax", "learned"])
def test_codes_of_export_equal_those_of_training(scales, seed):
    """Codes and scales to export give, bit for bit, the weight of the training forward pass."""
    compression = QuantAware(4, 8, scales=scales)
    linear = layer(torch.randn(6, 32), compression)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.02)
    for step in range(3):
        compression.refresh(step, None, optimizer)
        (linear(torch.randn(9, 32)) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    compression.refresh(3, None, optimizer)
    finished = compression.finished("a.q_proj.weight", linear.weight.detach(), getattr(linear, "scale", None))
    assert finished.scale_RG.dtype == torch.bfloat16 and finished.codes_RK.unique().numel() > 8
    assert torch.equal(finished.dense(torch.float32), linear.transform(linear.merged()))
    assert torch.equal(finished.dense(torch.float32), effective(linear)), "one product per output: no rounding by a sum"


def test_scales_are_taken_once_per_optimiser_step(seed):
    """Within a step the scale stays, after it the scale follows the weights."""
    linear = layer(W, compression := QuantAware(8, scale_dtype="float32"))
    compression.refresh(0, None, None)
    before = effective(linear)
    with torch.no_grad():
        linear.weight[0, 0] = 1.8
    assert effective(linear)[0, 0] == before[0, 0]  # clipped by the old scale
    compression.refresh(1, None, None)
    assert float(effective(linear).detach()[0, 0]) == pytest.approx(1.8)


def test_learned_scales_train_and_stay_positive(seed):
    """They start at the min-max scales, move, and never reach zero; they are vectors, which have no weight decay."""
    linear = layer(torch.randn(4, 16), compression := QuantAware(4, 8, "learned", "float32"))
    start = linear.scale.detach().clone()
    assert torch.equal(start.view(4, 2), Grid(4, 8, rule="full").scales(linear.weight.detach())[0])
    optimizer = torch.optim.SGD([linear.scale], lr=0.1)
    effective(linear).square().sum().backward()
    optimizer.step()
    assert linear.scale.dim() == 1 and not torch.equal(start, linear.scale)
    with torch.no_grad():
        linear.scale.fill_(-1.0)
    assert bool((compression.finished("a.q_proj.weight", linear.weight, linear.scale).scale_RG > 0).all())


def test_kept_zeros_stay_zero(seed):
    """Zeros of the folder have code 0, whatever their weight becomes in training."""
    weight = torch.randn(4, 16)
    weight[:, ::2] = 0
    linear = layer(weight, compression := QuantAware(4, 8, keep_zeros=True))
    with torch.no_grad():
        linear.weight += 1
    compression.refresh(1, None, None)
    assert bool((effective(linear)[:, ::2] == 0).all()) and bool((gradient(linear, torch.ones(4, 16))[:, ::2] == 0).all())
    assert int((compression.finished("a.q_proj.weight", linear.weight).codes_RK[:, ::2] != 0).sum()) == 0


def test_group_that_does_not_divide_is_refused():
    """One line names the weight and the remedy."""
    with pytest.raises(UserError, match=r"a\.q_proj\.weight has 4 inputs, not a multiple of 3; take another group size"):
        layer(W, QuantAware(4, 3))
