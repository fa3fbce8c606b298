from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from tests.support.eager import LOSSES, eager
from trainkit.losses.divergence import JSD, LK, TV, ChunkedDivergence, CrossEntropy, ForwardKL, LossOutput, ReverseKL, TVDpp
from trainkit.losses.log_softmax import FLOOR
from trainkit.losses.topk import TopKHead, compress

# N tokens  V vocabulary  K columns of a trimmed draft  k stored tokens
N, V, K, k = 13, 23, 9, 6
WITH_SAMPLED = {**LOSSES, "tvdpp_sampled": TVDpp("sampled")}


def identity(logits: Tensor) -> Tensor:
    return logits


def with_settings(loss: ChunkedDivergence, chunk: int = 1024, temperature: float = 1.0) -> ChunkedDivergence:
    other = copy.copy(loss).measuring()
    other.chunk, other.temperature = chunk, temperature
    return other


class Case:
    """Random logits in float64 with a random mask."""

    def __init__(self, seed: int, trimmed: bool = False, stored: int = k) -> None:
        self.seed = seed
        self.ids = torch.randperm(V)[:K] if trimmed else None
        self.draft = torch.randn(N, K if trimmed else V, dtype=torch.float64)
        self.target = 1.5 * torch.randn(N, V, dtype=torch.float64)
        self.mask = torch.rand(N) < 0.7
        self.mask[3] = True
        self.labels = torch.randint(V, (N,))
        self.stored(stored)

    def stored(self, stored: int) -> None:
        self.rows, self.head = compress(self.target, stored, torch.float64), TopKHead(stored, V)

    def run(self, loss: ChunkedDivergence, whole: bool = False, labelled: bool = True) -> tuple[LossOutput, Tensor]:
        """The loss and its gradient by the draft's logits."""
        logits, labels = self.draft.clone().requires_grad_(), self.labels if labelled else None
        torch.manual_seed(self.seed)  # for the draws of a sampled gradient
        teacher = (self.target, identity) if whole else (self.rows, self.head)
        output = loss(logits, identity, *teacher, self.ids, self.mask, labels)  # type: ignore[arg-type]
        return output, torch.autograd.grad(output.sum, logits)[0]

    def merged(self, name: str, draft: Tensor, frozen: Tensor) -> Tensor:
        """The loss over buckets: the stored tokens, the rest, and last the tokens outside a trimmed vocabulary."""
        ids = torch.arange(V) if self.ids is None else self.ids
        if name == "ce":
            column = (ids[None] == self.labels[:, None]).int().argmax(-1)
            return eager(name, draft, self.target, column, self.mask & torch.isin(self.labels, ids), self.ids)
        p, top, nothing = self.target.softmax(-1), self.target.topk(k).indices, -600.0  # finite: no 0 log 0 here
        inside = torch.isin(top, ids)
        some = (ids[None, :, None] != top[:, None]).all(-1)  # columns of the rest
        outside = p.gather(-1, top).masked_fill(inside, 0).sum(-1)
        rest = 1 - p.gather(-1, top).sum(-1)
        outside, rest = outside + rest * ~some.any(-1), rest * some.any(-1)
        stored = p.gather(-1, top).log().masked_fill(~inside, nothing)
        target = torch.cat([stored, rest.log()[:, None], outside.log()[:, None]], -1).clamp(min=nothing)

        def buckets(logits: Tensor) -> Tensor:
            log_q = logits.log_softmax(-1)
            whole = log_q.new_full((N, V), nothing).index_copy(-1, ids, log_q)
            rest = log_q.masked_fill(~some, nothing).logsumexp(-1, keepdim=True)
            return torch.cat([whole.gather(-1, top), rest], -1)

        weight = self.mask.double()
        return eager(name, buckets(draft), target, self.labels, weight, torch.arange(k + 1), 1.0, buckets(frozen))


def same(ours: tuple[LossOutput, Tensor], theirs: tuple[LossOutput, Tensor], **tolerance: float) -> None:
    (output, gradient), (expected, expected_gradient) = ours, theirs
    assert output.metrics.keys() == expected.metrics.keys() >= {"alpha", "agreement", "alpha_coupled"}
    assert output.count.item() == expected.count.item()
    torch.testing.assert_close(output.sum, expected.sum, **tolerance)  # type: ignore[arg-type]
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)  # type: ignore[arg-type]
    for name, values in expected.per_token.items():
        torch.testing.assert_close(output.per_token[name], values, **tolerance)  # type: ignore[arg-type]


