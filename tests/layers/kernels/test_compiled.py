"""Every kernel compiled for Hopper as it is launched, without a GPU: no spills, shared memory that fits, wide copies.

To add a kernel, add calls of its function on meta tensors to `CALLS`, and to the lists below what else must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.compiled import SHARED_LIMIT, Compiled, compile_launches
from trainkit.layers.kernels import attend as attend_module
from trainkit.layers.kernels import launch
from trainkit.layers.kernels.add_norm import add_norm
from trainkit.layers.kernels.attend import Plan, attend
from trainkit.layers.kernels.choose import choose
from trainkit.layers.kernels.few_rows import few_rows
from trainkit.layers.kernels.move import move_slots
from trainkit.layers.kernels.place import place
from trainkit.layers.kernels.walk import move_root, walk
from trainkit.layers.packed import VALUES, Packed, pack

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def meta(*sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*sizes, dtype=dtype, device="meta")


def call_add_norm(M: int, D: int, K: int, dtype: torch.dtype) -> None:
    parts = meta(K, M, D, dtype=F32) if K else None
    add_norm(meta(M, D, dtype=dtype), parts, meta(D, dtype=dtype), 1e-5, meta(M, 3, D, dtype=dtype)[:, 1])


def call_place(T: int, H: int, G: int, E: int, dtype: torch.dtype, norms: bool = True) -> None:
    """`place` of two parts for two rows, with a bias."""
    parts, bias = meta(2, 2 * T, (H + 2 * G) * E, dtype=F32), meta((H + 2 * G) * E, dtype=dtype)
    weight, rope = meta(E, dtype=dtype) if norms else None, meta(2048, 2, E, dtype=dtype)
    place(parts, bias, weight, weight, 1e-5, rope, meta(2, T), meta(2, T), meta(2, 2 * G, 2048, E, dtype=dtype))


def call_choose(dtype: torch.dtype) -> None:
    keys, temperatures = meta(2, 2, dtype=torch.int32), meta(2, dtype=F32)
    choose(meta(2, 5, 128_256, dtype=dtype), temperatures, keys, meta(2, 5), 0, logprobs=True)


def call_walk(N: int, parents: int | None, **options: torch.Tensor | bool) -> None:
    walk(meta(2, N), meta(2, N), None if parents is None else meta(parents, N), meta(2, dtype=torch.bool), 5, **options)


def call_move(P: int, E: int) -> None:
    move_slots(meta(2, 32, 16, 2048, E, dtype=BF16), meta(2, P), meta(2))


def call_attend(T: int, H: int, G: int, E: int, dtype: torch.dtype, words: int = 0, pad: int = 0) -> None:
    """`attend` over a cache of 2048 slots, which lie E + pad apart."""
    q = torch.empty(2, T, H, E, dtype=dtype, device="meta")
    cache = torch.empty(2, 2 * G, 2048, E + pad, dtype=dtype, device="meta")[..., :E]
    bits = torch.empty(2, T, words, dtype=torch.int64, device="meta") if words else None
    attend(q, cache, torch.empty(2, dtype=torch.int32, device="meta"), bits)


def call_few_rows(M: int, kind: str = "dense", silu: bool = False) -> None:
    """`few_rows` of an 8B decoder's sizes."""
    weight: Tensor | Packed = torch.empty(8192, 4096, dtype=BF16, device="meta")
    if kind != "dense":
        weight = pack(torch.zeros(8192, 4096, dtype=BF16), kind)
        weight = replace(weight, **{k: v.to("meta") for k, v in vars(weight).items() if isinstance(v, Tensor)})
    few_rows(torch.empty(M, 4096, dtype=BF16, device="meta"), weight, silu)


def call_few_rows_groups() -> None:
    """`few_rows` of int4 with groups of 32 columns and zero points."""
    codes, scale = torch.zeros(8192, 4096, dtype=torch.int8), torch.zeros(8192, 128, dtype=BF16)
    weight = Packed.from_codes(codes, scale, torch.zeros(8192, 128, dtype=torch.int8), 4)
    weight = replace(weight, **{k: v.to("meta") for k, v in vars(weight).items() if isinstance(v, Tensor)})
    few_rows(torch.empty(8, 4096, dtype=BF16, device="meta"), weight)


def dependent(*calls: Callable[[], None]) -> None:
    """Calls with dependent launch, as on a GPU that has it."""
    with mock.patch.object(launch, "_capability", return_value=(9, 0)), mock.patch.object(launch, "_is_gpu", return_value=True):
        for call in calls:
            call()


