"""What all algorithms share: advantages by group, the importance ratio, the KL term, sums for the reduction, and metrics.

An algorithm sees log-probabilities, advantages and a mask (`PolicyTokens`), and no model, text or reward function. It returns
the sum and the count of its published reduction over some responses. Both add up over micro-batches and ranks: the sum of all
sums divided by the sum of all counts is the published loss of the whole optimiser step.
"""

# P prompts  G responses of a prompt  R responses  T response tokens, padded at the end

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.losses.output import LossOutput
from trainkit.rl.types import PolicyTokens

T = TypeVar("T")
Scale = Literal["group", "batch", "none"]
EPS = 1e-4
"""Added to the standard deviation that divides rewards."""
MAX_LOG_RATIO = 20.0
"""Bound of |log-probability difference| before exp, as in verl."""


@dataclass(frozen=True)
class Terms:
    """The policy term of each token, before correction and reduction, and where a clip removes its gradient.

    Attributes:
        loss_RT: Value of each token, differentiable by `new_RT`.
        clip_low_RT: True where the ratio is below its lower bound and its gradient is 0.
        clip_high_RT: True where it is above its upper bound and its gradient is 0.
    """

    loss_RT: Tensor
    clip_low_RT: Tensor
    clip_high_RT: Tensor


class Algorithm(ABC):
    """Turns rewards into advantages, and response tokens into a loss.

    Args:
        beta: Weight of the KL divergence from the reference policy in the loss (estimator k3); 0 needs no reference.
        scale: What divides a reward minus its group's mean: the standard deviation of its `group`, that of all rewards of the
            generation on all ranks (`batch`), or nothing (`none`).
        mask_truncated: Whether responses cut by the length limit are left out of the loss; their rewards stay in the statistics
            of their group. The caller sets their mask to 0.

    Attributes:
        mean_over: The reduction: the mean over all `tokens` of the optimiser step, or over `responses` of the mean of each.
        needs_rewards: Whether advantages come from rewards, compared within a group of at least two responses.
        needs_teacher: Whether `ref_RT` holds the log-probabilities of a stronger teacher instead of the reference policy.
        dynamic_sampling: Whether groups without signal (`has_signal`, by the rewards before shaping) are replaced by others.
    """

    mean_over: ClassVar[Literal["responses", "tokens"]] = "responses"
    needs_rewards: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    dynamic_sampling: bool = False

    def __init__(self, beta: float = 0.0, scale: Scale = "group", mask_truncated: bool = False) -> None:
        self.beta = check(beta >= 0, "beta", beta, "at least 0")
        self.scale = check(scale in ("group", "batch", "none"), "scale", scale, "group, batch or none")
        self.mask_truncated = mask_truncated

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads log-probabilities of the reference policy, `ref_RT`."""
        return self.beta > 0

    # What a subclass defines

    @abstractmethod
    def terms(self, tokens: PolicyTokens, log_ratio_RT: Tensor) -> Terms:
        """The policy term of each token.

        Args:
            tokens: The tokens.
            log_ratio_RT: log(new / old), differentiable, within +-`MAX_LOG_RATIO`.
        """

    def count(self, mask_RT: Tensor) -> Tensor:
        """Denominator of the reduction: the number of tokens that count, or of responses that have one; adds up over ranks."""
        return mask_RT.sum() if self.mean_over == "tokens" else (mask_RT.sum(-1) > 0).sum().to(mask_RT.dtype)

    def weights(self, mask_RT: Tensor) -> Tensor:
        """Weight of each token in the sum: its mask, or mask / (tokens of its response) so that responses weigh the same."""
        return mask_RT if self.mean_over == "tokens" else mask_RT / mask_RT.sum(-1, keepdim=True).clamp(min=1)

    def shape_reward(self, length: int, limit: int) -> float:
        """What is added to the reward of a response of `length` tokens, before advantages; `limit` is the longest length."""
        return 0.0

    def set_limit(self, limit: int) -> None:
        """Takes the length limit of responses in tokens, before training; raises UserError if an option does not fit it."""
        self.shape_reward(0, limit)

    # What all share

    @torch.no_grad()
    def advantages(self, rewards_PG: Tensor) -> Tensor:
        """[P, G] advantage of each response: its reward minus the mean of its group, divided as `scale` says.

        (R - mean) / (std + 1e-4), std with Bessel's correction. A missing reward (NaN) has advantage 0 and is in no mean or
        std. A group with fewer than two rewards, or with equal rewards, has advantages of exactly 0.

        Args:
            rewards_PG: Rewards of whole groups; for `scale: batch` those of all groups of the generation, on all ranks.
        """
        valid_PG = rewards_PG.isfinite()
        known_PG, count_P1 = rewards_PG.double().masked_fill(~valid_PG, 0.0), valid_PG.sum(-1, keepdim=True)
        centred_PG = known_PG - known_PG.sum(-1, keepdim=True) / count_P1.clamp(min=1)
        centred_PG = centred_PG.where(valid_PG & has_signal(rewards_PG)[:, None], 0.0)
        if self.scale == "none":
            return centred_PG.to(rewards_PG.dtype)
        if self.scale == "group":
            variance = centred_PG.square().sum(-1, keepdim=True) / (count_P1 - 1).clamp(min=1)
        else:
            count = count_P1.sum()
            square = ((known_PG - known_PG.sum() / count.clamp(min=1)) * valid_PG).square().sum()
            variance = square / (count - 1).clamp(min=1)
        return (centred_PG / (variance.sqrt() + EPS)).to(rewards_PG.dtype)

    def loss(self, tokens: PolicyTokens) -> LossOutput:
        """The loss over these responses: its sum, `count(mask_RT)`, and metrics as sums over the N tokens that count.

        sum_it weights_it (correction_it policy_it + beta k3_it), with k3 = exp(d) - d - 1, d = log(ref / new).

        Metrics: `count_tokens` (N, the denominator of the others), `clip_low` and `clip_high` (tokens whose gradient a clip
        removes), `ratio` (new / old), and the estimators of two KL divergences in nats: `kl_old_k1` and `kl_old_k3` of
        KL(old || new), and, if `ref_RT` is given, `kl_ref_k1` and `kl_ref_k3` of KL(new || ref). Per token: `ratio`.
        """
        mask_RT = tokens.mask_RT
        log_ratio_RT = _difference(tokens.new_RT, tokens.old_RT)
        terms = self.terms(tokens, log_ratio_RT)
        loss_RT = terms.loss_RT if tokens.correction_RT is None else terms.loss_RT * tokens.correction_RT
        # Metrics.
        ratio_RT = log_ratio_RT.detach().exp()
        values = {
            "clip_low": terms.clip_low_RT,
            "clip_high": terms.clip_high_RT,
            "ratio": ratio_RT,
            "kl_old_k1": -log_ratio_RT.detach(),
            "kl_old_k3": k3(log_ratio_RT.detach()),
        }
        # The KL term.
        if tokens.ref_RT is not None:
            log_ref_RT = _difference(tokens.ref_RT, tokens.new_RT)
            k3_RT = k3(log_ref_RT)
            values |= {"kl_ref_k1": -log_ref_RT.detach(), "kl_ref_k3": k3_RT.detach()}
            if self.beta:
                loss_RT = loss_RT + self.beta * k3_RT
        else:
            assert not (self.needs_reference or self.needs_teacher), "the loss needs ref_RT"
        metrics = {name: (value_RT * mask_RT).sum() for name, value_RT in values.items()} | {"count_tokens": mask_RT.sum()}
        weights_RT = self.weights(mask_RT)
        return LossOutput((loss_RT * weights_RT).sum(), self.count(mask_RT), metrics, {"ratio": ratio_RT})


def clipped(ratio_RT: Tensor, advantage_RT: Tensor, low: float, high: float) -> Terms:
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), Schulman et al. 2017, arXiv 1707.06347."""
    loss_RT = -torch.minimum(ratio_RT * advantage_RT, ratio_RT.clamp(1 - low, 1 + high) * advantage_RT)
    below_RT, above_RT = ratio_RT.detach() < 1 - low, ratio_RT.detach() > 1 + high
    return Terms(loss_RT, below_RT & (advantage_RT < 0), above_RT & (advantage_RT > 0))


def k3(log_ratio: Tensor) -> Tensor:
    """exp(d) - d - 1, at most 10: with d = log(p / q) an unbiased estimate of KL(q || p) for samples of q, never negative."""
    return (log_ratio.exp() - log_ratio - 1).clamp(max=10.0)


def has_signal(rewards_PG: Tensor) -> Tensor:
    """[P] True for groups with at least two rewards that are not missing (NaN) and differ; the others have no gradient."""
    valid_PG = rewards_PG.isfinite()
    lowest_P = rewards_PG.masked_fill(~valid_PG, torch.inf).amin(-1)
    highest_P = rewards_PG.masked_fill(~valid_PG, -torch.inf).amax(-1)
    return lowest_P < highest_P


def check(fits: bool, name: str, value: T, allowed: str) -> T:
    """The value of an algorithm's option; raises UserError if it does not fit."""
    if not fits:
        raise UserError(f"model.algorithm.{name} is {value}; it must be {allowed}")
    return value


def _difference(x_RT: Tensor, y_RT: Tensor) -> Tensor:
    """X - y, within +-`MAX_LOG_RATIO`."""
    return (x_RT - y_RT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
