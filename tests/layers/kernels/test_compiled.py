"""Every kernel compiled for Hopper as it is launched, without a GPU: no spills, shared memory that fits, wide copies.

To add a kernel, add calls of its function on meta tensors to `CALLS`, and to the lists below what else must hold.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from tests.support.compiled import SHARED_LIMIT, Compiled, compile_launches
from trainkit.layers.kernels import attend as attend_module
from trainkit.layers.kernels.attend import Plan, attend

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def call_attend(T: int, H: int, G: int, E: int, dtype: torch.dtype, words: int = 0, pad: int = 0) -> None:
    """`attend` over a cache of 2048 slots, which lie E + pad apart."""
    q = torch.empty(2, T, H, E, dtype=dtype, device="meta")
    cache = torch.empty(2, 2 * G, 2048, E + pad, dtype=dtype, device="meta")[..., :E]
    bits = torch.empty(2, T, words, dtype=torch.int64, device="meta") if words else None
    attend(q, cache, torch.empty(2, dtype=torch.int32, device="meta"), bits)


CALLS = {
    "attend: chain": lambda: call_attend(1, 32, 8, 128, BF16),
    "attend: chain, 80 wide": lambda: call_attend(5, 32, 32, 80, BF16),
    "attend: tree of 8": lambda: call_attend(8, 32, 8, 128, BF16, words=1),
    "attend: chain, float32": lambda: call_attend(5, 9, 3, 64, F32),
    "attend: tree of 64": lambda: call_attend(64, 32, 8, 128, BF16, words=1),
    "attend: tree of 64, 80 wide": lambda: call_attend(64, 32, 32, 80, F16, words=2),
    "attend: prefill": lambda: call_attend(512, 32, 8, 128, BF16),
    "attend: prefill, 256 wide": lambda: call_attend(1024, 8, 4, 256, BF16),
    "attend: tree of 64, float32, 256 wide": lambda: call_attend(64, 8, 4, 256, F32, words=1),
}
INVARIANT = [
    "attend: chain",
    "attend: chain, 80 wide",
    "attend: tree of 8",
    "attend: chain, float32",
]  # rows depend on no other


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Compiled]]:
    return compile_launches("tests.layers.kernels.test_compiled", "CALLS")


@pytest.mark.parametrize("call", CALLS)
def test_kernels_fit_a_hopper_multiprocessor(compiled: dict[str, dict[str, Compiled]], call: str) -> None:
    """No register is spilled and shared memory is within the limit."""
    assert compiled[call]
    for name, result in compiled[call].items():
        assert result.stack == 0, (name, result)
        assert result.shared <= SHARED_LIMIT, (name, result)


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("attend")])
def test_attend_copies_the_cache_in_16_bytes(compiled: dict[str, dict[str, Compiled]], call: str) -> None:
    """Keys and values come by asynchronous copies, all of 16 bytes."""
    assert set(compiled[call]["_split_kernel"].copies) == {"16"}, compiled[call]


@pytest.mark.parametrize("call", INVARIANT)
def test_row_invariant_kernels_use_no_wgmma(compiled: dict[str, dict[str, Compiled]], call: str) -> None:
    """Products of a warp group need not add in the order of a warp's; 16 bits take the tensor cores, float32 does not."""
    for result in compiled[call].values():
        assert result.count("wgmma.mma_async") == 0
    products = sum(result.count("mma.sync") for result in compiled[call].values())
    assert (products > 0) == ("float32" not in call)


def large_tile() -> None:
    with mock.patch.object(attend_module, "plan", return_value=Plan(32, 64, 64, 32, 4, 2)):
        call_attend(5, 32, 8, 64, F32)


POOR = {"spilling": large_tile, "narrow": lambda: call_attend(1, 32, 8, 128, BF16, pad=2)}


def test_spills_and_narrow_copies_are_seen() -> None:
    """A tile too large for its warps spills, and slots that are not aligned are not copied in 16 bytes."""
    results = compile_launches("tests.layers.kernels.test_compiled", "POOR")
    assert results["spilling"]["_split_kernel"].stack > 0
    assert "16" not in results["narrow"]["_split_kernel"].copies
