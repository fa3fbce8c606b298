"""Chats and texts as packed batches, for every module alike."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from trainkit.data.loader import PackedLoader
from trainkit.data.text.prepare import CACHE, Prepared, prepare
from trainkit.errors import UserError
from trainkit.modules.base import TrainingModule, global_seed


class TextData(LightningDataModule):
    """Training and validation rows, tokenised once and packed.

    Args:
        train: File, folder or hub name, or several.
        validation: The same; by default a share of the training rows is held out.
        tokenizer: Folder of the tokenizer; the module's model by default.
        length: Tokens in a packed row.
        batch_size: Rows per micro-batch and process.
        columns: Our column names -> the files', e.g. {prompt: instruction, response: output}.
        on_bad_row: Stop at a bad row, or count it and go on.
        on_long_row: A row longer than `length` that is not plain text: keep its beginning, count and leave out, or stop.
        validation_share: Share of rows held out where no validation files are given.
        limit: First rows of the training files to take.
        limit_validation: First rows of the validation files to take.
        cache: Folder that keeps prepared sets by content; ~/.cache/trainkit/data by default.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | list[str] | None = None,
        tokenizer: str | None = None,
        length: int = 1024,
        batch_size: int = 8,
        columns: dict[str, str] | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        on_long_row: Literal["truncate", "skip", "error"] = "truncate",
        validation_share: float = 0.05,
        limit: int | None = None,
        limit_validation: int | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.train = [train] if isinstance(train, str) else list(train)
        self.validation = [validation] if isinstance(validation, str) else validation
        self.tokenizer = tokenizer
        self.length, self.batch_size = length, batch_size
        self._options: dict[str, Any] = {
            "columns": columns,
            "on_bad_row": on_bad_row,
            "on_long_row": on_long_row,
            "validation_share": validation_share,
            "limit": limit,
            "limit_validation": limit_validation,
            "cache_dir": cache or CACHE,
        }
        self.prepared: Prepared | None = None

    @property
    def tokenizer_folder(self) -> str:
        """The tokenizer these rows are read with."""
        folder = self.tokenizer or self._module.tokenizer_folder
        if folder is None:
            raise UserError("data.tokenizer: name the tokenizer's folder, the model brings none")
        return folder

    @property
    def fingerprint(self) -> str | None:
        """Digest of files, tokenizer and settings."""
        return None if self.prepared is None else self.prepared.fingerprint

    @property
    def largest_id(self) -> int:
        """The largest token id in the training rows."""
        return 0 if self.prepared is None else int(self.prepared.train.tokens_N.max())

    def prepare_data(self) -> None:
        # One process a node; the others find it cached.
        print(self._prepare().report)

    def setup(self, stage: str) -> None:
        if self.prepared is None:
            self.prepared = self._prepare()

    def train_dataloader(self) -> PackedLoader:
        assert self.prepared is not None and self.trainer is not None
        return self._loader(self.prepared.train, self.trainer.accumulate_grad_batches, True)

    def val_dataloader(self) -> PackedLoader:
        assert self.prepared is not None
        return self._loader(self.prepared.validation, 1, False)

    test_dataloader = val_dataloader

    @property
    def _module(self) -> TrainingModule:
        assert self.trainer is not None and isinstance(self.trainer.lightning_module, TrainingModule)
        return self.trainer.lightning_module

    def _prepare(self) -> Prepared:
        return prepare(self.train, self.validation, self.tokenizer_folder, self.length, seed=global_seed(), **self._options)

    def _loader(self, packed: Any, accumulate: int, shuffle: bool) -> PackedLoader:
        assert self.trainer is not None
        return PackedLoader(
            packed,
            self.batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            accumulate=accumulate,
            shuffle=shuffle,
            seed=global_seed(),
            attach_window=shuffle and self._module.needs_window,
        )
