"""Which implementation attention takes, and that a runner decodes the same texts with what it hands to the kernel."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.models import SHAPE, SIBLINGS, pair, ragged_prompts
from tests.support.replaying import replayed
from trainkit.layers import attend as module
from trainkit.layers.attend import folded, has_kernel, sdpa
from trainkit.layers.visible import Visible
from trainkit.runner import DynamicTree
from trainkit.runner.sampling import Sampling


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("T", [1, 3])
def test_sdpa_equals_softmax_over_visible_keys(T, group, seed):
    """Softmax over the keys that a query sees, head by head, with a view of a cache that has other layers beside it."""
    cache = torch.randn(2, 3, 4, 20, 8)[:, 1]
    q, visible = torch.randn(2, T, 2 * group, 8), Visible(torch.tensor([5, 11], dtype=torch.int32))
    y = module.attend(q, cache, folded(visible.bias(T, 16, torch.float32), group))
    for b, first in enumerate(visible.first_B.tolist()):
        for t in range(T):
            for h in range(2 * group):
                k, v = (cache[b, h // group + start, : first + t + 1] for start in (0, 2))
                torch.testing.assert_close(y[b, t, h], (q[b, t, h] @ k.T / 8**0.5).softmax(-1) @ v, atol=1e-5, rtol=1e-5)


def test_kernel_is_chosen_by_device_dtype_and_size(monkeypatch):
    """On a CPU only in the interpreter; never in float64, for other head widths, for long prompts, or where gradients flow."""
    like = torch.zeros(1)
    with torch.no_grad():
        assert not has_kernel(like, 4, 64)
        monkeypatch.setattr(module, "INTERPRET", True)
        assert all(has_kernel(like.to(dtype), 4, 64) for dtype in (torch.float32, torch.float16, torch.bfloat16))
        assert not has_kernel(like.double(), 4, 64) and not has_kernel(like, 4, 80)
        assert has_kernel(like, 128, 64) and not has_kernel(like, 129, 64)
    assert not has_kernel(like, 4, 64)


@pytest.mark.parametrize(
    "shaped",
    [{"depth": 0}, {"depth": 4}, {"tree": SIBLINGS}, {"tree": DynamicTree(4, 3, 8)}],
    ids="plain chain tree dynamic".split(),
)
def test_runner_with_lengths_and_bits_decodes_the_same(shaped, monkeypatch, seed):
    """A stand-in for the kernel gets the whole cache, lengths and bits; texts are those of attention with a bias."""
    runner, prompts, calls = pair(replace(SHAPE, head_dim=16), max_batch=3, ends=()), ragged_prompts(5), []
    options = {"max_new_tokens": 20, "temperature": 0.7, "seed": seed} | shaped
    expected = [out.tokens for out in runner.generate(prompts, **options)]

    def kernel(q_BTHE, cache_BGSE, first_B, bits_BTW):
        assert first_B.dtype == torch.int32 and (bits_BTW is None or bits_BTW.dtype == torch.int64)
        assert bits_BTW is None or (len(bits_BTW) in (1, len(q_BTHE)) and bits_BTW.shape[1] == q_BTHE.shape[1])
        calls.append(bits_BTW)
        (_, T, H, _), (_, G, S, _) = q_BTHE.shape, cache_BGSE.shape
        bias = folded(Visible(first_B, bits_BTW).bias(T, S, q_BTHE.dtype), 2 * H // G)
        return sdpa(q_BTHE, *cache_BGSE.split(G // 2, dim=1), bias)

    monkeypatch.setattr(module, "INTERPRET", True)
    monkeypatch.setitem(sys.modules, "trainkit.layers.kernels.attend", SimpleNamespace(attend=kernel))
    for run in (runner, replayed(runner, 1)):
        texts = [out.tokens for out in run.generate(prompts, **options)]
        assert_few(compare(runner.rounds.target, prompts, texts, expected, Sampling(0.7), seed), 100)
    assert calls and all((bits is None) == ("tree" not in shaped) for bits in calls[-2:])
