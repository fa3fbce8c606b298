"""Dr. GRPO: GRPO without the standard deviation and without the length of the response, which both bias the gradient."""

# R responses  T response tokens, padded at the end

from __future__ import annotations

from torch import Tensor

from trainkit.errors import UserError
from trainkit.rl.algorithms.base import check
from trainkit.rl.algorithms.grpo import GRPO


class DrGRPO(GRPO):
    """GRPO's tokens with A = R - mean, summed and divided by (responses x `max_length`).

    Liu et al. 2025, arXiv 2503.20783. Responses without a token that counts are not among the responses.

    Args:
        max_length: The longest possible response in tokens; None takes the run's `max_new_tokens`.
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: The ratio is clipped above 1 + clip_high.
        beta: Weight of the KL divergence from the reference policy in the loss (estimator k3); 0 needs no reference.
        mask_truncated: Whether responses cut by the length limit are left out of the loss.
    """

    def __init__(
        self,
        max_length: int | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        beta: float = 0.0,
        mask_truncated: bool = False,
    ) -> None:
        super().__init__(clip_low, clip_high, beta, "none", mask_truncated)
        self.max_length = check(max_length is None or max_length > 0, "max_length", max_length, "at least 1")

    def set_limit(self, limit: int) -> None:
        self.max_length = self.max_length or limit
        if self.max_length != limit:
            raise UserError(
                f"model.algorithm.max_length is {self.max_length}, but model.max_new_tokens {limit}; leave the former out"
            )

    def count(self, mask_RT: Tensor) -> Tensor:
        assert self.max_length is not None
        return super().count(mask_RT) * self.max_length

    def weights(self, mask_RT: Tensor) -> Tensor:
        return mask_RT
