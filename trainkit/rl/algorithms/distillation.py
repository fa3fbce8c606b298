"""On-policy distillation: the policy's own samples, scored token by token by a stronger teacher."""

# P prompts  G responses of a prompt  R responses  T response tokens, padded at the end

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.rl.algorithms.base import Algorithm, Terms
from trainkit.rl.types import PolicyTokens


class OnPolicyDistillation(Algorithm):
    """Mean over all tokens of the step of -A ratio, A = log(teacher / new) without gradient: reduces KL(policy || teacher).

    Agarwal et al. 2023, arXiv 2306.13649; in this form Lu et al. 2025 (thinkingmachines.ai/blog/on-policy-distillation). Each
    token has its own advantage, so there are no rewards and no groups, and one response to a prompt is enough. The teacher has
    the policy's vocabulary and temperature; `ref_RT` holds its log-probabilities. The metric `kl_ref_k1` (the mean of -A)
    estimates KL(policy || teacher) per token and must fall. `ReverseKL` over all logits of the
    teacher has less variance, but needs them at each sampled position.

    Args:
        mask_truncated: Whether responses cut by the length limit are left out of the loss.
    """

    mean_over = "tokens"
    needs_rewards = False
    needs_teacher = True

    def __init__(self, mask_truncated: bool = False) -> None:
        super().__init__(mask_truncated=mask_truncated)

    def advantages(self, rewards_PG: Tensor) -> Tensor:
        """Zeros: the loss takes its advantages from the teacher."""
        return torch.zeros_like(rewards_PG)

    def terms(self, tokens: PolicyTokens, log_ratio_RT: Tensor) -> Terms:
        assert tokens.ref_RT is not None
        never_RT = torch.zeros_like(log_ratio_RT, dtype=torch.bool)
        return Terms(-(tokens.ref_RT - tokens.new_RT).detach() * log_ratio_RT.exp(), never_RT, never_RT)
