"""Weights stored in fewer than 16 bits per value, as the decoding kernels read them (layers/kernels/few_rows.py).

A dense weight [N, K] becomes words of 32 bits that hold 4 or 8 values, and scales:

| kind | values in a word       | words          | scale                  | bytes of the bf16 weight |
|------|------------------------|----------------|------------------------|--------------------------|
| int8 | 4, each plus 128       | int32 [N, K/4] | float32 [N]            | 1/2                      |
| fp8  | 4 of float8_e4m3fn     | int32 [N, K/4] | float32 [N]            | 1/2                      |
| int4 | 8, each plus 8         | int32 [N, K/8] | bfloat16 [N, K / 128]  | 0.258                    |

Columns are taken in blocks of `plane` times the number of values in a word: value i of word j of a block is that of column
i * plane + j. So a kernel that takes value i of consecutive words has consecutive columns, and reads consecutive inputs.
"""

# N outputs  K inputs  I values in a word  P columns of a plane

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

VALUES = {"int8": 4, "fp8": 4, "int4": 8}
"""Kinds, and the number of values in a word."""
GROUP = 128
"""Columns that share an int4 scale."""


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Attributes:
        kind: One of `VALUES`.
        words: int32 [N, K / values].
        scale: Factor of each row or group.
    """

    kind: str
    words: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        return len(self.words), self.words.shape[1] * VALUES[self.kind]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.words, self.scale))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K], unpacked."""
        N, K = self.shape
        bits, P = 32 // VALUES[self.kind], plane(K, self.kind)
        shifts_I1 = torch.arange(0, 32, bits, device=self.words.device)[:, None]
        values_NK = (self.words.view(N, -1, 1, P) >> shifts_I1 & (1 << bits) - 1).flatten(1)
        if self.kind == "int4":
            whole = values_NK.view(N, K // GROUP, GROUP).float() - 8
            return (whole * self.scale.float()[..., None]).view(N, K).to(dtype)
        value = values_NK.to(torch.uint8).view(torch.float8_e4m3fn).float() if self.kind == "fp8" else values_NK.float() - 128
        return (value * self.scale[:, None]).to(dtype)


def plane(K: int, kind: str) -> int:
    """Columns of a plane: the largest power of two up to 64 whose blocks divide K; 0 if that is below 16."""
    size = 64
    while size >= 16 and (K % (size * VALUES[kind]) or (kind == "int4" and K % GROUP)):
        size //= 2
    return size if size >= 16 else 0


def pack(weight_NK: Tensor, kind: str) -> Packed:
    """Packs a weight by rounding its values to the nearest, with the largest magnitude of each row or group in range.

    Raises:
        ValueError: unknown kind, or a number of columns that is not a multiple of the kind's blocks.
    """
    N, K = weight_NK.shape
    if kind not in VALUES:
        raise ValueError(f"kind {kind!r}: must be one of {', '.join(VALUES)}")
    P, count = plane(K, kind), VALUES[kind]
    if not P:
        raise ValueError(f"{kind}: {K} columns are not a multiple of {GROUP if kind == 'int4' else 16 * count}")
    grouped = weight_NK.float().view(N, -1, GROUP if kind == "int4" else K)
    scale = (grouped.abs().amax(-1) / {"int8": 127, "fp8": 448, "int4": 7}[kind]).clamp_(min=1e-12)
    scale = scale.to(torch.bfloat16) if kind == "int4" else scale
    scaled = (grouped / scale.float()[..., None]).view(N, K)
    if kind == "fp8":
        values = scaled.to(torch.float8_e4m3fn).view(torch.uint8).int()
    else:
        zero = 128 if kind == "int8" else 8
        values = scaled.round().clamp_(1 - zero if kind == "int8" else -zero, zero - 1).int() + zero
    words = torch.zeros(N, K // (count * P), P, dtype=torch.int32, device=weight_NK.device)
    for i, value in enumerate(values.view(N, -1, count, P).unbind(2)):
        words |= value << i * (32 // count)
    return Packed(kind, words.view(N, -1), scale if kind == "int4" else scale[:, 0])
