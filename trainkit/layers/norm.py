"""RMS norm whose weight takes the dtype of its input, so that mixed precision keeps torch's fused kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in float32 or wider, in the dtype of x.

    If a float32 weight meets a bfloat16 input, as under bf16-mixed, torch runs an unfused implementation with the same result.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
