"""What a measurement ran on: processor, caches, threads, library versions, and the copy bandwidth that speeds are held to."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch

from trainkit import __version__
from trainkit.runner.timing import processor, synchronize

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Machine:
    """Where a measurement ran.

    Attributes:
        processor: Model name of the CPU or GPU.
        threads: Most threads a CPU contender may use.
        last_level_cache: Bytes of the last-level cache, or None where it is not known.
        copy_bandwidth: Bytes read plus bytes written per second by a copy of four times the cache or more.
        versions: Of trainkit, Python and the libraries that decode.
    """

    processor: str
    threads: int
    last_level_cache: int | None
    copy_bandwidth: float
    versions: dict[str, str]


def examine(device: torch.device) -> Machine:
    """Measures and describes the machine behind `device`."""
    threads = torch.get_num_threads()
    cache = last_level_cache(device)
    return Machine(processor(device), threads, cache, copy_bandwidth(device, cache), _versions())


def last_level_cache(device: torch.device) -> int | None:
    """Bytes of the GPU's L2, or of the CPU's highest cache as Linux reports it; None elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[int, int] = {}
    for index in _CACHES.glob("index*"):
        try:
            size = (index / "size").read_text().strip()
            found[int((index / "level").read_text())] = int(size.rstrip("KMG")) * _UNITS.get(size[-1], 1)
        except (OSError, ValueError):
            continue
    return found[max(found)] if found else None


def copy_bandwidth(device: torch.device, cache: int | None, repeats: int = 7) -> float:
    """Bytes per second, read and written, of copying a tensor of at least four times the cache; the median of `repeats`."""
    least = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.ones(max(4 * (cache or 0), least) // 4, dtype=torch.float32, device=device)
    sink = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = perf_counter()
        sink.copy_(source)
        synchronize(device)
        seconds.append(perf_counter() - began)
    return 2 * source.numel() * 4 / statistics.median(seconds[1:])  # the first touches the pages


def _versions() -> dict[str, str]:
    found = {"trainkit": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
