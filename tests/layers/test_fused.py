"""Layers in kernels compute what PyTorch's do, and in 16 bits a chain's texts are plain decoding's to the last token."""

from dataclasses import replace

import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.models import SHAPE, SIBLINGS, noisy_16_bit_pair, pair, random_decoder
from trainkit.layers import kernels
from trainkit.layers.blocks import Decoder
from trainkit.layers.shape import DecoderShape
from trainkit.layers.visible import Visible
from trainkit.runner import DynamicTree, Runner
from trainkit.runner.sampling import Sampling

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
WIDE = DecoderShape(96, 64, 128, 2, 4, 2, 16, max_positions=512)


def both(decoder: Decoder, forward, monkeypatch) -> list[torch.Tensor]:
    """The results of `forward` in kernels and in PyTorch from the same cache, and the caches after it."""
    B, slots = 2, 40
    decoder.reserve_positions(slots)
    weight = decoder.embed.weight
    before = torch.randn(B, decoder.shape.num_layers, 2 * decoder.shape.num_kv_heads, slots, decoder.shape.head_dim)
    results = []
    for use_kernels in (True, False):
        monkeypatch.setattr(kernels, "available", lambda like, use=use_kernels: use)
        cache = before.to(weight).clone()
        with torch.inference_mode():
            results.append([*forward(decoder, cache), cache])
    return results


@pytest.mark.parametrize("packed", ["", "int8", "fp8", "int4"])
@pytest.mark.parametrize(
    "more",
    [{}, {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True, "tied": False}],
    ids=["llama", "biases-and-norms"],
)
def test_decoder_in_kernels_equals_pytorch(more, packed, monkeypatch, seed):
    """Hidden states, taps, logits and cache of chains and trees agree, in float32 to rounding and in 16 bits to theirs."""
    shape = replace(WIDE, intermediate_size=128, hidden_size=128, **more)
    for dtype, bar in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
        decoder = random_decoder(shape, 0.15).to(device=DEVICE, dtype=dtype)
        for layer in decoder.layers if packed else ():
            for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
                if packed != "int4" or linear.in_features % 128 == 0:
                    linear.pack(packed)
        first = torch.tensor([5, 19], device=DEVICE)
        bits = torch.tensor([[[1], [3], [5]]], device=DEVICE)
        for visible in (Visible(first.int()), Visible(first.int(), bits)):
            tokens = torch.randint(96, (2, 3), device=DEVICE)
            depths = torch.tensor([0, 1, 1] if visible.bits_BTW is not None else [0, 1, 2], device=DEVICE)
            slots = first[:, None] + torch.arange(3, device=DEVICE)

            def forward(decoder, cache, tokens=tokens, visible=visible, at=first[:, None] + depths, slots=slots):
                hidden, taps = decoder(tokens, at, visible, cache, slots, taps=(0, 2, 1), span=40)
                return hidden, taps, decoder.head(hidden).float()

            ours, theirs = both(decoder, forward, monkeypatch)
            for a, b in zip(ours, theirs, strict=True):
                assert float((a.double() - b.double()).norm() / b.double().norm()) < bar


@pytest.mark.parametrize(
    "shaped", [{"depth": 2}, {"tree": SIBLINGS}, {"tree": DynamicTree(2, 2, 4)}], ids="chain tree dynamic".split()
)
def test_runner_in_kernels_decodes_the_same(shaped, monkeypatch, seed):
    """In float32 the texts are those of PyTorch's layers, whatever is drafted."""
    shape = replace(SHAPE, head_dim=16, num_layers=1)
    base, prompts = pair(shape, max_batch=2, ends=(), max_len=24), [[3], [5, 9, 2]]
    assert base.drafter is not None
    runner = Runner(base.rounds.target.to(DEVICE), base.drafter.to(DEVICE), base.shape, None, 2, 24, capture=False)
    options = {"max_new_tokens": 4, "temperature": 0.7, "seed": seed} | shaped
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "available", lambda like: False)
        expected = [out.tokens for out in runner.generate(prompts, **options)]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "INTERPRET", True)
        texts = [out.tokens for out in runner.generate(prompts, **options)]
    assert_few(compare(runner.rounds.target, prompts, texts, expected, Sampling(0.7), seed), 8)


