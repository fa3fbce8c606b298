"""Token sequences to evaluate a model on: windows of a given text, and texts that the model writes itself.

Windows follow the usual protocol for WikiText: all documents are joined by blank lines, tokenised once, and cut into windows
that do not overlap; a tail shorter than a window is left out. The first token of a window is read but not predicted.
"""

# W windows  T positions

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.data.text.chat_template import Encoder
from trainkit.data.text.formats import TokenRow, check_columns, parse_row
from trainkit.data.text.prompts import read_prompt_rows
from trainkit.data.text.sources import RowError, read_rows
from trainkit.errors import UserError
from trainkit.runner import Runner

BLANK_LINE = "\n\n"
"""Joins documents."""


@dataclass(frozen=True)
class Text:
    """A sequence that is evaluated on its own.

    Attributes:
        tokens_T: Token ids, int64.
        start: Number of tokens at the start that are read but not predicted, at least 1.
    """

    tokens_T: Tensor
    start: int = 1


def read_documents(source: str, encoder: Encoder, columns: Mapping[str, str] | None = None) -> list[int]:
    """Token ids of all documents of a source, joined by blank lines.

    A .txt file is one document. In any other source each row is one: a chat as the chat template renders it, plain text as it
    is, token ids as they are. If the tokenizer puts a start token before every text, the first id is that token.

    Args:
        source: A .txt file, or a file, folder or hub name as in `read_rows`.
        encoder: Encodes the texts.
        columns: Column mapping, from trainkit's names to the file's.

    Raises:
        UserError: the source cannot be read, or a row is not a text.
    """
    documents: list[Any] = []  # texts, and lists of token ids
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        try:
            documents = [path.read_bytes().decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    else:
        names = check_columns(columns)
        for location, values in read_rows(source):
            try:
                if isinstance(values, RowError):
                    raise values
                row, _ = parse_row(values, names)
                documents.append(encoder.check_ids(row.input_ids) if isinstance(row, TokenRow) else encoder.text(row))
            except RowError as reason:
                raise UserError(f"{location}: {reason}; fix or remove this row") from None
    # Texts beside each other are tokenised together, because a token may hold line breaks and letters.
    tokens: list[int] = []
    for is_text, group in groupby(documents, lambda document: isinstance(document, str)):
        for ids in [encoder.encode(BLANK_LINE.join(group))] if is_text else group:
            tokens += [*(encoder.encode(BLANK_LINE) if tokens else []), *ids]
    start: Any = encoder.tokenizer.bos_token_id
    first = encoder.tokenizer("a")["input_ids"][:1]  # type: ignore[index]
    return encoder.check_ids([start, *tokens] if first == [start] != tokens[:1] else tokens)


def cut_windows(tokens: list[int], length: int, source: str, limit: int | None = None) -> tuple[list[Text], int]:
    """Windows of `length` tokens, at most `limit` of them, and the number of tokens of the tail that is too short for one.

    Raises:
        UserError: the text is shorter than one window.
    """
    count = len(tokens) // length
    if not count:
        raise UserError(
            f"{source}: {len(tokens)} tokens, fewer than one window of {length}; give more text or a smaller --length"
        )
    tokens_WT = torch.tensor(tokens[: count * length]).view(count, length)
    return [Text(window_T) for window_T in tokens_WT[:limit]], len(tokens) - count * length


def write_own_texts(
    runner: Runner,
    source: str,
    encoder: Encoder,
    windows: list[Text],
    count: int,
    columns: Mapping[str, str] | None,
    **options: Any,
) -> list[Text]:
    """Texts that the model writes after prompts of the source; only what it writes is predicted.

    The prompts are those of the first `count` rows, as `generate` reads them; for a .txt file, the first halves of windows. A
    prompt longer than half a window is cut.

    Args:
        runner: The model that is evaluated.
        source: As in `read_documents`.
        encoder: Encodes the prompts.
        windows: Windows of the source.
        count: Number of prompts.
        columns: As in `read_documents`.
        options: Options of `Runner.generate`.

    Raises:
        UserError: fewer prompts than `count`, or a row without a prompt.
    """
    longest = len(windows[0].tokens_T) // 2
    if Path(source).suffix == ".txt":
        prompts = [window.tokens_T[:longest].tolist() for window in windows[:count]]
    else:
        prompts = [prompt.tokens[:longest] for prompt in read_prompt_rows(source, encoder, count, columns)]
    if len(prompts) < count:
        raise UserError(f"--own {count}: {source} has {len(prompts)} prompts; give more text or a smaller number")
    outputs = runner.generate(prompts, progress=True, **options)
    return [Text(torch.tensor(prompt + output.tokens), len(prompt)) for prompt, output in zip(prompts, outputs, strict=True)]
