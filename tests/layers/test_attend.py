"""Attention by PyTorch, and where kernels are chosen instead."""

from dataclasses import replace

import pytest
import torch

from tests.support.models import SHAPE
from trainkit.layers import kernels
from trainkit.layers.attend import attend, folded
from trainkit.layers.attention import KernelContext, Rotary
from trainkit.layers.visible import Visible


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3])
def test_attend_equals_softmax_over_visible_keys(T, group, seed):
    """Softmax over the keys that a query sees, head by head, with a view of a cache that has other layers beside it."""
    cache = torch.randn(2, 3, 4, 20, 8)[:, 1, :, :16]
    q, visible = torch.randn(2, T, 2 * group, 8), Visible(torch.tensor([5, 11], dtype=torch.int32))
    y = attend(q, *cache.split(2, dim=1), folded(visible.bias(T, 16, torch.float32), group))
    for b, first in enumerate(visible.first_B.tolist()):
        for t in range(T):
            for h in range(2 * group):
                k, v = (cache[b, h // group + start, : first + t + 1] for start in (0, 2))
                torch.testing.assert_close(y[b, t, h], (q[b, t, h] @ k.T / 8**0.5).softmax(-1) @ v, atol=1e-5, rtol=1e-5)


def test_kernels_are_chosen_by_device_dtype_and_size(monkeypatch):
    """On a CPU only in the interpreter; never in float64, for wide heads, for long prompts, under a bias, or under autograd."""

    def chosen(T: int = 4, head_dim: int = 16, dtype: torch.dtype = torch.float32, biased: bool = False) -> bool:
        rotary, positions = Rotary(replace(SHAPE, head_dim=head_dim)), torch.arange(T)[None]
        rotary.reserve(256, torch.zeros(1, dtype=dtype))
        seen = Visible.causal(positions)
        context = rotary.context(positions, seen.bias(T, T, dtype) if biased else seen, positions, T)
        return isinstance(context, KernelContext)

    with torch.no_grad():
        assert not chosen()
        monkeypatch.setattr(kernels, "INTERPRET", True)
        assert all(chosen(dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
        assert chosen(T=128) and chosen(head_dim=80)
        assert not any((chosen(dtype=torch.float64), chosen(T=129), chosen(head_dim=512), chosen(biased=True)))
    assert not chosen()


def test_attend_takes_any_strides_of_the_library(monkeypatch, seed):
    """On a GPU the library's output may have its rows before its heads."""
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    bias = torch.zeros(2, 1, 6, 9)
    expected, plain = attend(q, k, v, bias), torch.nn.functional.scaled_dot_product_attention

    def strided(*tensors, **options):
        return plain(*tensors, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", strided)
    assert torch.equal(attend(q, k, v, bias), expected)
