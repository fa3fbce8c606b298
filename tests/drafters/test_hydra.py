"""Kind hydra: what each head reads, in training and on a tree, and the prefix layer's cache."""

import pytest
import torch

from trainkit.drafters.base import Accepted, Chunk, DraftBatch, Frontier, LossOutput
from trainkit.drafters.hydra import Hydra
from trainkit.models.target import FrozenTarget

# D hidden  N counted positions


@pytest.fixture(scope="module")
def teacher(tiny_target) -> FrozenTarget:
    return FrozenTarget(tiny_target)


def scrambled(teacher: FrozenTarget, **options) -> Hydra:
    """A Hydra with random weights everywhere; a fresh one ignores all inputs but the first state."""
    draft = Hydra(teacher.shape(), **options)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return draft.eval()


@torch.no_grad()
def test_head_reads_state_and_tokens_before_its_label(teacher, seed):
    """Head i reads the hidden state and all tokens before its label."""
    asked = []

    def record(draft_ND, draft_head, target_ND, target_head, ids_K=None, labels_N=None, rows=None):
        parts = (x.split(rows.sizes) for x in (draft_ND, target_ND[rows.index_N], labels_N))
        asked.extend(zip(*parts, strict=True))
        return LossOutput(draft_ND.sum() * 0, torch.tensor(1.0), {}, {"counted": torch.ones(len(draft_ND))})

    draft = scrambled(teacher, num_heads=3)
    tokens, positions = torch.randint(320, (1, 7)), torch.arange(7)[None]
    hidden = torch.randn(1, 7, teacher.hidden_size)
    counted, taps = positions > 4, hidden[:, :, None]
    draft(DraftBatch(tokens, positions, torch.zeros_like(tokens), counted, taps, hidden, teacher.handle()), record)
    embed = teacher.handle().embed
    for head, (draft_ND, target_ND, labels_N) in enumerate(asked):
        starts = [label - head - 2 for label in (5, 6)]
        assert labels_N.tolist() == tokens[0, 5:].tolist()
        assert torch.equal(target_ND, hidden[0, 4:6])
        read = [torch.cat([hidden[0, t], *(embed(tokens[0, t + 1 + i]) for i in range(head + 1))]) for t in starts]
        torch.testing.assert_close(draft_ND, draft.blocks[head](torch.stack(read)))


@torch.no_grad()
def test_tree_node_reads_its_own_path(teacher, seed):
    """Root r with children a, b; then c and d under b and e under a, in this order; then f under d, which reads r, b, d, f."""
    draft, handle = scrambled(teacher, num_heads=4, num_layers=2), teacher.handle()
    state = draft.init_state(1, 16, torch.device("cpu"), torch.float32)
    state["hidden"].copy_(torch.randn(1, 1, teacher.hidden_size))
    r, a, b, c, d, e, f = torch.randperm(320)[:7].tolist()
    levels = [([r], [0]), ([a, b], [0, 0]), ([c, d, e], [1, 1, 0]), ([f], [1])]
    expected = [[[r]], [[r, a], [r, b]], [[r, b, c], [r, b, d], [r, a, e]], [[r, b, d, f]]]
    for depth, ((tokens, places), paths) in enumerate(zip(levels, expected, strict=True)):
        ids, zero = torch.tensor([tokens]), torch.zeros(1, len(tokens), dtype=torch.long)
        nodes = Frontier(ids, zero, zero[0], torch.tensor([places]), zero[..., None], depth)
        found = draft.step(state, nodes, handle, 16).logits_BFK[0]
        read = torch.stack([torch.cat([state["hidden"][0, 0], *handle.embed(torch.tensor(path))]) for path in paths])
        torch.testing.assert_close(found, draft.lm_heads[depth](draft.blocks[depth](read)))


@torch.no_grad()
@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_prefix_cache_equals_full_forward(accepted, teacher, seed):
    """A prompt in two chunks and two rounds with `accepted` of 4 nodes each equal one causal pass over the accepted text."""
    draft, D = scrambled(teacher, num_heads=3, prefix=True), teacher.hidden_size
    taps = torch.randn(2, 15, 1, D)
    state = draft.init_state(2, 32, torch.device("cpu"), torch.float32)
    ids, at = torch.zeros(2, 4, dtype=torch.long), torch.arange(15).expand(2, -1)
    draft.prefill(state, Chunk(ids[:, :3], ids[:, :3], at[:, :3], taps[:, :3]), teacher.handle(), 32)
    draft.prefill(state, Chunk(ids, ids, at[:, 3:7], taps[:, 3:7]), teacher.handle(), 32)
    kept = [taps[:, :7]]
    for root in (7, 7 + accepted):
        made = torch.cat([taps[:, root : root + accepted], torch.randn(2, 4 - accepted, 1, D)], dim=1)
        kept.append(made[:, :accepted])
        count, start = torch.tensor([accepted, accepted]), torch.tensor([root, root])
        draft.commit(state, Accepted(None, ids, ids, count, start, made), teacher.handle(), 32)
    text = torch.cat(kept, dim=1)[:, :, 0]
    positions = torch.arange(text.shape[1]).expand(2, -1)
    bias = torch.full((2, text.shape[1], text.shape[1]), float("-inf")).triu(1)
    assert draft.prefix is not None
    torch.testing.assert_close(state["hidden"][:, 0], draft.prefix(text, positions, bias)[:, -1], rtol=1e-4, atol=1e-4)
