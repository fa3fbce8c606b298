"""Prompts for generation, distillation and benchmarks, as token ids, and the completions that a model generates for them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.data.text.chat_template import Encoder, Tokenizer, load_tokenizer
from trainkit.data.text.formats import (
    PROMPT_FORMATS,
    QUESTION_SEPARATOR,
    check_columns,
    check_text,
    parse_token_row,
    parse_tools,
    parse_turns,
    pick_format,
)
from trainkit.data.text.sources import RowError, data_files, read_rows
from trainkit.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        tokens: Token ids.
        messages: The chat, which does not end with an assistant turn; None for raw text and for token rows.
        text: The raw text; empty for chats and token rows.
        tools: Tools of the chat, or None.
    """

    tokens: list[int]
    messages: list[dict[str, Any]] | None = None
    text: str = ""
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    Attributes:
        id: Id of the request.
        tokens: New token ids, with the end token if the text ended with one.
        text: The text of these tokens without special tokens.
        finish: `end` (an end token), `stop` (a server ended it at a stop string), `length` (`max_new_tokens`) or `max_len`
            (prompt and text fill `max_len`).
    """

    id: int
    tokens: list[int]
    text: str
    finish: str


def read_prompts(
    path: str, tokenizer: str | Tokenizer, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[list[int]]:
    """Token ids of each prompt in a file; arguments as in `read_prompt_rows`."""
    return [prompt.tokens for prompt in read_prompt_rows(path, Encoder(load_tokenizer(tokenizer)), limit, columns)]


def read_prompt_rows(
    path: str, encoder: Encoder, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[Prompt]:
    """The prompt of each row, rendered by the chat template if the tokenizer has one.

    A chat is cut after its last user turn. A text in `prompt` or `question`, and the first of `turns`, become a user turn, or
    remain raw text if there is no template. `text` always remains raw. `input_ids` are cut before the first token that counts
    as a label. `tools` are passed to the template.

    Args:
        path: File, folder or hub name, as in `read_rows`.
        encoder: Encodes the prompts.
        limit: Number of rows to read, from the beginning; None reads all.
        columns: Column mapping, from trainkit's names to the file's.

    Raises:
        UserError: the file has no row, or a row has no prompt; the message names the row and the reason.
    """
    return [prompt for _, _, prompt in read_located_prompts(path, encoder, limit, columns)]


def read_located_prompts(
    path: str, encoder: Encoder, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[tuple[str, Mapping[str, Any], Prompt]]:
    """The location, the values and the prompt of each row; arguments and errors as in `read_prompt_rows`."""
    columns = check_columns(columns)
    if Path(path).is_dir() and (left_out := data_files(Path(path))[1]):
        print(f"{path}: left out: {', '.join(file.name for file in left_out)}", file=sys.stderr)
    prompts, unread_tools = [], 0
    for location, row in read_rows(path, limit):
        try:
            if isinstance(row, RowError):
                raise row
            prompt = encode_prompt(row, columns, encoder)
            prompts.append((location, row, prompt))
            unread_tools += prompt.tools is not None and not encoder.reads_tools(prompt.tools)
        except RowError as reason:
            raise UserError(f"{location}: {reason}; fix or remove this row") from None
    if not prompts:
        raise UserError(f"{path}: holds no prompts; use a file with at least one row")
    if unread_tools:
        print(f"{path}: {unread_tools:,} rows have tools, which the chat template does not read", file=sys.stderr)
    return prompts


def encode_prompt(values: Mapping[str, Any], columns: Mapping[str, str], encoder: Encoder) -> Prompt:
    """The prompt of a row, as in `read_prompt_rows`; raises RowError if it has none."""
    fmt = pick_format(values, columns, PROMPT_FORMATS)
    value = values[columns.get(fmt[0], fmt[0])]
    if fmt[0] == "input_ids":
        row = parse_token_row(value, values[columns.get("loss_mask", "loss_mask")])
        end = row.loss_mask.index(1) if 1 in row.loss_mask else len(row.input_ids)
        if not end:
            raise RowError("loss_mask is 1 from the first token on, so there is no prompt")
        return Prompt(encoder.check_ids(row.input_ids[:end]))
    if fmt[0] == "turns":
        if not isinstance(value, list) or not value:
            raise RowError("turns must be a list of texts")
        value = value[0]
    # A text that stays raw.
    is_chat = fmt[0] in ("messages", "conversations") or (fmt[0] == "prompt" and isinstance(value, list))
    if not is_chat:
        text = check_text(fmt[0], value)
        if fmt[0] == "text" or not encoder.has_template:
            text += QUESTION_SEPARATOR if fmt[0] == "question" else ""
            return Prompt(encoder.check_ids(encoder.encode(text)), None, text)
        turns = [{"role": "user", "content": text}]
    # A chat; a list of turns in `prompt` is a whole prompt.
    else:
        turns = parse_turns(value, fmt[0])
        users = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
        if not users:
            raise RowError("the chat has no user turn")
        if fmt[0] != "prompt":
            turns = turns[: users[-1] + 1]
        elif turns[-1]["role"] == "assistant":
            raise RowError("the prompt ends with an assistant turn")
    tools = parse_tools(values, columns)
    return Prompt(encoder.check_ids(encoder.prompt_ids(turns, tools)), turns, "", tools)
