"""Records of an acceptance set as a Lightning data module."""

from __future__ import annotations

from trainkit.data.sets.acceptance import AcceptanceSet
from trainkit.modules.training_data import TrainingData, global_seed


class AcceptanceData(TrainingData):
    """Records of an acceptance set, all in memory. No prompt has records both in training and in validation.

    Args:
        train: Folder that `trainkit acceptance` wrote.
        validation_share: Share of the prompts that is held out for validation.
        batch_size: Records per micro-batch and process.
    """

    rows: tuple[AcceptanceSet, AcceptanceSet]

    def __init__(self, train: str, validation_share: float = 0.1, batch_size: int = 2048) -> None:
        super().__init__(batch_size)
        self.train, self.validation_share = train, validation_share

    def setup(self, stage: str) -> None:
        if self.fingerprint is None:
            self.rows = AcceptanceSet.read(self.train).split(self.validation_share, global_seed())
            self.fingerprint = self.rows[0].fingerprint
