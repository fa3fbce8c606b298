"""Prompts for generation, distillation and benches: what a model is given before it begins to answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.data.text.formats import (
    PROMPT_FORMATS,
    QUESTION_SEPARATOR,
    chat_messages,
    check_columns,
    pick_format,
    sharegpt_messages,
    text_of,
    token_row,
)
from trainkit.data.text.sources import BadRow, read_rows
from trainkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """A prompt.

    Attributes:
        tokens: Its ids.
        messages: The chat it came from, last the user's turn; None for raw text and given tokens.
        text: Raw text as it stood; empty for chats and given tokens.
    """

    tokens: list[int]
    messages: list[dict[str, Any]] | None = None
    text: str = ""


def read_prompts(
    path: str, tokenizer: str | PreTrainedTokenizerBase, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[list[int]]:
    """Token ids of each prompt in a file; `read_asked` says how."""
    return [asked.tokens for asked in read_asked(path, tokenizer, limit, columns)]


def read_asked(
    path: str, tokenizer: str | PreTrainedTokenizerBase, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[Asked]:
    """The prompt of each row, through the chat template where the tokenizer has one.

    Chats are taken up to and including their last user turn; `prompt`, `question` and the first of `turns` become a user turn,
    or stand raw without a template; `text` is always raw; `input_ids` are taken up to the first token that counts.

    Args:
        path: File, folder or hub name, as `read_rows` takes it.
        tokenizer: A loaded tokenizer, or its folder or hub name.
        limit: First rows to take.
        columns: Our column names -> the file's.

    Raises:
        UserError: nothing to read, or a row without a prompt; named by place and reason.
    """
    columns, encoder = check_columns(columns), Encoder(load_tokenizer(tokenizer))
    prompts = []
    for place, row in read_rows(path, limit):
        try:
            if isinstance(row, BadRow):
                raise row
            prompts.append(_prompt(row, columns, encoder))
        except BadRow as reason:
            raise UserError(f"{place}: {reason}; mend this row or take it out") from None
    if not prompts:
        raise UserError(f"{path}: holds no prompts; give a file with at least one row")
    return prompts


def _prompt(values: Mapping[str, Any], columns: Mapping[str, str], encoder: Encoder) -> Asked:
    fmt = pick_format(values, columns, PROMPT_FORMATS)
    value = values[columns.get(fmt[0], fmt[0])]
    if fmt[0] in ("messages", "conversations"):
        turns = chat_messages(value) if fmt[0] == "messages" else sharegpt_messages(value)
        asked = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
        if not asked:
            raise BadRow("the chat has no user turn")
        turns = turns[: asked[-1] + 1]
        return Asked(encoder.prompt(turns), turns)
    if fmt[0] == "input_ids":
        row = token_row(value, values[columns.get("loss_mask", "loss_mask")])
        given = row.loss_mask.index(1) if 1 in row.loss_mask else len(row.input_ids)
        if not given:
            raise BadRow("loss_mask counts from the first token on, so there is no prompt")
        return Asked(row.input_ids[:given])
    if fmt[0] == "turns":
        if not isinstance(value, list) or not value:
            raise BadRow("turns must be a list of texts")
        value = value[0]
    text = text_of(fmt[0], value)
    if fmt[0] == "text":
        return Asked(encoder.ids(text), None, text)
    if encoder.template is None:
        text += QUESTION_SEPARATOR if fmt[0] == "question" else ""
        return Asked(encoder.ids(text), None, text)
    turns = [{"role": "user", "content": text}]
    return Asked(encoder.prompt(turns), turns)
