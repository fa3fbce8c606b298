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
        count: Number of counted tokens, or the denominator of a policy loss; a scalar float tensor without gradient.
        metrics: Detached scalar sums over the same tokens, by name (`alpha`, `alpha_coupled`, `agreement`, ...). Add them over
            chunks, micro-batches and ranks, then divide by `count_tokens` if it is among them, else by `count`; divide
            those named `..._head2` by `count_head2`.
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


def by_head(output: LossOutput, counted: Sequence[tuple[Tensor, int]]) -> LossOutput:
    """The same loss with metrics also for each head, from 1, and with values by the position of the label.

    Args:
        output: Loss of all heads (`chunked.HeadRows`), with a row for each position of each mask, in row-major order.
        counted: For each head, the mask [B, T] of its positions, and the offset from a position to its label.
    """
    # Metrics.
    places = [mask_BT.nonzero(as_tuple=True) for mask_BT, _ in counted]
    values = {name: value_N.split([len(rows) for rows, _ in places]) for name, value_N in output.per_token.items()}
    metrics = dict(output.metrics)
    for name, parts in values.items():
        label = "count" if name == "counted" else name
        metrics |= {f"{label}_head{number}": part_N.sum() for number, part_N in enumerate(parts, start=1)}
    # Values by token, at the position of the label.
    placed = {f"{name}_HBT": torch.zeros(len(counted), *counted[0][0].shape, device=output.sum.device) for name in values}
    for head, ((rows_N, positions_N), (_, offset)) in enumerate(zip(places, counted, strict=True)):
        for name, parts in values.items():
            placed[f"{name}_HBT"][head, rows_N, positions_N + offset] = parts[head].float()
    placed["counted_HBT"] = placed["counted_HBT"].bool()
    return LossOutput(output.sum, output.count, metrics, placed)
