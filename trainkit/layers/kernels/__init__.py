"""Triton kernels of the runner on a GPU, one file each.

No module outside this package imports their files before `available` has returned True, so trainkit runs without Triton.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

INTERPRET = False
"""Also use the kernels on a CPU, where Triton's interpreter runs them; for tests."""


def available(like: Tensor) -> bool:
    """Whether kernels run on tensors of this device and dtype; never under autograd, since they have no gradient."""
    fits = like.dtype in (torch.float32, torch.bfloat16, torch.float16) and not torch.is_grad_enabled()
    return fits and (INTERPRET or (like.is_cuda and _has_triton()))


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
