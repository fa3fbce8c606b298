"""Matrix products with a handful of rows, which is what decoding is made of.

On a CPU, `F.linear` with one row is a single-threaded matrix-vector product, and with 2 to 8 rows it takes a kernel made for
many; on weights that stream from memory both reach a third of its bandwidth. The same product written as weight x rows^T takes
the kernel for narrow right-hand sides. Milliseconds for a 14M model's matrices, float32, 2 threads (F.linear / this): 1 row
5.2 / 1.9, 2 rows 7.5 / 1.8, 4 rows 8.4 / 2.7, 8 rows 8.3 / 4.3. Weights that stay in cache gain nothing by it, so it is
switched on by size.
"""

# R rows  I inputs  O outputs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8
CACHE_BYTES = 32 * 2**20
"""Weights beyond this are taken not to stay in a processor's cache. A constant: no measurement decides about bits."""


def project(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, streams: bool) -> Tensor:
    """The product x weight^T + bias over the last dimension; with `streams`, by the kernel for few rows where there are few."""
    rows = x.numel() // x.shape[-1]
    if not streams or rows > FEW_ROWS or torch.is_grad_enabled():
        return F.linear(x, weight_OI, bias_O)
    x_RI = x.reshape(rows, -1)
    if rows == 1:  # alone it would be a matrix-vector product again
        x_RI = torch.cat([x_RI, x_RI])
    y_OR = torch.mm(weight_OI, x_RI.T)
    y = y_OR[:, :rows].T.contiguous().view(*x.shape[:-1], -1)
    return y if bias_O is None else y + bias_O


class Linear(nn.Linear):
    """`nn.Linear` that can stream its weights for a few rows."""

    streams = False

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias, self.streams)


def stream_weights(*networks: nn.Module) -> None:
    """Sets whether these networks' projections stream: float32 on a CPU, and together more than a cache holds.

    Every module in them with a `streams` attribute is set.
    """
    weights = [weight for network in networks for weight in network.parameters()]
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    streams = plain and sum(weight.numel() * weight.element_size() for weight in weights) > CACHE_BYTES
    for part in (part for network in networks for part in network.modules()):
        if hasattr(part, "streams"):
            part.streams = streams  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
