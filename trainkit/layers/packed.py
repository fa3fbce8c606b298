"""Weights stored in fewer bytes than 16 a value, as the decoding kernels read them (layers/kernels/few_rows.py).

A dense weight [N, K] becomes one of four layouts:

| kind   | values                            | scale              | index           | bytes of the bf16 weight |
|--------|-----------------------------------|--------------------|-----------------|--------------------------|
| int8   | int8 [N, K]                       | float32 [N]        |                 | 1/2                      |
| fp8    | float8_e4m3fn [N, K]              | float32 [N]        |                 | 1/2                      |
| int4   | uint8 [N, K / 2], two of a byte   | bfloat16 [N, K/128]|                 | 0.258                    |
| sparse | the weight's dtype [N, K / 2]     |                    | uint8 [N, K / 8]| 0.5625                   |

int4: byte j of a group of 128 columns holds column j in its low half and column j + 64 in its high half, each plus 8. sparse: two
of each four columns are kept, in their order; four bits a group of four hold their places, the first in the low two bits, and
the low half of a byte belongs to the group of even number.
"""

# N outputs  K inputs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("int8", "fp8", "int4", "sparse")
GROUP = 128
"""Columns that share an int4 scale."""


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Attributes:
        kind: One of `KINDS`.
        values: Packed values.
        scale: Factor of each row or group; None for sparse.
        index: Places of the kept values; only for sparse.
    """

    kind: str
    values: Tensor
    scale: Tensor | None = None
    index: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that a product reads."""
        return tuple(tensor for tensor in (self.values, self.scale, self.index) if tensor is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        rows, columns = self.values.shape
        return rows, columns * (2 if self.kind in ("int4", "sparse") else 1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] that the packed one stands for."""
        N, K = self.shape
        if self.kind == "sparse":
            assert self.index is not None
            fours = torch.stack([self.index & 15, self.index >> 4], dim=-1).flatten(1).long()  # [N, K / 4]
            places = torch.stack([fours & 3, fours >> 2], dim=-1)
            weight = self.values.new_zeros(N, K // 4, 4)
            return weight.scatter_(2, places, self.values.view(N, K // 4, 2)).view(N, K).to(dtype)
        assert self.scale is not None
        if self.kind == "int4":
            bytes_ = self.values.view(N, K // GROUP, GROUP // 2)
            whole = torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1).float() - 8
            return (whole * self.scale.float()[..., None]).view(N, K).to(dtype)
        return (self.values.float() * self.scale[:, None]).to(dtype)


def pack(weight_NK: Tensor, kind: str) -> Packed:
    """Packs a weight: int8, fp8 and int4 by rounding to the nearest, sparse by keeping the two largest of each four columns.

    Raises:
        ValueError: unknown kind, or columns that the kind's groups do not divide.
    """
    N, K = weight_NK.shape
    groups = {"int8": 1, "fp8": 1, "int4": GROUP, "sparse": 8}
    if kind not in groups:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    if K % groups[kind]:
        raise ValueError(f"{kind} needs a multiple of {groups[kind]} columns, not {K}")
    if kind == "sparse":
        fours = weight_NK.view(N, K // 4, 4)
        places = fours.abs().topk(2, dim=-1).indices.sort(dim=-1).values
        bits = (places[..., 0] | places[..., 1] << 2).view(N, K // 8, 2)
        return Packed(kind, fours.gather(2, places).view(N, K // 2), None, (bits[..., 0] | bits[..., 1] << 4).to(torch.uint8))
    weight = weight_NK.float()
    if kind == "int4":
        grouped = weight.view(N, K // GROUP, GROUP)
        scale = (grouped.abs().amax(-1) / 7).clamp_(min=1e-12).to(torch.bfloat16)
        whole = ((grouped / scale.float()[..., None]).round().clamp_(-8, 7) + 8).to(torch.uint8)
        low, high = whole.split(GROUP // 2, dim=-1)
        return Packed(kind, (low | high << 4).view(N, K // 2), scale)
    largest = 127.0 if kind == "int8" else 448.0
    scale = (weight.abs().amax(-1) / largest).clamp_(min=1e-12)
    scaled = weight / scale[:, None]
    values = scaled.round().to(torch.int8) if kind == "int8" else scaled.to(torch.float8_e4m3fn)
    return Packed(kind, values, scale)
