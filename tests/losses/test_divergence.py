from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.eager import LOSSES, eager
from trainkit.losses import divergence as D
from trainkit.losses.divergence import JSD, ForwardKL, LossOutput, ReverseKL, TVDpp

# Worked by hand for p = (1/2, 1/4, 1/4), q = (1/8, 1/8, 3/4).
P, Q = torch.tensor([[[1 / 2, 1 / 4, 1 / 4]]]), torch.tensor([[[1 / 8, 1 / 8, 3 / 4]]])
ONE = torch.ones(1, 1, dtype=torch.bool)
LN2, LN3 = math.log(2), math.log(3)
KL_PQ = 1 / 2 * math.log(4) + 1 / 4 * LN2 + 1 / 4 * math.log(1 / 3)
KL_QP = 1 / 8 * math.log(1 / 4) + 1 / 8 * math.log(1 / 2) + 3 / 4 * LN3
KL_PM = 1 / 2 * math.log(8 / 5) + 1 / 4 * math.log(4 / 3) + 1 / 4 * math.log(1 / 2)  # m = (5/16, 3/16, 1/2)
KL_QM = 1 / 8 * math.log(2 / 5) + 1 / 8 * math.log(2 / 3) + 3 / 4 * math.log(3 / 2)
LAM = math.exp(-3 * 1 / 2)
BY_HAND = [
    ("forward_kl", {}, KL_PQ),
    ("reverse_kl", {}, KL_QP),
    ("jsd", {}, (KL_PM + KL_QM) / 2),
    ("tv", {}, 3 / 8 + 1 / 8),
    ("tvdpp", {}, 1 / 2),
    ("lk", {}, LN2),
    ("lk", {"hybrid": True}, LAM * KL_PQ + (1 - LAM) / 2),
    ("ce", {}, math.log(8)),  # the target's argmax is token 0
]
FUNCTIONS = ["ce", "forward_kl", "reverse_kl", "jsd", "tv", "tvdpp", "lk"]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_value_by_hand(name, options, expected):
    """The value of every divergence equals the one computed by hand."""
    output = getattr(D, name)(Q.log() + 3.0, P.log() - 1.0, ONE, **options)  # logits: shifts change nothing
    assert output.mean.item() == pytest.approx(expected, abs=1e-6)
    assert output.metrics["alpha"].item() == pytest.approx(1 / 2, abs=1e-6)
    assert output.metrics["agreement"].item() == 0


def test_gradient_of_tv_and_tvdpp_by_hand():
    """The gradients of TV and TVD++ equal those computed by hand."""
    logits = Q.double().log().requires_grad_()
    # r = (1, 1, 0), mu = 1/4: -q (r - mu) = (-3/32, -3/32, 3/16); sigma = sqrt(3)/4
    (tv,) = torch.autograd.grad(D.tv(logits, P.double().log(), ONE).mean, logits)
    (tvdpp,) = torch.autograd.grad(D.tvdpp(logits, P.double().log(), ONE, eps=0.0).mean, logits)
    expected = torch.tensor([-3 / 32, -3 / 32, 3 / 16], dtype=torch.float64)
    torch.testing.assert_close(tv[0, 0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(tvdpp, tv / (math.sqrt(3) / 4), rtol=1e-7, atol=0)


def test_reverse_kl_counts_an_impossible_token_as_100_nats():
    """Reverse KL counts a token that the target excludes as 100 nats."""
    logits = torch.zeros(1, 1, 2, requires_grad=True)  # q = (1/2, 1/2), p = (1, 0)
    output = D.reverse_kl(logits, torch.tensor([[[0.0, -torch.inf]]]), ONE)
    output.sum.backward()
    assert output.sum.item() == pytest.approx(100 / 2 - LN2, rel=1e-6)
    assert logits.grad is not None and logits.grad.flatten().tolist() == pytest.approx([-25.0, 25.0], rel=1e-6)


def test_ce_uses_labels_and_counts_only_the_mask():
    """Cross-entropy uses the labels and counts only unmasked tokens."""
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, -5.0]]])
    output = D.ce(logits, torch.tensor([[1, 1]]), torch.tensor([[True, False]]))
    assert output.mean.item() == pytest.approx(-math.log(3 / 4)) and output.count.item() == 1
    assert output.metrics == {}  # no target to compare with


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradient_equals_finite_differences(seed, name, temperature):
    """The gradient of every divergence equals finite differences."""
    draft, target = (torch.randn(4, 7, dtype=torch.float64) for _ in range(2))
    labels, weight = target.argmax(-1), torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    logits = draft.clone().requires_grad_()
    loss = type_with(LOSSES[name], temperature=temperature)
    (gradient,) = torch.autograd.grad(loss(logits, identity, target, identity, None, weight.bool()).sum, logits)
    step = 1e-6
    for i in range(draft.numel()):
        nudge = torch.zeros(draft.numel(), dtype=torch.float64)
        nudge[i] = step
        up, down = (
            eager(name, draft + s * nudge.view_as(draft), target, labels, weight, None, temperature, draft) for s in (1, -1)
        )
        if name.startswith("tvdpp"):  # its value is TV's; only the surrogate moves
            up, down = (surrogate(name, draft + s * nudge.view_as(draft), target, weight, temperature, draft) for s in (1, -1))
        # central differences: error about step^2 + 1e-16 / step
        assert gradient.flatten()[i].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=2e-8)


