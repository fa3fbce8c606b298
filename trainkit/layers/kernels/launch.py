"""How kernels are launched: on GPUs that support it, before the kernel that they depend on has ended.

Programmatic dependent launch (compute capability 9.0, CUDA Graphs included): a kernel that calls `gdc_launch_dependents` lets
the next one start on multiprocessors that become free; the next one calls `gdc_wait` before it touches anything that an earlier
kernel writes or reads. Every kernel launched this way waits, so that the end of one implies the end of all before it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

DEPENDENT = True
"""Whether dependent launch is used if the GPU supports it; read at each launch, so that measurements can turn it off."""


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel with the constexpr `PDL`."""
    if DEPENDENT and _is_gpu(device) and _capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Makes the GPU of the first argument the current one during the call, since Triton launches on the current one."""

    @wraps(launch)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        device = getattr(args[0], "device", None)
        if not isinstance(device, torch.device) or device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(device):
            return launch(*args, **kwargs)

    return guarded
