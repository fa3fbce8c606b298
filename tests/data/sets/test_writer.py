"""Which device a process of a set uses."""

import pytest
import torch

from trainkit.data.sets.writer import local_device


@pytest.mark.parametrize(
    ("device", "rank", "gpus", "used"),
    [
        ("auto", None, True, "auto"),
        ("auto", "1", True, "cuda:1"),
        ("auto", "1", False, "auto"),
        ("cuda", "3", True, "cuda:3"),
        ("cuda", None, True, "cuda"),
        ("cuda:0", "1", True, "cuda:0"),
        ("cpu", "1", True, "cpu"),
    ],
)
def test_each_process_has_its_own_gpu(device, rank, gpus, used, monkeypatch):
    """Under torchrun `cuda` and `auto` are the GPU of the local rank; a named device stays as it is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert local_device(device) == used
