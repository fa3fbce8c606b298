"""Trees that a predictor ranks and a policy prunes: which nodes stay, by hand; and the text, which is plain decoding's."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.models import pair, predicting, ragged_prompts
from tests.support.replaying import replayed
from trainkit.errors import UserError
from trainkit.models.predictor import FoldedPredictor, signals
from trainkit.runner import DynamicTree
from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policies.pruned import AdaptiveTree, PredictedTree, TreeCost
from trainkit.runner.policy import RoundOutcome
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.dynamic import likeliest

TREE = DynamicTree(4, 3, 10)


@pytest.fixture(autouse=True)
def own_costs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINKIT_COSTS", str(tmp_path / "costs"))


def flat(verify: float, level: float, nodes: int = 40) -> ChainCosts:
    """A plain step of 1, `verify` more for each further row, `level` for each draft level."""
    line = tuple(1.0 + verify * n for n in range(nodes))
    return ChainCosts((1, 8), tuple(range(1, nodes + 1)), (line, line), (level, level), (level, level))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(("width", "columns"), [(1, 30), (3, 30), (4, 4), (2, 2), (1, 1)])
def test_the_folded_predictor_says_what_the_predictor_says(width, columns, temperature, seed):
    made = predicting(pair(), max_depth=3)
    hidden, noisy = 3 * torch.randn(2, 4, made.hidden_size), 4 * torch.randn(2, 4, columns)
    for depth in (0, 2, 7):
        told, picked = FoldedPredictor(made, temperature)(hidden, noisy, width, depth)
        expected = made.probability(hidden, signals(noisy, width, temperature), depth)
        torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(picked, noisy.topk(width, dim=-1).indices)


@pytest.mark.parametrize("policy", ["fixed", "cost", "cost-blind"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_text_is_plain_decodings(batch, temperature, policy, seed):
    runner = pair(max_batch=batch)
    runner.predictor, runner.pacer.costs = predicting(runner), lambda *_: flat(0.02, 0.05)
    prompts, options = ragged_prompts(8), {"max_new_tokens": 24, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    ties = []
    for _ in range(2):  # the second call goes on with what the first has learnt
        texts = [out.tokens for out in runner.generate(prompts, policy=policy, tree=TREE, **options)]
        ties += compare(runner.rounds.target, prompts, texts, plain, Sampling(temperature), seed)
    assert_few(ties, 2 * sum(map(len, plain)))
    assert runner.last.tau > 1.2, "nothing was accepted"


@pytest.mark.parametrize("costs", [flat(0.0, 0.0), flat(0.3, 0.2), flat(5.0, 0.0)], ids=["free", "dear", "unpayable"])
def test_whatever_is_pruned_the_text_stays_and_under_residual_too(costs, seed):
    """There the target's choice has noise of its own, so that every tree gives the same text; the price decides what is cut."""
    runner = pair(max_batch=3)
    runner.predictor, runner.pacer.costs = predicting(runner), lambda *_: costs
    options = {"max_new_tokens": 20, "temperature": 0.8, "seed": seed, "verify": "residual"}
    prompts = ragged_prompts(5)
    ways = (None, "fixed", "cost")
    texts = [[out.tokens for out in runner.generate(prompts, tree=TREE, policy=policy, **options)] for policy in ways]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("policy", ["fixed", "cost"])
