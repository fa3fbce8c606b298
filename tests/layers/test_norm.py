"""The RMS norm under mixed precision."""

import warnings

import torch
from torch import nn

from trainkit.layers.norm import RMSNorm


def test_mixed_precision_takes_the_fused_kernel(seed):
    """A float32 weight meets a bfloat16 input without torch's warning of a slow path; value and gradient are torch's own."""
    ours, theirs = RMSNorm(64, eps=1e-5), nn.RMSNorm(64, eps=1e-5)
    nn.init.normal_(ours.weight, mean=1.0, std=0.2)
    theirs.load_state_dict(ours.state_dict())
    x, scale, results = torch.randn(7, 64).bfloat16(), torch.randn(7, 64), []
    for norm in (ours, theirs):
        given = x.clone().requires_grad_()
        with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", dtype=torch.bfloat16):
            torch.set_warn_always(True)
            warnings.simplefilter("always")
            y = norm(given)
        torch.set_warn_always(False)
        assert any("Mismatch dtype" in str(entry.message) for entry in caught) == (norm is theirs)
        assert y.dtype == torch.bfloat16
        (y.float() * scale).sum().backward()
        assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32
        results.append((y.float(), given.grad, norm.weight.grad))
    for mine, torchs in zip(*results, strict=True):
        assert (mine - torchs).abs().max() <= 2**-6 * torchs.abs().max()  # the two round differently
