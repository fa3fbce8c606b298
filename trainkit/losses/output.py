"""The one value every training loss returns: sums, never averages, so that ranks and micro-batches add up exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# N counted or masked tokens, flattened


@dataclass(frozen=True)
class LossOutput:
    """A loss as numerator and denominator, with the sums of what is measured beside it.

    Attributes:
        sum: Differentiable numerator, a scalar (nats, or probability for `tv`), summed over counted tokens.
        count: Number of counted tokens, a scalar float tensor without gradient.
        metrics: Detached scalar sums over the same tokens, by name (`alpha`, `alpha_coupled`, `agreement`, ...);
            divide by `count` after adding over chunks, micro-batches and ranks.
        per_token: Detached [N] values of the same metrics in the order the tokens were given, 0 where not counted.
    """

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_token: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The loss per counted token, differentiable; 0 when nothing counts."""
        return self.sum / self.count.clamp(min=1)
