"""A runner on the second GPU, with a stand-in for torch.cuda that follows which GPU is the current one."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from trainkit.runner import graphs as graphs_module
from trainkit.runner.graphs import Graphs, capture
from trainkit.runner.round import RoundOutput
from trainkit.runner.session import start_fetch

SECOND = torch.device("cuda:1")


class FakeCuda:
    """What the runner uses of torch.cuda; streams, events and graphs belong to the GPU that is the current one."""

    def __init__(self) -> None:
        self.index, self.seen, self.streams = 0, [], {}
        cuda = self

        class Stream:
            def __init__(self, index=None):
                self.index = cuda.index if index is None else index

            def wait_stream(self, other):
                assert self.index == other.index

        class Event:
            def record(self, stream=None):
                cuda.seen.append(("event", (stream or cuda.current_stream()).index))

            def synchronize(self):
                pass

        class CUDAGraph:
            def pool(self):
                return "pool"

            def replay(self):
                cuda.seen.append(("replay", cuda.index))

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def current_device(self):
        return self.index

    def current_stream(self):
        return self.streams.setdefault(self.index, self.Stream())

    def synchronize(self, device):
        self.seen.append(("synchronize", device.index))

    @contextmanager
    def device(self, device):
        before, self.index = self.index, device.index
        yield
        self.index = before

    @contextmanager
    def stream(self, stream):
        assert stream.index == self.index
        yield

    @contextmanager
    def graph(self, graph, pool=None, stream=None):
        assert stream is not None, "torch's own stream is on the GPU of the first capture"
        self.seen.append(("capture", self.index, stream, pool))
        assert stream.index == self.index
        yield


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in (
        "Stream",
        "Event",
        "CUDAGraph",
        "current_device",
        "current_stream",
        "synchronize",
        "device",
        "stream",
        "graph",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    graphs_module._capture_stream.cache_clear()
    yield fake
    graphs_module._capture_stream.cache_clear()


def output(count=1):
    return RoundOutput(torch.zeros(1, 1), torch.full((1,), count), None)


def test_graphs_are_captured_and_replayed_on_their_gpu(cuda):
    """Captures and replays happen on the tensors' GPU, and all captures of a GPU share one stream and a pool."""
    graphs, done_B, ran = Graphs(SECOND), torch.zeros(1, dtype=torch.bool), []
    for key in ("a", "b", "a"):
        graphs.run(key, lambda: ran.append(cuda.index) or output(), done_B)
    captures = [seen for seen in cuda.seen if seen[0] == "capture"]
    assert set(ran) == {1} and cuda.index == 0
    assert [index for _, index, _, _ in captures] == [1, 1] and captures[0][2] is captures[1][2]
    assert [pool for *_, pool in captures] == [None, "pool"]
    assert [seen for seen in cuda.seen if seen[0] == "replay"] == [("replay", 1)] * 3
    capture(output, torch.device("cuda:0"))
    assert cuda.seen[-1][1] == 0 and cuda.seen[-1][2] is not captures[0][2]


def test_outputs_are_awaited_on_the_runners_gpu(cuda, monkeypatch):
    """The event behind the copies to the host is recorded on the stream that copies."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device, pin_memory: empty_like(tensor))
    wait = start_fetch(output(3), SECOND)
    assert cuda.seen == [("event", 1)] and wait().counts_B.tolist() == [3] and cuda.index == 0


def test_graphs_unused_for_longest_are_dropped(cuda, monkeypatch):
    """No more than `MAX_GRAPHS` graphs are kept, those used last."""
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 3)
    graphs, done_B = Graphs(SECOND), torch.zeros(1, dtype=torch.bool)
    for key in "abcadaea":
        graphs.run(key, output, done_B)
    assert list(graphs._captured) == ["d", "e", "a"]
    assert sum(seen[0] == "capture" for seen in cuda.seen) == 5 and ("synchronize", 1) in cuda.seen