CALLS = {
    **{f"few_rows: {M} rows": lambda M=M: dependent(lambda: call_few_rows(M)) for M in (1, 32)},
    **{f"few_rows: {kind}": lambda kind=kind: dependent(lambda: call_few_rows(8, kind)) for kind in VALUES},
    "few_rows: int4, groups of 32 with zeros": lambda: dependent(call_few_rows_groups),
    "few_rows: gated": lambda: dependent(lambda: call_few_rows(8, silu=True)),
    "attend: chain, dependent launch": lambda: dependent(lambda: call_attend(1, 32, 8, 128, BF16)),
    "attend: chain": lambda: call_attend(1, 32, 8, 128, BF16),
    "attend: chain, 80 wide": lambda: call_attend(5, 32, 32, 80, BF16),
    "attend: tree of 8": lambda: call_attend(8, 32, 8, 128, BF16, words=1),
    "attend: chain, float32": lambda: call_attend(5, 9, 3, 64, F32),
    "attend: tree of 64": lambda: call_attend(64, 32, 8, 128, BF16, words=1),
    "attend: tree of 64, 80 wide": lambda: call_attend(64, 32, 32, 80, F16, words=2),
    "attend: prefill": lambda: call_attend(512, 32, 8, 128, BF16),
    "attend: prefill, 256 wide": lambda: call_attend(1024, 8, 4, 256, BF16),
    "attend: tree of 64, float32, 256 wide": lambda: call_attend(64, 8, 4, 256, F32, words=1),
    "add_norm": lambda: call_add_norm(5, 4096, 2, BF16),
    "add_norm: 16384 wide": lambda: call_add_norm(1, 16384, 4, F32),
    "add_norm: first layer": lambda: call_add_norm(1, 576, 0, F16),
    "place": lambda: call_place(5, 32, 8, 128, BF16),
    "place: float32, 80 wide, without norms": lambda: call_place(1, 8, 8, 80, F32, norms=False),
    "add_norm, place: dependent launch": lambda: dependent(
        lambda: call_add_norm(1, 4096, 2, BF16), lambda: call_place(1, 32, 8, 128, BF16)
    ),
    "choose": lambda: call_choose(F32),
    "choose: bfloat16": lambda: call_choose(BF16),
    "walk: chain": lambda: call_walk(5, None),
    "walk: packed chain": lambda: call_walk(5, None, lengths_B=meta(2)),
    "walk: plain": lambda: call_walk(5, None, plain=True),
    "walk: static tree": lambda: call_walk(16, 1),
    "walk: dynamic tree": lambda: call_walk(64, 2),
    "move_root": lambda: move_root(
        meta(2, 6), meta(2), meta(3), meta(2), meta(2, dtype=torch.bool), meta(2), meta(2), meta(2, dtype=torch.bool)
    ),
    "move_slots": lambda: call_move(6, 128),
    "move_slots: 64 of 80": lambda: call_move(64, 80),
}
INVARIANT = [  # rows depend on no other
    *(call for call in CALLS if call.startswith("few_rows")),
    "attend: chain",
    "attend: chain, 80 wide",
    "attend: tree of 8",
    "attend: chain, float32",
]


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
    """No product is of a warp group, which may add in another order; 16 bits use the tensor cores, float32 does not."""
    for result in compiled[call].values():
        assert result.count("wgmma.mma_async") == 0
    products = sum(result.count("mma.sync") for result in compiled[call].values())
    assert (products > 0) == ("float32" not in call)


def test_dependent_launch_waits_for_the_kernel_before(compiled: dict[str, dict[str, Compiled]]) -> None:
    """Kernels with dependent launch wait before they read, and let the next kernel start."""
    for result in compiled["attend: chain, dependent launch"].values():
        assert result.count("griddepcontrol.wait") == result.count("griddepcontrol.launch_dependents") == 1


def large_tile() -> None:
    with mock.patch.object(attend_module, "plan", return_value=Plan(32, 64, 64, 32, 4, 2)):
        call_attend(5, 32, 8, 64, F32)


POOR = {"spilling": large_tile, "narrow": lambda: call_attend(1, 32, 8, 128, BF16, pad=2)}


def test_spills_and_narrow_copies_are_seen() -> None:
    """A tile too large for its warps spills, and slots that are not aligned are not copied in 16 bytes."""
    results = compile_launches("tests.layers.kernels.test_compiled", "POOR")
    assert results["spilling"]["_split_kernel"].stack > 0
    assert "16" not in results["narrow"]["_split_kernel"].copies


def test_early_add_norm_and_place_wait_before_they_read(compiled: dict[str, dict[str, Compiled]]) -> None:
    """Kernels with dependent launch wait for the previous kernel, and let the next one start."""
    results = compiled["add_norm, place: dependent launch"]
    assert set(results) == {"_add_norm", "_place"}
    for result in results.values():
        assert result.count("griddepcontrol.wait") == result.count("griddepcontrol.launch_dependents") == 1


@pytest.mark.parametrize("call", ["choose", "choose: bfloat16"])
def test_choose_divides_and_takes_logarithms_exactly(compiled: dict[str, dict[str, Compiled]], call: str) -> None:
    """There is no approximate division or logarithm, which would choose other tokens than torch."""
    for result in compiled[call].values():
        assert not result.count("lg2.approx") and not result.count("div.full") and not result.count("div.approx")
    assert compiled[call]["_best_of_block"].count("div.rn.f32")


@pytest.mark.parametrize("call", ["move_slots", "move_slots: 64 of 80"])
def test_move_slots_waits_between_reading_and_writing(compiled: dict[str, dict[str, Compiled]], call: str) -> None:
    """A barrier separates the loads of a path from its stores, since the slots may overlap."""
    assert compiled[call]["_move_slots"].count("bar.sync")