def test_one_stored_token_by_hand():
    """With one stored token, values, gradients and metrics equal those computed by hand."""
    p = torch.tensor([[1 / 2, 1 / 8, 1 / 4, 1 / 8]], dtype=torch.float64)
    q = torch.tensor([[1 / 8, 1 / 8, 1 / 4, 1 / 2]], dtype=torch.float64)
    rows = compress(p.log() + 5.0, 1, torch.float64)  # logits: a shift changes nothing
    assert rows[0].tolist() == pytest.approx([0, -math.log(2), -math.log(2)])
    # Buckets p = (1/2, 1/2), q = (1/8, 7/8); q within the rest: 1/7, 2/7, 4/7.
    kl = 1 / 2 * math.log(4) + 1 / 2 * math.log(4 / 7)
    by_hand = [
        (ForwardKL(), kl, [-3 / 8, 3 / 56, 6 / 56, 12 / 56]),  # q - p = (-3/8, 3/8)
        (TV(), 3 / 8, [-7 / 64, 1 / 64, 2 / 64, 4 / 64]),  # r = (1, 0), E_q r = 1/8: -q (r - 1/8) = (-7/64, 7/64)
        (LK(), -math.log(5 / 8), [-7 / 40, 1 / 40, 2 / 40, 4 / 40]),  # TV's by 5/8
        (CrossEntropy(), math.log(8), [-7 / 8, 1 / 8, 2 / 8, 4 / 8]),
    ]
    for loss, value, gradient in by_hand:
        logits = q.log().requires_grad_()
        output = loss.measuring()(logits, identity, rows, TopKHead(1, 4))
        output.sum.backward()
        assert output.sum.item() == pytest.approx(value)
        assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx(gradient)
        assert output.metrics["alpha"].item() == pytest.approx(5 / 8) and output.metrics["agreement"].item() == 0
        # q/p = 1/4, 7/4; P = 1/2, 1; Q after = 7/8, 0
        assert output.metrics["alpha_coupled"].item() == pytest.approx(1 / (1 + 7) + 1 / (2 + 0))


@pytest.mark.parametrize("stored", [1, 5, 39, 40])
def test_rows_hold_the_top_tokens_and_lowest_tied_ids(seed, stored):
    """Rows hold the most probable tokens; of equal ones those with the lowest ids."""
    logits = (3 * torch.randn(50, 40)).round()  # full of ties
    logits[0], logits[1, :30] = 0, -torch.inf
    rows = compress(logits.bfloat16(), stored)
    assert rows.shape == (50, 2 * stored + 1) and rows.dtype == torch.float32
    teacher = TopKHead(stored, 40)(rows)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :stored]
    assert torch.equal(teacher.ids_nk, order) and torch.equal(teacher.ids_nk[:, 0], logits.argmax(-1))
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(teacher.log_p_nk, log_p.gather(-1, order).clamp(min=FLOOR), rtol=0, atol=1e-6)
    total = teacher.log_p_nk.exp().sum(-1) + teacher.log_rest_n.exp()
    torch.testing.assert_close(total, torch.ones(50), rtol=0, atol=1e-6)  # float32 sums
    assert (teacher.log_rest_n == FLOOR).all() == (stored == 40) and rows.isfinite().all()


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", WITH_SAMPLED)
def test_storing_all_tokens_equals_the_full_teacher(seed, name, trimmed):
    """A teacher with all tokens stored gives the same bits as the full teacher."""
    case = Case(seed, trimmed, stored=V)
    for labelled in (False, True):
        loss = with_settings(WITH_SAMPLED[name], chunk=5)
        same(case.run(loss, labelled=labelled), case.run(loss, whole=True, labelled=labelled), rtol=0, atol=0)
    loss = with_settings(WITH_SAMPLED[name], temperature=0.7)
    if name != "tvdpp_sampled":  # its draws may change by rounding
        same(case.run(loss), case.run(loss, whole=True), rtol=1e-11, atol=1e-13)  # one softmax more, in float64


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_equal_merged_buckets(seed, name, trimmed):
    """Value and gradient are those of the distributions with all other tokens merged into one."""
    case = Case(seed, trimmed)
    output, gradient = case.run(LOSSES[name])
    logits = case.draft.clone().requires_grad_()
    total = case.merged(name, logits, case.draft)
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(output.sum, total.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    if name.startswith("tvdpp"):
        return  # its value is TV's, but the gradient is that of the surrogate, compared above
    step = 1e-6
    for i in torch.randperm(case.draft.numel())[:40].tolist():
        nudge = torch.zeros(case.draft.numel(), dtype=torch.float64)
        nudge[i] = step
        up, down = (case.merged(name, case.draft + s * nudge.view_as(case.draft), case.draft) for s in (1, -1))
        # central differences: error about step^2 + 1e-15 / step
        assert gradient.flatten()[i].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=5e-8)


