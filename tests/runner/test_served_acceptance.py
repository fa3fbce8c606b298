"""Acceptance beside its exact value: at the nodes that the runner evaluated, and teacher-forced on given texts."""

import pytest

from tests.support.models import pair, ragged_prompts
from tests.support.served_acceptance import served_acceptance, teacher_forced_acceptance
from trainkit.errors import UserError
from trainkit.eval.bench.identity import logits
from trainkit.losses.measures import acceptance, coupled_acceptance


@pytest.mark.parametrize("verify", ["coupled", "residual"])
def test_observed_acceptance_equals_the_exact_value(verify, seed):
    """One run in 16,000 fails by chance; the standard error is small enough to detect a wrong rule."""
    runner = pair(noise=0.06, ends=(), max_batch=48)
    found = served_acceptance(runner, ragged_prompts(48), max_new_tokens=48, temperature=1.0, depth=3, verify=verify, seed=seed)
    assert found.evaluated > 1000 and found.standard_error < 0.02
    assert abs(found.deviation) < 4, found
    assert found.expected == (found.alpha if verify == "residual" else found.alpha_coupled)
    assert found.alpha_coupled <= found.alpha + 1e-9, "sharing noise never accepts more than the best coupling"
    assert runner.observe is None


def test_greedy_acceptance_is_agreement(seed):
    """At temperature 0 acceptance is exactly the argmax agreement."""
    found = served_acceptance(pair(ends=()), ragged_prompts(8), max_new_tokens=32, depth=3)
    assert found.observed == found.expected and 0 < found.observed < 1 and found.standard_error == 0


def test_teacher_forced_acceptance_by_hand(seed):
    """By hand: a forward pass of each model; distributions at the positions whose next token is in the continuation."""
    runner = pair(noise=0.06, ends=())
    prompt, continuation, temperature = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5], 0.7
    found = teacher_forced_acceptance(runner, [prompt], [continuation], temperature)
    text, evaluated = [*prompt, *continuation], slice(len(prompt) - 1, len(prompt) + len(continuation) - 1)
    p = (logits(runner.rounds.target, text)[evaluated] / temperature).softmax(-1)
    q = (logits(runner.drafter.decoder, text)[evaluated] / temperature).softmax(-1)  # pyright: ignore[reportOptionalMemberAccess]
    assert found["count"] == len(continuation)
    assert found["alpha"] == pytest.approx(float(acceptance(p, q).mean()), abs=1e-5)
    assert found["alpha_coupled"] == pytest.approx(float(coupled_acceptance(p, q).mean()), abs=1e-5)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()), abs=1e-6)


def test_served_acceptance_needs_a_drafter_and_a_chain():
    """Without a drafter, and on a tree, served acceptance is refused."""
    with pytest.raises(UserError, match="drafter"):
        served_acceptance(pair(noise=None), [[1]])
    with pytest.raises(UserError, match="chains"):
        served_acceptance(pair(), [[1]], max_new_tokens=8, tree=((0,), (1,)))
    with pytest.raises(UserError, match="1 prompts but 0"):
        teacher_forced_acceptance(pair(), [[1]], [])
