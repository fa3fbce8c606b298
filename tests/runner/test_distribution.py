"""What sampling with a draft emits has exactly the target's distribution, through the real draft and verify path.

Each case compares the exact JOINT law of four consecutive tokens with at least 2e5 blocks (slow) or 5e4 (fast). Each planted
fault has its noncentrality computed first, from its own exact law, and must be caught by the same test.
"""

# V vocabulary, 4

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support import laws
from tests.support.distribution import CASES, check_joint, laws_of, sample, skewed, tables
from tests.support.models import SIBLINGS
from trainkit.runner import verify
from trainkit.runner.sampling import PROPOSAL
from trainkit.runner.trees.static import chain

TREES = {"chain1": chain(1), "chain4": chain(4), "siblings": SIBLINGS}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tree", TREES)
def test_residual_joint_of_four_tokens_is_exact(case, tree, seed):
    """Residual verification emits the target's joint distribution of four tokens."""
    check_joint(case, TREES[tree], "residual", 200_000, seed, len(CASES) * len(TREES))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["generic", "top-p", "disjoint"])
@pytest.mark.parametrize("tree", ["chain4", "siblings"])
def test_coupled_joint_of_four_tokens_is_exact(case, tree, seed):
    """Coupled verification emits the target's joint distribution of four tokens."""
    check_joint(case, TREES[tree], "coupled", 200_000, seed, 6)


@pytest.mark.parametrize(
    ("case", "tree", "method"),
    [
        ("generic", "chain4", "residual"),
        ("top-p", "siblings", "residual"),
        ("zeros", "siblings", "residual"),
        ("disjoint", "chain1", "residual"),
        ("generic", "chain4", "coupled"),
    ],
)
def test_joint_of_four_tokens_on_fewer_samples(case, tree, method, seed):
    """The joint distribution of four tokens is the target's, on 50,000 blocks."""
    check_joint(case, TREES[tree], method, 50_000, seed, 5)


def test_enumerated_law_equals_the_target(seed):
    """The enumeration that gives the planted faults' laws gives the plain law when nothing is wrong, in every case."""
    for case, (kind, settings) in CASES.items():
        p, q = laws_of(*tables(kind, np.random.default_rng(seed)), settings)
        for tree, paths in TREES.items():
            law = laws.block_law(p, q, paths, laws.right, 5)
            assert np.abs(law - laws.plain_law(p)).max() < 1e-12, (case, tree)


# Faults. Tables on which each shows well are fixed, since a random pair may hide one.


def share_noise(monkeypatch):
    monkeypatch.setattr(verify, "RESIDUAL", PROPOSAL)
    monkeypatch.setattr(verify, "mix", torch.zeros_like)
    return laws.sharing_noise


def keep_the_rejected(monkeypatch):
    """Not zeroing the rejected token in q; not renormalising the rest gives the same law, as only its size is then wrong."""
    original = verify.after_rejection
    monkeypatch.setattr(verify, "after_rejection", lambda p, q, token: (original(p, q, token)[0], q))
    return lambda p, q, width: laws.siblings(p, q, width, after=laws.residue_keeping_the_rejected)


def judge_at_another_temperature(monkeypatch):
    original = verify.Residual.verify
    warmed = lambda draft: replace(draft, logits=tuple(s / 1.25 for s in draft.logits))
    monkeypatch.setattr(verify.Residual, "verify", lambda self, draft, *rest: original(self, warmed(draft), *rest))

    def law(p, q, width):
        warmer = q**0.8
        return laws.siblings(p, q, width, judged_as=warmer / warmer.sum())

    return law


def draw_residual_from_target(monkeypatch):
    original = verify.after_rejection
    monkeypatch.setattr(verify, "after_rejection", lambda p, q, token: (p, original(p, q, token)[1]))
    return lambda p, q, width: laws.siblings(p, q, width, after=lambda p, q, x: (p, laws.residue(p, q, x)[1]))


FAULTS = [
    (share_noise, "chain4"),
    (keep_the_rejected, "siblings"),
    (judge_at_another_temperature, "chain4"),
    (draw_residual_from_target, "chain1"),
]


@pytest.mark.parametrize(("plant", "tree"), FAULTS)
def test_planted_fault_is_detected(plant, tree, seed, monkeypatch):
    """With the samples that its exact noncentrality asks for, each fault fails the test, and matches its own law meanwhile."""
    p, q = skewed(1)
    wrong = plant(monkeypatch)
    truth = laws.plain_law(laws_of(p, q, {"temperature": 1.0})[0])
    fault = laws.block_law(*laws_of(p, q, {"temperature": 1.0}), TREES[tree], wrong, 25)
    needed = int(np.ceil(150 / laws.noncentrality(fault, truth, 1)))
    print(f"{plant.__name__}: {needed} samples for a noncentrality of 150")
    assert needed <= 200_000, "the suite's 2e5 samples would miss it"
    blocks = max(needed, 20_000)
    counts, each = sample(p, q, blocks, TREES[tree], seed, verify="residual", temperature=1.0)
    assert laws.p_value(counts, truth) < 1e-4 / 24
    fault = laws.block_law(*laws_of(p, q, {"temperature": 1.0}), TREES[tree], wrong, each)
    assert laws.p_value(counts, fault) > 1e-5  # so it is this fault that was caught, and the enumeration is right about it
