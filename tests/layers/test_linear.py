"""The product from blocked weights equals `F.linear`, follows the weight, and is never used while gradients are enabled."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.equality import compare
from tests.support.models import SHAPE, pair, ragged_prompts, random_decoder
from trainkit.layers import linear
from trainkit.layers.linear import HAS_KERNELS, Blocked, Linear, block_weights, project
from trainkit.runner.sampling import Sampling

pytestmark = pytest.mark.skipif(not HAS_KERNELS, reason="blocked weights are for x86 processors with AVX2")


@pytest.fixture(autouse=True)
def block_small(monkeypatch):
    """Small weights are blocked too."""
    monkeypatch.setattr(linear, "SMALLEST", 0)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16])
def test_blocked_product_equals_linear(rows, bias, values, seed):
    """The blocked product equals `F.linear`, by oneDNN and, for values that 16 bits hold, by FBGEMM."""
    x, weight = torch.randn(1, rows, 24), torch.randn(40, 24).to(values).float()
    added = torch.randn(40) if bias else None
    with torch.inference_mode():
        product, reference = project(x, weight, added, Blocked()), F.linear(x.double(), weight.double(), None).float()
    reference = reference if added is None else reference + added
    assert product.shape == (1, rows, 40) and product.is_contiguous()
    # two float32 sums of 24 products in different orders
    torch.testing.assert_close(product, reference, rtol=1e-5, atol=1e-5)


def test_weights_are_never_rounded(seed):
    """Products with unit vectors are the weight's entries, bit for bit, whatever their range; float16 holds most of them."""
    taken = 0
    for low in (-6, -16, -24, -40, -120):
        weight = (torch.randn(64, 48) * torch.randint(low, 3, (64, 48)).exp2()).bfloat16().float()
        blocked = Blocked()
        with torch.inference_mode():
            assert torch.equal(project(torch.eye(48), weight, None, blocked).T, weight)
        taken += blocked._factor > 0
    assert taken >= 2 or torch.backends.quantized.engine not in ("fbgemm", "x86")
    for weight in (torch.zeros(8, 8), torch.full((8, 8), 1e-42), torch.full((8, 8), 3e38)):
        with torch.inference_mode():
            assert torch.equal(project(torch.eye(8), weight, None, Blocked()), weight)


def test_blocked_product_follows_the_weight(seed):
    """A weight changed in place, or replaced, is blocked again; so is that of a copied module."""
    layer, x = Linear(24, 40, bias=False), torch.randn(3, 24)
    layer.blocked = Blocked()
    with torch.inference_mode():
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-5, atol=1e-5)
        other = copy.deepcopy(layer)
        other.weight.mul_(2)
        torch.testing.assert_close(other(x), F.linear(x, layer.weight) * 2, rtol=1e-5, atol=1e-5)
        layer.weight = nn.Parameter(torch.randn(40, 24))
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=1e-5, atol=1e-5)


def test_gradients_use_the_ordinary_product(seed, monkeypatch):
    """While gradients are computed the ordinary product is used."""
    layer = Linear(6, 4)
    layer.blocked = Blocked()
    monkeypatch.setattr(Blocked, "product", lambda *_: pytest.fail("blocked under autograd"))
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad is not None


def test_blocking_depends_on_dtype_and_size(monkeypatch):
    """Networks in float64 and large ones keep a single copy; a second runner keeps the blocks of the first."""
    decoder = random_decoder(SHAPE)
    block_weights(decoder)
    first = decoder.layers[1].attention.qkv.blocked
    assert first and decoder.blocked and decoder.layers[0].mlp.down.blocked is not first
    block_weights(decoder)
    assert decoder.layers[1].attention.qkv.blocked is first
    block_weights(decoder.double())
    assert not decoder.blocked and not decoder.layers[0].mlp.down.blocked
    monkeypatch.setattr(linear, "MOST_BYTES", 1000)
    block_weights(decoder.float())
    assert not decoder.blocked


def test_blocked_decoder_generates_the_same_tokens(monkeypatch, seed):
    """A runner with blocked weights generates the tokens of one without."""
    runner, prompts = pair(noise=0.03), ragged_prompts(6)
    drafted = runner.generate(prompts, max_new_tokens=24, temperature=0.7, depth=3)
    monkeypatch.setattr(linear, "SMALLEST", 1 << 30)
    plain = runner.generate(prompts, max_new_tokens=24, temperature=0.7, depth=0)
    mine, theirs = [out.tokens for out in drafted], [out.tokens for out in plain]
    assert len(compare(runner.rounds.target, prompts, mine, theirs, Sampling(0.7))) <= 1
