"""Records of an acceptance set as a Lightning data module."""

# B records of a batch  W proposals of each  D hidden  C signals  N validation records

from __future__ import annotations

from lightning.pytorch import LightningDataModule

from trainkit.data.loader import PackedLoader
from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.modules.base import global_seed


class AcceptanceData(LightningDataModule):
    """Records of an acceptance set, in memory; validation on prompts that training has no record of.

    Args:
        train: Folder that `trainkit acceptance` wrote.
        validation_share: Share of the prompts held out.
        batch_size: Records per micro-batch and process.
    """

    def __init__(self, train: str, validation_share: float = 0.1, batch_size: int = 2048) -> None:
        super().__init__()
        self.train, self.validation_share, self.batch_size = train, validation_share, batch_size
        self.sets: tuple[AcceptanceSet, AcceptanceSet] | None = None

    @property
    def fingerprint(self) -> str | None:
        """Digest of what determines the records, and of how they are split."""
        return None if self.sets is None else self.sets[0].fingerprint

    def setup(self, stage: str) -> None:
        if self.sets is None:
            self.sets = AcceptanceSet.read(self.train).split(self.validation_share, global_seed())

    def train_dataloader(self) -> PackedLoader:
        assert self.trainer is not None
        return self._loader(0, self.trainer.accumulate_grad_batches)

    def val_dataloader(self) -> PackedLoader:
        return self._loader(1, 1)

    test_dataloader = val_dataloader

    def _loader(self, which: int, accumulate: int) -> PackedLoader:
        assert self.sets is not None and self.trainer is not None
        return PackedLoader(
            self.sets[which],
            self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            accumulate=accumulate,
            shuffle=which == 0,
            seed=global_seed(),
        )