def test_where_rounds_are_captured_the_sizes_are_few_and_the_text_stays(policy, seed):
    runner = pair(max_batch=4)
    runner.predictor = predicting(runner)
    prompts, options = ragged_prompts(9), {"max_new_tokens": 30, "temperature": 0.7, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    runner.pacer.costs = lambda *_: flat(0.02, 0.1)
    replayed(runner, 1)
    texts = [out.tokens for out in runner.generate(prompts, policy=policy, tree=TREE, **options)]
    assert_few(compare(runner.rounds.target, prompts, texts, plain, Sampling(0.7), seed), 300)
    shapes = {key[0] for key in runner.schedule.graphs.closures}
    assert all(shape == () or isinstance(shape, PredictedTree) for shape in shapes) and 1 <= len(shapes) <= 4


def test_the_nodes_that_stay_are_those_with_the_best_predicted_chances(seed):
    """Each round's tree against all products of what the predictor said as it was asked; not in the draft's order."""
    runner = pair(noise=0.3, ends=())
    made = predicting(runner)
    made.said.weight[-1] = torch.tensor([-2.0, 0, 0, 0, 0])  # the less the draft believes in a token, the more this one does
    made.scale.fill_(0.2)  # far from 0 and 1, where chances are clamped
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Telling(FoldedPredictor):
        def __call__(self, hidden_BFD, noisy_BFK, width, depth):
            told = super().__call__(hidden_BFD, noisy_BFK, width, depth)
            asked.append((told[0], likeliest(noisy_BFK, width)[0].exp()))
            return told

    kept: list[tuple[list[int], list[int]]] = []
    tree = PredictedTree(2, 3, 6, Telling(made, 0.0))

    def observe(trace):
        (root, draft_root), (below, _) = asked
        asked.clear()
        for row in range(root.shape[0]):
            first = root[row, 0]
            order = first.argsort(descending=True, stable=True)
            second = first[order][:, None] * below[row]
            expected = torch.cat([first, second.flatten()]).sort(descending=True).values[:5]
            topology = trace.draft.topology
            depths, parents = topology.depths_BN[row].tolist(), topology.parents_BN[row].tolist()
            assert depths[0] == 0 and all(depths[n] == depths[parents[n]] + 1 for n in range(1, 6))
            # how many on each level says which chances stayed
            assert depths.count(1) == int((first >= expected[-1]).sum())
            kept.append((order.tolist(), draft_root[row, 0].argsort(descending=True, stable=True).tolist()))

    runner.observe = observe
    runner.generate(ragged_prompts(4), max_new_tokens=16, tree=tree)
    assert len(kept) > 10 and any(ours != drafts for ours, drafts in kept)


def test_the_number_of_nodes_is_the_best_of_all(seed):
    """Against every number, in costs that have steps; and none at all where a row costs more than a token is worth."""
    draw = np.random.default_rng(seed)
    for _ in range(50):
        line = tuple(np.cumsum([1.0, *draw.random(9) * draw.choice([0.05, 0.3])]).tolist())
        costs = ChainCosts((1, 3), tuple(range(1, 11)), (line, line), (0.1, 0.1), (0.1, 0.1))
        policy = TreeCost(costs, PredictedTree(2, 3, 10))
        policy.begin(3)
        chances = [draw.random((3, 1, 3)) * 0.9, draw.random((3, 3, 3)) * 0.9]
        for one in chances:
            policy.spread(-np.sort(-one))
        first = -np.sort(-chances[0])[:, 0]
        every = np.concatenate([first, (first[..., None] * -np.sort(-chances[1])).reshape(3, -1)], 1)
        ranked = -np.sort(-every)
        worth = [ranked[:, :n].sum() - policy.rate(3) * costs.verify(3, n + 1) for n in range(10)]
        assert policy.nodes(9) == int(np.argmax(worth))
    assert TreeCost(flat(9.0, 0.1), PredictedTree(2, 3, 10)).nodes(0) == 0


def test_it_grows_while_a_level_pays():
    """A level of free rows is worth what its nodes may bring, and one that costs more than that is not drafted."""
    likely, unlikely = np.array([[[0.9, 0.05, 0.02]]]), np.array([[[0.1, 0.05, 0.02]]])
    for level, chances, goes_on in itertools.product((0.05, 0.5), (likely, unlikely), (True, False)):
        policy = TreeCost(flat(0.0, level), PredictedTree(3, 3, 10))
        policy.begin(1)
        if goes_on:
            # the two levels to come bring 0.7 + 2 * 0.1 of what was reached, 0.97 and 0.17
            assert policy.spread(chances) == (0.9 * chances.sum() > level)
        else:
            policy.most = 1
            policy.begin(1)
            assert not policy.spread(chances)
    free = TreeCost(flat(0.9, 0.0), PredictedTree(3, 3, 10))
    free.begin(1)
    assert not free.spread(unlikely), "a row costs 0.9, no child is worth it"


def test_a_level_that_failed_is_tried_again(seed):
    """As in chains: 300 rounds whose second token fails, then 700 good ones; and a level that said NaN once."""
    draw = np.random.default_rng(seed)

    def levels(policy: TreeCost, said: list[float], rounds: int) -> list[int]:
        found = []
        for _ in range(rounds):
            level, most = 0, policy.begin(1)
            while level < most:
                chances_BFK = np.full((1, 3 if level else 1, 3), 0.001)
                chances_BFK[..., 0] = said[level]
                level += 1
                if not policy.spread(chances_BFK):
                    break
            kept = policy.nodes(9) if level else 0
            accepted = int((draw.random(level) < np.array(said[:level])).cumprod().sum())
            policy.learn(RoundOutcome(1, level, [kept], [min(accepted, kept)], (), kept))
            found.append(level)
        return found

    policy = TreeCost(flat(0.05, 0.2), PredictedTree(4, 3, 10))
    levels(policy, [0.95, 0.01, 0.01, 0.01], 300)
    levels(policy, [0.95] * 4, 700)
    assert np.mean(levels(policy, [0.95] * 4, 100)) > 3.5
    assert levels(policy, [0.95, float("nan"), 0.9, 0.9], 1) == [2]
    assert np.mean(levels(policy, [0.95] * 4, 300)[200:]) > 3.5


def test_a_tree_that_does_not_pay_costs_hardly_a_round(seed):
    """Rows at the price of five tokens: soon it drafts only to see whether that has changed."""
    runner = pair()
    runner.predictor, runner.pacer.costs = predicting(runner), lambda *_: flat(5.0, 0.3)
    outs = runner.generate(ragged_prompts(2), max_new_tokens=60, tree=TREE, policy="cost", ignore_end=True)
    assert runner.last.tau == 1 and sum(len(out.tokens) for out in outs) == 120


@pytest.mark.parametrize("policy", ["ema", "confidence:0.5", "predictor:0.5"])
def test_other_policies_pace_chains(policy):
    runner = pair()
    runner.predictor = predicting(runner)
    with pytest.raises(UserError, match="for a dynamic tree take cost or fixed"):
        runner.generate([[1, 2]], max_new_tokens=4, tree=TREE, policy=policy)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_costs_of_trees_are_measured_for_their_levels_and_nodes(temperature):
    runner = pair(max_batch=2)
    costs = runner.pacer.costs(TREE.depth, None, Sampling(temperature), PredictedTree(4, 3, 10))
    assert costs.nodes == (1, 2, 5, 8, 10) and costs.rows == (1, 2)
    assert costs.round(1, 4, 9) > costs.round(1, 1, 1) > costs.round(1, 0, 0) > 0
    assert isinstance(AdaptiveTree(TreeCost(costs, PredictedTree(4, 3, 10)), runner.device).captured(2, 2), PredictedTree)


class Rootless(TreeCost):
    """Grows two levels and keeps none of it."""

    def begin(self, rows):
        return 2

    def spread(self, chances_BFK):
        return True

    def nodes(self, most):
        return 0

    def learn(self, came):
        pass


def test_a_tree_pruned_to_its_root_counts_as_trees_do(seed):
    costs = ChainCosts((1,), (1, 20), ((1.0, 1.0),), (0.0,), (0.0,))
    runner = pair(ends=())
    shape = AdaptiveTree(Rootless(costs, PredictedTree(2, 3, 6)), runner.device)
    stats = runner.generate([[1, 2]], max_new_tokens=9, tree=shape)[0].stats
    assert stats.rounds == 8 and stats.paused == 0 and stats.drafted == 0


def test_tables_that_a_captured_round_reads_live_as_long_as_it_does(seed):
    """Costs are measured at more slots than the runner has, and rotary tables made anew for that."""
    runner = replayed(pair(max_len=32, max_batch=1, ends=()), 1)
    tree, options = DynamicTree(5, 6, 60), {"max_new_tokens": 20, "tree": DynamicTree(5, 6, 60)}
    runner.generate([[1, 2]], **options)
    tables = [weakref.ref(runner.rounds.target.rope), weakref.ref(runner.drafter.decoder.rope)]
    runner.generate([[1, 2]], policy="cost", **options)
    assert runner.rounds.target.rope is not tables[0]()
    assert any(key[0] == tree for key in runner.schedule.graphs.closures)
    assert all(table() is not None for table in tables)