def surrogate(name: str, draft: Tensor, target: Tensor, weight: Tensor, temperature: float, frozen: Tensor) -> Tensor:
    """-sum sg[q A] log q, without TV's value, which the loss has as well."""
    p, q = (target / temperature).softmax(-1), (frozen / temperature).softmax(-1)
    reward = (p > q).double()
    mu = (q * reward).sum(-1, keepdim=True)
    if name == "tvdpp_batch":
        mu = (mu[:, 0] * weight).sum() / weight.sum()
    advantage = (reward - mu) / ((mu - mu**2).sqrt() + 1e-6)
    return -((q * advantage * (draft / temperature).log_softmax(-1)).sum(-1) * weight).sum()


def identity(logits: Tensor) -> Tensor:
    return logits


def type_with(loss: D.ChunkedDivergence, **values: object) -> D.ChunkedDivergence:
    other = loss.measuring(coupled=False)
    for name, value in values.items():
        setattr(other, name, value)
    return other


def test_tv_gradient_is_a_policy_gradient(seed):
    """The gradient of TV is the policy gradient with reward 1 where p > q."""
    draft, target = torch.randn(3, 40, dtype=torch.float64, requires_grad=True), torch.randn(3, 40, dtype=torch.float64)
    ours = torch.autograd.grad(D.tv(draft[None], target[None], torch.ones(1, 3).bool()).sum, draft)[0]
    p, q = target.softmax(-1), draft.detach().softmax(-1)
    policy = -(q * (p > q) * draft.log_softmax(-1)).sum()  # E_{x~q}[r grad log q], written as a sum over x
    torch.testing.assert_close(ours, torch.autograd.grad(policy, draft)[0], rtol=0, atol=1e-10)


def whole(draft: Tensor, target: Tensor, loss: D.ChunkedDivergence) -> tuple[LossOutput, Tensor]:
    logits = draft.clone().requires_grad_()
    output = loss(logits, identity, target, identity)
    return output, torch.autograd.grad(output.sum, logits)[0]


def test_tvdpp_gradient_is_a_scaled_tv_gradient(seed):
    """TVD++ with the exact sum: value of TV; gradient of TV times a constant (batch) or a factor per token (position)."""
    draft, target = torch.randn(16, 30, dtype=torch.float64), torch.randn(16, 30, dtype=torch.float64)
    (tv, tv_gradient), (batch, batch_gradient) = (whole(draft, target, loss) for loss in (D.TV(), TVDpp(normalise="batch")))
    position, position_gradient = whole(draft, target, TVDpp(normalise="position"))
    assert batch.sum.item() == position.sum.item() == tv.sum.item()
    ratio = batch_gradient / tv_gradient
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-9, atol=0)
    weights = position_gradient / tv_gradient
    torch.testing.assert_close(weights, weights[:, :1].expand_as(weights), rtol=1e-9, atol=0)  # one factor per token ...
    assert weights[:, 0].std() > 1e-3 * weights[:, 0].mean()  # ... but not the same for all
    mu = (draft.softmax(-1) * (target.softmax(-1) > draft.softmax(-1))).sum(-1)
    torch.testing.assert_close(weights[:, 0], 1 / ((mu * (1 - mu)).sqrt() + 1e-6), rtol=1e-9, atol=0)


@pytest.mark.parametrize("normalise", ["batch", "position"])
def test_sampled_tvdpp_is_unbiased(seed, normalise):
    """The mean of sampled TVD++ gradients is the exact gradient."""
    draft, target = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    exact = whole(draft, target, TVDpp(normalise=normalise))[1]
    draws = torch.stack([whole(draft, target, TVDpp("sampled", normalise, samples=16))[1] for _ in range(400)])
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 5 * error + 1e-12).all()


def test_baseline_reduces_sampled_gradient_variance(seed):
    """Compared with the same draws and A = r / (sigma + eps), which has the same expectation (the mean cancels)."""
    draft = torch.randn(1, 12, dtype=torch.float64)
    target = draft + 0.3 * torch.randn(1, 12, dtype=torch.float64)
    q = draft.softmax(-1)
    reward = (target.softmax(-1) > q).double()
    mu = (q * reward).sum()
    if mu < 0.5:  # the claim holds for a frequent reward; swap the roles to get one
        draft, target = target, draft
        q = draft.softmax(-1)
        reward = (target.softmax(-1) > q).double()
        mu = (q * reward).sum()
    sigma = (mu * (1 - mu)).sqrt()
    ours, plain = [], []
    for i in range(600):
        torch.manual_seed(seed + i)
        logits = draft.clone().requires_grad_()
        output = D.tvdpp(logits[None], target[None], ONE, estimator="sampled", samples=1)
        ours.append(torch.autograd.grad(output.sum, logits)[0])
        torch.manual_seed(seed + i)
        uniform = torch.rand(1, 1, dtype=torch.float64)
        x = torch.searchsorted(q.cumsum(-1), uniform, right=True)
        plain.append((q - torch.zeros_like(q).scatter_(-1, x, 1.0)) * reward.gather(-1, x) / sigma)
    variance = [torch.stack(gradients).var(0).sum().item() for gradients in (ours, plain)]
    assert variance[0] < 0.9 * variance[1]  # at mu = 1/2, E A^2 halves


