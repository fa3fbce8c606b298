"""The machine that a measurement ran on: processor, cache, threads, library versions, and measured copy bandwidth."""

from __future__ import annotations

import platform
import statistics
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

from trainkit import __version__
from trainkit.runner.timing import processor, synchronize


@dataclass(frozen=True)
class Machine:
    """The machine of a measurement.

    Attributes:
        processor: Model name of the CPU or GPU.
        threads: Maximum number of CPU threads.
        last_level_cache: Bytes of the last-level cache; None if unknown.
        copy_bandwidth: Bytes read plus bytes written per second, when copying at least four times the cache.
        versions: Versions of trainkit, Python, torch and transformers.
    """

    processor: str
    threads: int
    last_level_cache: int | None
    copy_bandwidth: float
    versions: dict[str, str]


def examine(device: torch.device) -> Machine:
    """Describes the machine behind `device`, and measures its copy bandwidth."""
    cache = _last_level_cache(device)
    versions = {"trainkit": __version__, "python": platform.python_version()}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    return Machine(processor(device), torch.get_num_threads(), cache, _copy_bandwidth(device, cache), versions)


def _last_level_cache(device: torch.device) -> int | None:
    """Bytes of the GPU's L2 cache, or of the CPU's highest cache level as Linux reports it; None on other systems."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    bytes_by_level: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError, ValueError):
            size = (index / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(size[-1], 1)
            bytes_by_level[int((index / "level").read_text())] = int(size.rstrip("KMG")) * unit
    return bytes_by_level[max(bytes_by_level)] if bytes_by_level else None


def _copy_bandwidth(device: torch.device, cache: int | None, repeats: int = 7) -> float:
    """Bytes per second, read plus written, of copying a tensor of at least four times the cache; median of `repeats`."""
    min_bytes = 1 << 30 if device.type == "cuda" else 1 << 26
    source = torch.ones(max(4 * (cache or 0), min_bytes) // 4, dtype=torch.float32, device=device)
    sink = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = perf_counter()
        sink.copy_(source)
        synchronize(device)
        seconds.append(perf_counter() - began)
    return 2 * source.numel() * 4 / statistics.median(seconds[1:])  # the first copy is slower: it allocates the pages
