"""Products with packed weights on a CPU, by operators of torch that read the stored codes.

| class       | weights                                          | bytes of a weight       |
|-------------|--------------------------------------------------|-------------------------|
| `RowInt8`   | int8, one scale for a row, no zero points        | 1                       |
| `GroupInt4` | int4, groups in multiples of 32, no zero points  | 1/2, and 4 for a group  |

Inputs and results are rounded to bfloat16, and sums are float32: with float32 inputs these operators are ten times slower.
A row's result does not depend on the other rows or on their number, bit for bit, so verification computes the same products as
plain decoding.

Milliseconds of the products in the layers of SmolLM2-135M for 1 / 4 / 8 / 16 rows; one thread of an AMD EPYC (Zen 5), processor
time with other jobs beside it, torch 2.13.0, 2026-11-27:

| product                                                        | ms                       |
|----------------------------------------------------------------|--------------------------|
| dense weights as float16, by FBGEMM (layers/linear.py)         | 7.7 / 9.4 / 12.5 / 18.9  |
| int8, `_weight_int8pack_mm`                                    | 6.9 / 7.3 / 12.9 / 23.5  |
| int8, the same in float32                                      | 65 / 275 / 542 / 1149    |
| int4 in groups of 32, `_weight_int4pack_mm_for_cpu`            | 4.5 / 6.2 / 11.0 / 21.0  |
| int8, oneDNN; inputs in 16 bits as two rows of 8               | 9.1 / 13.1 / 16.1 / 25.0 |
| int8, FBGEMM; inputs in 8 bits with one scale for all rows     | 4.7 / 6.4 / 7.6 / 11.7   |

The last product changes the function that is computed, and makes a row depend on the others.
"""

# M rows  N outputs  K inputs  G groups of a row

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.layers.packed import Packed

GROUPS = (256, 128, 64, 32)
"""Groups of torch's int4 product."""


class OnCPU:
    """A packed weight in the layout of a product on a CPU.

    Attributes:
        kind, shape, group: As in `Packed`.
        nbytes: Bytes that a product reads.
    """

    def __init__(self, packed: Packed, *stored: Tensor) -> None:
        self.kind, self.shape, self.group = packed.kind, packed.shape, packed.group
        self.nbytes = sum(tensor.nbytes for tensor in stored)

    def product(self, x: Tensor, bias_N: Tensor | None) -> Tensor:
        """The product x weight^T + bias, in the dtype of x.

        Raises:
            RuntimeError: x needs a gradient, which these products do not have.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("packed weights on a CPU have no gradient; decode under torch.inference_mode()")
        y = self._rows(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return (y if bias_N is None else y + bias_N).to(x.dtype)

    def _rows(self, x_MK: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K], with the scales of the product."""
        raise NotImplementedError


class RowInt8(OnCPU):
    """torch's product with int8 weights."""

    def __init__(self, packed: Packed) -> None:
        scale_N = packed.scale[:, 0].float()
        self._weight, self._scale_N = packed.codes(), scale_N.bfloat16()
        rest_N = scale_N / self._scale_N  # what rounding the scale leaves out
        self._rest_N = None if torch.equal(self._scale_N.float(), scale_N) else rest_N
        super().__init__(packed, self._weight, self._scale_N)

    @staticmethod
    def covers(packed: Packed) -> bool:
        """Whether this product computes with such a weight."""
        return packed.kind == "int8" and packed.scale.shape[1] == 1 and packed.zero is None

    def _rows(self, x_MK: Tensor) -> Tensor:
        y_MN = torch._weight_int8pack_mm(x_MK.bfloat16(), self._weight, self._scale_N)
        return y_MN if self._rest_N is None else y_MN * self._rest_N

    def dense(self, dtype: torch.dtype) -> Tensor:
        scale_N = self._scale_N.float() if self._rest_N is None else self._scale_N * self._rest_N
        return (self._weight * scale_N[:, None]).to(dtype)


class GroupInt4(OnCPU):
    """torch's product with int4 weights; scales are rounded to bfloat16 too."""

    def __init__(self, packed: Packed) -> None:
        self._group = next(size for size in GROUPS if packed.group % size == 0)
        self._weight = torch._convert_weight_to_int4pack_for_cpu(packed.codes().int() + 8, 1)
        scale_GN = packed.scale.bfloat16().repeat_interleave(packed.group // self._group, 1).T
        self._scale_GN2 = torch.stack([scale_GN, torch.zeros_like(scale_GN)], 2)
        super().__init__(packed, self._weight, self._scale_GN2)

    @staticmethod
    def covers(packed: Packed) -> bool:
        """Whether this product computes with such a weight."""
        whole = packed.kind == "int4" and packed.group % GROUPS[-1] == 0 and packed.zero is None
        return whole and packed.shape[0] % 16 == 0

    def _rows(self, x_MK: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK.bfloat16(), self._weight, self._group, self._scale_GN2)

    def dense(self, dtype: torch.dtype) -> Tensor:
        # the stored order of the codes depends on the processor, so they are read as products with unit vectors
        units_KK = torch.eye(self.shape[1], dtype=torch.bfloat16)
        ones_GN2 = torch.stack([torch.ones_like(self._scale_GN2[..., 0]), self._scale_GN2[..., 1]], 2)
        codes_KN = torch.ops.aten._weight_int4pack_mm_for_cpu(units_KK, self._weight, self._group, ones_GN2).float()
        return (codes_KN * self._scale_GN2[..., 0].float().repeat_interleave(self._group, 0)).T.contiguous().to(dtype)
