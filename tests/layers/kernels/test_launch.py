"""Kernels are launched on the GPU that holds their arguments, whatever GPU is the current one."""

from types import SimpleNamespace

import torch

from trainkit.layers.kernels import launch


def test_kernel_runs_on_the_gpu_of_its_first_argument(monkeypatch):
    """The current GPU is changed for the call only, and only where it is another one."""
    current = [0]

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            self.before, current[0] = current[0], self.device.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    run = launch.on_its_device(lambda tensor: current[0])
    for index in (0, 1):
        assert run(SimpleNamespace(device=torch.device("cuda", index))) == index
        assert current[0] == 0
    assert run(SimpleNamespace(device=torch.device("cpu"))) == 0
