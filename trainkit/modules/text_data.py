"""Chats and texts as packed batches, for language models and drafters alike."""

from __future__ import annotations

from typing import Any, Literal

from trainkit.data.text.packing import PackedSet
from trainkit.data.text.prepare import CACHE, Prepared, prepare
from trainkit.errors import UserError
from trainkit.modules.training_data import TrainingData, global_seed


class TextData(TrainingData):
    """Training and validation rows, tokenised once, cached on disk and packed.

    Args:
        train: Training text: a file, a folder, the name of a data set on the hub, or a list of these.
        validation: Validation text, named in the same way; by default a share of the training rows is held out.
        tokenizer: Folder of the tokenizer; by default that of the model.
        length: Tokens in a packed row.
        batch_size: Packed rows per micro-batch and process.
        columns: Names of columns that differ from trainkit's, as {trainkit's: the files'}, such as {prompt: instruction}.
        on_bad_row: For a row that cannot be read: stop (error), or count it and continue (skip).
        on_long_row: For a row longer than `length` that is not plain text: train on its beginning (truncate), count it and
            leave it out (skip), or stop (error).
        validation_share: Share of the training rows that is held out if `validation` is not set; the rows of a prompt stay
            together.
        limit: Number of rows to read from the training files, from the first one.
        limit_validation: Number of rows to read from the validation files, from the first one.
        cache: Folder where prepared sets are cached by content; ~/.cache/trainkit/data by default.
    """

    rows: tuple[PackedSet, PackedSet]
    training_sets: list[PackedSet]
    """All stored sets that are trained on; `setup` sets them."""

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
        super().__init__(batch_size)
        self.train = [train] if isinstance(train, str) else list(train)
        self.validation = [validation] if isinstance(validation, str) else validation
        self.tokenizer, self.length = tokenizer, length
        self._options: dict[str, Any] = {"validation_share": validation_share, "limit_validation": limit_validation}
        self._options |= {"columns": columns, "on_bad_row": on_bad_row, "on_long_row": on_long_row}
        self._options |= {"limit": limit, "cache_dir": cache or CACHE}

    @property
    def tokenizer_folder(self) -> str:
        folder = self.tokenizer or self.module.tokenizer_folder
        if folder is None:
            raise UserError("data.tokenizer: the model has no tokenizer; set data.tokenizer to the folder of one")
        return folder

    def check_fits(self, vocab_size: int, max_positions: int) -> None:
        """Compares training and validation rows with the sizes of the model that reads them.

        Raises:
            UserError: a row is longer than `max_positions` tokens, or a token id is not below `vocab_size`.
        """
        if self.length > max_positions:
            raise UserError(f"data.length is {self.length}, the model has {max_positions} positions; lower data.length")
        largest = max(int(packed.tokens_N.max(initial=0)) for packed in (*self.training_sets, self.rows[1]))
        if largest >= vocab_size:
            raise UserError(f"data.tokenizer: token id {largest} exceeds the model's {vocab_size} ids; use its own tokenizer")

    def prepare_data(self) -> None:
        # Lightning calls this in one process of each node; the other processes then read the cache.
        print(self._prepare().report)

    def setup(self, stage: str) -> None:
        if self.fingerprint is None:
            prepared = self._prepare()
            self.rows, self.fingerprint = (prepared.train, prepared.validation), prepared.fingerprint
            self.training_sets = [prepared.train]

    def _prepare(self) -> Prepared:
        return self._prepare_files(self.train, self.validation, **self._options)

    def _prepare_files(self, train: list[str], validation: list[str] | None, **options: Any) -> Prepared:
        """The packed rows of files, with this run's tokenizer, length and seed."""
        tokenizer, model = self.tokenizer_folder, self.module.tokenizer_folder
        return prepare(train, validation, tokenizer, self.length, model=model, seed=global_seed(), **options)