def test_sampled_draws_do_not_depend_on_the_chunk_size(seed):
    """The draws come from the generator and do not depend on the chunk size."""
    draft, target = torch.randn(10, 50), torch.randn(10, 50)
    gradients = []
    for chunk in (3, 10):
        torch.manual_seed(seed)
        gradients.append(whole(draft, target, TVDpp("sampled", samples=4, chunk=chunk))[1])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert not torch.equal(
        gradients[0], whole(draft, target, TVDpp("sampled", samples=4, chunk=3))[1]
    )  # new draws in the next call


def test_jsd_tends_to_both_kls(seed):
    """JSD divided by beta tends to forward KL for beta near 0, and to reverse KL for beta near 1."""
    draft, target = torch.randn(8, 20, dtype=torch.float64), torch.randn(8, 20, dtype=torch.float64)
    beta = 1e-6
    for loss, limit in ((JSD(beta=beta), ForwardKL()), (JSD(beta=1 - beta), ReverseKL())):
        ours, theirs = whole(draft, target, loss), whole(draft, target, limit)
        torch.testing.assert_close(ours[0].sum / beta, theirs[0].sum, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours[1] / beta, theirs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_empty_mask_gives_zero_loss_and_gradients(seed, name):
    """An empty mask gives a loss of 0 and gradients of 0."""
    logits = torch.randn(2, 3, 5, requires_grad=True)
    output = getattr(D, name)(logits, torch.randn(2, 3, 5), torch.zeros(2, 3).bool())
    output.mean.backward()
    assert output.mean.item() == 0 and output.count.item() == 0
    assert logits.grad is not None and (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LOSSES, "tvdpp_sampled"])
def test_extreme_logits_stay_finite(seed, name, dtype):
    """Loss, metrics and gradient stay finite for extreme logits."""
    loss = LOSSES.get(name) or TVDpp("sampled")
    draft, target = torch.randn(4, 9), torch.randn(4, 9)
    draft[0, 0], draft[0, 1], target[0, 0], target[0, 1] = 1e4, -1e4, -1e4, 1e4
    target[1, 2:] = -torch.inf
    target[2] = draft[2]
    draft[3] = 0
    target[3], target[3, 4] = -torch.inf, 0.0
    logits = draft.to(dtype).clone().requires_grad_()
    output = loss.measuring()(logits, identity, target.to(dtype), identity)
    output.sum.backward()
    assert output.sum.isfinite() and all(value.isfinite() for value in output.metrics.values())
    assert logits.grad is not None and logits.grad.isfinite().all()
    # and with a trimmed vocabulary in which the target has probability 0 in row 1
    trimmed = draft[:, 3:7].detach().clone().requires_grad_()
    output = loss.measuring()(trimmed, identity, target, identity, ids_K=torch.tensor([3, 4, 5, 6]))
    output.sum.backward()
    assert output.sum.isfinite() and trimmed.grad is not None and trimmed.grad.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_target_has_no_gradient_and_softmax_is_float32(seed, name):
    """No gradient flows into the target, and the softmax is computed in float32."""
    draft, target = (torch.randn(1, 6, 40).bfloat16().requires_grad_() for _ in range(2))
    output = getattr(D, name)(draft, target, torch.ones(1, 6).bool())
    output.mean.backward()
    assert target.grad is None and draft.grad is not None
    assert output.sum.dtype == torch.float32
    again = getattr(D, name)(draft.detach().float(), target.detach().float(), torch.ones(1, 6).bool())
    assert output.sum.item() == again.sum.item()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vocabularies_of_unequal_size_are_refused(name):
    """Distributions over vocabularies of different sizes are refused."""
    with pytest.raises(ValueError, match="5 differs from the target's 6"):
        getattr(D, name)(torch.zeros(1, 2, 5), torch.zeros(1, 2, 6), torch.ones(1, 2).bool())


def test_invalid_arguments_are_refused():
    """Invalid arguments and masks of another shape are refused."""
    for make in (lambda: JSD(beta=1.0), lambda: TVDpp(samples=0), lambda: D.TV(chunk=0), lambda: D.TV(temperature=0.0)):
        with pytest.raises(ValueError):
            make()
    with pytest.raises(ValueError, match="mask have shape"):
        D.tv(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5), torch.ones(3, 2).bool())
