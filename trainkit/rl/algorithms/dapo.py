"""DAPO: GRPO with a higher upper clip, the mean over tokens, dynamic sampling, and a soft penalty for length."""

from __future__ import annotations

from trainkit.rl.algorithms.base import Scale, check
from trainkit.rl.algorithms.grpo import GRPO


class DAPO(GRPO):
    """Mean over all tokens of the step of -min(ratio A, clip(ratio, 1 - low, 1 + high) A), with A as in GRPO.

    Yu et al. 2025, arXiv 2503.14476. The higher upper clip lets unlikely tokens rise; the mean over tokens gives the tokens of
    long responses the same weight as those of short ones.

    Args:
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        dynamic_sampling: Whether groups whose rewards are all equal are replaced by further prompts.
        overlong: Tokens before the length limit over which a penalty grows from 0 to -1; 0 for no penalty. The paper uses 4096
            of 20480.
        scale: What divides a reward minus its group's mean: the standard deviation of its `group`, that of all rewards of the
            generation (`batch`), or nothing (`none`).
        beta: Weight of the KL divergence from the reference policy in the loss (estimator k3); 0 needs no reference.
            The paper has no KL term.
        mask_truncated: Whether responses cut by the length limit are left out of the loss, as the paper does at first.
    """

    mean_over = "tokens"

    def __init__(
        self,
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        dynamic_sampling: bool = True,
        overlong: int = 0,
        scale: Scale = "group",
        beta: float = 0.0,
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(clip_low, clip_high, beta, scale, mask_truncated)
        self.dynamic_sampling = dynamic_sampling
        self.overlong = check(overlong >= 0, "overlong", overlong, "at least 0")

    def shape_reward(self, length: int, limit: int) -> float:
        """0 up to limit - overlong tokens, then linear down to -1 at the limit and beyond."""
        if not self.overlong:
            return 0.0
        check(self.overlong <= limit, "overlong", self.overlong, f"at most the length limit, {limit}")
        return -min(1.0, max(0.0, (length - (limit - self.overlong)) / self.overlong))
