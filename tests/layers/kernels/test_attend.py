"""Attention over a static cache in Triton: equal to its eager twin, and bitwise independent of other rows in chains."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from trainkit.layers.kernels import attend as source
from trainkit.layers.kernels.attend import attend, attend_eager, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32: sums in another order. 16 bits: the weights of the second product and the result are rounded; the interpreter's
# products of bfloat16 are wrong.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 8e-3} | ({torch.bfloat16: 6e-2} if DEVICE == "cuda" else {})
FIRSTS = (0, 1, 63, 64, 150)

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN, so that a read of unwritten memory fails the test."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan")))
    yield


@pytest.fixture
def products_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter's products add in the same order for every row, as tensor cores do; NumPy's BLAS does not."""

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return (a.astype(dtype)[:, :, None] * b.astype(dtype)).sum(1)

    monkeypatch.setattr(np, "matmul", matmul)


def make_inputs(
    T: int, group: int, E: int, firsts: list[int], words: int = 0, shared_bits: bool = False, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Random strided queries, a layer of a cache that holds NaN past the slots in use, and random ancestor bits if `words`."""
    B, G, ahead = len(firsts), 2 if T * group <= 32 else 1, 64 * words or T
    S = max(firsts) + ahead + 70
    cache_BLGSE = torch.randn(B, 3, 2 * G, S, E)
    for row, first in enumerate(firsts):
        cache_BLGSE[row, :, :, first + ahead :] = float("nan")
    q_BTHE = torch.randn(B, T, 3 * G * group, E)[:, :, G * group : 2 * G * group]
    bits_BTW = torch.randint(-(2**63), 2**63 - 1, (1 if shared_bits else B, T, words)) if words else None
    if bits_BTW is not None:
        bits_BTW[:, :: max(2, T // 3)] &= 1 << 40  # few bits, so that rows see nothing of a whole split
    first_B = torch.tensor(firsts, dtype=torch.int32)
    bits_BTW = None if bits_BTW is None else bits_BTW.to(DEVICE)
    return q_BTHE.to(DEVICE, dtype), cache_BLGSE.to(DEVICE, dtype)[:, 1], first_B.to(DEVICE), bits_BTW


def expected(q_BTHE: Tensor, cache_BGSE: Tensor, first_B: Tensor, bits_BTW: Tensor | None) -> Tensor:
    return attend_eager(q_BTHE, cache_BGSE.nan_to_num(0.0), first_B, bits_BTW)


def error(y: Tensor, reference: Tensor) -> float:
    """Largest difference; infinite if anything is NaN."""
    return float((y.float() - reference.float()).abs().nan_to_num(float("inf")).max())


def test_eager_agrees_with_a_loop_over_slots(seed: int) -> None:
    """The twin follows the definition: committed slots, then those whose bit is set, or up to first + t."""
    q, cache, first, bits = make_inputs(3, 2, 8, [5, 0], words=2)
    for given in (bits, None):
        y = expected(q, cache, first, given)
        for b in range(2):
            for t in range(3):
                at = int(first[b])
                if given is None:
                    seen = list(range(at + t + 1))
                else:
                    seen = [*range(at), *(at + j for j in range(128) if int(given[b, t, j // 64]) >> (j % 64) & 1)]
                for h in range(4):
                    k, v = cache[b, h // 2, seen], cache[b, 2 + h // 2, seen]
                    want = (k @ q[b, t, h] * 8**-0.5).softmax(0) @ v
                    torch.testing.assert_close(y[b, t, h], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("T", [1, 3, 8, 16, 33, 64, 80])
@pytest.mark.parametrize("kind", ["causal", "bits", "shared bits"])
def test_attend_equals_its_eager_twin(seed: int, T: int, kind: str) -> None:
    """Random heads, widths, lengths and precision; strided queries and cache, NaN in all memory that must not be read."""
    group = random.choice([1, 3, 4, 8] if T <= 16 else [1, 3])
    dtype = random.choice(list(TOLERANCE))
    firsts = random.choices(FIRSTS, k=2 if T * group <= 32 else 1)
    words = 0 if kind == "causal" else random.choice([1, 2]) if T <= 64 else 2
    inputs = make_inputs(T, group, random.choice([32, 64, 80, 128]), firsts, words, kind == "shared bits", dtype)
    found = error(attend(*inputs), expected(*inputs))
    assert found <= TOLERANCE[dtype], (group, dtype, firsts, words, inputs[0].shape, found)


def test_attend_writes_into_out(seed: int) -> None:
    """The result is `out` itself, of one split and of several."""
    for firsts in ([3], [150]):
        inputs = make_inputs(2, 2, 32, firsts)
        out = torch.empty(*inputs[0].shape, device=DEVICE)
        assert attend(*inputs, out=out) is out
        assert error(out, expected(*inputs)) <= TOLERANCE[torch.float32]


def test_attend_gives_zeros_to_rows_that_see_nothing(seed: int) -> None:
    """With no committed slot and no bit set the output is zero; a softmax over no key would be NaN."""
    q, cache, first, bits = make_inputs(3, 2, 32, [0, 70], words=1)
    assert bits is not None
    bits[0, 1] = 0
    y = attend(q, cache, first, bits)
    assert y[0, 1].eq(0).all() and y.isfinite().all()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_chain_rows_do_not_depend_on_other_rows(seed: int, products_by_row: None, dtype: torch.dtype) -> None:
    """A position computed alone (T = 1, B = 1) is bitwise equal to the same position among 8 positions of 2 rows."""
    group, start = random.choice([1, 3, 4]), [random.choice(FIRSTS), random.randrange(100)]
    q, cache, first, _ = make_inputs(8, group, random.choice([32, 40]), start, dtype=dtype)
    together = attend(q, cache, first, None)
    for b, t in [(0, 0), (1, 7), (random.randrange(2), random.randrange(1, 7))]:
        alone = attend(q[b : b + 1, t : t + 1], cache[b : b + 1], first[b : b + 1] + t, None)
        assert torch.equal(alone[0, 0], together[b, t]), (group, start, b, t)
    some = attend(q[1:, :5], cache[1:], first[1:], None)
    assert torch.equal(some[0], together[1, :5])


def test_chain_of_bits_equals_the_causal_chain(seed: int, products_by_row: None) -> None:
    """Bits 1, 11, 111, ... for up to 32 folded rows give a result bitwise equal to a causal call."""
    q, cache, first, _ = make_inputs(5, 4, 64, [61, 20])
    bits = torch.tensor([2 ** (t + 1) - 1 for t in range(5)], device=DEVICE).view(1, 5, 1)
    cache = cache.nan_to_num(0.0)
    assert torch.equal(attend(q, cache, first, bits), attend(q, cache, first, None))


def test_plan_is_the_same_for_all_chains() -> None:
    """Tile and split follow from the cache, not from T, and a cache row has at most 1.25 times the intended splits."""
    for S in (64, 2048, 2128, 8192, 131072):
        for G in (1, 2, 8, 32):
            chains = {plan(T, 4, G, S, 128, torch.bfloat16, True) for T in range(1, 33)}
            assert len(chains) == 1
            (size,) = chains
            assert size.split * size.splits >= S > size.split * (size.splits - 1)
            assert size.splits <= 1.25 * max(16, min(128, 256 // G))
    assert plan(1, 4, 8, 2128, 128, torch.bfloat16, True)[:4] == (32, 64, 64, 34)


FAULTS = {  # what is replaced by what, and the words of bits of the call that shows it
    "keys and values swapped": ("v_ptr = k_ptr + G * c_g", "k_ptr, v_ptr = k_ptr + G * c_g, k_ptr", 0),
    "own slot hidden": ("<= (first + t)[:, None]", "< (first + t)[:, None]", 0),
    "last slot left out": ("(t + 1 if WORDS == 0", "(t if WORDS == 0", 0),
    "dead splits read": ("here = low + n < live", "here = low + n < SPLITS", 0),
    "head of another group": ("(g * GROUP + r % GROUP) * q_h", "(r % (G * GROUP)) * q_h", 0),
    "bits begin one slot late": ("((low - first) & 63)", "((low - first - 1) & 63)", 1),
    "no guard for rows that saw nothing": ('base = tl.where(new == float("-inf"), 0.0, new)  # a', "base = new  # a", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_the_kernel_are_noticed(seed: int, tmp_path: Path, fault: str) -> None:
    """With a fault planted in its source, the comparison with the eager twin fails."""
    old, new, words = FAULTS[fault]
    inputs = make_inputs(4, 2, 32, [63], words)
    limit = TOLERANCE[torch.float32]
    assert (
        error(attend(*inputs), expected(*inputs))
        <= limit
        < error(load_broken(tmp_path, old, new).attend(*inputs), expected(*inputs))
    )


def load_broken(folder: Path, old: str, new: str) -> ModuleType:
    """The kernel's module with one place of its source replaced."""
    text = Path(source.__file__).read_text()
    assert text.count(old) == 1, old
    path = folder / "broken_attend.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("broken_attend", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
