"""A CPU's products with packed weights equal the dense ones to bfloat16, in the stored bytes, each row by itself."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.support.models import SHAPE, random_decoder
from trainkit.compress.quantise import Grid, quantise
from trainkit.eval.bench.identity import TIE, logits, tie_tolerance
from trainkit.layers.linear import HAS_KERNELS, Linear, block_weights
from trainkit.layers.packed import Packed
from trainkit.layers.packed_cpu import OnCPU
from trainkit.layers.visible import Visible

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="these products are for x86 processors with AVX2")
COVERED = [Grid(8), Grid(8, scale_dtype=torch.bfloat16), Grid(4, 32), Grid(4, 64), Grid(4), Grid(4, 96)]
OTHERS = [Grid(8, 32), Grid(8, None, False), Grid(4, 32, False), Grid(4, 16), Grid(8, kind="float")]


def packed_layer(grid: Grid, N: int = 48, K: int = 192, bias: bool = False) -> tuple[Linear, torch.Tensor]:
    """A layer with a random weight on a grid, as a runner holds it, and the dense weight."""
    layer = Linear(K, N, bias=bias).requires_grad_(False)
    found = quantise(layer.weight, grid)
    layer.set_packed(Packed.from_codes(found.codes_RK, found.scale_RG, found.zero_RG, grid.bits, grid.kind))
    block_weights(layer)
    return layer, found.dense(torch.float32)


@pytest.mark.parametrize("grid", COVERED, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_product_equals_the_dense_one(grid, bias, seed):
    """To the rounding of inputs and results to bfloat16, with one row and many, in float32 and bfloat16."""
    layer, weight = packed_layer(grid, bias=bias)
    assert isinstance(layer.packed, OnCPU)
    for rows in ((1,), (2, 3), (1, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(*rows, 192).to(dtype)
            with torch.inference_mode():
                y = layer.to(dtype)(x)
            exact = x.double() @ weight.double().T + (layer.bias.double() if bias else 0)
            assert y.shape == (*rows, 48) and y.dtype == dtype
            # bfloat16 has a relative error of up to 2^-8 in inputs, scales, products and, with it, biases and results
            assert float((y.double() - exact).norm() / exact.norm()) < 5e-3


@pytest.mark.parametrize("grid", COVERED, ids=str)
def test_packed_product_holds_the_stored_bytes(grid, seed):
    """A weight's bits, and at most 4 bytes for the scale of each group; unpacked, it is the stored weight."""
    layer, weight = packed_layer(grid)
    assert isinstance(layer.packed, OnCPU) and layer.weight.numel() == 0
    groups = 192 // (grid.group or 192)
    if grid.bits == 8:
        assert layer.packed.nbytes == 48 * (192 + 2)
    else:  # torch's groups are powers of two
        own = next(size for size in (256, 128, 64, 32) if (192 // groups) % size == 0)
        assert layer.packed.nbytes == 48 * (192 // 2 + 4 * 192 // own)
    # an int8 scale is exact; int4 scales are rounded to bfloat16
    torch.testing.assert_close(layer.packed.dense(torch.float32), weight, atol=0, rtol=2**-22 if grid.bits == 8 else 2**-8)
    with torch.inference_mode():
        x = torch.randn(3, 192)
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("grid", COVERED[1:4], ids=str)
@pytest.mark.parametrize(("N", "K"), [(48, 192), (960, 576), (576, 1536)])
def test_row_does_not_depend_on_the_other_rows(grid, N, K, seed):
    """A row alone is bitwise equal to the same row among 2 to 32 rows, and among 300."""
    layer, _ = packed_layer(grid, N, K)
    x = torch.randn(300, K)
    with torch.inference_mode():
        alone = torch.cat([layer(row[None]) for row in x[:32]])
        for M in (*range(2, 33), 300):
            assert torch.equal(layer(x[:M])[:32], alone[:M])


@pytest.mark.parametrize("grid", OTHERS, ids=str)
def test_other_grids_become_dense(grid, seed):
    """Weights for which torch has no product are unpacked once, exactly."""
    layer, weight = packed_layer(grid)
    assert layer.packed is None and torch.equal(layer.weight, weight)
    if grid.bits == 4:
        few = packed_layer(Grid(4, 32), N=24)[0]  # rows are not a multiple of 16
        assert few.packed is None


def test_gradients_are_refused(seed):
    """A packed product would silently stop a gradient, so it raises."""
    layer, _ = packed_layer(Grid(8))
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, 192, requires_grad=True))


def test_step_bytes_count_packed_weights(seed):
    """Bytes of a decoding step follow the stored weights, and a second runner keeps their layout."""
    decoder = random_decoder(SHAPE)
    before = decoder.step_bytes()
    layer = decoder.layers[0].mlp.down
    found = quantise(layer.weight, Grid(8, scale_dtype=torch.bfloat16))
    layer.set_packed(Packed.from_codes(found.codes_RK, found.scale_RG, None, 8))
    block_weights(decoder)
    held = layer.packed
    block_weights(decoder)
    assert layer.packed is held and isinstance(held, OnCPU)
    assert before - decoder.step_bytes() == 3 * 32 * 48 - 2 * 32


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 32)], ids=str)
def test_round_has_the_bits_of_one_by_one(grid, seed):
    """Several positions of two texts in one call give, bit for bit, the hidden states of positions that are read one by one."""
    decoder = random_decoder(replace(SHAPE, hidden_size=64, intermediate_size=128, num_heads=4, head_dim=16))
    for part in decoder.modules():
        if isinstance(part, Linear):
            found = quantise(part.weight, grid)
            part.set_packed(Packed.from_codes(found.codes_RK, found.scale_RG, None, grid.bits))
    block_weights(decoder)
    decoder.reserve_positions(256)
    tokens_BT = torch.randint(SHAPE.vocab_size, (2, 160))
    caches = [decoder.new_cache(2, 256, torch.device("cpu"), torch.float32) for _ in range(2)]

    def read(cache: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        positions_BT = torch.arange(start, stop).expand(2, -1)
        span = -(-stop // 64) * 64  # as the session rounds it
        seen = Visible.causal(positions_BT)
        return decoder(tokens_BT[:, start:stop], positions_BT, seen, cache, positions_BT, span=span)[0]

    with torch.inference_mode():
        for cache in caches:
            read(cache, 0, 100)
        for start, T in ((100, 2), (102, 5), (107, 16), (123, 8)):
            one_by_one = torch.cat([read(caches[0], at, at + 1) for at in range(start, start + T)], dim=1)
            assert torch.equal(read(caches[1], start, start + T), one_by_one)
            assert torch.equal(*caches)


def test_bench_tolerates_the_rounding_of_packed_products(seed):
    """Texts of the same weights in float32 may differ by what the products round, and not by more."""
    decoder, text = random_decoder(replace(SHAPE, hidden_size=64)), list(range(30))
    assert tie_tolerance(decoder, text) == TIE
    for part in decoder.modules():
        if isinstance(part, Linear):
            found = quantise(part.weight, Grid(8))
            part.set_packed(Packed.from_codes(found.codes_RK, found.scale_RG, None, 8))
    dense = logits(copy.deepcopy(decoder), text)
    block_weights(decoder)
    difference = float((logits(decoder, text) - dense).abs().max())
    # the copy's scales are exact to float32
    assert tie_tolerance(decoder, text) == pytest.approx(4 * difference, rel=1e-2) and difference > TIE
    assert all(part.packed is not None for part in decoder.modules() if isinstance(part, Linear))
