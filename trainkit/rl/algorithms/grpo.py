"""GRPO: the clipped policy gradient with advantages relative to the group."""

# R responses  T response tokens, padded at the end

from __future__ import annotations

from torch import Tensor

from trainkit.rl.algorithms.base import Algorithm, Scale, Terms, check, clipped
from trainkit.rl.types import PolicyTokens


class GRPO(Algorithm):
    """Mean over responses of the mean over a response's tokens of -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta k3.

    ratio = new / old per token; A = (R - mean) / (std + 1e-4) of the group. Shao et al. 2024, arXiv 2402.03300. In the first
    minibatch of a generation the ratio is 1, and the gradient is the plain policy gradient, -A grad log-probability.

    Args:
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        beta: Weight of the KL divergence from the reference policy in the loss (estimator k3); 0 needs no reference.
            The paper uses 0.04, later work mostly 0.
        scale: What divides a reward minus its group's mean: the standard deviation of its `group`, that of all rewards of the
            generation (`batch`), or nothing (`none`).
        mask_truncated: Whether responses cut by the length limit are left out of the loss.
    """

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        scale: Scale = "group",
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(beta, scale, mask_truncated)
        self.clip_low = check(0 < clip_low <= 1, "clip_low", clip_low, "above 0 and at most 1")
        self.clip_high = check(clip_high > 0, "clip_high", clip_high, "above 0")

    def terms(self, tokens: PolicyTokens, log_ratio_RT: Tensor) -> Terms:
        return clipped(log_ratio_RT.exp(), tokens.advantage_RT, self.clip_low, self.clip_high)
