"""Faster matrix products on a CPU, from a second copy of the weights in the layout of oneDNN or FBGEMM.

`F.linear` takes the weight as it lies in memory, which is slow for the few rows of decoding. Decoding reads all weights for
every token, so fewer bytes are faster too: float32 weights whose values float16 holds, up to a power of two, as those of
bfloat16 checkpoints, go to FBGEMM as float16. They are half the bytes, and products and sums stay in float32: nothing is
rounded. Other float32 weights and bfloat16 go to oneDNN.

Milliseconds of all matrix products of a step by F.linear / oneDNN / FBGEMM; one thread of an AMD EPYC (Zen 5), processor time
with other jobs beside it, torch 2.13.0, 2026-11-27. F.linear was measured in another process than the rest.

| model, dtype           | 1 row              | 4 rows             | 8 rows             | 64 rows          |
|------------------------|--------------------|--------------------|--------------------|------------------|
| 14M, float32           | 3.9 / 2.3 / 1.4    | 5.3 / 2.5 / 1.6    | 6.3 / 3.0 / 1.9    | 22.6 / 9.4 / 8.6 |
| 14M, bfloat16          | 2.9 / 1.4          | 2.9 / 1.5          | 3.3 / 1.8          | 6.9 / 5.1        |
| SmolLM2-135M, float32  | 35.6 / 20.2 / 10.9 | 55.0 / 23.3 / 12.8 | 65.3 / 27.4 / 16.0 |                  |
| SmolLM2-135M, bfloat16 | 22.9 / 12.1        | 23.1 / 12.5        | 24.4 / 14.8        |                  |
"""

# I inputs  O outputs

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.layers.packed import Packed, pack, plane
from trainkit.layers.packed_cpu import GroupInt4, OnCPU, RowInt8

ROWS = 16
"""Number of rows for which oneDNN's layout is chosen; other numbers use it too. With fewer than 4 it is one for matrix-vector
products, which is slower for one row and twice as slow for several."""
SMALLEST = 1 << 16
"""Smallest number of a weight's entries: these products take some microseconds more to start."""
HAS_KERNELS = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
"""Whether these products were measured on such a processor."""
MOST_BYTES = 1 << 32
"""Networks of more bytes keep a single copy of their weights, and `F.linear`."""


class Blocked:
    """A weight in the layout of a faster product: made when it is first used, and again after the weight has changed."""

    def __init__(self) -> None:
        self._source: tuple[int, torch.dtype, int] | None = None
        self._weight: Any = None
        self._factor = 0.0

    def __reduce__(self) -> tuple[type[Blocked], tuple[()]]:
        return Blocked, ()  # a copy makes its own

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """The product x weight^T + bias."""
        source = weight_OI.data_ptr(), weight_OI.dtype, 0 if weight_OI.is_inference() else weight_OI._version
        if source != self._source:
            self._weight, self._factor = _blocks(weight_OI.detach())
            self._source = source
        if not self._factor:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias_O, "none", [], "")
        y = torch.ops.quantized.linear_dynamic_fp16(x, self._weight)
        return y.mul_(self._factor) if bias_O is None else torch.add(bias_O, y, alpha=self._factor)


def _blocks(weight_OI: Tensor) -> tuple[Any, float]:
    """The weight in FBGEMM's or oneDNN's layout, and the factor of FBGEMM's product; 0 with oneDNN.

    A power of two brings the largest magnitude to 2^14..2^15. If float16 then holds every value, so that nothing is rounded,
    FBGEMM takes the weight.
    """
    if weight_OI.dtype == torch.float32 and torch.backends.quantized.engine in ("fbgemm", "x86"):
        exponent = 15 - int(weight_OI.abs().max().frexp().exponent)
        scaled_OI = weight_OI * 2.0**exponent
        if torch.equal(scaled_OI.half().float(), scaled_OI) and torch.equal(scaled_OI * 2.0**-exponent, weight_OI):
            return torch.ops.quantized.linear_prepack_fp16(scaled_OI.contiguous(), None), 2.0**-exponent
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), ROWS), 0.0


