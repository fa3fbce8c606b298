"""Capture of whole rounds as CUDA graphs, one for each (batch, tree, cache span, processing), and their replay."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainkit.runner.round import RoundOutput


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: RoundOutput
    round_: Callable[[], RoundOutput]  # what it holds on to, the graph reads


class Graphs:
    """Captured rounds by key.

    All graphs share one memory pool: they never overlap in time, and their outputs are copied off before the next replay is
    enqueued on the same stream, so temporaries of one may lie where another's lay.
    """

    def __init__(self) -> None:
        self._captured: dict[Hashable, _Captured] = {}
        self._pool: Any = None

    def clear(self) -> None:
        """Forgets every graph; for when the static tensors they point to are replaced."""
        self._captured.clear()
        self._pool = None

    def run(self, key: Hashable, round_: Callable[[], RoundOutput], done_B: Tensor) -> RoundOutput:
        """Replays the graph of `key`, captured at first use; the output's tensors are overwritten by the next replay.

        Args:
            key: All that the round's Python code depends on.
            round_: The round over static tensors.
            done_B: Rows marked done change nothing but scratch slots; all are, while kernels warm up before the capture.
        """
        if key not in self._captured:
            kept = done_B.clone()
            done_B.fill_(True)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    round_()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                output = round_()
            self._pool = self._pool or graph.pool()
            self._captured[key] = _Captured(graph, output, round_)
            done_B.copy_(kept)
        captured = self._captured[key]
        captured.graph.replay()
        return captured.output
