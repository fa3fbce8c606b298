"""Rounds captured as CUDA graphs, one for each (batch, tree, processing), and their replay."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainkit.runner.round import RoundOutput

T = TypeVar("T")


MAX_GRAPHS = 128
"""Number of graphs that a runner keeps; each takes some megabytes."""


def capture(function: Callable[[], T], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """The function as a CUDA graph, and its output; two warm-up runs come first, so that nothing is compiled in the capture.

    Args:
        function: Reads and writes static tensors only.
        device: GPU of these tensors, which need not be the current one.
        pool: Memory pool shared with other graphs.
    """
    with torch.cuda.device(device):
        stream, current = _capture_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            output = function()
    return graph, output


@cache
def _capture_stream(index: int) -> torch.cuda.Stream:
    """The stream for all captures on GPU `index`, which must be the current device.

    torch's default capture stream is on the GPU that captured first. Only graphs captured on the same stream share a pool.
    """
    return torch.cuda.Stream(index)


class Graphs:
    """Captured rounds by key, at most `MAX_GRAPHS`; the least recently used one is dropped.

    All graphs share one memory pool. They never overlap in time, and outputs are copied before the next replay is enqueued on
    the same stream, so temporaries of one may use the memory of another's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Graph, output, and the round itself, which keeps alive what the graph reads.
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, RoundOutput, Callable[[], RoundOutput]]] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forgets every graph, because the static tensors that they point to are replaced."""
        self._captured.clear()
        self._pool = None

    def run(self, key: Hashable, round_: Callable[[], RoundOutput], done_B: Tensor) -> RoundOutput:
        """Replays the graph of `key`, captured at first use; the next replay overwrites the output's tensors.

        Args:
            key: All that the round's Python code depends on.
            round_: The round over static tensors.
            done_B: Rows whose text has ended, which change nothing but scratch slots. All rows are marked so while kernels warm
                up before the capture.
        """
        if key not in self._captured:
            before_B = done_B.clone()
            done_B.fill_(True)
            if len(self._captured) >= MAX_GRAPHS:
                torch.cuda.synchronize(self.device)  # a replay of it may still run
                self._captured.pop(next(iter(self._captured)))
            graph, output = capture(round_, self.device, self._pool)
            self._pool = self._pool or graph.pool()
            self._captured[key] = graph, output, round_
            done_B.copy_(before_B)
        graph, output, _ = self._captured[key] = self._captured.pop(key)  # moved to the end: most recently used
        with torch.cuda.device(self.device):
            graph.replay()
        return output
