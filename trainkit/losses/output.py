"""The value that every training loss returns: sums instead of means, so that ranks and micro-batches add up exactly."""

# N counted or masked tokens, flattened  H heads  B batch  T positions

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """A loss as numerator and denominator, with sums of the metrics.

    Attributes:
        sum: Differentiable numerator, a scalar (nats, or probability for `tv`), summed over counted tokens.
        count: Number of counted tokens, a scalar float tensor without gradient.
        metrics: Detached scalar sums over the same tokens, by name (`alpha`, `alpha_coupled`, `agreement`, ...). Add them over
            chunks, micro-batches and ranks, then divide by `count`; divide those named `..._head2` by `count_head2`.
        per_token: Detached [N] values of the same metrics in the order of the tokens, 0 where not counted. For several heads
            `alpha_HBT`, `agreement_HBT`, ... [H, B, T] by the position of the label, and `counted_HBT`, True where counted.
    """

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_token: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The loss per counted token, differentiable; 0 if no token counts."""
        return self.sum / self.count.clamp(min=1)


def combine_heads(outputs: Sequence[LossOutput], decay: float, counted: Sequence[tuple[Tensor, int]]) -> LossOutput:
    """The loss of several heads: the sum of decay^i * (loss of head i), with metrics over all heads and for each, from 1.

    Args:
        outputs: Loss of each head, over the positions it counts in row-major order.
        decay: Weight of each head relative to the head before it; metrics are not weighted.
        counted: For each head, the mask [B, T] of those positions, and the offset from a position to its label.
    """
    # Metrics.
    names = outputs[0].metrics
    metrics = {name: torch.stack([output.metrics[name] for output in outputs]).sum() for name in names}
    for number, output in enumerate(outputs, start=1):
        metrics |= {f"{name}_head{number}": output.metrics[name] for name in names}
        metrics[f"count_head{number}"] = output.count
    # Values by token, at the position of the label.
    size, device = (len(outputs), *counted[0][0].shape), outputs[0].sum.device
    values = {f"{name}_HBT": torch.zeros(size, device=device) for name in outputs[0].per_token}
    values["counted_HBT"] = torch.zeros(size, dtype=torch.bool, device=device)
    for head, (output, (counted_BT, offset)) in enumerate(zip(outputs, counted, strict=True)):
        rows_N, positions_N = counted_BT.nonzero(as_tuple=True)
        values["counted_HBT"][head, rows_N, positions_N + offset] = True
        for name, value_N in output.per_token.items():
            values[f"{name}_HBT"][head, rows_N, positions_N + offset] = value_N.float()
    total = torch.stack([decay**head * output.sum for head, output in enumerate(outputs)]).sum()
    return LossOutput(total, torch.stack([output.count for output in outputs]).sum(), metrics, values)
