"""Log-probabilities in which the log of 0 is a large negative number."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = -1e30  # used for log 0, so that 0 * log 0 is 0 and not NaN


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over the last axis, at least FLOOR; computed in float32 or, for float64 logits, in float64."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits if temperature == 1.0 else logits.to(dtype) / temperature
    return torch.log_softmax(scaled, -1, dtype=dtype).clamp_(min=FLOOR)
