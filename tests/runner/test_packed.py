"""Rows of a batch verify unequally many drafted tokens, packed into one row and shared out by chance; the text stays."""

# B rows  N nodes  D draft levels  Q nodes of all rows

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.models import SHAPE, pair, predicting, ragged_prompts, random_decoder, table_runner
from tests.support.pauses import Erratic
from tests.support.replaying import replayed
from trainkit.layers.attention import Packing
from trainkit.layers.visible import Visible
from trainkit.models.predictor import FoldedPredictor
from trainkit.runner import Runner, Stats
from trainkit.runner.policies import chain as adaptive
from trainkit.runner.policies.chain import PolicyChain, RankedChain
from trainkit.runner.policies.cost import Cost
from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policy import Policy, RoundOutcome
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.shape import Draft, Steps
from trainkit.runner.trees.static import build, chain
from trainkit.runner.verify import Coupled

CPU = torch.device("cpu")


def priced(verify: float = 0.1, level: float = 0.01, pack: float = 0.0, pad: float = 0.0) -> ChainCosts:
    """A plain step of one text is 1, each node more `verify`, whosever it is."""
    rows, nodes = tuple(range(1, 9)), tuple(range(1, 20))
    lines = tuple(tuple(1.0 + verify * (B * n - 1) for n in nodes) for B in rows)
    return ChainCosts(rows, nodes, lines, *((value,) * 8 for value in (level, level, pack, pad)))


def test_packing_by_hand():
    """Packing and padding of rows equal those written by hand."""
    packing = Packing.from_lengths(torch.tensor([2, 1, 3]), 3, 6)
    assert packing.packed_BT.tolist() == [[0, 1, 0], [2, 2, 2], [3, 4, 5]]
    assert packing.padded_Q.tolist() == [0, 1, 3, 6, 7, 8]
    padded = torch.arange(9).view(3, 3)
    assert packing.pack(padded).tolist() == [[0, 1, 3, 6, 7, 8]]
    assert packing.pad(packing.pack(padded)).tolist() == [[0, 1, 0], [3, 3, 3], [6, 7, 8]]


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "qkv_bias": True, "tied": False}])
def test_packed_rows_equal_padded_rows(more, seed):
    """Hidden states, taps and cache, in float64, where 1e-10 is far above rounding and far below any fault."""
    network, B, N, span = random_decoder(replace(SHAPE, **more)).double(), 5, 4, 32
    network.reserve_positions(span)
    lengths = torch.tensor([N, 1, *torch.randint(1, N + 1, (B - 2,)).tolist()])
    roots = torch.randint(3, 20, (B,))
    tokens, positions = torch.randint(48, (B, N)), roots[:, None] + torch.arange(N)
    before = torch.randn(B, SHAPE.num_layers, 2 * SHAPE.num_kv_heads, span, SHAPE.head_dim, dtype=torch.float64)
    visible, packing = Visible.causal(positions), Packing.from_lengths(lengths, N, int(lengths.sum()))
    caches = before.clone(), before.clone()
    hidden, taps = network(tokens, positions, visible, caches[0], positions, (0, 1, 2))
    packed = network(packing.pack(tokens), positions, visible, caches[1], positions, (0, 1, 2), packing)
    assert packed[0].shape[:2] == (1, lengths.sum())
    inside = torch.arange(N) < lengths[:, None]
    for whole, part in zip((hidden, taps), packed, strict=True):
        torch.testing.assert_close(packing.pad(part)[inside], whole[inside], atol=1e-10, rtol=0)
    for row, (root, length) in enumerate(zip(roots.tolist(), lengths.tolist(), strict=True)):
        ours, theirs = (cache[row, :, :, : root + length] for cache in caches)
        torch.testing.assert_close(theirs, ours, atol=1e-10, rtol=0)
        assert not torch.equal(ours[:, :, root:], before[row, :, :, root : root + length])
        assert torch.equal(caches[1][row, :, :, root + N :], before[row, :, :, root + N :])


