"""Base class of the data modules. Here alone a training module and its data module are connected."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from trainkit.data.loader import PackedLoader, Rows

if TYPE_CHECKING:
    from trainkit.modules.base import TrainingModule


def global_seed() -> int:
    """The seed of this run, as `seed_everything` set it."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


class TrainingData(LightningDataModule):
    """Training and validation rows for a `TrainingModule`.

    The module calls `connect` before Lightning prepares any data. Of the module, this class reads only `tokenizer_folder` and
    `needs_window`.

    Args:
        batch_size: Rows per micro-batch and process.
    """

    module: TrainingModule
    tokenizer_folder: str | None = None
    """Folder of the tokenizer that the rows are encoded with; None if the rows are not text."""
    rows: tuple[Rows, Rows]
    """Training rows and validation rows; `setup` sets them."""
    fingerprint: str | None = None
    """Digest of everything that determines the rows and their split; `setup` sets it."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def connect(self, module: TrainingModule) -> None:
        """Stores the module that trains on this data. Raises UserError if the data does not suit it."""
        self.module = module

    def train_dataloader(self) -> Any:
        return PackedLoader(self.rows[0], self.batch_size, **self._training_options())

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return PackedLoader(self.rows[1], self.batch_size, rank=rank, world_size=world_size, shuffle=False, seed=global_seed())

    test_dataloader = val_dataloader

    def _training_options(self) -> dict[str, Any]:
        """Options of a loader for training."""
        assert self.trainer is not None
        return {
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
            "accumulate": self.trainer.accumulate_grad_batches,
            "seed": global_seed(),
            "attach_window": self.module.needs_window,
        }