@pytest.mark.parametrize("trimmed", [False, True])
def test_stored_losses_are_bounds_that_tighten_with_k(seed, trimmed):
    """Losses from stored tokens are lower bounds, and acceptance an upper one, that tighten with k."""
    case = Case(seed, trimmed)
    losses: dict[str, ChunkedDivergence] = {"tv": TV(), "tvdpp": TVDpp(), "lk": LK()}
    if not trimmed:
        losses |= {"forward_kl": ForwardKL(), "reverse_kl": ReverseKL(), "jsd": JSD(beta=0.3)}
    for name, loss in losses.items():
        alone = with_settings(loss, chunk=1)
        values, alphas = [], []
        for stored in range(1, V + 1):
            case.stored(stored)
            teacher = (case.rows, case.head)
            each = [alone(case.draft[i : i + 1], identity, teacher[0][i : i + 1], teacher[1], case.ids) for i in range(N)]
            values.append(torch.stack([output.sum for output in each]))
            alphas.append(torch.stack([output.metrics["alpha"] for output in each]))
        bound, alpha = torch.stack(values), torch.stack(alphas)  # [k, N], one value per token
        assert (bound.diff(dim=0) >= -1e-12).all() and (alpha.diff(dim=0) <= 1e-12).all(), name
        assert (bound[0] < bound[-1] - 1e-6).any() and (alpha[0] > alpha[-1] + 1e-6).any(), name  # not tight at k = 1


def test_agreement_is_exact_for_any_k(seed):
    """Agreement is exact however many tokens are stored."""
    case = Case(seed, trimmed=True)
    case.draft = case.target[:, case.ids].clone()  # they agree if the choice is in the draft's vocabulary
    whole = case.run(ForwardKL(), whole=True)[0].per_token["agreement"]
    assert whole.any()
    for stored in (1, 4, V):
        case.stored(stored)
        assert torch.equal(case.run(ForwardKL())[0].per_token["agreement"], whole)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("trimmed", [False, True])
def test_cross_entropy_is_exact_with_one_stored_token(seed, trimmed, labelled):
    """Cross-entropy is exact with one stored token."""
    case = Case(seed, trimmed, stored=1)
    (ours, gradient), (theirs, expected) = (case.run(CrossEntropy(chunk=4), whole, labelled) for whole in (False, True))
    assert ours.count.item() == theirs.count.item() and ours.sum.item() == theirs.sum.item()
    assert torch.equal(gradient, expected) and torch.equal(ours.metrics["agreement"], theirs.metrics["agreement"])


