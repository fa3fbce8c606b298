"""Row formats: a dictionary read from a file becomes a chat, a prompt with its response, plain text or token ids.

The first format in `FORMATS` whose columns a row has is used; `tools` may be added to any of them. Columns that are not used
are returned to the caller, which counts them. A column mapping gives the file's name for some of our columns:
`{"prompt": "instruction", "response": "output"}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from trainkit.data.text.sources import RowError
from trainkit.errors import UserError


@dataclass(frozen=True)
class Chat:
    """Turns as the chat template takes them: `role`, `content` and any other keys.

    Attributes:
        messages: The turns.
        context: Number of turns at the start whose tokens never count as labels.
        tools: Definitions of the tools that the assistant may call, or None.
    """

    messages: list[dict[str, Any]]
    context: int = 0
    tools: list[dict[str, Any]] | None = None

    @property
    def counted(self) -> list[int]:
        """Indices of the assistant turns whose tokens are labels: none of the context, none of `weight` 0 (OpenAI's format)."""
        turns = enumerate(self.messages)
        return [n for n, turn in turns if n >= self.context and turn["role"] == "assistant" and turn.get("weight", 1)]


@dataclass(frozen=True)
class PromptResponse:
    """A prompt and its response: a chat of two turns if the tokenizer has a template, otherwise the texts are concatenated.

    `separator` is put between them only when they are concatenated.
    """

    prompt: str
    response: str
    separator: str = ""
    tools: list[dict[str, Any]] | None = None

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
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("question", "answer"))
FORMATS: tuple[tuple[str, ...], ...] = (*_COMMON, *_PAIRS, ("text",))
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
    names = sorted({name for fmt in (*FORMATS, *PROMPT_FORMATS, ("tools",)) for name in fmt})
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
    mapped = set(columns) - {"tools"}
    formats = tuple(fmt for fmt in formats if not mapped or set(fmt) & mapped)
    for fmt in formats:
        if all(columns.get(name, name) in values for name in fmt):
            return fmt
    wanted = " or ".join("+".join(columns.get(name, name) for name in fmt) for fmt in formats)
    found = ", ".join(map(repr, values)) or "none"
    raise RowError(
        f"columns are {found}, expected {wanted}; if they have other names, set the "
        "column mapping, such as columns: {prompt: query}"
    )


def parse_row(values: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Row, list[str]]:
    """The parsed row, and the columns that it does not use.

    Raises:
        RowError: the row has the columns of no format, or a value has the wrong type or content.
    """
    fmt = pick_format(values, columns)
    names = [columns.get(name, name) for name in fmt]
    row = _PARSERS[fmt](*(values[name] for name in names))
    if isinstance(row, (Chat, PromptResponse)):
        row = replace(row, tools=parse_tools(values, columns))
        names.append(columns.get("tools", "tools"))
    return row, [key for key in values if key not in names]


def parse_turns(turns: Any, column: str) -> list[dict[str, Any]]:
    """Checked turns with `role` and `content`, from OpenAI's form or from ShareGPT's (`from` and `value`).

    Text parts are joined, and the arguments of tool calls, which OpenAI writes as JSON text, become objects, as chat templates
    expect them. The content may be null only beside tool calls.
    """
    if not isinstance(turns, list) or not turns:
        raise RowError(f"{column} must be a list of turns, not {_describe(turns)}")
    sharegpt = isinstance(turns[0], Mapping) and "role" not in turns[0] and ("from" in turns[0] or column == "conversations")
    keys = ("from", "value") if sharegpt else ("role", "content")
    messages = []
    for n, turn in enumerate(turns):
        where = f"{column}[{n}]"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} must be an object with {' and '.join(keys)}, not {_describe(turn)}")
        role, content = (turn.get(key) for key in keys)
        if sharegpt and (not isinstance(role, str) or role not in _ROLES):
            raise RowError(f"{where}.from is {role!r}; it must be one of {', '.join(_ROLES)}")
        if not isinstance(role, str) or not role:
            raise RowError(f"{where}.role must be a name, not {_describe(role)}")
        calls = None if sharegpt else turn.get("tool_calls")
        if content is not None or not calls:
            content = _join_parts(content, f"{where}.{keys[1]}")
        if sharegpt:
            weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
            messages.append({"role": _ROLES[role], "content": content} | weight)
            continue
        # null is left out: Arrow adds it to give all turns the same keys
        messages.append({key: value for key, value in turn.items() if value is not None} | {"content": content})
        if calls:
            messages[-1]["tool_calls"] = _parse_calls(calls, f"{where}.tool_calls")
    return messages


def parse_tools(values: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The `tools` column of a row, a list of objects or the JSON text of one; None if the row has no tools."""
    name = columns.get("tools", "tools")
    tools = _parse_json(values.get(name) or None, name)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"{name} must be a list of objects, not {_describe(tools)}")
    return tools


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


def _join_parts(content: Any, where: str) -> str:
    """The content of a turn, which is text or a list of text parts."""
    if isinstance(content, list) and content:
        for n, part in enumerate(content):
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = f"of type {part.get('type')!r}" if isinstance(part, Mapping) else _describe(part)
                raise RowError(f"{where}[{n}] is {kind}; only parts of type 'text' can be used")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError(f"{where} must be text, not {_describe(content)}")
    return content


def _parse_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls, with their arguments as objects."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RowError(f"{where} must be a list of objects, not {_describe(calls)}")
    parsed = []
    for n, call in enumerate(calls):
        function = call.get("function", call)
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            name = f"{where}[{n}].function.arguments"
            arguments = _parse_json(function["arguments"] or "{}", name)
            if not isinstance(arguments, dict):
                raise RowError(f"{name} must be an object, not {_describe(arguments)}")
            function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else dict(function))
    return parsed


def _parse_json(value: Any, name: str) -> Any:
    """The value; text is parsed as JSON."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RowError(f"{name} is text that is not JSON: {error.msg} at column {error.colno}") from None


def _chat(messages: list[dict[str, Any]], context: int = 0) -> Chat:
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant" and n >= context]
    if not turns:
        raise RowError("the chat has no assistant turn")
    for n in turns:
        if not (messages[n]["content"] or "").strip() and not messages[n].get("tool_calls"):
            raise RowError(f"turn {n} is an empty assistant turn")
        if (weight := messages[n].get("weight", 1)) not in (0, 1):
            raise RowError(f"turn {n} has weight {weight!r}; it must be 0 (no labels) or 1")
    chat = Chat(messages, context)
    if not chat.counted:
        raise RowError("all assistant turns have weight 0, so nothing is a label")
    return chat


def _pair(first: str, second: str, separator: str = "") -> Any:
    """Parser of a prompt and its response: two texts, or two lists of turns, of which only the second has labels."""

    def parse(prompt: Any, response: Any) -> Row:
        if isinstance(prompt, list) or isinstance(response, list):
            context = parse_turns(prompt, first)
            return _chat(context + parse_turns(response, second), len(context))
        return PromptResponse(check_text(first, prompt), check_text(second, response), separator)

    return parse


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
    ("messages",): lambda messages: _chat(parse_turns(messages, "messages")),
    ("conversations",): lambda conversations: _chat(parse_turns(conversations, "conversations")),
    ("prompt", "response"): _pair("prompt", "response"),
    ("prompt", "completion"): _pair("prompt", "completion"),
    ("question", "answer"): _pair("question", "answer", QUESTION_SEPARATOR),
    ("text",): lambda text: PlainText(check_text("text", text)),
}
assert tuple(_PARSERS) == FORMATS
