"""Biases, rotary rows and cache moves, compared with loops over their definitions."""

# B batch  T positions  S cache slots

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests.support.models import SHAPE
from trainkit.layers.attention import Attention, Rotary, document_bias, move_slots, rotary_table, rotate
from trainkit.layers.visible import Visible


def test_document_bias_is_causal_within_documents():
    """A position sees itself and earlier positions of its own document only."""
    document = torch.tensor([[0, 0, 1, 1, 1, -1]])
    bias = document_bias(document, torch.float32)[0]
    assert set(bias.unique().tolist()) == {0.0, float("-inf")}
    seen = bias == 0
    for t in range(6):
        assert seen[t].nonzero()[:, 0].tolist() == [s for s in range(t + 1) if document[0, s] == document[0, t]]


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_rotating_equals_transformers(kind, seed):
    """Rotary embeddings equal transformers' for every supported type."""
    rope = {"rope_type": kind, "rope_theta": 3000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif kind != "yarn":
        rope.pop("original_max_position_embeddings")
    shape = replace(SHAPE, rope=rope, max_positions=256)
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=256, rope_parameters=dict(rope)
    )
    positions = torch.randint(0, 256, (2, 9))
    x = torch.randn(2, 9, 4, 8)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    assert torch.allclose(rotate(x, rotary_table(shape, 256)[positions]), theirs, atol=1e-6)


def test_move_slots_equals_a_loop_even_with_overlap(seed):
    """Moving cache slots equals a loop over rows, also where source and destination overlap."""
    cache = torch.randn(3, 2, 4, 20, 5)
    path = torch.tensor([[0, 2, 5], [0, 1, 2], [0, 3, 0]])
    root = torch.tensor([4, 10, 0])
    expected = cache.clone()
    for b in range(3):
        for i in range(3):
            expected[b, :, :, root[b] + i] = cache[b, :, :, root[b] + path[b, i]]
    move_slots(cache, root[:, None] + path, root)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("norms", [False, True])
def test_attention_equals_its_definition_with_any_cache(groups, norms, seed):
    """Softmax over visible keys, head by head; the same values from the sequence and from scattered cache slots."""
    shape = replace(SHAPE, num_kv_heads=groups, qkv_bias=True, qk_norm=norms)
    attention = Attention(shape)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.3)
    x = torch.randn(2, 6, 32)
    rotary, positions = Rotary(shape), torch.arange(6).expand(2, -1)
    rotary.reserve(6, x)
    rope = rotary.rows(positions)
    bias = Visible.causal(positions).bias(6, 6, torch.float32)
    with torch.no_grad():
        ours = attention(x, rotary.context(positions, bias))
        q, k, v = attention.qkv(x).split([32, 8 * groups, 8 * groups], dim=-1)
        q, k, v = q.unflatten(-1, (4, 8)), k.unflatten(-1, (groups, 8)), v.unflatten(-1, (groups, 8))
        if attention.q_norm is not None and attention.k_norm is not None:
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        heads = []
        for h in range(4):
            g = h * groups // 4
            scores = q[:, :, h] @ k[:, :, g].transpose(1, 2) / 8**0.5 + bias
            heads.append(scores.softmax(-1) @ v[:, :, g])
        assert torch.allclose(ours, attention.out(torch.cat(heads, dim=-1)), atol=1e-5)

        # each position in a random slot, unused slots full of other numbers
        slots = torch.tensor([[4, 0, 7, 2, 5, 1], [0, 1, 2, 3, 4, 5]])
        cache = torch.randn(2, 2 * groups, 9, 8)
        seen = torch.full((2, 6, 9), float("-inf"))
        for t in range(6):
            for b in range(2):
                seen[b, t, slots[b, : t + 1]] = 0.0
        assert torch.allclose(attention(x, rotary.context(positions, seen, slots), cache), ours, atol=1e-5)
