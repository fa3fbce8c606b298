"""Rounds whose verification runs in kernels, compared with rounds in torch operations."""

import pytest
import torch

from tests.support.models import END, SIBLINGS, pair
from trainkit.runner.trees.dynamic import DynamicTree

pytest.importorskip("triton")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "shaped",
    [{"depth": 0}, {"depth": 3}, {"tree": SIBLINGS}, {"tree": DynamicTree(3, 2, 6)}],
    ids="plain chain tree dynamic".split(),
)
def test_verification_in_kernels_emits_the_same(shaped, temperature, monkeypatch, seed):
    """Tokens, ends and lengths are equal, log-probabilities up to rounding, with end ids and without."""
    options = {"max_new_tokens": 9, "temperature": temperature, "seed": seed, "logprobs": True} | shaped
    prompts = [[3], [5, 9, 2], [4, 4]]
    for ends in ((), (END, 3, 11)):
        runner, results = pair(max_batch=2, ends=ends, max_len=40), []
        for kernels in (False, True):
            monkeypatch.setattr("trainkit.runner.round.available", lambda like, kernels=kernels: kernels)
            results.append(runner.generate(prompts, **options))
        for ours, theirs in zip(*results, strict=True):
            assert ours.tokens == theirs.tokens and ours.finish == theirs.finish
            assert ours.stats.rounds == theirs.stats.rounds and ours.stats.accepted == theirs.stats.accepted
            assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4)
