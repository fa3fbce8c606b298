"""Row formats: a dictionary read from a file becomes a chat, a prompt with its response, plain text or token ids.

The first format in `FORMATS` whose columns a row has is used. Columns that it does not use are returned to the caller, which
counts them. A column mapping gives the file's name for some of our columns: `{"prompt": "instruction", "response": "output"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from trainkit.data.text.sources import RowError
from trainkit.errors import UserError


@dataclass(frozen=True)
class Chat:
    """Turns as the chat template takes them: `role`, `content` and any other keys."""

    messages: list[dict[str, Any]]

    @property
    def counted(self) -> list[int]:
        """Indices of the assistant turns whose tokens are labels: all but those of `weight` 0, as in OpenAI's format."""
        return [n for n, turn in enumerate(self.messages) if turn["role"] == "assistant" and turn.get("weight", 1)]


@dataclass(frozen=True)
class PromptResponse:
    """A prompt and its response: a chat of two turns if the tokenizer has a template, otherwise the texts are concatenated.

    `separator` is put between them only when they are concatenated.
    """

    prompt: str
    response: str
    separator: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]


@dataclass(frozen=True)
class PlainText:
    """Text all of whose tokens count as labels."""

    text: str


@dataclass(frozen=True)
class TokenRow:
    """Token ids, and a mask that is 1 where the token counts as a label."""

    input_ids: list[int]
    loss_mask: list[int]


Row: TypeAlias = Chat | PromptResponse | PlainText | TokenRow

_COMMON = (("input_ids", "loss_mask"), ("messages",), ("conversations",))
FORMATS: tuple[tuple[str, ...], ...] = (*_COMMON, ("prompt", "response"), ("question", "answer"), ("text",))
PROMPT_FORMATS: tuple[tuple[str, ...], ...] = (*_COMMON, ("turns",), ("prompt",), ("question",), ("text",))
QUESTION_SEPARATOR = "\n"
"""Goes between question and answer if there is no template: models have rarely seen the two without any separator."""

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function"), "tool"),
}
"""ShareGPT roles -> roles that chat templates know."""


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column mapping as a dictionary.

    Raises:
        UserError: a key is not a column name of any format.
    """
    names = sorted({name for fmt in (*FORMATS, *PROMPT_FORMATS) for name in fmt})
    for ours in columns or {}:
        if ours not in names:
            raise UserError(f"columns: unknown key {ours!r}; choose from {', '.join(names)}")
    return dict(columns or {})


def pick_format(
    values: Mapping[str, Any], columns: Mapping[str, str], formats: tuple[tuple[str, ...], ...] = FORMATS
) -> tuple[str, ...]:
    """The first format whose columns the row has; with a mapping, only formats with a mapped column are considered.

    Raises:
        RowError: the row has the columns of no format.
    """
    formats = tuple(fmt for fmt in formats if not columns or set(fmt) & set(columns))
    for fmt in formats:
        if all(columns.get(name, name) in values for name in fmt):
            return fmt
    wanted = " or ".join("+".join(columns.get(name, name) for name in fmt) for fmt in formats)
    found = ", ".join(map(repr, values)) or "none"
    raise RowError(f"columns are {found}, expected {wanted}; set a column mapping if they have other names")


def parse_row(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Row, list[str]]:
    """The parsed row, and the columns that it does not use.

    Raises:
        RowError: the row has the columns of no format, or a value has the wrong type or content.
    """
    fmt = pick_format(values, columns)
    names = [columns.get(name, name) for name in fmt]
    return _PARSERS[fmt](*(values[name] for name in names)), [key for key in values if key not in names]


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """Turns with `role` and `content`, checked."""
    for n, (role, content) in enumerate(_check_turns(messages, "messages", "role", "content")):
        if not isinstance(role, str) or not role:
            raise RowError(f"messages[{n}].role must be a name, not {_describe(role)}")
        if not isinstance(content, str):
            raise RowError(f"messages[{n}].content must be text, not {_describe(content)}")
    # Parquet gives every turn the union of all keys, with null where a turn has no value
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def parse_sharegpt(conversations: Any) -> list[dict[str, Any]]:
    """ShareGPT turns (`from`, `value`) as turns with `role` and `content`."""
    turns = _check_turns(conversations, "conversations", "from", "value")
    for n, (speaker, value) in enumerate(turns):
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise RowError(f"conversations[{n}].from is {speaker!r}; it must be one of {', '.join(_ROLES)}")
        if not isinstance(value, str):
            raise RowError(f"conversations[{n}].value must be text, not {_describe(value)}")
    messages = [{"role": _ROLES[speaker], "content": value} for speaker, value in turns]
    weights = [{"weight": turn["weight"]} if turn.get("weight") is not None else {} for turn in conversations]
    return [message | weight for message, weight in zip(messages, weights, strict=True)]


def check_text(name: str, value: Any) -> str:
    """The text of column `name`, which must not be empty."""
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} must be text, not {_describe(value)}")
    return value


def parse_token_row(input_ids: Any, loss_mask: Any) -> TokenRow:
    """Token ids and their mask. Whether the ids are in the vocabulary is checked by `Encoder`."""
    for name, value in (("input_ids", input_ids), ("loss_mask", loss_mask)):
        if not isinstance(value, list) or not value or not all(isinstance(x, int) for x in value):
            raise RowError(f"{name} must be a list of whole numbers, not {_describe(value)}")
    if len(input_ids) != len(loss_mask):
        raise RowError(f"input_ids has {len(input_ids)} entries, loss_mask {len(loss_mask)}")
    if not set(loss_mask) <= {0, 1}:
        raise RowError("loss_mask must hold only 0 and 1")
    return TokenRow(input_ids, [int(x) for x in loss_mask])


def _check_turns(turns: Any, column: str, *keys: str) -> list[tuple[Any, ...]]:
    """The values of two keys in each turn of a column, None if a turn does not have the key."""
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{column} must be a list of turns, not {_describe(turns)}")
    for n, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError(f"{column}[{n}] must be an object with {' and '.join(keys)}, not {_describe(turn)}")
    return [tuple(turn.get(key) for key in keys) for turn in turns]


def _chat(messages: list[dict[str, Any]]) -> Chat:
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise RowError("the chat has no assistant turn")
    for n in turns:
        if not messages[n]["content"].strip() and not messages[n].get("tool_calls"):
            raise RowError(f"turn {n} is an empty assistant turn")
        if (weight := messages[n].get("weight", 1)) not in (0, 1):
            raise RowError(f"turn {n} has weight {weight!r}; it must be 0 (no labels) or 1")
    if not Chat(messages).counted:
        raise RowError("all assistant turns have weight 0, so nothing is a label")
    return Chat(messages)


def _pair(first: str, second: str, separator: str) -> Any:
    return lambda prompt, response: PromptResponse(check_text(first, prompt), check_text(second, response), separator)


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "empty" if not value.strip() else "text"
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'object'}"
    return {list: "a list", dict: "an object", bool: "a truth value"}.get(type(value), f"{type(value).__name__} {value!r}"[:60])


_PARSERS: dict[tuple[str, ...], Any] = {
    ("input_ids", "loss_mask"): parse_token_row,
    ("messages",): lambda messages: _chat(parse_messages(messages)),
    ("conversations",): lambda conversations: _chat(parse_sharegpt(conversations)),
    ("prompt", "response"): _pair("prompt", "response", ""),
    ("question", "answer"): _pair("question", "answer", QUESTION_SEPARATOR),
    ("text",): lambda text: PlainText(check_text("text", text)),
}
assert tuple(_PARSERS) == FORMATS
