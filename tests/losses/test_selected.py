from __future__ import annotations

import pytest
import torch
from torch import nn

from trainkit.losses.selected import selected_logprobs

N, V, D = 23, 31, 8


def dense(hidden, weight, labels, temperature):
    """Whole log-probabilities, by autograd."""
    logp = torch.log_softmax(
        torch.nn.functional.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature, -1
    )
    return logp.gather(-1, labels[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1).detach()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_selected_equals_dense_value_and_gradient(seed, chunk, temperature):
    """Chunked log-probabilities equal dense ones in value, entropy, and gradient by hidden states and head, in any chunk."""
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    labels, upstream = torch.randint(V, (N,)), torch.randn(N, dtype=torch.float64)
    results = []
    for form in (dense, lambda h, w, y, t: selected_logprobs(h, lambda x: x @ w.T, y, t, chunk)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = form(h, w, labels, temperature)
        assert not entropy.requires_grad
        (logp * upstream).sum().backward()
        results.append((logp.detach(), entropy, h.grad, w.grad))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)  # float64; only the order of sums differs


def test_selected_gradient_equals_finite_differences(seed):
    """The gradient of log-probabilities equals finite differences."""
    weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    hidden, labels = torch.randn(5, D, dtype=torch.float64, requires_grad=True), torch.randint(V, (5,))
    assert torch.autograd.gradcheck(lambda h, w: selected_logprobs(h, lambda x: x @ w.T, labels, 0.7, 2)[0], (hidden, weight))


def test_selected_gradient_of_tied_head(seed):
    """A head tied to the embedding gets the gradients of both of its uses."""
    embedding, labels = nn.Embedding(V, D), torch.randint(V, (N,))
    tokens, weights = torch.randint(V, (N,)), torch.randn(N)
    gradients = []
    for chunked in (False, True):
        embedding.weight.grad = None
        hidden = torch.tanh(embedding(tokens))
        head = lambda x: torch.nn.functional.linear(x, embedding.weight)
        logp = (
            selected_logprobs(hidden, head, labels, chunk=6)[0] if chunked else dense(hidden, embedding.weight, labels, 1.0)[0]
        )
        (logp * weights).sum().backward()
        gradients.append(embedding.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)  # float32 sums of 23 rows in another order


def test_selected_is_float32_for_bfloat16_hidden(seed):
    """Bfloat16 logits are normalised in float32, and the gradient has the dtype of the hidden states."""
    hidden = torch.randn(N, D).bfloat16().requires_grad_()
    head, labels = nn.Linear(D, V, bias=False).bfloat16(), torch.randint(V, (N,))
    logp, entropy = selected_logprobs(hidden, head, labels, chunk=7)
    expected = torch.log_softmax(head(hidden).float(), -1)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(
        logp, expected.gather(-1, labels[:, None]).squeeze(-1), rtol=0, atol=1e-6
    )  # same float32 operations
    gradient, weight = torch.autograd.grad(logp.sum(), [hidden, head.weight])
    exact = torch.autograd.grad(expected.gather(-1, labels[:, None]).sum(), [hidden, head.weight])
    assert gradient.dtype == torch.bfloat16
    for ours, theirs in zip((gradient, weight), exact, strict=True):  # chunks are added in bfloat16, which has 8 bits
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.1)


def test_selected_runs_head_once_without_gradient(seed):
    """The head runs once per chunk without gradient, once more in backward, and never on more rows than a chunk."""
    rows: list[int] = []
    linear = nn.Linear(D, V)

    def head(x):
        rows.append(len(x))
        return linear(x)

    with torch.no_grad():
        plain, _ = selected_logprobs(torch.ones(10, D), head, torch.zeros(10, dtype=torch.long), chunk=4)
    assert rows == [4, 4, 2] and not plain.requires_grad
    rows.clear()
    selected_logprobs(torch.ones(10, D), head, torch.zeros(10, dtype=torch.long), chunk=4)[0].sum().backward()
    assert sorted(rows) == [2, 2, 4, 4, 4, 4]


def test_selected_of_no_tokens_is_empty():
    """No tokens give no values, and a backward pass that works."""
    head = nn.Linear(D, V)
    logp, entropy = selected_logprobs(torch.zeros(0, D), head, torch.zeros(0, dtype=torch.long))
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and head.weight.grad is not None and not head.weight.grad.any()
