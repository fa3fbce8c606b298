"""Decisions that all ranks of a training run take together, so that no rank waits for another that has stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import torch
from lightning.pytorch import Trainer

from trainkit.errors import UserError


def largest(trainer: Trainer, value: int) -> int:
    """The largest of all ranks' values, the same on every rank."""
    if trainer.world_size == 1:
        return value
    values = torch.tensor(float(value), device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(values, reduce_op="max"))  # pyright: ignore[reportArgumentType]


def stop_all(trainer: Trainer, message: str) -> NoReturn:
    """Ends the run with exit code 2 and one line, which rank 0 prints; every rank must call it."""
    raise UserError(message) if trainer.is_global_zero else SystemExit(2)


@contextlib.contextmanager
def failing_together(trainer: Trainer) -> Iterator[None]:
    """If a file cannot be written within the block on any rank, all ranks exit with code 2, and one of them prints why.

    Every rank must enter the block. Its end is a barrier.
    """
    error: Exception | None = None
    try:
        yield
    except (OSError, UserError) as caught:
        error = caught
    first = -largest(trainer, -trainer.world_size if error is None else -trainer.global_rank)
    if error is not None and first == trainer.global_rank:
        raise error
    if first < trainer.world_size:
        raise SystemExit(2)