def packed_draft(tokens: list[list[int]], lengths: list[int]) -> Draft:
    tree = build(chain(len(tokens[0]) - 1), CPU)
    packing = Packing.from_lengths(torch.tensor(lengths), tree.size, sum(lengths))
    return Draft(tree, torch.tensor(tokens), tree.topology, tree.depth, packing=packing)


def test_padding_is_not_accepted():
    """The first node's choice is the pad's token, and a pad repeats the root's logits, whose choice is the one after it."""
    draft = packed_draft([[9, 1, 2, 1], [9, 1, 2, 3]], [2, 4])
    choices = torch.tensor([[1, 2, 1, 1], [1, 2, 3, 4]])
    logits = torch.nn.functional.one_hot(choices, 10).float()
    unread, fault = (torch.empty(0), torch.empty(0)), replace(draft, packing=None)
    assert Coupled().verify(draft, logits, None, *unread).counts_B.tolist() == [2, 4]
    assert Coupled().verify(fault, logits, None, *unread).counts_B.tolist() == [4, 4]


def sharing(runner, depth=4):
    return {"tree": PolicyChain(Erratic(depth), runner.device)}


def test_accepted_padding_would_change_the_text(monkeypatch, seed):
    """The draft is the target itself, so that every pad holds the token that comes next: accepting it is the tempting fault."""
    runner = pair(noise=0.0, max_batch=3)
    prompts, options = ragged_prompts(6), {"max_new_tokens": 30, "seed": seed, "ignore_end": True}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    texts = [out.tokens for out in runner.generate(prompts, **sharing(runner), **options)]
    assert_few(compare(runner.rounds.target, prompts, texts, plain, Sampling(0.0)), 180)
    right = Coupled.verify
    monkeypatch.setattr(Coupled, "verify", lambda self, draft, *rest: right(self, replace(draft, packing=None), *rest))
    assert [out.tokens for out in runner.generate(prompts, **sharing(runner), **options)] != plain


@pytest.fixture
def packings(monkeypatch):
    """The lengths of all rows packed in this test."""
    found, make = [], Packing.from_lengths

    def from_lengths(lengths_B, *sizes):
        found.append(lengths_B.tolist())
        return make(lengths_B, *sizes)

    monkeypatch.setattr(adaptive.Packing, "from_lengths", staticmethod(from_lengths))
    return found


