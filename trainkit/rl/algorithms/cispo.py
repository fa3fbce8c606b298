"""CISPO: the policy gradient weighted by a clipped importance ratio, so that every token keeps its gradient."""

# R responses  T response tokens, padded at the end

from __future__ import annotations

from torch import Tensor

from trainkit.rl.algorithms.base import Algorithm, Scale, Terms, check
from trainkit.rl.types import PolicyTokens


class CISPO(Algorithm):
    """Mean over all tokens of the step of -w A log-probability, w = clip(ratio, min_ratio, max_ratio) without gradient.

    MiniMax 2025, arXiv 2506.13585. The defaults bound the ratio only above, as TRL does; verl bounds it by 0.8 and 1.28. The
    metrics `clip_low` and `clip_high` count the tokens with a bounded weight.

    Args:
        min_ratio: Lower bound of the weight; 0 for none.
        max_ratio: Upper bound of the weight.
        beta: Weight of the KL divergence from the reference policy in the loss (estimator k3); 0 needs no reference.
        scale: What divides a reward minus its group's mean: the standard deviation of its `group`, that of all rewards of the
            generation (`batch`), or nothing (`none`).
        mask_truncated: Whether responses cut by the length limit are left out of the loss.
    """

    mean_over = "tokens"

    def __init__(
        self,
        min_ratio: float = 0.0,
        max_ratio: float = 5.0,
        beta: float = 0.0,
        scale: Scale = "group",
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(beta, scale, mask_truncated)
        self.min_ratio = check(0 <= min_ratio <= 1, "min_ratio", min_ratio, "between 0 and 1")
        self.max_ratio = check(max_ratio >= 1, "max_ratio", max_ratio, "at least 1")

    def terms(self, tokens: PolicyTokens, log_ratio_RT: Tensor) -> Terms:
        ratio_RT = log_ratio_RT.detach().exp()
        weight_RT = ratio_RT.clamp(self.min_ratio, self.max_ratio)
        loss_RT = -weight_RT * tokens.advantage_RT * tokens.new_RT
        return Terms(loss_RT, ratio_RT < self.min_ratio, ratio_RT > self.max_ratio)
