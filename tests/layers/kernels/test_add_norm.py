"""The kernel of the residual stream, compared with torch operations."""

# M rows  D hidden  K partial sums

import pytest
import torch

pytest.importorskip("triton")

from trainkit.layers.kernels.add_norm import add_norm, add_norm_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off instead of rounding it
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def inputs(M, D, K, dtype):
    """A strided residual, strided parts, weight, and a strided tap."""
    residual = torch.randn(M, D + 8, device=DEVICE).to(dtype)[:, :D]
    parts = torch.randn(K, M, D + 4, device=DEVICE)[:, :, :D] if K else None
    return residual, parts, 1 + 0.3 * torch.randn(D, device=DEVICE).to(dtype), torch.empty(M, 3, D, device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M, D, K", [(1, 64, 0), (3, 100, 1), (5, 256, 4), (2, 5120, 2)])
def test_add_norm_equals_torch_operations(M, D, K, dtype, seed):
    """Residual and tap equal those of torch bit for bit; the norm differs by at most one rounding step."""
    residual, parts, weight, taps = inputs(M, D, K, dtype)
    expected, expected_tap = residual.clone(), torch.empty_like(residual)
    theirs = add_norm_eager(expected, parts, weight, 1e-5, expected_tap)
    normed = add_norm(residual, parts, weight, 1e-5, taps[:, 1])
    assert torch.equal(residual, expected) and torch.equal(taps[:, 1], expected_tap)
    assert normed.dtype == dtype
    # A sum in another order moves 1 / rms by a few 2^-24, which moves at most the last bit of a narrower result.
    step = max(torch.finfo(dtype).eps, 2**-20)
    assert ((normed.float() - theirs.float()).abs() <= step * theirs.float().abs() + 1e-9).all()


def test_add_norm_without_a_tap_leaves_the_rest_alone(seed):
    """Without parts the residual is unchanged; columns past its rows are never written."""
    residual = torch.randn(3, 40, device=DEVICE)
    before = residual.clone()
    weight = torch.ones(24, device=DEVICE)
    add_norm(residual[:, :24], None, weight, 1e-6)
    assert torch.equal(residual, before)
    add_norm(residual[:, :24], torch.ones(2, 3, 24, device=DEVICE), weight, 1e-6)
    assert torch.equal(residual[:, :24], before[:, :24] + 2) and torch.equal(residual[:, 24:], before[:, 24:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_norm_of_a_row_ignores_the_other_rows(dtype, seed):
    """A row computed alone is bitwise equal to the same row among others."""
    residual, parts, weight, _ = inputs(6, 200, 3, dtype)
    assert parts is not None
    alone = torch.cat([add_norm(residual[i : i + 1].clone(), parts[:, i : i + 1], weight, 1e-5) for i in range(6)])
    assert torch.equal(add_norm(residual, parts, weight, 1e-5), alone)
