from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.losses.measures import acceptance, agreement, coupled_acceptance


def race_agreement(p: torch.Tensor, q: torch.Tensor, draws: int) -> tuple[float, float]:
    """Share of `draws` in which argmax(log p + G) = argmax(log q + G) with the same Gumbel noise G, and its standard error."""
    noise = -torch.log(torch.empty(draws, p.numel(), dtype=torch.float64).exponential_())
    share = ((p.log() + noise).argmax(-1) == (q.log() + noise).argmax(-1)).double().mean().item()
    return share, math.sqrt(share * (1 - share) / draws) + 1e-9


def test_measures_by_hand():
    """Acceptance, coupled acceptance and agreement equal those computed by hand."""
    p, q = torch.tensor([1 / 2, 1 / 4, 1 / 4]), torch.tensor([1 / 8, 1 / 8, 3 / 4])
    assert acceptance(p, q).item() == pytest.approx(1 / 8 + 1 / 8 + 1 / 4)
    # q/p = 1/4, 1/2, 3: already sorted. P = 1/2, 3/4, 1; Q after = 7/8, 3/4, 0.
    by_hand = 1 / (1 + 7) + 1 / (3 + 6) + 1 / (4 + 0)
    assert coupled_acceptance(p, q).item() == pytest.approx(by_hand)
    assert coupled_acceptance(p.flip(0), q.flip(0)).item() == pytest.approx(by_hand)
    assert not agreement(p, q)


@pytest.mark.parametrize("zeros", ["none", "p", "q", "both", "all_but_one_p"])
def test_coupled_acceptance_is_shared_noise_agreement(seed, zeros):
    """Coupled acceptance is the probability that choices with shared noise agree."""
    p, q = (torch.randn(12, dtype=torch.float64).mul(1.5).softmax(-1) for _ in range(2))
    if zeros in ("p", "both"):
        p[:4] = 0
    if zeros in ("q", "both"):
        q[2:7] = 0
    if zeros == "all_but_one_p":
        p[1:] = 0
    p, q = p / p.sum(), q / q.sum()
    share, error = race_agreement(p, q, 200_000)
    assert abs(coupled_acceptance(p, q).item() - share) < 4.5 * error


def test_coupled_acceptance_is_continuous_at_zero(seed):
    """Coupled acceptance is continuous where a probability goes to 0."""
    p, q = (torch.randn(9, dtype=torch.float64).softmax(-1) for _ in range(2))
    for side in (p, q):
        at_zero, near = side.clone(), side.clone()
        at_zero[3], near[3] = 0, 1e-12
        there, close = ((x, q) if side is p else (p, x) for x in (at_zero, near))
        assert coupled_acceptance(*there).item() == pytest.approx(coupled_acceptance(*close).item(), abs=1e-10)


def test_coupled_acceptance_is_exact_in_float32(seed):
    """Over nine orders of magnitude, with p = q at some tokens and zeros in p or q at others."""
    p, q = (torch.randn(40, 3000).mul(4).softmax(-1) for _ in range(2))
    q[:, :50] = p[:, :50]
    p[:, 100:700], q[:, 500:1200] = 0, 0
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    exact = coupled_acceptance(p.double(), q.double())
    torch.testing.assert_close(coupled_acceptance(p, q).double(), exact, rtol=2e-5, atol=1e-6)


def test_trimmed_distributions_give_exact_acceptance(seed):
    """Acceptance over the draft's ids alone equals the one over the whole vocabulary."""
    p, q = torch.randn(6, 20, dtype=torch.float64).softmax(-1), torch.zeros(6, 20, dtype=torch.float64)
    ids = torch.randperm(20)[:7]
    q[:, ids] = torch.randn(6, 7, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(coupled_acceptance(p[:, ids], q[:, ids]), coupled_acceptance(p, q), rtol=0, atol=1e-12)
    torch.testing.assert_close(acceptance(p[:, ids], q[:, ids]), acceptance(p, q), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 3000), scale=st.floats(0.01, 30), double=st.booleans())
def test_coupled_acceptance_is_between_its_bounds(seed, vocabulary, scale, double):
    """Coupled acceptance lies between alpha / (2 - alpha) and alpha."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(4, vocabulary, generator=generator, dtype=torch.float64).mul(scale).softmax(-1) for _ in range(2))
    if not double:
        p, q = p.float(), q.float()
    alpha, coupled = acceptance(p, q), coupled_acceptance(p, q)
    slack = 1e-12 if double else 2e-6  # float32 sums of probabilities
    assert (coupled <= alpha + slack).all()
    assert (coupled >= alpha / (2 - alpha) - slack).all()


def test_equal_distributions_are_always_accepted(seed):
    """Equal distributions have acceptance 1."""
    p = torch.randn(5, 1000).mul(4).softmax(-1)
    torch.testing.assert_close(coupled_acceptance(p, p), torch.ones(5), rtol=0, atol=2e-6)  # float32 sums of 1000 terms
    torch.testing.assert_close(acceptance(p, p), torch.ones(5), rtol=0, atol=2e-6)


def test_agreement_breaks_ties_by_the_lowest_id():
    """Agreement breaks ties by the lowest id."""
    target = torch.tensor([[0.0, 2.0, 2.0, 1.0], [0.0, 1.0, 2.0, 2.0]])
    assert agreement(target, torch.tensor([[0.0, 5.0, 5.0, 5.0], [0.0, 5.0, 5.0, 5.0]])).tolist() == [True, False]
    ids = torch.tensor([2, 1, 0])  # columns out of order: the tie of columns 0 and 1 is won by id 1, column 1
    assert agreement(target, torch.tensor([[3.0, 3.0, 0.0], [3.0, 3.0, 0.0]]), ids).tolist() == [True, False]