def project(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, blocked: Blocked | None) -> Tensor:
    """The product x weight^T + bias; from the blocked layout if there is one, no gradient is needed, and x has its dtype."""
    if blocked is None or torch.is_grad_enabled() or x.dtype != weight_OI.dtype or weight_OI.numel() < SMALLEST:
        return F.linear(x, weight_OI, bias_O)
    return blocked.product(x, weight_OI, bias_O)


class Linear(nn.Linear):
    """`nn.Linear` that can use the blocked layout, or a packed weight.

    Attributes:
        blocked: The weight in the blocked layout; set by `block_weights`.
        packed: The weight in fewer bytes, for decoding; `weight` is then empty.
    """

    blocked: Blocked | None = None
    packed: Packed | OnCPU | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is not None:
            return self.packed.product(input, self.bias)
        return project(input, self.weight, self.bias, self.blocked)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        """`nn.Module.to` and its like: a packed weight moves too, and its scales are rounded to a narrower dtype."""
        super()._apply(fn, recurse)
        if isinstance(self.packed, Packed):  # what a CPU's product reads has no other place
            old, scale = self.packed, fn(self.packed.scale)
            if scale.element_size() > old.scale.element_size():
                scale = scale.to(old.scale.dtype)  # exactly the old values
            zero = None if old.zero is None else fn(old.zero)
            self.packed = replace(old, words=fn(old.words), scale=scale, zero=zero)
        return self

    @torch.no_grad()
    def pack(self, kind: str) -> None:
        """Replaces the weight by a packed one, for decoding."""
        self.set_packed(pack(self.weight, kind))

    def set_packed(self, packed: Packed) -> None:
        """Replaces the weight by a packed one of the same shape.

        Raises:
            ValueError: it has another shape.
        """
        if packed.shape != (self.out_features, self.in_features):
            raise ValueError(f"a packed weight of {packed.shape} for {self.out_features} outputs of {self.in_features} inputs")
        self.packed = packed
        self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    @torch.no_grad()
    def place_packed(self) -> None:
        """Brings a packed weight to the layout of its device's product; one that has none there becomes dense."""
        packed = self.packed
        if not isinstance(packed, Packed):
            return
        on_cpu = not packed.words.is_cuda
        kinds = [kind for kind in (RowInt8, GroupInt4) if on_cpu and HAS_KERNELS and kind.covers(packed)]
        if kinds:
            self.packed = kinds[0](packed)
        elif on_cpu or not plane(packed.columns, packed.kind, packed.group):
            self.packed, self.weight = None, nn.Parameter(packed.dense(self.weight.dtype), requires_grad=False)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and packed weights."""
    packed = (part.packed for part in network.modules() if isinstance(part, Linear))
    return sum(weight.nbytes for weight in network.parameters()) + sum(part.nbytes for part in packed if part is not None)


def rounds_products(network: nn.Module) -> bool:
    """Whether products of packed weights round their inputs to bfloat16, whatever the dtype of the rest (on a CPU)."""
    return any(isinstance(part, Linear) and isinstance(part.packed, OnCPU) for part in network.modules())


def block_weights(network: nn.Module) -> None:
    """Lets a network compute its products from blocked weights, where the processor is one for which that was measured.

    These are x86 processors with AVX2, in float32, and in bfloat16 if oneDNN has kernels for it there. Packed weights are
    brought to the layout of their device first.
    """
    for part in network.modules():
        if isinstance(part, Linear):
            part.place_packed()
    weights = list(network.parameters())
    dtypes = {torch.float32}
    if HAS_KERNELS and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    fits = sum(weight.nbytes for weight in weights) <= MOST_BYTES
    fits = fits and all(weight.device.type == "cpu" and weight.dtype in dtypes for weight in weights)
    for part in network.modules():
        if hasattr(part, "blocked"):
            part.blocked = (part.blocked or Blocked()) if HAS_KERNELS and fits else None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
