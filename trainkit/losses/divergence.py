"""Training losses of a draft q against a target p. The docstring of each class gives equation, gradient and source.

Each loss has two forms. Training uses the classes: `TV()(draft_hidden, draft_head, target_hidden, target_head, ids, mask,
labels)`, which never hold [tokens, vocabulary]. The functions take whole logits and run the same code with identity heads.
A loss is in nats (`tv` and `tvdpp` in probability), summed over counted tokens; softmaxes run in float32, or in float64 for
float64 logits. No gradient flows into the target. With a trimmed draft vocabulary S (`ids_K`) the draft has q = 0 outside S:
`tv`, `tvdpp` and `lk` compare with p over the whole vocabulary, which is exact; the KL losses and `jsd` compare with p
renormalised on S, because KL(p || q) would be infinite; `ce` does not count labels outside S.
For a teacher stored as its top k probabilities see `topk`.
Metrics: always `alpha` and `agreement`; `alpha_coupled` with `loss.measuring()`. No factor temperature^2 is applied.
"""

# B batch  T positions  V vocabulary  K columns of the draft  N tokens  n tokens of a chunk  D hidden  S draws per token

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.losses.chunked import ChunkedDivergence, Pair
from trainkit.losses.log_softmax import FLOOR
from trainkit.losses.output import LossOutput


class CrossEntropy(ChunkedDivergence):
    """Cross entropy of hard labels, in nats per token: -log q(label).

    The labels are `labels_N`, by default the target's argmax. With `target_head=None` there is no target: `labels_N` are
    required, `target_hidden_ND` is ignored (pass the draft's), and there are no metrics. With a trimmed vocabulary, labels
    outside it are not counted, in metrics neither. Gradient by logits: q - onehot(label).
    """

    hard_labels = True

    def value(self, pair: Pair) -> Tensor:
        assert pair.labels_n is not None
        return -pair.log_q_nK.gather(-1, pair.labels_n[:, None]).squeeze(-1)

    def gradient(self, pair: Pair) -> Tensor:
        assert pair.labels_n is not None
        q_nK = pair.log_q_nK.exp_()
        return q_nK.scatter_add_(-1, pair.labels_n[:, None], q_nK.new_full((q_nK.shape[0], 1), -1.0))


class ForwardKL(ChunkedDivergence):
    """KL(p || q), in nats per token: sum_v p_v (log p_v - log q_v). Covers all modes of the target.

    Hinton et al. 2015, arXiv 1503.02531. p is renormalised on a trimmed vocabulary. Gradient by logits: q - p.
    """

    def value(self, pair: Pair) -> Tensor:
        return _kl(pair)

    def gradient(self, pair: Pair) -> Tensor:
        return pair.log_q_nK.exp_().sub_(pair.inner_log_p_nK.exp_())


class ReverseKL(ChunkedDivergence):
    """KL(q || p), in nats per token: sum_v q_v (log q_v - log p_v). Seeks one mode; penalises tokens unlikely under p.

    Gu et al. 2023, arXiv 2306.08543. p is renormalised on a trimmed vocabulary; log p is floored at -100, so that a token
    with p = 0 costs 100 nats instead of infinity. Gradient by logits: q (log q - log p - KL).
    """

    def value(self, pair: Pair) -> Tensor:
        return _dot(pair.log_q_nK - pair.inner_log_p_nK.clamp(min=-100.0), pair.log_q_nK.exp()).squeeze(-1)

    def gradient(self, pair: Pair) -> Tensor:
        excess_nK = pair.inner_log_p_nK.clamp_(min=-100.0).neg_().add_(pair.log_q_nK)
        q_nK = pair.log_q_nK.exp_()
        return excess_nK.sub_(_dot(excess_nK, q_nK)).mul_(q_nK)


