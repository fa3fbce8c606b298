from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.lifecycle.forward import quantize as reference_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from tests.support.layers import WEIGHT_RK, error
from trainkit.compress.quantise import Grid, Quantised, quantise
from trainkit.errors import UserError

GRIDS = [Grid(8), Grid(4, 8), Grid(8, 16), Grid(4, 8, symmetric=False), Grid(8, None, symmetric=False), Grid(8, kind="float")]


def test_rounding_to_nearest_is_as_computed_by_hand() -> None:
    """Codes of 4 bits in groups of 4, and their error."""
    quantised = quantise(WEIGHT_RK, Grid(4, 4, scale_dtype=torch.float64))
    # fmt: off
    codes_RK = [
        [-7, 7, 1, -4, -7, -6, -3, 7], [3, 5, -8, 0, -8, 5, -4, -4], [-4, 4, 7, -3, -1, -1, 7, 5], [5, 2, 3, -7, 2, 7, -6, -8],
    ]
    # fmt: on
    assert quantised.codes_RK.tolist() == codes_RK and quantised.codes_RK.dtype == torch.int8
    assert error(quantised.dense(torch.float64)) == pytest.approx(2.594250, abs=1e-6)


@pytest.mark.parametrize(
    ("grid", "scale", "zero", "codes"),
    [
        (Grid(4, rule="half"), 1.0, None, [7, -8, 0, 2, -2, 0]),  # 7.5 is out of range, halves go to the even code
        (Grid(4, rule="full"), 7.5 / 7, None, [7, -7, 0, 1, -2, 0]),
        (Grid(8, rule="half"), 7.5 / 127.5, None, [127, -128, 8, 26, -42, 0]),
        (Grid(8, rule="full"), 7.5 / 127, None, [127, -127, 8, 25, -42, 0]),
        (Grid(4, symmetric=False), 1.0, 0, [7, -8, 0, 2, -2, 0]),
        (Grid(8, kind="float"), 7.5 / 448, None, [448, -448, 30, 88, -144, 0]),
    ],
)
def test_grids_are_as_computed_by_hand(grid: Grid, scale: float, zero: int | None, codes: list[float]) -> None:
    """Scale, zero point and codes of one output with extremes of plus and minus 7.5."""
    quantised = quantise(torch.tensor([[7.5, -7.5, 0.5, 1.5, -2.5, 0.0]]), grid)
    assert float(quantised.scale_RG) == pytest.approx(scale, rel=1e-6)
    assert quantised.zero_RG is None if zero is None else float(quantised.zero_RG) == zero  # type: ignore[arg-type]
    assert quantised.codes_RK.float().tolist() == [codes]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_those_of_compressed_tensors(grid: Grid, dtype: torch.dtype, seed: int) -> None:
    """Scales to rounding and, by our scales, the codes and dense weights that the library computes."""
    weight_RK = torch.randn(6, 32) * torch.rand(6, 1)
    arguments = QuantizationArgs(
        num_bits=grid.bits,
        type=QuantizationType(grid.kind),
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.GROUP if grid.group else QuantizationStrategy.CHANNEL,
        group_size=grid.group,
    )
    grouped = weight_RK.view(6, -1, grid.group or 32)
    scale_RG, zero_RG = calculate_qparams(grouped.amin(2), grouped.amax(2), arguments)
    stored = Grid(grid.bits, grid.group, grid.symmetric, grid.kind, scale_dtype=dtype)
    quantised = quantise(weight_RK, stored)
    assert torch.equal(quantised.scale_RG, scale_RG.to(dtype))
    if quantised.zero_RG is not None and dtype == torch.float32:
        assert torch.equal(quantised.zero_RG, zero_RG.round().to(torch.int8))
    ours = quantised.scale_RG.float(), None if quantised.zero_RG is None else quantised.zero_RG.float()
    codes_RK = reference_quantize(weight_RK, ours[0], ours[1], arguments)  # type: ignore[arg-type]
    assert torch.equal(quantised.codes_RK.float(), codes_RK.float())
    dense_RK = dequantize(quantised.codes_RK, quantised.scale_RG, quantised.zero_RG, arguments)
    assert torch.equal(quantised.dense(dtype), dense_RK.to(dtype)) and dense_RK.dtype == dtype


