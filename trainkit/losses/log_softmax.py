"""Log-probabilities in which zero is a large negative number."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = -1e30  # stands for log 0, so that 0 * log 0 is 0 and not NaN


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over the last axis, FLOOR or more, in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits if temperature == 1.0 else logits.to(dtype) / temperature
    return torch.log_softmax(scaled, -1, dtype=dtype).clamp_(min=FLOOR)
