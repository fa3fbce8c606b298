"""The product for few rows equals `F.linear`, is used where it should be, and never while gradients are enabled."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.equality import compare
from tests.support.models import SHAPE, pair, ragged_prompts, random_decoder
from trainkit.layers import linear
from trainkit.layers.linear import FEW_ROWS, Linear, project, stream_weights
from trainkit.runner.sampling import Sampling


@pytest.mark.parametrize("rows", [1, 2, 3, 5, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_streamed_product_equals_linear(rows, bias, seed):
    """The product for few rows equals `F.linear`."""
    x, weight = torch.randn(1, rows, 24), torch.randn(40, 24)
    added = torch.randn(40) if bias else None
    with torch.inference_mode():
        streamed, reference = project(x, weight, added, True), F.linear(x.double(), weight.double(), None).float()
    reference = reference if added is None else reference + added
    assert streamed.shape == (1, rows, 40) and streamed.is_contiguous()
    # two float32 sums of 24 products in different orders
    torch.testing.assert_close(streamed, reference, rtol=1e-5, atol=1e-5)


def test_gradients_use_the_ordinary_product(seed, monkeypatch):
    """While gradients are computed the ordinary product is used."""
    layer = Linear(6, 4)
    layer.streams = True
    monkeypatch.setattr(torch, "mm", lambda *_: pytest.fail("streamed under autograd"))
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad is not None


def test_streaming_needs_float32_weights_beyond_cache(monkeypatch):
    """Only float32 weights larger than the cache are streamed."""
    decoder = random_decoder(SHAPE)
    stream_weights(decoder)
    assert not decoder.streams and not decoder.layers[0].mlp.down.streams
    monkeypatch.setattr(linear, "CACHE_BYTES", 1000)
    stream_weights(decoder)
    assert decoder.streams and decoder.layers[0].mlp.down.streams and decoder.layers[1].attention.qkv.streams
    stream_weights(decoder.to(torch.bfloat16))
    assert not decoder.streams


def test_streamed_decoder_generates_the_same_tokens(monkeypatch, seed):
    """A decoder with streamed weights generates the same tokens."""
    runner, prompts = pair(noise=0.03), ragged_prompts(6)
    plain = runner.generate(prompts, max_new_tokens=24, temperature=0.7, depth=0)
    monkeypatch.setattr(linear, "CACHE_BYTES", 0)
    stream_weights(runner.rounds.target, runner.drafter)
    drafted = runner.generate(prompts, max_new_tokens=24, temperature=0.7, depth=3)
    mine, theirs = [out.tokens for out in drafted], [out.tokens for out in plain]
    assert len(compare(runner.rounds.target, prompts, mine, theirs, Sampling(0.7))) <= 1