class JSD(ChunkedDivergence):
    """Generalised Jensen-Shannon divergence, in nats per token.

    beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. Agarwal et al. 2023 (GKD), arXiv 2306.13649.
    Divided by beta it tends to KL(p || q) as beta -> 0, divided by 1 - beta to KL(q || p) as beta -> 1.
    p is renormalised on a trimmed vocabulary. Gradient by logits: (1 - beta) q (log(q/m) - KL(q || m)).

    Args:
        beta: Weight of the target in the mixture, strictly between 0 and 1.
    """

    def __init__(self, beta: float = 0.5, **common: Any) -> None:
        super().__init__(**common)
        if not 0 < beta < 1:
            raise UserError(f"jsd's beta is {beta}; it must be strictly between 0 and 1 (its ends are forward and reverse KL)")
        self.beta = beta

    def value(self, pair: Pair) -> Tensor:
        p_nK, q_nK = pair.inner_log_p_nK.exp(), pair.log_q_nK.exp()
        mixture_nK = self._mixture(p_nK.clone(), q_nK)
        target = torch.xlogy(p_nK, p_nK / mixture_nK).sum(-1)
        return self.beta * target + (1 - self.beta) * torch.xlogy(q_nK, q_nK / mixture_nK).sum(-1)

    def gradient(self, pair: Pair) -> Tensor:
        q_nK = pair.log_q_nK.exp_()
        mixture_nK = self._mixture(pair.inner_log_p_nK.exp_(), q_nK)
        excess_nK = torch.xlogy(q_nK, torch.div(q_nK, mixture_nK, out=mixture_nK))
        return excess_nK.sub_(q_nK.mul_(excess_nK.sum(-1, keepdim=True))).mul_(1 - self.beta)

    def _mixture(self, p_nK: Tensor, q_nK: Tensor) -> Tensor:
        """The mixture m, written over p; never 0, so that 0/m is 0 where both underflow."""
        return p_nK.mul_(self.beta).add_(q_nK, alpha=1 - self.beta).clamp_(min=torch.finfo(p_nK.dtype).tiny)


class TV(ChunkedDivergence):
    """Total variation distance, in probability per token; 1 - tv is the acceptance rate alpha.

    sum_v max(0, p_v - q_v) = 1 - sum_v min(p_v, q_v). Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6. Over the whole
    vocabulary, even if the draft's is trimmed. Gradient: -E_{x~q}[r(x) grad log q(x)], r(x) = 1{p(x) > q(x)}; by logits
    -q (r - E_q r), which vanishes where q is 0 at all tokens with p > 0: start from a draft trained by `forward_kl`.
    """

    def value(self, pair: Pair) -> Tensor:
        return 1.0 - pair.alpha_n

    def gradient(self, pair: Pair) -> Tensor:
        return _tv_gradient(pair)


