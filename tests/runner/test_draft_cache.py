"""A wrong draft cache is invisible in the text, only tau falls: so logits are compared with fresh forwards at every node."""

# B rows  F frontier nodes  M, N nodes of a round  V vocabulary

import pytest
import torch

from tests.support.models import BUSHY, SIBLINGS, lm_draft, near, pair, ragged_prompts, random_decoder
from trainkit.drafters.lm import LMDraft
from trainkit.layers.visible import Visible, unpack_bits
from trainkit.models.shape import TargetShape
from trainkit.runner import DynamicTree, Runner
from trainkit.runner.trees.static import chain


def fresh_logits(decoder, tokens):
    """Logits after a text, from one forward without a cache."""
    positions = torch.arange(len(tokens))[None]
    hidden, _ = decoder(torch.tensor([tokens]), positions, Visible.causal(positions))
    return decoder.head(hidden)[0, -1]


ROUNDING = 1e-3  # logits here reach dozens, in float32; a wrong cache entry moves them by whole units


TREES = [chain(1), chain(3), SIBLINGS, BUSHY, DynamicTree(4, 2, 6), DynamicTree(3, 5, 30)]


class CheckedDraft(LMDraft):
    """An LMDraft that keeps each row's text among its state tensors, so that it moves with the rows, and checks every level.

    Attributes:
        checked: Nodes whose draft logits were compared.
        error: Largest difference seen.
    """

    checked = 0
    error = 0.0

    def init_state(self, batch_size, slots, device, dtype):
        return super().init_state(batch_size, slots, device, dtype) | {"text": torch.full((batch_size, slots), -1)}

    def prefill(self, state, chunk, handle, span):
        super().prefill(state, chunk, handle, span)
        state["text"].scatter_(1, chunk.positions_BT, chunk.tokens_BT)

    def step(self, state, frontier, handle, span):
        out = super().step(state, frontier, handle, span)
        B = frontier.tokens_BF.shape[0]
        if frontier.depth == 0:
            self.text = state["text"].clone()
            self.root = frontier.positions_BF[:, 0].clone()
            self.drafted = torch.full((B, 64), -1)
        self.drafted[:, frontier.nodes_F] = frontier.tokens_BF
        bits_BFW = torch.tensor([[[2 ** (frontier.depth + 1) - 1]]]) if frontier.is_chain else frontier.bits_BFW
        seen_BFM = unpack_bits(bits_BFW, 64).expand(B, -1, -1)
        for b in range(B):
            for f in range(len(frontier.nodes_F)):
                path = self.drafted[b][seen_BFM[b, f]].tolist()
                text = self.text[b, : self.root[b]].tolist() + path
                assert min(text) >= 0, "a token of the text was never read"
                self.error = max(self.error, float((fresh_logits(self.decoder, text) - out.logits_BFK[b, f]).abs().max()))
                self.checked += 1
        return out

    def commit(self, state, accepted, handle, span):
        super().commit(state, accepted, handle, span)
        for b, count in enumerate(accepted.counts_B.tolist()):
            state["text"][b, accepted.root_B[b] : accepted.root_B[b] + count] = accepted.tokens_BP[b, :count]


def checked_runner(noise, ends=(7,)):
    target = random_decoder()
    shape = TargetShape(target.shape, ends)
    draft = CheckedDraft(shape, num_layers=2, init="scratch")
    draft.decoder = near(target, noise)
    return Runner(target, draft, shape, max_batch=4, max_len=64)


@pytest.mark.parametrize("tree", TREES, ids=["chain1", "chain3", "siblings", "bushy", "dynamic", "wide"])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3], ids=["same", "near", "far"])
def test_cached_logits_equal_fresh_forwards(tree, noise, seed):
    """After rejections and full acceptance, after rows moved between slots, for every node of every tree, in every round."""
    runner = checked_runner(noise)
    target, draft = runner.rounds.target, runner.drafter
    worst = 0.0
    lengths = set()

    def observe(trace):
        nonlocal worst
        lengths.update(trace.verdict.counts_B.tolist())
        for b in range(trace.scores_BNV.shape[0]):
            prefix = draft.text[b, : draft.root[b]].tolist()
            for node in range(trace.draft.shape.size):
                bits_W = trace.draft.topology.bits_BNW.expand(len(draft.root), -1, -1)[b, node]
                path = trace.draft.tokens_BN[b][unpack_bits(bits_W, trace.draft.shape.size)].tolist()
                worst = max(worst, float((fresh_logits(target, prefix + path) - trace.scores_BNV[b, node]).abs().max()))

    runner.observe = observe
    outs = runner.generate(ragged_prompts(7, longest=9), max_new_tokens=9, temperature=0.0, tree=tree)
    assert draft.checked > 3 and draft.error < ROUNDING, draft.error
    assert worst < ROUNDING, worst
    draft.error = 0.0
    runner.observe = None
    outs = runner.generate(ragged_prompts(5, longest=9), max_new_tokens=9, temperature=1.0, verify="residual", tree=tree)
    assert draft.error < ROUNDING, draft.error
    assert outs and lengths


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_target_as_its_own_draft_accepts_every_token(temperature, seed):
    """A draft that is the target has every token accepted."""
    runner = pair(noise=0.0, ends=())
    for depth in (1, 4):
        for out in runner.generate(ragged_prompts(10), max_new_tokens=26, temperature=temperature, seed=seed, depth=depth):
            assert out.stats.accepted == [0] * depth + [out.stats.rounds]
            assert out.stats.tau == depth + 1


def test_draft_cache_survives_calls_of_other_depth(seed):
    """A call without drafting in between leaves nothing stale behind: the next call's drafts are as good as before."""
    runner = pair(noise=0.0, ends=())
    prompts = ragged_prompts(6)
    for depth in (4, 0, 2, 0, 4):
        outs = runner.generate(prompts, max_new_tokens=21, depth=depth)
        assert all(out.stats.tau == depth + 1 for out in outs)


def test_draft_of_a_runner_can_still_be_trained(seed):
    """Rotary rows that the runner made in inference mode do not stand in the way of a backward pass."""
    target = random_decoder()
    shape = TargetShape(target.shape, ())
    draft = lm_draft(shape, near(target, 0.1))
    Runner(target, draft, shape, max_len=64).generate([[1, 2, 3]], max_new_tokens=4, depth=2)
    draft.requires_grad_(True)
    positions = torch.arange(5)[None]
    hidden, _ = draft.decoder(torch.tensor([[1, 2, 3, 4, 5]]), positions, Visible.causal(positions))
    draft.decoder.head(hidden).logsumexp(-1).sum().backward()
    assert all(p.grad is not None for p in draft.decoder.parameters())
