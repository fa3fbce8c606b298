"""The kernel for products of few rows equals torch's product, and a row's result does not depend on the other rows."""

import pytest
import torch

from trainkit.compress.quantise import Grid, quantise
from trainkit.layers.kernels.few_rows import block_k, few_rows, few_rows_eager, splits, supports
from trainkit.layers.packed import VALUES, Packed, pack, plane

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def drawn(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(M, K, device=DEVICE, dtype=dtype), torch.randn(N, K, device=DEVICE, dtype=dtype) / K**0.5


def random_packed(N: int, K: int, bits: int, group: int | None, symmetric: bool = True) -> Packed:
    """A random matrix on a grid of whole numbers."""
    found = quantise(torch.randn(N, K, device=DEVICE) / K**0.5, Grid(bits, group, symmetric, scale_dtype=torch.bfloat16))
    return Packed.from_codes(found.codes_RK, found.scale_RG, found.zero_RG, bits)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@dtypes
@pytest.mark.parametrize(("N", "K"), [(96, 256), (70, 192), (33, 1024)])
def test_product_equals_torch(N, K, dtype, seed):
    """For 1 to 32 rows and sizes that the blocks do not divide."""
    for M in (1, 5, 16, 32):
        x, w = drawn(M, N, K, dtype)
        assert error(few_rows(x, w).sum(0), x.double() @ w.double().T) < 1e-6 * K**0.5


@dtypes
def test_gated_product_equals_torch(dtype, seed):
    """silu(gate) * up, rounded where a library's products round."""
    for M, half, K in ((1, 48, 256), (5, 40, 64), (19, 16, 128)):
        x, w = drawn(M, 2 * half, K, dtype)
        assert error(few_rows(x, w, silu=True), few_rows_eager(x, w, silu=True)) < (1e-3 if dtype == torch.float16 else 8e-3)


@dtypes
@pytest.mark.parametrize("kind", VALUES)
def test_packed_product_equals_that_of_the_dense_weight(kind, dtype, seed):
    """Products with packed weights equal those with the unpacked weights."""
    for M, N, K in ((1, 48, 256), (5, 40, 768), (17, 32, 1024)):
        x, w = drawn(M, N, K, dtype)
        packed = pack(w, kind)
        exact = x.double() @ packed.dense(torch.float64).T
        assert error(few_rows(x, packed).sum(0), exact) < 2e-5
        assert error(few_rows_eager(x, packed).sum(0), exact) < 2e-5
        assert error(few_rows(x, packed, silu=True), few_rows_eager(x, packed, silu=True)) < 8e-3


@dtypes
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, None), (8, 64), (8, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_and_zeros_equal_the_dense_weight(bits, group, symmetric, dtype, seed):
    """Products of quantised matrices with groups of any size and zero points equal those with the unpacked weights."""
    for M, N, K in ((1, 48, 256), (5, 40, 768)):
        x, packed = drawn(M, N, K, dtype)[0], random_packed(N, K, bits, group, symmetric)
        assert supports(packed)
        exact = x.double() @ packed.dense(torch.float64).T
        # float32 sums of codes up to 255 that cancel
        assert error(few_rows(x, packed).sum(0), exact) < 2e-5
        assert error(few_rows(x, packed, silu=True), few_rows_eager(x, packed, silu=True)) < 8e-3


@pytest.mark.parametrize("kind", ["dense", *VALUES])
def test_row_does_not_depend_on_the_other_rows(kind, seed):
    """A row computed alone is bitwise equal to the same row among 2 to 32 rows, at any index."""
    x, w = drawn(32, 48, 2048 if DEVICE == "cuda" else 512, DTYPES[-1])
    weight = w if kind == "dense" else pack(w, kind)
    alone = [few_rows(x[row : row + 1], weight)[:, 0] for row in range(8)]
    for M in (2, 5, 8, 16, 17, 32):
        together = few_rows(x[:M], weight)
        for row in range(min(M, 8)):
            assert torch.equal(together[:, row], alone[row])
    moved = few_rows(x[3:9].contiguous(), weight)
    assert torch.equal(moved[:, 2], alone[5])


@pytest.mark.gpu
def test_row_does_not_depend_on_the_other_rows_at_real_sizes(seed):
    """The same for the matrices of an 8B decoder in bfloat16."""
    for N, K, silu in ((6144, 4096, False), (28672, 4096, True), (4096, 14336, False), (128256, 4096, False)):
        x, w = drawn(32, N, K, torch.bfloat16)
        alone = few_rows(x[:1].contiguous(), w, silu)
        for M in (2, 5, 16, 17, 32):
            assert torch.equal(few_rows(x[:M].contiguous(), w, silu)[..., :1, :], alone)


@pytest.mark.parametrize("kind", VALUES)
def test_packing_keeps_what_its_kind_can_hold(kind, seed):
    """Rounding errors are at most half a step, and each kind has the stated number of bytes, for every plane width."""
    for K in (512, 768, 384) if kind != "int4" else (512, 1280, 384):
        w = torch.randn(24, K)
        packed = pack(w, kind)
        dense = packed.dense(torch.float32)
        assert packed.shape == (24, K) and plane(K, kind) in (16, 32, 64)
        assert abs(packed.nbytes / (2 * w.numel()) - {"int8": 0.5, "fp8": 0.5, "int4": 0.258}[kind]) < 0.006
        if kind == "fp8":
            assert ((dense - w).abs() <= w.abs() / 16 + 1e-3).all()
            continue
        group = 128 if kind == "int4" else K
        step = w.view(24, -1, group).abs().amax(-1) / (7 if kind == "int4" else 127)
        # bfloat16 scales may be 2^-9 too small, which moves the largest values by 7 of them
        assert ((dense - w).abs().view(24, -1, group) <= (0.52 if kind == "int4" else 0.501) * step[..., None]).all()
    with pytest.raises(ValueError, match="must be one of"):
        pack(w, "int3")


def test_sizes_that_the_kernel_covers():
    """Columns in multiples of 64 (int4: 128) are covered; parts divide K into whole steps."""
    assert supports(torch.empty(4, 576, dtype=torch.bfloat16)) and not supports(torch.empty(4, 96, dtype=torch.bfloat16))
    assert not supports(torch.empty(4, 576))
    assert block_k(14336) == 256 and block_k(576) == 64
    assert [splits(N, K) for N, K in ((6144, 4096), (4096, 4096), (4096, 14336), (128256, 4096))] == [2, 2, 2, 1]
    assert splits(4096, 14336, "int8") == 4 and splits(57344, 4096, silu=True) == 1
    with pytest.raises(ValueError, match="not a multiple of 128"):
        pack(torch.empty(2, 192), "int4")
