"""Base class of the data modules: the one place where a training module and its data module learn about each other."""

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

    The module calls `connect` before Lightning prepares any data, and `check_fits` when it knows the sizes of its model. In
    between, the data module asks the module for `tokenizer_folder` and `needs_window`, and nothing else.

    Args:
        batch_size: Rows per micro-batch and process.
    """

    module: TrainingModule

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def connect(self, module: TrainingModule) -> None:
        """Stores the module that trains on this data.

        Raises:
            UserError: this data is not for such a module.
        """
        self.module = module

    @property
    def tokenizer_folder(self) -> str | None:
        """Folder of the tokenizer that the rows are encoded with; None where there is no text."""
        return None

    @property
    def fingerprint(self) -> str | None:
        """Digest of everything that determines the rows and their split; None before `setup`."""
        return None

    @property
    def rows(self) -> tuple[Rows, Rows]:
        """Training rows and validation rows, after `setup`."""
        raise NotImplementedError

    def check_fits(self, vocab_size: int, max_positions: int) -> None:
        """Compares the rows with the sizes of the model that reads them.

        Raises:
            UserError: rows are longer than `max_positions` tokens, or a token id is not below `vocab_size`.
        """

    def train_dataloader(self) -> Any:
        return self._loader(self.rows[0], training=True)

    def val_dataloader(self) -> Any:
        return self._loader(self.rows[1], training=False)

    test_dataloader = val_dataloader

    def _loader(self, rows: Rows, training: bool) -> PackedLoader:
        trainer = self.trainer
        assert trainer is not None
        return PackedLoader(
            rows,
            self.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches if training else 1,
            shuffle=training,
            seed=global_seed(),
            attach_window=training and self.module.needs_window,
        )
