"""The row formats: what a dictionary read from a file says, in one of four forms.

A row's columns decide its format, in the order of `FORMATS`; columns that no format uses are counted by the caller, not
silently dropped. A column mapping gives our names for theirs: `{"prompt": "instruction", "response": "output"}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from trainkit.data.text.sources import BadRow
from trainkit.errors import UserError


@dataclass(frozen=True)
class Chat:
    """Turns for the chat template, as it takes them: `role`, `content` and whatever else a turn carries."""

    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """A prompt and its response: a chat of two turns where there is a template, otherwise the two texts end to end.

    `separator` stands between them only in the second case.
    """

    prompt: str
    response: str
    separator: str = ""

    @property
    def messages(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]


@dataclass(frozen=True)
class Text:
    """Plain text; every token counts."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids with a mask that is 1 where the token counts as a label."""

    input_ids: list[int]
    loss_mask: list[int]


Row: TypeAlias = Chat | Pair | Text | Tokens

FORMATS: tuple[tuple[str, ...], ...] = (
    ("input_ids", "loss_mask"),
    ("messages",),
    ("conversations",),
    ("prompt", "response"),
    ("question", "answer"),
    ("text",),
)
PROMPT_FORMATS: tuple[tuple[str, ...], ...] = (
    ("input_ids", "loss_mask"),
    ("messages",),
    ("conversations",),
    ("turns",),
    ("prompt",),
    ("question",),
    ("text",),
)
QUESTION_SEPARATOR = "\n"
"""Between question and answer without a template: a question that runs into its answer is like nothing a model has read."""

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column mapping, once its keys are known to be names of ours.

    Raises:
        UserError: a key that no format has.
    """
    names = sorted({name for fmt in (*FORMATS, *PROMPT_FORMATS) for name in fmt})
    for ours in columns or {}:
        if ours not in names:
            raise UserError(f"columns: {ours!r} is no column of ours; the keys are {', '.join(names)}")
    return dict(columns or {})


def pick_format(
    values: Mapping[str, Any], columns: Mapping[str, str], formats: tuple[tuple[str, ...], ...] = FORMATS
) -> tuple[str, ...]:
    """The first format whose columns the row has; with a mapping, one that uses a mapped name.

    Raises:
        BadRow: none fits; the reason lists the row's columns.
    """
    for fmt in formats:
        if all(columns.get(name, name) in values for name in fmt) and (not columns or any(name in columns for name in fmt)):
            return fmt
    open_formats = [fmt for fmt in formats if not columns or set(fmt) & set(columns)]
    wanted = " or ".join("+".join(columns.get(name, name) for name in fmt) for fmt in open_formats)
    raise BadRow(f"columns are {', '.join(map(repr, values)) or 'none'}, expected {wanted}; a column mapping can name others")


def parse(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Row, list[str]]:
    """The row in its form, and the columns it did not use.

    Raises:
        BadRow: no format fits, or a value is not what the format wants.
    """
    fmt = pick_format(values, columns)
    fields = {name: values[columns.get(name, name)] for name in fmt}
    unused = [key for key in values if key not in {columns.get(name, name) for name in fmt}]
    return _FORMS[fmt](**fields), unused


def chat_messages(messages: Any) -> list[dict[str, Any]]:
    """Turns checked: a list of objects with a role and a text."""
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"messages must be a list of turns, not {_describe(messages)}")
    turns = []
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRow(f"messages[{n}] must be an object with role and content, not {_describe(message)}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise BadRow(f"messages[{n}].role must be a name, not {_describe(role)}")
        if not isinstance(content, str):
            raise BadRow(f"messages[{n}].content must be text, not {_describe(content)}")
        # Parquet gives every turn the union of all keys, null where a turn has none
        turns.append({key: value for key, value in message.items() if value is not None})
    return turns


def sharegpt_messages(conversations: Any) -> list[dict[str, Any]]:
    """ShareGPT turns under the roles that templates know."""
    if not isinstance(conversations, list) or not conversations:
        raise BadRow(f"conversations must be a list of turns, not {_describe(conversations)}")
    turns = []
    for n, turn in enumerate(conversations):
        if not isinstance(turn, Mapping):
            raise BadRow(f"conversations[{n}] must be an object with from and value, not {_describe(turn)}")
        speaker, value = turn.get("from"), turn.get("value")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise BadRow(f"conversations[{n}].from is {speaker!r}; known are {', '.join(_ROLES)}")
        if not isinstance(value, str):
            raise BadRow(f"conversations[{n}].value must be text, not {_describe(value)}")
        turns.append({"role": _ROLES[speaker], "content": value})
    return turns


def text_of(name: str, value: Any) -> str:
    """A column's text; empty or no text is a bad row."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow(f"{name} must be text, not {_describe(value)}")
    return value


def token_row(input_ids: Any, loss_mask: Any) -> Tokens:
    """Checks the two lists against one another; ids are held against the vocabulary when encoding."""
    for name, value in (("input_ids", input_ids), ("loss_mask", loss_mask)):
        if not isinstance(value, list) or not value or not all(isinstance(x, int) for x in value):
            raise BadRow(f"{name} must be a list of whole numbers, not {_describe(value)}")
    if len(input_ids) != len(loss_mask):
        raise BadRow(f"input_ids has {len(input_ids)} entries, loss_mask {len(loss_mask)}")
    if not set(loss_mask) <= {0, 1}:
        raise BadRow("loss_mask must hold only 0 and 1")
    return Tokens(input_ids, [int(x) for x in loss_mask])


def _chat(messages: list[dict[str, Any]]) -> Chat:
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise BadRow("the chat has no assistant turn")
    for n in answers:
        if not messages[n]["content"].strip() and not messages[n].get("tool_calls"):
            raise BadRow(f"turn {n} is an empty assistant turn")
    return Chat(messages)


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "empty" if not value.strip() else "text"
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'object'}"
    return {list: "a list", dict: "an object", bool: "a truth value"}.get(type(value), f"{type(value).__name__} {value!r}"[:60])


_FORMS: dict[tuple[str, ...], Any] = {
    ("input_ids", "loss_mask"): token_row,
    ("messages",): lambda messages: _chat(chat_messages(messages)),
    ("conversations",): lambda conversations: _chat(sharegpt_messages(conversations)),
    ("prompt", "response"): lambda prompt, response: Pair(text_of("prompt", prompt), text_of("response", response)),
    ("question", "answer"): lambda question, answer: Pair(
        text_of("question", question), text_of("answer", answer), QUESTION_SEPARATOR
    ),
    ("text",): lambda text: Text(text_of("text", text)),
}
assert tuple(_FORMS) == FORMATS
