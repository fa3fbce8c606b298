"""Sampling with a dynamic tree has exactly the target's joint law of four tokens; rules that are nearly right do not.

Tables and counting are those of tests/support/distribution.py. Each fault is a whole verification written wrongly, whose exact
law is worked out first; noise used twice, which has no simple law, is planted in the runner's own.
"""

# B rows  N nodes  V vocabulary, 4

import numpy as np
import pytest
import torch

from tests.support import distribution, laws
from tests.support.distribution import CASES, check_joint, laws_of, sample, skewed, tables
from tests.support.models import SIBLINGS
from trainkit.layers.visible import unpack_bits
from trainkit.runner import DynamicTree, sampling, verify

SLOW = pytest.mark.slow
TREES = {"grown": DynamicTree(3, 2, 6), "wide": DynamicTree(2, 3, 7), "deep": DynamicTree(5, 2, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("method", ["coupled", "residual"])
def test_joint_of_four_tokens_is_exact(method, tree, case, seed):
    """Dynamic trees emit the target's joint distribution of four tokens."""
    check_joint(case, TREES[tree], method, 200_000, seed, 2 * len(CASES) * len(TREES))


@pytest.mark.parametrize(("case", "tree", "method"), [("generic", "deep", "residual"), ("top-p", "grown", "coupled")])
def test_joint_of_four_tokens_on_fewer_samples(case, tree, method, seed):
    """The joint distribution of four tokens is the target's, on 20,000 blocks."""
    check_joint(case, TREES[tree], method, 20_000, seed, 2)


def test_enumerated_law_equals_the_target(seed):
    """The enumeration that gives the faults' laws gives the plain law when nothing is wrong, in every case."""
    for case, (kind, settings) in CASES.items():
        p, q = laws_of(*tables(kind, np.random.default_rng(seed)), settings)
        for tree in TREES.values():
            law = laws.grown_law(p, q, tree.depth, tree.top_k, tree.nodes, laws.points, 5)
            assert np.abs(law - laws.plain_law(p)).max() < 1e-12, (case, tree)


def one_by_one(accept, after):
    """A verification that judges siblings one after the other, with noise of its own, rightly or not."""

    def verdict(self, draft, scores_BNV, *_):
        B, rows = len(scores_BNV), torch.arange(len(scores_BNV))
        q_BMV, p_BNV = torch.cat(draft.logits, dim=1).softmax(-1), scores_BNV.softmax(-1)
        here_B, p, q = torch.zeros(B, dtype=torch.long), p_BNV[:, 0], q_BMV[:, 0]
        for node in range(1, draft.shape.size):
            token_B = draft.tokens_BN[:, node]
            judged_B = draft.topology.parents_BN[:, node] == here_B
            stays_B = torch.rand(B) < accept(p[rows, token_B], q[rows, token_B])
            p_left, q_left = after(p, q, token_B)
            taken, left = (judged_B & stays_B)[:, None], (judged_B & ~stays_B)[:, None]
            p = torch.where(taken, p_BNV[:, node], torch.where(left, p_left, p))
            q = torch.where(taken, q_BMV[rows, draft.drafter_numbers_BN[:, node]], torch.where(left, q_left, q))
            here_B = torch.where(taken[:, 0], node, here_B)
        path = verify._path(draft, unpack_bits(draft.topology.bits_BNW[rows, here_B], draft.shape.size))
        counts = 1 + draft.topology.depths_BN[rows, here_B]
        tokens = draft.tokens_BN.gather(1, path)
        emitted = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).scatter(1, (counts - 1)[:, None], torch.multinomial(p, 1))
        return verify.Verdict(path, counts, emitted)

    return verdict


def without(p, q, token):
    left = p.scatter(1, token[:, None], 0.0)
    return left / left.sum(-1, keepdim=True).clamp(min=1e-30), q


RULES = {
    "right": (laws.points, one_by_one(lambda p, q: p, without)),
    "rejected token kept": (laws.points_kept, one_by_one(lambda p, q: p, lambda p, q, token: (p, q))),
    "judged as draws from q": (laws.points_as_draws, one_by_one(lambda p, q: p / q, verify.after_rejection)),
}


@pytest.mark.parametrize("tree", [pytest.param("grown", marks=SLOW), pytest.param("wide", marks=SLOW), "deep"])
@pytest.mark.parametrize("rule", RULES)
def test_wrong_verification_rule_is_detected(rule, tree, seed, monkeypatch):
    """One after the other, as the rule is written, is the target's law too: one draw for all siblings is no other rule."""
    shape, (p, q) = TREES[tree], skewed(1)
    p_q, of_tree = laws_of(p, q, {"temperature": 1.0}), (shape.depth, shape.top_k, shape.nodes)
    law, written = RULES[rule]
    truth, wrong = laws.plain_law(p_q[0]), laws.grown_law(*p_q, *of_tree, law, 25)
    blocks = 20_000
    if rule != "right":
        needed = int(np.ceil(150 / laws.noncentrality(wrong, truth, 1)))
        print(f"{rule}: {needed} samples for a noncentrality of 150")
        assert needed <= 200_000, "the suite's 2e5 samples would miss it"
        blocks = max(needed, 10_000)
    monkeypatch.setattr(verify.Coupled, "verify", written)
    made = distribution.table_runner

    def observed(*args):
        runner = made(*args)
        runner.observe = lambda trace: None  # so that draft logits are kept
        return runner

    monkeypatch.setattr(distribution, "table_runner", observed)
    counts, each = sample(p, q, blocks, shape, seed, verify="residual", temperature=1.0)
    value = laws.p_value(counts, truth)
    assert value > 1e-5 if rule == "right" else value < 1e-6
    assert laws.p_value(counts, laws.grown_law(*p_q, *of_tree, law, each)) > 1e-5


@pytest.mark.parametrize(
    ("tree", "method"),
    [(TREES["deep"], "coupled"), (TREES["deep"], "residual"), (SIBLINGS, "coupled")],
    ids=["coupled", "residual", "coupled on a static tree"],
)
def test_noise_shared_by_depths_is_detected(tree, method, seed, monkeypatch):
    """Planted: tokens of one round share their noise. Each token by itself still has the right law."""
    right = sampling.gumbel
    monkeypatch.setattr(
        sampling, "gumbel", lambda keys, rows, *rest: right(keys, rows[:, :1], *rest).expand(-1, rows.shape[1], -1)
    )
    p, q = skewed(1)
    counts, _ = sample(p, q, 20_000, tree, seed, verify=method, temperature=1.0)
    assert laws.p_value(counts, laws.plain_law(laws_of(p, q, {"temperature": 1.0})[0])) < 1e-6
