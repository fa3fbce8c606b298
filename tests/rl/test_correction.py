from __future__ import annotations

import math

import pytest
import torch

from trainkit.errors import UserError
from trainkit.rl.correction import choose, correction, mismatch

OLD = torch.tensor([[-0.6, -0.9, -0.2, 0.0], [-1.0, -0.5, -0.3, -0.8]], dtype=torch.float64)
C = torch.tensor([[-0.1, 0.05, 0.0, 9.0], [0.5, 0.5, 0.4, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.float64)


def test_correction_equals_worked_example():
    """A response with token ratios .9048, 1.0513 and 1 keeps them; one with ratio e^1.4 = 4.0552 is cut or masked at 3."""
    first, second = math.exp(-0.05), math.exp(1.4)
    expected = {
        "token_truncate": [[0.904837, 1.051271, 1.0], [math.exp(0.5), math.exp(0.5), math.exp(0.4), 1.0]],
        "sequence_truncate": [[first] * 3, [3.0] * 4],
        "sequence_mask": [[first] * 3, [0.0] * 4],
    }
    assert first == pytest.approx(0.951229, abs=1e-6) and second == pytest.approx(4.0552, abs=1e-4)
    for kind, rows in expected.items():
        factor = correction(kind, 3.0, OLD, OLD - C, MASK)  # type: ignore[arg-type]
        assert factor is not None
        for found, row, count in zip(factor, rows, (3, 4), strict=True):
            torch.testing.assert_close(found[:count], torch.tensor(row, dtype=torch.float64), rtol=0, atol=1e-6)
    tokens = correction("token_truncate", 1.5, OLD, OLD - C, MASK)
    assert tokens is not None and tokens[1, 0] == 1.5 and correction("none", 3.0, OLD, OLD - C, MASK) is None
    masked = correction("sequence_mask", 5.0, OLD, OLD - C, MASK)
    assert masked is not None and masked[1, 3].item() == pytest.approx(second)


def test_mismatch_sums_count_masked_tokens_only():
    """Sums of |c| and k3 over the tokens that count, and the shares above the cap."""
    sums = mismatch(OLD, OLD - C, MASK, cap=1.6)
    values = [-0.1, 0.05, 0.0, 0.5, 0.5, 0.4, 0.0]
    assert sums["tokens"] == 7
    assert sums["abs"].item() == pytest.approx(sum(map(abs, values)), abs=1e-12)
    assert sums["k3"].item() == pytest.approx(sum(math.exp(c) - c - 1 for c in values), abs=1e-12)
    assert sums["token_capped"] == 2 and sums["sequence_capped"] == 4


def test_truncated_tokens_unbias_a_sampler(seed):
    """Weighted by token_truncate below its cap, means over the sampler's draws are those of the policy."""
    sampler, old = (
        (torch.randn(5, dtype=torch.float64) * 0.2).log_softmax(-1),
        torch.zeros(5, dtype=torch.float64).log_softmax(-1),
    )
    values = torch.randn(5, dtype=torch.float64)
    factor = correction("token_truncate", 20.0, old[:, None], sampler[:, None], torch.ones(5, 1))
    assert factor is not None
    mean = (sampler.exp() * factor[:, 0] * values).sum()
    torch.testing.assert_close(mean, values.mean(), rtol=1e-9, atol=1e-12)  # float64, an exact identity


def test_extreme_mismatch_stays_finite():
    """A difference of thousands of nats gives finite factors and sums."""
    for shift in (-3000.0, 3000.0):
        assert all(value.isfinite() for value in mismatch(OLD, OLD + shift, MASK).values())
        for kind in ("token_truncate", "sequence_truncate", "sequence_mask"):
            factor = correction(kind, 2.0, OLD, OLD + shift, MASK)
            assert factor is not None and factor.isfinite().all()


def test_auto_corrects_only_above_its_bound():
    """Auto corrects by token above a mean k3 of 1e-4, and other kinds are kept."""
    assert [choose("auto", k3) for k3 in (0.0, 1e-4, 2e-4)] == ["none", "none", "token_truncate"]
    assert choose("sequence_mask", 0.0) == "sequence_mask"


def test_correction_refuses_bad_option():
    """An unknown kind and a cap below 1 are refused in one line."""
    with pytest.raises(UserError, match="model.correction is 'token'; choose from none, auto"):
        correction("token", 2.0, OLD, OLD, MASK)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="model.correction_cap is 0.5; it must be at least 1"):
        correction("token_truncate", 0.5, OLD, OLD, MASK)