class TVDpp(ChunkedDivergence):
    """TVD++: TV's value in probability per token, with the advantage-normalised policy gradient.

    grad = -E_{x~q}[A(x) grad log q(x)], A = (r - mu) / (sigma + eps), r(x) = 1{p(x) > q(x)}; mu and sigma, detached, are the
    q-weighted mean and standard deviation of r. Direct Alignment of Draft Model, arXiv 2403.00858 (the form of the advantage is
    from memory, not checked against the paper). p is not renormalised on a trimmed vocabulary.
    With `estimator="exact"` mu cancels and 1/(sigma + eps) remains: `normalise="batch"` is then TV times a constant, the
    same training under Adam; `position` gives tokens with rare or almost certain reward more weight than TV does.
    The defaults are the best measured (recipes/studies/losses, 14M target, 3 seeds), by alpha at temperature 1: exact position
    0.611, sampled (8) batch 0.595, plain TV 0.605, forward KL 0.587, JSD 0.612; at temperature 0 forward KL and JSD are 0.01
    ahead.

    `normalise="batch"` needs statistics of the whole optimiser step (`spans_batch`): gather them over all micro-batches with
    `first_pass()`, add over ranks, then train with `with_statistics(sums, count)`. Otherwise each call uses its own statistics.

    Args:
        estimator: `exact` sums over the vocabulary; `sampled` uses `samples` draws from q by torch's global generator.
        normalise: Scope of mu and sigma: the whole optimiser step (`batch`) or each position (`position`).
        samples: Number of draws per token for `sampled`.
        eps: Constant added to sigma.
    """

    def __init__(
        self,
        estimator: Literal["exact", "sampled"] = "exact",
        normalise: Literal["batch", "position"] = "position",
        samples: int = 8,
        eps: float = 1e-6,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if estimator not in ("exact", "sampled") or normalise not in ("batch", "position"):
            raise UserError(
                f"tvdpp: estimator {estimator!r} must be exact or sampled, normalise {normalise!r} must be batch or position"
            )
        if samples < 1:
            raise UserError(f"tvdpp's samples is {samples}; it must be at least 1")
        self.estimator, self.normalise, self.samples, self.eps = estimator, normalise, samples, eps
        self.spans_batch = normalise == "batch"
        self._totals: Mapping[str, Tensor] | None = None

    def first_pass(self) -> Callable[..., LossOutput]:
        """A callable like this loss, without gradient, whose metrics include the sums for `with_statistics`."""
        other = copy.copy(self)
        other.gathers = True
        return torch.no_grad()(other.__call__)

    def with_statistics(self, sums: Mapping[str, Tensor], count: Tensor) -> TVDpp:
        """A copy that normalises by these totals: `sums["reward"]` over `count` tokens; other sums are ignored."""
        other = copy.copy(self)
        other._totals = {"reward": sums["reward"].detach(), "count": count.detach()}
        return other

    def uniforms(self, tokens: int, like_ND: Tensor) -> Tensor | None:
        if self.estimator == "exact":
            return None
        dtype = torch.promote_types(like_ND.dtype, torch.float32)
        return torch.rand(tokens, self.samples, device=like_ND.device, dtype=dtype)

    def moments(self, pair: Pair) -> Mapping[str, Tensor]:
        if not self.spans_batch:
            return {}
        rewarded_nK = pair.log_q_nK.masked_fill(pair.log_p_nK <= pair.log_q_nK, FLOOR)
        return {"reward": rewarded_nK.exp_().sum(-1)}  # r is 0 or 1, so its mean gives its standard deviation

    def value(self, pair: Pair) -> Tensor:
        return 1.0 - pair.alpha_n

    def gradient(self, pair: Pair) -> Tensor:
        q_nK, rewarded_nK, mean_n1 = _rewards(pair)
        if self.normalise == "batch":
            totals = self._totals or pair.totals
            mean = (totals["reward"] / totals["count"].clamp(min=1)).to(q_nK.dtype)
        else:
            mean = mean_n1
        scale = 1.0 / ((mean * (1.0 - mean)).clamp(min=0.0).sqrt() + self.eps)
        if self.estimator == "exact":
            return q_nK.mul_(mean_n1).sub_(rewarded_nK).mul_(scale)
        assert pair.uniforms_nS is not None
        cumulative_nK = q_nK.cumsum(-1)
        draws_nS = torch.searchsorted(cumulative_nK, pair.uniforms_nS * cumulative_nK[:, -1:], right=True)
        draws_nS.clamp_(max=q_nK.shape[-1] - 1)
        advantage_nS = ((rewarded_nK.gather(-1, draws_nS) > 0).to(q_nK.dtype) - mean) * (scale / self.samples)
        return q_nK.mul_(advantage_nS.sum(-1, keepdim=True)).scatter_add_(-1, draws_nS, -advantage_nS)


class LK(ChunkedDivergence):
    """Acceptance likelihood, in nats per token: -log alpha, alpha = sum_v min(p_v, q_v).

    Its gradient is TV's divided by alpha, which gives tokens with low acceptance more weight. `hybrid` is
    lam KL(p || q) + (1 - lam) TV, lam = exp(-eta alpha) detached: KL while alpha is low, TV later. alpha is exact on a trimmed
    vocabulary; the KL of `hybrid` renormalises p there.

    Args:
        hybrid: Whether to blend KL and TV instead of -log alpha.
        eta: Rate at which `hybrid` moves from KL to TV as alpha grows.
    """

    def __init__(self, hybrid: bool = False, eta: float = 3.0, **common: Any) -> None:
        super().__init__(**common)
        self.hybrid, self.eta = hybrid, eta

    def value(self, pair: Pair) -> Tensor:
        if not self.hybrid:
            return -_log_alpha(pair).squeeze(-1)
        return torch.lerp(1.0 - pair.alpha_n, _kl(pair), torch.exp(-self.eta * pair.alpha_n))

    def gradient(self, pair: Pair) -> Tensor:
        if self.hybrid:
            kl_share = torch.exp(-self.eta * pair.alpha_n)[:, None]
            kl_nK = pair.log_q_nK.exp().sub_(pair.inner_log_p_nK.exp()).mul_(kl_share)
            return _tv_gradient(pair).mul_(1.0 - kl_share).add_(kl_nK)
        # min(p, q) / alpha where p > q, and 0 elsewhere; in logs, because alpha may underflow.
        share_nK = (pair.log_q_nK - _log_alpha(pair)).exp_().masked_fill_(pair.log_p_nK <= pair.log_q_nK, 0.0)
        return pair.log_q_nK.exp_().mul_(share_nK.sum(-1, keepdim=True)).sub_(share_nK)


def _kl(pair: Pair) -> Tensor:
    return _dot(pair.inner_log_p_nK - pair.log_q_nK, pair.inner_log_p_nK.exp()).squeeze(-1)


def _rewards(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Q, q r with r(x) = 1{p(x) > q(x)}, and its sum, the mean of r under q; overwrites the pair."""
    reward_nK = pair.log_p_nK.gt_(pair.log_q_nK)
    q_nK = pair.log_q_nK.exp_()
    rewarded_nK = reward_nK.mul_(q_nK)
    return q_nK, rewarded_nK, rewarded_nK.sum(-1, keepdim=True)


def _tv_gradient(pair: Pair) -> Tensor:
    q_nK, rewarded_nK, mean_n1 = _rewards(pair)
    return q_nK.mul_(mean_n1).sub_(rewarded_nK)


def _dot(x_nK: Tensor, y_nK: Tensor) -> Tensor:
    """[n, 1] sums over K of x y; not a matrix product, which would run in TF32 or, under autocast, in bfloat16."""
    return (x_nK * y_nK).sum(-1, keepdim=True)


def _log_alpha(pair: Pair) -> Tensor:
    return torch.minimum(pair.log_p_nK, pair.log_q_nK).logsumexp(-1, keepdim=True).clamp(max=0.0)


def _on_logits(name: str, loss_class: Callable[..., ChunkedDivergence]) -> Callable[..., LossOutput]:
    def function(draft_BTV: Tensor, target_BTV: Tensor, mask_BT: Tensor, **options: Any) -> LossOutput:
        loss, draft_NV, mask_N = loss_class(**options), draft_BTV.flatten(0, -2), mask_BT.flatten()
        _same(draft_BTV.shape[:-1], mask_BT.shape, "mask")
        if loss.hard_labels and not target_BTV.is_floating_point():
            _same(draft_BTV.shape[:-1], target_BTV.shape, "labels")
            return loss(draft_NV, _identity, draft_NV, None, None, mask_N, target_BTV.flatten())
        if draft_BTV.shape[-1] != target_BTV.shape[-1]:
            sizes = f"draft vocabulary {draft_BTV.shape[-1]} differs from the target's {target_BTV.shape[-1]}"
            raise UserError(f"{sizes}; pass logits over the same vocabulary")
        _same(draft_BTV.shape, target_BTV.shape, "target logits")
        return loss(draft_NV, _identity, target_BTV.flatten(0, -2), _identity, None, mask_N)

    function.__name__ = name
    function.__doc__ = f"""`{loss_class.__name__}` over whole logits; see that class for equation and unit.

    Args:
        draft_BTV: Draft logits.
        target_BTV: Target logits over the same vocabulary, without gradient; for `ce` also integer labels [B, T].
        mask_BT: True where the token counts.
        options: Arguments of the class, among them `chunk` and `temperature`.

    Raises:
        UserError: the shapes do not fit.
    """
    return function


ce = _on_logits("ce", CrossEntropy)
"""`CrossEntropy` over whole logits (draft_BTV, labels_BT or target_BTV, mask_BT), in nats per unmasked token."""
forward_kl = _on_logits("forward_kl", ForwardKL)
"""`ForwardKL` over whole logits (draft_BTV, target_BTV, mask_BT), in nats per unmasked token."""
reverse_kl = _on_logits("reverse_kl", ReverseKL)
"""`ReverseKL` over whole logits (draft_BTV, target_BTV, mask_BT), in nats per unmasked token."""
jsd = _on_logits("jsd", JSD)
"""`JSD` over whole logits (draft_BTV, target_BTV, mask_BT), in nats per unmasked token."""
tv = _on_logits("tv", TV)
"""`TV` over whole logits (draft_BTV, target_BTV, mask_BT), in probability per unmasked token."""
tvdpp = _on_logits("tvdpp", TVDpp)
"""`TVDpp` over whole logits (draft_BTV, target_BTV, mask_BT), in probability per unmasked token."""
lk = _on_logits("lk", LK)
"""`LK` over whole logits (draft_BTV, target_BTV, mask_BT), in nats per unmasked token."""


def _same(expected: torch.Size, given: torch.Size, what: str) -> None:
    if expected != given:
        raise UserError(f"{what} have shape {tuple(given)}, but the draft logits need {tuple(expected)}; make them equal")


def _identity(logits: Tensor) -> Tensor:
    return logits
