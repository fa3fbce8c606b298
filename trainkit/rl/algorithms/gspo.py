"""GSPO: one importance ratio for a whole response."""

# R responses  T response tokens, padded at the end

from __future__ import annotations

from torch import Tensor

from trainkit.rl.algorithms.base import Scale, Terms, clipped
from trainkit.rl.algorithms.grpo import GRPO
from trainkit.rl.types import PolicyTokens


class GSPO(GRPO):
    """Mean over responses of -min(s A, clip(s, 1 - low, 1 + high) A), s = exp(mean over tokens of log(new / old)).

    Zheng et al. 2025, arXiv 2507.18071. Computed for each token with s_it = s / sg(p_it) p_it (p_it its probability, sg without
    gradient), the paper's GSPO-token: the same value and gradient if a response's tokens share one advantage, and also defined
    if they do not. Clip bounds are narrow because s is a geometric mean.

    Args:
        clip_low: The response's ratio is clipped below 1 - clip_low.
        clip_high: The response's ratio is clipped above 1 + clip_high.
        beta: Weight of the KL divergence from the reference policy in the loss (estimator k3); 0 needs no reference.
        scale: What divides a reward minus its group's mean: the standard deviation of its `group`, that of all rewards of the
            generation (`batch`), or nothing (`none`).
        mask_truncated: Whether responses cut by the length limit are left out of the loss.
    """

    def __init__(
        self,
        clip_low: float = 3e-4,
        clip_high: float = 4e-4,
        beta: float = 0.0,
        scale: Scale = "group",
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(clip_low, clip_high, beta, scale, mask_truncated)

    def terms(self, tokens: PolicyTokens, log_ratio_RT: Tensor) -> Terms:
        mean_R1 = (log_ratio_RT.detach() * self.weights(tokens.mask_RT)).sum(-1, keepdim=True)
        ratio_RT = (mean_R1 + log_ratio_RT - log_ratio_RT.detach()).exp()
        return clipped(ratio_RT, tokens.advantage_RT, self.clip_low, self.clip_high)
