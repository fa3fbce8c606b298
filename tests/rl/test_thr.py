from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.rl.thr import THR

DOUBLE = torch.float64
TOKENS = [torch.tensor([0, 2]), torch.tensor([0]), torch.tensor([1, 3])]
HIDDEN = [
    torch.tensor([[1, 0], [0.5, 1]], dtype=DOUBLE),
    torch.tensor([[1, 0.5]], dtype=DOUBLE),
    torch.tensor([[1, 0], [0, 1]], dtype=DOUBLE),
]
LOGITS = torch.tensor([[2, 1, 0, -1], [0, 1, 1, 0], [1, 1, 0, 0], [2, 1, 0, -1], [0, 0, 1, 1]], dtype=DOUBLE)
CORRECT = [True, True, False]
ADVANTAGE = [
    torch.full((2,), 0.577250, dtype=DOUBLE),
    torch.full((1,), 0.577250, dtype=DOUBLE),
    torch.full((2,), -1.154501, dtype=DOUBLE),
]


def given_logits(hidden: Tensor) -> Tensor:
    """The logits of the worked example, which no linear head of its hidden states gives."""
    assert len(hidden) == 5
    return LOGITS


class Group:
    """A random group: 4 responses of 1 to 6 tokens over a vocabulary of 12, with hidden states of width 5."""

    def __init__(self) -> None:
        sizes = torch.randint(1, 7, (4,)).tolist()
        self.tokens = [torch.randint(12, (size,)) for size in sizes]
        self.hidden = [torch.randn(size, 5, dtype=DOUBLE) for size in sizes]
        self.weight = torch.randn(12, 5, dtype=DOUBLE)
        self.correct = [True, False, True, False]

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


@pytest.mark.parametrize(
    ("p", "kept"), [(0.0, (0.577250, -1.154501)), (0.1, (0.634975, -1.269951)), (-0.1, (0.519525, -1.039051))]
)
def test_thr_equals_worked_example(p, kept):
    """The influence of each token, and the advantages for three values of p, worked by hand."""
    influence = THR(p).influence(HIDDEN, TOKENS, given_logits, CORRECT)
    for found, expected in zip(influence, ([0.421240, 0.335696], [0.870213], [0.933009, 0.161165]), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-6)
    found = THR(p).reweight(HIDDEN, TOKENS, given_logits, CORRECT, ADVANTAGE)
    for ours, expected in zip(found, ([kept[0], 0], [kept[0]], [kept[1], 0]), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=1e-6)
    # tau: the mean of .378468 and .870213 is .624340, above both tokens of the first response
    found = THR(p, tau="mean").reweight(HIDDEN, TOKENS, given_logits, CORRECT, ADVANTAGE)
    assert [row.ne(0).tolist() for row in found] == [[False, False], [True], [True, False]]


def test_influence_equals_pairwise_double_sum(seed):
    """The influence through M equals the sum over pairs of tokens, of (g . g') (h . h')."""
    group = Group()
    distinct = torch.cat(group.tokens).unique()

    def restricted(response: int) -> Tensor:
        probabilities = group.head(group.hidden[response]).softmax(-1)
        return (torch.nn.functional.one_hot(group.tokens[response], 12) - probabilities)[:, distinct]

    for j, found in enumerate(THR(chunk=3).influence(group.hidden, group.tokens, group.head, group.correct)):
        expected = torch.zeros(len(found), dtype=DOUBLE)
        for i in (0, 2):
            similar = (restricted(j) @ restricted(i).T) * (group.hidden[j] @ group.hidden[i].T)
            expected += (1 if group.correct[j] else -1) * similar.sum(-1) / len(group.tokens[i])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # float64, another order of sums


def test_influence_predicts_likelihood_of_correct_responses(seed):
    """A small step that raises a correct token's likelihood by its head gradient changes correct responses by its THR."""
    group = Group()
    group.tokens = [torch.arange(12).roll(shift)[: len(tokens)] for shift, tokens in enumerate(group.tokens)]
    group.tokens[0], group.hidden[0] = torch.arange(12), torch.randn(12, 5, dtype=DOUBLE)  # so that no token is left out
    weight = group.weight.clone().requires_grad_()

    def logp(response: int) -> Tensor:
        return (group.hidden[response] @ weight.T).log_softmax(-1).gather(-1, group.tokens[response][:, None]).squeeze(-1)

    (correct,) = torch.autograd.grad(logp(0).mean() + logp(2).mean(), weight)
    for j, found in enumerate(THR().influence(group.hidden, group.tokens, group.head, group.correct)):
        for k, score in enumerate(found):
            (own,) = torch.autograd.grad(logp(j)[k], weight)
            sign = 1 if group.correct[j] else -1  # the advantage moves a wrong response's tokens down
            assert score.item() == pytest.approx(sign * (own * correct).sum().item(), abs=1e-10)


def test_thr_scales_by_the_sign_of_large_influence(seed):
    """Tokens above tau in size are scaled by 1 + p or 1 - p after the sign of their influence; the others get 0."""
    group, thr = Group(), THR(0.25)
    advantage = [torch.ones(len(tokens), dtype=DOUBLE) for tokens in group.tokens]
    influence = thr.influence(group.hidden, group.tokens, group.head, group.correct)
    tau = min(influence[0].mean(), influence[2].mean())
    found = thr.reweight(group.hidden, group.tokens, group.head, group.correct, advantage)
    for row, scores in zip(found, influence, strict=True):
        expected = [0.0 if abs(score) <= tau else 1.25 if score > 0 else 0.75 for score in scores.tolist()]
        assert row.tolist() == expected


def test_thr_skips_groups_of_one_kind(seed):
    """A group whose responses with tokens are all correct or all wrong keeps its advantages."""
    group = Group()
    advantage = [torch.randn(len(tokens), dtype=DOUBLE) for tokens in group.tokens]
    for correct in ([True] * 4, [False] * 4):
        found = THR(0.1).reweight(group.hidden, group.tokens, group.head, correct, advantage)
        assert all(torch.equal(x, y) for x, y in zip(found, advantage, strict=True))
    tokens, hidden, part = ([values[0][:0], *values[1:]] for values in (group.tokens, group.hidden, advantage))
    for correct in ([True, False, False, False], [False, True, True, True]):
        found = THR(0.1).reweight(hidden, tokens, group.head, correct, part)
        assert all(torch.equal(x, y) for x, y in zip(found, part, strict=True))
    assert len(THR(0.1).reweight(hidden, tokens, group.head, group.correct, part)[0]) == 0


def test_thr_refuses_graded_rewards():
    """Graded rewards need a threshold; missing rewards are not correct."""
    assert THR().correct([1.0, 0.0, float("nan")]) == [True, False, False]
    assert THR(threshold=0.5).correct([0.7, 0.2, float("nan")]) == [True, False, False]
    with pytest.raises(UserError, match=r"THR needs rewards of 0 or 1, not 0.7; set model.reweight.threshold"):
        THR().correct([1.0, 0.7])
    with pytest.raises(UserError, match=r"model.reweight.p is 2; it must be between -1 and 1"):
        THR(p=2)
    with pytest.raises(UserError, match=r"model.reweight.tau is 'max'; it must be min or mean"):
        THR(tau="max")  # type: ignore[arg-type]