@pytest.mark.parametrize("draft_layers", [None, 1])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [3, 8])
def test_shared_rounds_decode_as_plain_decoding(batch, temperature, draft_layers, packings, seed):
    """Rows end at different times, so that batches shrink; by costs and a predictor, and as a die falls."""
    runner = pair(max_batch=batch, draft_layers=draft_layers)
    runner.predictor = predicting(runner)
    runner.policies.costs = lambda *_: priced(0.05)
    prompts, options = ragged_prompts(11), {"max_new_tokens": 30, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    for paced in (sharing(runner), {"policy": "cost", "depth": 5}):
        texts = [out.tokens for out in runner.generate(prompts, **paced, **options)]
        assert_few(compare(runner.rounds.target, prompts, texts, plain, Sampling(temperature), seed), 330)
        assert packings and all(min(lengths) >= 1 and min(lengths) < max(lengths) for lengths in packings)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_residual_sampling_verifies_rows_equally(temperature, packings, seed):
    """Above temperature 0, residual verification verifies equally many tokens in all rows."""
    options = {"policy": "cost", "max_new_tokens": 20, "temperature": temperature, "verify": "residual"}
    for _ in range(5):  # a random predictor may rate all rows alike: it does in one of 50 draws
        runner = pair(max_batch=3, ends=())
        runner.predictor = predicting(runner)
        runner.policies.costs = lambda *_: priced(0.05)
        runner.generate(ragged_prompts(5), **options)
    assert bool(packings) == (temperature == 0)


class Halved(Policy):
    """Verifies half of what captured rounds draft."""

    signal = "confidence"

    def captured_size(self, rows):
        return self.max_depth, self.max_depth // 2


@pytest.mark.parametrize("predicted", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_captured_shared_rounds_decode_as_plain_decoding(temperature, predicted, packings, seed):
    """A host one round behind, and padded batches: the budget is fixed, whoever has it."""
    runner = pair(max_batch=8)
    prompts, options = ragged_prompts(11), {"max_new_tokens": 30, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    replayed(runner, 1)
    word = FoldedPredictor(predicting(runner), temperature) if predicted else None
    shape = PolicyChain(Halved(4), runner.device, word)
    outs = runner.generate(prompts, tree=shape, **options)
    assert_few(compare(runner.rounds.target, prompts, [out.tokens for out in outs], plain, Sampling(temperature), seed), 330)
    assert packings and all(sum(lengths) == 3 * len(lengths) for lengths in packings)
    assert any(len(set(lengths)) > 1 for lengths in packings)
    stats = Stats.merge(out.stats for out in outs)
    assert stats.drafted == 4 * stats.rounds
    assert len(stats.offered) > 3 and stats.offered[1] <= stats.rounds and stats.offered[3] < stats.offered[1]


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_shared_rounds_in_gpu_graphs_decode_the_same(temperature, seed):
    """Shared rounds in CUDA graphs give the text of plain decoding."""
    runner = pair(max_batch=8)
    runner = Runner(runner.rounds.target.cuda(), runner.drafter.cuda(), runner.shape, None, 8, 96, capture=True)
    prompts, options = ragged_prompts(11), {"max_new_tokens": 30, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    shape = PolicyChain(Halved(4), runner.device)
    texts = [out.tokens for out in runner.generate(prompts, tree=shape, **options)]
    assert_few(compare(runner.rounds.target.cpu(), prompts, texts, plain, Sampling(temperature), seed), 330)


def test_captured_budget_goes_to_the_most_probable_tokens(seed):
    """Drafts after token 0 are sure of 0, after 1 of 1 less so, after 2 hardly of 2; the last row is done."""
    sure = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]]).log()[None]
    runner = table_runner(sure, sure, 4, 16)
    tree, root_B = build(chain(3), CPU), torch.tensor([0, 1, 2, 0])
    done_B, position_B = torch.tensor([False, False, False, True]), torch.ones(4, dtype=torch.long)
    for each, lengths in ((1, [4, 2, 1, 1]), (2, [4, 4, 3, 1])):
        # chances: .9 .81 .73, .6 .36 .22, .4 .16 .06, none of the last
        steps = Steps(runner.drafter, {}, runner.rounds.handle, root_B, position_B, Sampling(), None, 8, done_B=done_B)
        draft = RankedChain(tree, each).grow(steps)
        assert draft.packing is not None and draft.chances_BD is not None
        assert draft.packing.lengths_B.tolist() == lengths
        torch.testing.assert_close(draft.chances_BD[:2], torch.tensor([[0.9, 0.81, 0.729], [0.6, 0.36, 0.216]]))
        assert draft.chances_BD[3].tolist() == [0, 0, 0]
    assert RankedChain(tree, 3).grow(steps).packing is None


def verified_counts(policy: Cost, chances_DB: list[list[float]]) -> list[int]:
    """What each row gets where all of this was drafted."""
    policy.begin(len(chances_DB[0]))
    for said_B in chances_DB:
        policy.continues(said_B)
    return list(policy.verified(len(chances_DB), len(chances_DB[0])))


def worth(policy: Cost, chances_DB: list[list[float]], lengths: tuple[int, ...] | list[int]) -> float:
    """Expected tokens kept, less what verifying costs."""
    rows, gained = len(lengths), 0.0
    for row, length in enumerate(lengths):
        chance = 1.0
        for said_B in chances_DB[:length]:
            chance *= said_B[row]
            gained += chance
    return gained - policy.rate(rows) * policy.costs.packed(rows, rows + sum(lengths), 1 + max(lengths))


@pytest.mark.parametrize("pack, pad", [(0.0, 0.0), (0.05, 0.0), (0.05, 0.02)])
def test_shared_budget_is_the_best_split(pack, pad, seed):
    """Where pads cost nothing; where they do, no worse than equal rows."""
    shared = 0
    for _ in range(40):
        price = float(torch.rand(()) * 0.5)
        policy = Cost(priced(price, pack=pack, pad=pad), 4, "predictor", per_row=True)
        chances_DB = torch.rand(3, 3).tolist()
        ways = product(range(4), repeat=3) if not pad else ((n, n, n) for n in range(4))
        found = verified_counts(policy, chances_DB)
        best = max(worth(policy, chances_DB, way) for way in ways)
        assert worth(policy, chances_DB, found) >= best - 1e-9
        shared += len(set(found)) > 1
    assert shared > 2


def test_shares_by_hand():
    """At R = 1 a token in 1.1 seconds for two rows, 2 / 1.1, and a node at 0.1, a token needs a chance of 0.18."""
    policy = Cost(priced(0.1), 4, "predictor", per_row=True)
    assert verified_counts(policy, [[0.9, 0.1], [0.9, 0.9], [0.2, 0.9]]) == [2, 0]
    assert verified_counts(policy, [[0.1, 0.1]]) == [0, 0]
    assert verified_counts(policy, [[0.9], [0.9]]) == [2]  # one text has nobody to share with
    assert verified_counts(Cost(priced(0.1), 4, "none", per_row=True), [[0.9, 0.1]]) == [1, 1]
    assert verified_counts(Cost(priced(0.1), 4, "predictor"), [[0.9, 0.1]]) == [1, 1]


def test_one_promising_row_is_drafted_while_it_pays():
    """Where rows are equal, another level is a node for all of them; where they share, for those alone that it pays for."""
    said = [0.95, *[0.02] * 7]
    equal, shares = (Cost(priced(0.1, 0.02), 6, "predictor", per_row=shares) for shares in (False, True))
    for policy in (equal, shares):
        policy.begin(8)
    assert shares.continues(said) and not equal.continues(said)
    dear = Cost(priced(0.1, 0.5), 6, "predictor", per_row=True)
    dear.begin(8)
    assert not dear.continues(said)


@pytest.mark.parametrize("said, halves", [([0.95, 0.95, 0.05, 0.05], True), ([0.9] * 4, False)])
def test_captured_rounds_learn_if_sharing_pays(said, halves):
    """Two sure rows and two hopeless ones do with half the budget; four alike do not."""
    policy = Cost(priced(0.1, 0.001), 4, "predictor", per_row=True)
    for _ in range(60):
        levels, each = policy.captured_size(4)
        if not levels:
            continue
        chances = [[p ** (level + 1) for p in said] for level in range(levels)]
        best = sorted(((chance, row) for level in chances for row, chance in enumerate(level)), reverse=True)[: 4 * each]
        verified = [sum(row == mine for _, mine in best) for row in range(4)]
        accepted = [sum(p ** (level + 1) for level in range(n)) for p, n in zip(said, verified, strict=True)]
        policy.learn(RoundOutcome(4, levels, verified, accepted, chances))
    levels, each = policy.captured_size(4)
    assert (each < levels) == halves


def test_captured_rounds_stop_an_overconfident_draft():
    """The draft is sure and always wrong: after some rounds it is not drafted with."""
    policy = Cost(priced(0.1, 0.2), 8, "confidence", per_row=True)
    for _ in range(8):
        levels, each = policy.captured_size(4)
        if levels:
            policy.learn(RoundOutcome(4, levels, [each] * 4, [0] * 4, [[0.99] * 4] * levels))
    assert policy.captured_size(4) == (0, 0)


class Unequal(Policy):
    """Three tokens of the first row, one of the second."""

    def verified(self, levels, rows):
        return [3, 1][:rows]


def test_stats_are_kept_per_row(seed):
    """Each row has statistics of its own."""
    runner = pair(noise=0.0, max_batch=2, ends=())
    first, second = runner.generate([[1, 2], [3]], tree=PolicyChain(Unequal(4), CPU), max_new_tokens=17)
    # until the first ends, having 4 tokens a round, the second has 2 of each, and then rows are no longer two
    assert first.stats.offered == [0, 4, 4, 4] and first.stats.drafted == 16 and first.stats.alpha_k == [1, 1, 1]
    assert second.stats.offered[1] >= 4 and first.stats.tau == 4


class Resting(Policy):
    """Drafts in every third round."""

    turn = 0

    def begin(self, rows):
        self.turn += 1
        return self.max_depth if self.turn % 3 == 0 else 0


@pytest.mark.parametrize("captured", [False, True])
def test_rounds_without_a_draft_count_as_paused(captured, seed):
    """Rounds without a draft are counted as paused."""
    runner = pair(max_batch=2, ends=())
    if captured:
        replayed(runner, 1)
    outs = runner.generate([[1, 2], [3]], tree=PolicyChain(Resting(2), CPU), max_new_tokens=40)
    for out in outs:
        assert 0 < out.stats.paused < out.stats.rounds
        assert out.stats.drafted == 2 * (out.stats.rounds - out.stats.paused)
    assert runner.last.paused == sum(out.stats.paused for out in outs)
    assert runner.generate([[1, 2]], depth=0, max_new_tokens=5)[0].stats.paused == 0


def test_unprofitable_speculation_is_switched_off(seed):
    """Where a level costs as much as a plain step of the whole batch and the draft is another network altogether."""
    runner = pair(noise=3.0, max_batch=4, ends=())
    runner.policies.costs = lambda *_: priced(0.2, 2.0)
    runner.generate(ragged_prompts(4), policy="cost", max_new_tokens=60)
    assert runner.last.paused > 0.8 * runner.last.rounds


@pytest.mark.parametrize("captured", [False, True])
def test_paused_drafter_reads_no_prompt(captured, seed):
    """It is read with what was decoded since, once drafting is tried again."""
    runner = pair(noise=3.0, max_batch=4, max_len=700, ends=())
    runner.policies.costs = lambda *_: priced(0.2, 2.0)
    if captured:
        replayed(runner, 1)
    read, prefill = [], runner.drafter.prefill
    runner.drafter.prefill = lambda state, chunk, *rest: (read.append(chunk.tokens_BT.tolist()), prefill(state, chunk, *rest))
    prompts = [[*range(n)] for n in range(8, 15)] + [[9] * 600]
    outs = runner.generate(prompts, policy="cost", max_new_tokens=30)
    at_once = [tokens[0] for tokens in read if tokens[0] in prompts]
    assert at_once == prompts[:4], "later ones come while drafting rests"
    assert [9] * 88 in [tokens[0] for tokens in read], "but one that is too long to be kept is read at once"
    assert [out.tokens for out in outs] == [out.tokens for out in runner.generate(prompts, depth=0, max_new_tokens=30)]


def test_packing_cost_by_hand():
    """By hand: 8 nodes of 2 texts with a pad each, 1.0 + 0.1 * 7 for the nodes, 0.5 for packing and 2 pads at 0.25."""
    found = priced(0.1, pack=0.5, pad=0.25)
    assert found.packed(2, 8, 5) == pytest.approx(1.7 + 0.5 + 0.5)
    assert found.packed(2, 8, 4) == found.verify(2, 4) == pytest.approx(1.7)


def test_packing_costs_are_measured(tmp_path, monkeypatch):
    """The costs of packing are measured, for more than one row, and stored."""
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path))
    runner = pair(max_batch=2)
    found = runner.policies.costs(3, None)
    assert found.pack_R[0] == found.pad_R[0] == 0 and found.pack_R[1] >= 0 and found.pad_R[1] >= 0
    assert runner.policies.costs(3, None) == found
