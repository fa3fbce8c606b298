"""The decoder computes the same on packed rows and with a cache, and its taps are Hugging Face's hidden states."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.models import SHAPE, random_decoder
from trainkit.layers.attention import document_bias
from trainkit.layers.blocks import Decoder
from trainkit.layers.shape import DecoderShape
from trainkit.layers.visible import Visible
from trainkit.models.load import load_decoder


def whole(decoder, tokens):
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    return decoder.head(decoder(tokens, positions, Visible.causal(positions))[0])


def test_packed_documents_equal_each_alone(seed):
    """Packed documents have the logits of each document alone."""
    decoder = random_decoder()
    decoder.reserve_positions(32)
    tokens = torch.randint(0, 48, (1, 15))
    positions = torch.cat([torch.arange(6), torch.arange(5), torch.arange(4)])[None]
    document = torch.tensor([[0] * 6 + [1] * 5 + [-1] * 4])
    hidden, _ = decoder(tokens, positions, document_bias(document, torch.float32))
    packed = decoder.head(hidden)
    for start, stop in ((0, 6), (6, 11)):
        assert torch.allclose(packed[:, start:stop], whole(decoder, tokens[:, start:stop]), atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_cached_chunks_equal_one_forward(chunk, seed):
    """Rows at different positions in one batch, over a cache whose other slots hold other numbers."""
    decoder = random_decoder(replace(SHAPE, qk_norm=True, qkv_bias=True, tied=False))
    decoder.reserve_positions(40)
    tokens = torch.randint(0, 48, (3, 24))
    offsets = torch.tensor([0, 5, 11])
    cache = torch.randn(decoder.new_cache(3, 40, torch.device("cpu"), torch.float32).shape)
    for b, offset in enumerate(offsets.tolist()):
        if offset:
            at = torch.arange(offset)[None]
            decoder(tokens[b : b + 1, :offset], at, Visible.causal(at), cache[b : b + 1], at)
    expected = whole(decoder, tokens)
    for start in range(0, 12, chunk):
        positions = offsets[:, None] + torch.arange(start, min(start + chunk, 12))
        hidden, _ = decoder(tokens.gather(1, positions), positions, Visible.causal(positions), cache, positions)
        ours = decoder.head(hidden)
        theirs = expected.gather(1, positions[..., None].expand(-1, -1, 48))
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_taps_are_transformers_hidden_states(tiny_target, seed):
    """Taps equal transformers' hidden states."""
    tokens = torch.randint(0, 320, (2, 12))
    with torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(tiny_target).eval()(tokens, output_hidden_states=True).hidden_states
    decoder = load_decoder(tiny_target)
    decoder.reserve_positions(12)
    positions = torch.arange(12).expand(2, -1)
    taps = (-1, 0, 2, 4, 1)
    hidden, tapped = decoder(tokens, positions, Visible.causal(positions), taps=taps)
    for place, tap in enumerate(taps):
        assert torch.allclose(tapped[:, :, place], states[tap], atol=1e-4)
    assert torch.equal(tapped[:, :, 0], hidden)


def test_step_bytes_exclude_an_untied_embedding():
    """The bytes of a step exclude an embedding that is not the head."""
    tied, untied = Decoder(SHAPE), Decoder(replace(SHAPE, tied=False))
    assert tied.step_bytes() == untied.step_bytes() == sum(p.numel() * 4 for p in tied.parameters())


def test_init_scales_residual_projections_by_depth(seed):
    """Projections into the residual stream are initialised with a deviation scaled by depth."""
    decoder = Decoder(replace(SHAPE, hidden_size=128, intermediate_size=256, head_dim=32, num_layers=8, qkv_bias=True))
    decoder.requires_grad_(False)
    decoder.initialise(0.02)
    layer = decoder.layers[3]
    assert layer.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert layer.attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert (layer.attention.qkv.bias == 0).all() and (layer.mlp_norm.weight == 1).all()


def test_key_heads_must_divide_query_heads():
    """A number of key heads that does not divide the query heads is refused."""
    with pytest.raises(ValueError, match="num_kv_heads 3"):
        DecoderShape(8, 8, 8, 1, 4, 3, 2)
