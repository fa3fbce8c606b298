"""The work folder of a walk over blocks: the command it belongs to, the complete blocks, and hidden states between blocks.

A block is complete when its file exists; the states after it are on disk by then. Names of temporary files begin with a dot.
"""

# S sequences  B sequences of a batch  T positions  D hidden

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainkit.bundle import read_json
from trainkit.errors import UserError
from trainkit.files import sync, write_file, write_json

BATCH_TOKENS = 2048
"""Positions computed at a time, unless a sequence is longer."""


class States:
    """Hidden states of this process's sequences before a block, in one of two files."""

    def __init__(self, work: Path, counted_ST: Tensor, hidden: int, dtype: torch.dtype) -> None:
        self.work, self.counted_ST, self.dtype = work, counted_ST, dtype
        self.row = counted_ST.shape[1] * hidden * dtype.itemsize
        size = max(1, BATCH_TOKENS // counted_ST.shape[1])
        self.batches = [slice(start, start + size) for start in range(0, len(counted_ST), size)]

    def file(self, index: int) -> Path:
        """The file of the states before block `index`."""
        return self.work / f"states-{rank()}-{index % 2}.bin"

    def read(self, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The states before block `index` and their `counted`, batch by batch."""
        with self.file(index).open("rb") as file:
            for batch in self.batches:
                counted_BT = self.counted_ST[batch]
                data = bytearray(file.read(self.row * len(counted_BT)))
                yield torch.frombuffer(data, dtype=self.dtype).view(*counted_BT.shape, -1), counted_BT

    @contextmanager
    def writer(self, index: int) -> Iterator[Callable[[Tensor], object]]:
        """A function that appends batches to the states before block `index`."""
        with self.file(index).open("wb") as file:
            yield lambda x_BTD: file.write(x_BTD.cpu().contiguous().view(torch.uint8).numpy().data)
        sync(self.file(index))


def block_file(work: Path, index: int) -> Path:
    """The file of a complete block: its replaced tensors, and what was reported of it."""
    return work / f"block-{index:05d}.safetensors"


def write_block(work: Path, index: int, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Marks a block as complete."""
    contents = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_file(block_file(work, index), partial(save_file, contents, metadata={"report": json.dumps(report)}))


def read_report(work: Path, index: int) -> dict[str, Any]:
    """What was reported of a complete block."""
    with safe_open(block_file(work, index), framework="pt") as file:
        return json.loads(file.metadata()["report"])


@contextmanager
def claimed(work: Path, key: Mapping[str, Any]) -> Iterator[None]:
    """Creates the work folder or checks that it belongs to the same call; no other process uses it meanwhile."""
    if rank() > 0:
        barrier()
        yield
        return
    file, values = work / "walk.json", json.loads(json.dumps(key))
    work.mkdir(parents=True, exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{work}: another process is working there; wait for it, or choose another OUT") from None
        if not file.is_file():
            if any(not path.name.startswith(".") for path in work.iterdir()):
                raise UserError(f"{work}: holds other files; move them, or choose another OUT")
            write_json(file, values)
        stored = read_json(file)
        if changed := sorted(name for name in stored.keys() | values.keys() if stored.get(name) != values.get(name)):
            raise UserError(
                f"{work}: holds the unfinished work of another command ({', '.join(changed)} differ); give that command again "
                "to continue it, or remove the folder"
            )
        barrier()
        yield
    finally:
        os.close(lock)


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Waits for all processes."""
    if world() > 1:
        dist.barrier()