def test_float8_codes_are_torchs_own_casting(seed: int) -> None:
    """Codes are the weights over the scale, cast by torch; nothing is out of its range."""
    weight_RK = torch.randn(4, 64)
    quantised = quantise(weight_RK, Grid(8, kind="float"))
    scaled_RK = weight_RK / quantised.scale_RG
    assert torch.equal(
        quantised.codes_RK.view(torch.uint8), scaled_RK.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    )
    assert torch.isfinite(quantised.dense(torch.float32)).all()


@pytest.mark.parametrize("grid", [*GRIDS, Grid(4, 8, rule="full")], ids=str)
def test_a_rounded_weight_is_off_by_half_a_step(grid: Grid, seed: int) -> None:
    """At most half a scale from the weight, a whole one where the rule clips or shifts; float8 by 1/16 of its magnitude."""
    weight_RK = torch.randn(5, 32)
    quantised = quantise(weight_RK, grid)
    step_RK = grid.spread(quantised.scale_RG, 32)
    change_RK = (quantised.dense(torch.float32) - weight_RK).abs()
    if grid.kind == "float":
        assert (change_RK <= weight_RK.abs() / 16 + step_RK * 2**-9).all()
    else:
        assert (change_RK <= step_RK * (0.501 if grid.rule == "full" else 1.001)).all()


@pytest.mark.parametrize(
    "grid", [Grid(4, 8), Grid(4, 8, symmetric=False), Grid(8), Grid(4, 8, rule="full", scale_dtype=torch.bfloat16)], ids=str
)
def test_a_searched_scale_has_the_least_error(grid: Grid, seed: int) -> None:
    """Of all shrunk ranges, each group has the one of least weighted error: none that was not searched is better."""
    weight_RK, importance_K = torch.randn(5, 32, dtype=torch.float64), torch.rand(32, dtype=torch.float64) + 0.01

    def lost(quantised: Quantised, weights_K: torch.Tensor | None) -> torch.Tensor:
        square_RK = (quantised.dense(torch.float64) - weight_RK).square() * (1 if weights_K is None else weights_K)
        return square_RK.view(5, -1, grid.group or 32).sum(2)

    factors = torch.linspace(1, 0.5 if grid.bits == 4 else 0.85, 20).tolist()
    for weights_K in (None, importance_K):
        errors = [lost(quantise(weight_RK, grid, *grid.scales(weight_RK * factor)), weights_K) for factor in factors]
        searched = quantise(weight_RK, grid, *replace(grid, search=True).scales(weight_RK, weights_K))
        torch.testing.assert_close(lost(searched, weights_K), torch.stack(errors).amin(0))


def test_zeros_are_exact_and_groups_of_zeros_harmless(seed: int) -> None:
    """A pruned weight stays zero under every grid, also where a whole group is zero."""
    weight_RK = torch.randn(4, 32) * (torch.rand(4, 32) < 0.5)
    weight_RK[1, 8:16] = 0
    weight_RK[2] = 0
    for grid in GRIDS:
        dense_RK = quantise(weight_RK, grid).dense(torch.bfloat16)
        assert torch.isfinite(dense_RK).all() and (dense_RK[weight_RK == 0] == 0).all()


def test_a_group_that_does_not_divide_is_refused() -> None:
    """The line names the tensor; one scale per output fits every matrix."""
    with pytest.raises(UserError, match=r"--group 128: model\.x has 192 inputs, not a multiple of it"):
        Grid(4, 128).check(192, "model.x")
    Grid(8).check(191, "model.x")