def test_16_bit_rows_do_not_depend_on_the_other_rows(monkeypatch, seed):
    """Hidden states, logits and cache of a chain equal, bit for bit, those of one token after the other, alone in the batch."""
    monkeypatch.setattr(kernels, "INTERPRET", True)
    shape = noisy_16_bit_pair(DEVICE, torch.float16).rounds.target.shape
    T = 5 if ON_GPU else 3
    for dtype in (torch.float16, torch.bfloat16) if ON_GPU else (torch.float16,):
        decoder = random_decoder(shape, 0.1).to(device=DEVICE, dtype=dtype)
        decoder.reserve_positions(400)
        before = decoder.new_cache(3, 400 if ON_GPU else 80, DEVICE, dtype).normal_()
        first = torch.tensor([70, 3, 61] if not ON_GPU else [70, 3, 390], device=DEVICE)
        tokens, caches = torch.randint(shape.vocab_size, (3, T), device=DEVICE), (before.clone(), before.clone())
        slots = first[:, None] + torch.arange(T, device=DEVICE)
        with torch.inference_mode():
            together, _ = decoder(tokens, slots, Visible.causal(slots), caches[0], slots)
            logits = decoder.head(together)
            for t in range(T):
                at, own = slots[:1, t : t + 1], caches[1][:1]
                alone, _ = decoder(tokens[:1, t : t + 1], at, Visible.causal(at), own, at)
                assert torch.equal(alone, together[:1, t : t + 1])
                assert torch.equal(decoder.head(alone), logits[:1, t : t + 1])
        assert torch.equal(caches[0][0], caches[1][0])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3, 6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_16_bit_chain_equals_plain_decoding(temperature, batch, seed):
    """Texts are equal to the last token, although the likeliest tokens have close scores, in batches of up to 30 rows."""
    for dtype in (torch.float16, torch.bfloat16):
        runner = noisy_16_bit_pair(DEVICE, dtype, batch)
        prompts = [torch.randint(2048, (int(n),)).tolist() for n in torch.randint(1, 120, (12,))]
        options = {"max_new_tokens": 96, "temperature": temperature, "seed": seed}
        plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
        for depth in (3, 4):
            outs = runner.generate(prompts, depth=depth, **options)
            assert [out.tokens for out in outs] == plain
            assert 1.2 < runner.last.tau < depth + 0.9, "the draft must be right often, and wrong often"


def test_eagle_layer_in_kernels_equals_pytorch(monkeypatch, seed):
    """The layer of EAGLE-3 and a plain decoder layer agree in value and cache."""
    from trainkit.drafters.eagle.network import EagleLayer
    from trainkit.layers.attention import Rotary
    from trainkit.layers.blocks import DecoderLayer

    shape = replace(WIDE, hidden_size=64)
    rotary, x = Rotary(shape), torch.randn(2, 3, 64, device=DEVICE)
    rotary.reserve(40, x)
    positions = torch.tensor([4, 9], device=DEVICE)[:, None] + torch.arange(3, device=DEVICE)
    embedded = torch.randn_like(x)
    for layer, inputs in ((EagleLayer(shape).to(DEVICE), (embedded, x)), (DecoderLayer(shape).to(DEVICE), (x,))):
        results, before = [], torch.randn(2, 4, 40, 16, device=DEVICE)
        for use_kernels in (True, False):
            monkeypatch.setattr(kernels, "available", lambda like, use=use_kernels: use)
            cache = before.clone()
            with torch.inference_mode():
                context = rotary.context(positions, Visible.causal(positions), positions, 40)
                results.append((layer(*inputs, context, cache), cache))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
