"""Weights stored in 4 or 8 bits per value, as the decoding kernels read them (layers/kernels/few_rows.py).

A weight [N, K] is (code - zero) * scale. Codes are stored in words of 32 bits, with scales for groups of a row's columns:

| kind | values in a word       | words          | usual scale            | bytes of the bf16 weight |
|------|------------------------|----------------|------------------------|--------------------------|
| int8 | 4, each plus 128       | int32 [N, K/4] | float32 [N, 1]         | 1/2                      |
| fp8  | 4 of float8_e4m3fn     | int32 [N, K/4] | float32 [N, 1]         | 1/2                      |
| int4 | 8, each plus 8         | int32 [N, K/8] | bfloat16 [N, K / 128]  | 0.258                    |

Columns are taken in blocks of `plane` times the number of values in a word: value i of word j of a block is that of column
i * plane + j. So a kernel that takes value i of consecutive words has consecutive columns, and reads consecutive inputs.
Where no plane fits the columns and groups, it is 1, the last word is padded, and no kernel reads the weight.
"""

# N, R outputs  K inputs  G groups of a row  I values in a word  P columns of a plane

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

VALUES = {"int8": 4, "fp8": 4, "int4": 8}
"""Kinds, and the number of values in a word."""
GROUP = 128
"""Columns that share an int4 scale by default."""


@dataclass(frozen=True)
class Packed:
    """A packed weight.

    Attributes:
        kind: One of `VALUES`.
        columns: K.
        words: int32 [N, K / values, rounded up].
        scale: Factor of each group of columns [N, G], of any floating-point dtype.
        zero: Code that stands for 0 in each group, int8 [N, G]; None if it is 0 everywhere.
    """

    kind: str
    columns: int
    words: Tensor
    scale: Tensor
    zero: Tensor | None = None

    @staticmethod
    def from_codes(
        codes_RK: Tensor,
        scale_RG: Tensor,
        zero_RG: Tensor | None,
        bits: int,
        kind: str = "int",
        device: torch.device | str | None = None,
    ) -> Packed:
        """Packs codes and their scales.

        Args:
            codes_RK: Codes: whole numbers from -2^(bits - 1) to 2^(bits - 1) - 1, or values of float8_e4m3fn.
            scale_RG: Scales; group g covers columns g K / G to (g + 1) K / G.
            zero_RG: Zero points, in the range of the codes; None if symmetric.
            bits: 4 or 8.
            kind: `int`, or `float` for float8_e4m3fn.
            device: Where the weight is needed; by default where the codes are.

        Raises:
            ValueError: other bits or kind, or groups that do not divide the columns.
        """
        name = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8"}.get((kind, bits))
        (R, K), G = codes_RK.shape, scale_RG.shape[1]
        if name is None:
            raise ValueError(f"{bits} bits of kind {kind!r}: must be 4 or 8 of int, or 8 of float")
        if scale_RG.shape[0] != R or K % G or (zero_RG is not None and zero_RG.shape != scale_RG.shape):
            raise ValueError(f"scales {list(scale_RG.shape)} do not fit {R} rows of {K} columns")
        device, count, P = device or codes_RK.device, VALUES[name], plane(K, name, K // G) or 1
        if name == "fp8":
            values_RK = codes_RK.to(device).to(torch.float8_e4m3fn).view(torch.uint8).int()
        else:
            values_RK = codes_RK.to(device).int() + (1 << bits - 1)
        values_RK = F.pad(values_RK, (0, -K % (count * P)))
        words = torch.zeros(R, values_RK.shape[1] // (count * P), P, dtype=torch.int32, device=device)
        for i, value in enumerate(values_RK.view(R, -1, count, P).unbind(2)):
            words |= value << i * bits
        return Packed(name, K, words.view(R, -1), scale_RG.to(device), None if zero_RG is None else zero_RG.to(device))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the dense weight."""
        return len(self.words), self.columns

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads."""
        return sum(tensor.nbytes for tensor in (self.words, self.scale, self.zero) if tensor is not None)

    def codes(self) -> Tensor:
        """The codes [N, K], int8 or float8_e4m3fn."""
        (N, K), bits = self.shape, 32 // VALUES[self.kind]
        P = plane(K, self.kind, self.group) or 1
        shifts_I1 = torch.arange(0, 32, bits, device=self.words.device)[:, None]
        values_NK = (self.words.view(N, -1, 1, P) >> shifts_I1 & (1 << bits) - 1).flatten(1)[:, :K]
        if self.kind == "fp8":
            return values_NK.to(torch.uint8).view(torch.float8_e4m3fn)
        return (values_NK - (1 << bits - 1)).to(torch.int8)

    def product(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """The product x weight^T + bias, of the unpacked weight."""
        return F.linear(x, self.dense(x.dtype), bias_N)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K]: (code - zero) * scale, in float32 or `dtype` if that is wider, then rounded."""
        wide = torch.promote_types(dtype, torch.float32)
        grouped = self.codes().to(wide).view(len(self.words), -1, self.group)
        if self.zero is not None:
            grouped = grouped - self.zero[..., None]
        return (grouped * self.scale.to(wide)[..., None]).flatten(1).to(dtype)


def plane(K: int, kind: str, group: int | None = None) -> int:
    """Columns of a plane: the largest power of two up to 64 that fits; 0 if that is below 16.

    A plane fits if its blocks divide K and, unless a scale belongs to the whole row, it divides a group, and groups its blocks.

    Args:
        K: Columns.
        kind: One of `VALUES`.
        group: Columns that share a scale; by default the kind's own.
    """
    size, group = 64, group or (GROUP if kind == "int4" else K)
    while size >= 16 and (K % (size * VALUES[kind]) or (group < K and (group % size or size * VALUES[kind] % group))):
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
    group = GROUP if kind == "int4" else K
    if K % group or not plane(K, kind):
        raise ValueError(f"{kind}: {K} columns are not a multiple of {GROUP if kind == 'int4' else 16 * VALUES[kind]}")
    grouped = weight_NK.float().view(N, -1, group)
    high = {"int8": 127, "fp8": 448, "int4": 7}[kind]
    scale_NG = (grouped.abs().amax(-1) / high).clamp_(min=1e-12).to(torch.bfloat16 if kind == "int4" else torch.float32)
    scaled_NK = (grouped / scale_NG.float()[..., None]).view(N, K)
    if kind == "fp8":
        return Packed.from_codes(scaled_NK, scale_NG, None, 8, "float")
    return Packed.from_codes(scaled_NK.round().clamp_(-high - (kind == "int4"), high), scale_NG, None, 32 // VALUES[kind])