@pytest.mark.parametrize("name", LOSSES)
def test_fully_stored_draft_vocabulary_is_exact(seed, name):
    """If all ids of a trimmed draft vocabulary are stored, every loss is exact."""
    case = Case(seed, trimmed=True)
    assert case.ids is not None
    case.target[:, case.ids] += 20  # all of S is stored, so that the rest is outside
    case.target[:, (case.ids[0] + 1) % V] += 18  # and a likely token outside S
    case.stored(K + 2)
    loss = with_settings(LOSSES[name], chunk=5)
    same(case.run(loss), case.run(loss, whole=True), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("name", WITH_SAMPLED)
def test_chunk_size_changes_nothing(seed, name, trimmed):
    """The chunk size changes neither value nor gradient."""
    case = Case(seed, trimmed)
    expected = case.run(with_settings(WITH_SAMPLED[name]))
    for chunk in (1, 4):
        same(case.run(with_settings(WITH_SAMPLED[name], chunk)), expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalise", ["batch", "position"])
def test_sampled_tvdpp_is_unbiased(seed, normalise):
    """The mean of sampled TVD++ gradients is the exact gradient."""
    case = Case(seed)
    exact = case.run(TVDpp(normalise=normalise))[1]
    draws = []
    for case.seed in range(seed, seed + 400):
        draws.append(case.run(TVDpp("sampled", normalise, samples=16))[1])
    error = torch.stack(draws).std(0) / math.sqrt(len(draws))
    assert ((torch.stack(draws).mean(0) - exact).abs() < 5.5 * error + 1e-12).all()  # 299 entries


def test_batch_statistics_over_micro_batches_are_exact(seed):
    """Batch statistics over two micro-batches equal those of one batch."""
    case = Case(seed)
    loss, first = TVDpp(normalise="batch", chunk=3), TVDpp(normalise="batch", chunk=3).first_pass()
    expected = case.run(loss)[1]
    logits, parts, outputs = case.draft.clone().requires_grad_(), [slice(0, 5), slice(5, N)], []
    for part in parts:
        outputs.append(first(logits[part], identity, case.rows[part], case.head, None, case.mask[part]))
    sums = {"reward": torch.stack([output.metrics["reward"] for output in outputs]).sum()}
    final = loss.with_statistics(sums, torch.stack([output.count for output in outputs]).sum())
    for part in parts:
        final(logits[part], identity, case.rows[part], case.head, None, case.mask[part]).sum.backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WITH_SAMPLED)
def test_extreme_logits_stay_finite(seed, name, dtype):
    """Loss, metrics and gradient stay finite for extreme logits."""
    draft, target = torch.randn(6, 9), torch.randn(6, 9)
    draft[0, 0], draft[0, 1], target[0, 0], target[0, 1] = 1e4, -1e4, -1e4, 1e4
    target[1, 2:] = -torch.inf  # nothing in the rest
    target[2] = draft[2]
    draft[3], draft[3, 4] = -torch.inf, 0.0  # q is 0 on the rest, or on all of it but one token
    target[3, 4] = 9.0
    draft[4, target[4].topk(3).indices] = -torch.inf  # ... or on all stored tokens
    target[5], target[5, 4] = -torch.inf, 0.0
    for ids in (None, torch.tensor([3, 5, 8, 6])):
        logits = (draft if ids is None else draft[:, ids].nan_to_num(neginf=-1e4)).to(dtype, copy=True).requires_grad_()
        loss = WITH_SAMPLED[name].measuring()
        output = loss(logits, identity, compress(target.to(dtype), 3), TopKHead(3, 9), ids)
        output.sum.backward()
        assert output.sum.isfinite() and all(value.isfinite() for value in output.metrics.values())
        assert logits.grad is not None and logits.grad.isfinite().all()
        assert output.sum.dtype == torch.float32


def test_float16_rows_hold_a_small_vocabulary(seed):
    """Rows in float16 hold the ids and probabilities of a small vocabulary."""
    case = Case(seed, stored=V)
    case.target[:, 2] = -torch.inf
    narrow = compress(case.target, V, torch.float16)
    assert narrow.isneginf().any()  # the floor is out of float16's range; the head puts it back
    teacher = TopKHead(V, V)(narrow)
    assert teacher.log_p_nk.dtype == torch.float32 and teacher.log_p_nk.min() == FLOOR
    log_p = teacher.log_probabilities(case.draft, None, 1.0)
    torch.testing.assert_close(log_p.exp(), case.target.softmax(-1).float(), rtol=0, atol=4e-3)  # float16 logs down to -10


def test_empty_mask_gives_zero_loss_and_gradients(seed):
    """Without an unmasked token loss and gradients are 0."""
    case = Case(seed)
    case.mask[:] = False
    output, gradient = case.run(TVDpp())
    assert output.mean.item() == 0 and output.count.item() == 0 and (gradient == 0).all()
    assert compress(case.target[:0], k).shape == (0, 2 * k + 1)


def test_mismatched_rows_and_settings_are_refused(seed):
    """Rows, temperatures and dtypes that do not fit are refused."""
    case = Case(seed)
    with pytest.raises(ValueError, match=f"k is {V + 1}; .* {V} tokens"):
        compress(case.target, V + 1)
    with pytest.raises(ValueError, match="k is 0"):
        TopKHead(0, V)
    for loss in (ForwardKL(temperature=0.7), CrossEntropy(temperature=0.7)):
        with pytest.raises(ValueError, match=f"{k} of {V} probabilities, at temperature 1; .* 0.7 needs all {V}"):
            case.run(loss)
    rows = case.rows
    case.rows = rows[:, 1:]
    with pytest.raises(ValueError, match=f"rows of {2 * k} numbers; k = {k} makes {2 * k + 1}"):
        case.run(TV())
    with pytest.raises(ValueError, match="bfloat16, which rounds ids of 128256 tokens"):
        TopKHead(k, 128256)(rows.bfloat16())
    with pytest.raises(AssertionError, match="cannot hold the ids"):
        compress(torch.zeros(1, 3000), 2, torch.float16)
    case.rows, case.draft = rows, case.draft[:, 1:]
    with pytest.raises(ValueError, match=f"{V - 1} differs from the target's {V}"):
        case.run(TV())
