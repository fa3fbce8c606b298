"""The one value every training loss returns: sums, never averages, so that ranks and micro-batches add up exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# N counted or masked tokens, flattened  H heads  B batch  T positions


@dataclass(frozen=True)
class LossOutput:
    """A loss as numerator and denominator, with the sums of what is measured beside it.

    Attributes:
        sum: Differentiable numerator, a scalar (nats, or probability for `tv`), summed over counted tokens.
        count: Number of counted tokens, a scalar float tensor without gradient.
        metrics: Detached scalar sums over the same tokens, by name (`alpha`, `alpha_coupled`, `agreement`, ...);
            divide by `count` after adding over chunks, micro-batches and ranks, those named `..._head2` by `count_head2`.
        per_token: Detached [N] values of the same metrics in the order the tokens were given, 0 where not counted; of several
            heads `alpha_HBT`, `agreement_HBT`, ... [H, B, T] by the position of the label, and `counted_HBT`, where one counts.
    """

    sum: Tensor
    count: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    per_token: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """The loss per counted token, differentiable; 0 when nothing counts."""
        return self.sum / self.count.clamp(min=1)


def heads_together(
    outputs: Sequence[LossOutput], weights: Sequence[float], counted: Sequence[tuple[Tensor, int]]
) -> LossOutput:
    """One loss of several heads: the weighted sum of theirs; metrics over all of them, and of each, counted from 1.

    Args:
        outputs: Of each head, over the positions it counts in row-major order.
        weights: Of each head in the loss; metrics are not weighted.
        counted: Of each head, those positions [B, T], and how far ahead of them its labels are.
    """
    names = outputs[0].metrics
    metrics = {name: torch.stack([output.metrics[name] for output in outputs]).sum() for name in names}
    for number, output in enumerate(outputs, start=1):
        metrics |= {f"{name}_head{number}": output.metrics[name] for name in names}
        metrics[f"count_head{number}"] = output.count
    size, device = (len(outputs), *counted[0][0].shape), outputs[0].sum.device
    placed = {f"{name}_HBT": torch.zeros(size, device=device) for name in outputs[0].per_token}
    placed["counted_HBT"] = torch.zeros(size, dtype=torch.bool, device=device)
    for head, (output, (counted_BT, ahead)) in enumerate(zip(outputs, counted, strict=True)):
        rows_N, places_N = counted_BT.nonzero(as_tuple=True)
        placed["counted_HBT"][head, rows_N, places_N + ahead] = True
        for name, value_N in output.per_token.items():
            placed[f"{name}_HBT"][head, rows_N, places_N + ahead] = value_N.float()
    total = torch.stack([weight * output.sum for weight, output in zip(weights, outputs, strict=True)]).sum()
    count = torch.stack([output.count for output in outputs]).sum()
    return LossOutput(total, count, metrics, placed)
