"""The kernel between projection and attention, compared with torch operations and with `Attention.projected`."""

# B batch  T positions  M rows  N columns  K partial sums  H query heads  G key-value heads  E head width  L layers

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from tests.support.models import SHAPE
from trainkit.layers.attention import Attention, rotary_table
from trainkit.layers.kernels.place import place, place_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off instead of rounding it
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def inputs(B, T, H, G, E, K, dtype, bias=True, norms=True):
    """The arguments of `place`, with strided parts, positions, slots and cache."""
    N = (H + 2 * G) * E
    cache = torch.randn(B, 3, 2 * G, 3 * T + 40, E, device=DEVICE).to(dtype)[:, 1]
    positions = torch.randint(0, 40, (B, 1), device=DEVICE) + torch.randint(0, 5, (1, 2 * T), device=DEVICE)
    slots = torch.stack([torch.randperm(cache.shape[2], device=DEVICE)[:T] for _ in range(B)])
    weights = [1 + 0.3 * torch.randn(E, device=DEVICE).to(dtype) if norms else None for _ in range(2)]
    rope = torch.randn(45, 2, E, device=DEVICE).to(dtype)
    parts = torch.randn(K, B * T, N + 8, device=DEVICE)[:, :, :N]
    bias = torch.randn(N, device=DEVICE).to(dtype) if bias else None
    return [parts, bias, *weights, 1e-5, rope, positions[:, ::2], slots, cache]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias, norms", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("B, T, H, G, E, K", [(1, 1, 4, 2, 64, 1), (3, 2, 3, 1, 24, 4), (2, 3, 8, 2, 128, 2)])
def test_place_equals_torch_operations(B, T, H, G, E, K, bias, norms, dtype, seed):
    """Queries and the whole cache equal those of torch: bit for bit in 16 bits without norms, otherwise up to rounding."""
    arguments = inputs(B, T, H, G, E, K, dtype, bias, norms)
    theirs = arguments[:-1] + [arguments[-1].clone()]
    expected, q = place_eager(*theirs), place(*arguments)
    assert q.dtype == dtype and q.shape == (B, T, H, E)
    for ours, torchs in ((q, expected), (arguments[-1], theirs[-1])):
        if dtype != torch.float32 and not norms:
            assert torch.equal(ours, torchs)
        # float32: the compiler may fuse a product and a sum. Norms: a sum in another order may move a value by one step before
        # it is multiplied by a cosine or sine.
        bound = 4 * max(torch.finfo(dtype).eps, 2**-20) * torchs.float().abs().max()
        assert ((ours.float() - torchs.float()).abs() <= bound).all()


@pytest.mark.parametrize("norms", [False, True])
def test_place_of_a_product_equals_attention(norms, seed):
    """With the finished product as its one part it writes what `Attention.projected` returns."""
    shape = replace(SHAPE, qkv_bias=True, qk_norm=norms)
    attention = Attention(shape).to(DEVICE)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    H, G, E = shape.num_heads, shape.num_kv_heads, shape.head_dim
    x, positions = torch.randn(2, 5, shape.hidden_size, device=DEVICE), torch.arange(3, 8, device=DEVICE).expand(2, -1)
    rope = rotary_table(shape, 16).to(DEVICE)
    cache = torch.zeros(2, 2 * G, 16, E, device=DEVICE)
    weights = [attention.q_norm.weight, attention.k_norm.weight] if norms else [None, None]
    with torch.no_grad():
        qk, v = attention.projected(x, rope[positions])
        product = attention.qkv(x).flatten(0, 1)[None]
        q = place(product, None, *weights, shape.norm_eps, rope, positions, positions, cache)
    assert torch.allclose(q, qk[:, :, :H], atol=1e-5)
    assert torch.allclose(cache[:, :, 3:8], torch.cat([qk[:, :, H:], v], dim=2).transpose(1, 2), atol=1e-5)
    assert not cache[:, :, :3].any() and not cache[:, :, 8:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_place_of_a_row_ignores_the_other_rows(dtype, seed):
    """A row computed alone is bitwise equal to the same row among others."""
    arguments = inputs(2, 3, 4, 2, 48, 2, dtype)
    parts, *fixed, positions, slots, cache = arguments
    alone = cache.clone()
    for b in range(2):
        for t in range(3):
            row, at = parts[:, 3 * b + t :][:, :1], (slice(b, b + 1), slice(t, t + 1))
            q = place(row, *fixed, positions[at], slots[at], alone[b : b + 1])
            assert torch.equal(q[0, 0], place(*arguments)[b, t])
    assert torch.equal(alone, cache)
