"""Reads the JSON body of a completion request: supported fields, ignored ones, and one clear error for each other field.

A field that this server does not know is an error, so that a misspelt `temperatur` does not pass silently. A field with the
value null counts as absent, as in OpenAI's own API.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trainkit.errors import UserError, check_unicode
from trainkit.runner.session import TOP

MAX_STOPS, MAX_SAMPLES, MAX_PROMPTS = 4, 128, 1024
DEFAULT_COMPLETION_TOKENS = 16
"""Default of `max_tokens` in /v1/completions, as OpenAI documents it; a chat may by default use all positions that are left."""

IGNORED = frozenset({"user", "metadata", "store", "service_tier"})
REFUSED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "logit_bias": ({},),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
    "echo": (False,), "best_of": (1,), "suffix": ("",), "prediction": (), "reasoning_effort": (), "verbosity": (),
    "web_search_options": (), "moderation": (), "trainkit": ({},),
}  # fmt: skip
"""Fields that this server does not implement -> their neutral values, which are accepted."""
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """An error response in OpenAI's form.

    Attributes:
        status: HTTP status.
        message: What was wrong, and the remedy.
        param: The field, or None.
        code: OpenAI's error code, which programs can compare; or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, _printable(message), code
        self.param = None if param is None else _printable(param)

    def body(self) -> dict[str, Any]:
        """The JSON body of the response."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _printable(text: str) -> str:
    """The text with lone surrogates, which a client's names may have, as escapes."""
    return text.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class Call:
    """A checked request.

    Attributes:
        chat: Whether it is a chat; then `prompts` holds one list of messages.
        prompts: Texts, token ids, or messages; each is decoded `n` times.
        max_tokens: Largest number of new tokens of each text; None means as many as `max_len` allows.
        logprobs: Number of likeliest tokens listed at each position beside the log-probability of the token itself; None for no
            log-probabilities.
        seed: Seed of the noise, or None for a random one.
        ignore_end: Whether to continue past end tokens.
        token_ids: Whether the response holds the token ids too.
        include_usage: Whether a stream ends with a chunk of usage.
    """

    chat: bool
    prompts: list[Any]
    max_tokens: int | None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    ignore_end: bool = False
    token_ids: bool = False

    @property
    def source(self) -> str:
        """Name of the field that holds the prompts."""
        return "messages" if self.chat else "prompt"


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request body; raises ApiError if it is not one."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    return value


def parse_call(body: dict[str, Any], chat: bool, model: str) -> Call:
    """The checked request in a body; raises ApiError for the first field that is wrong, unknown or not implemented."""
    fields = {name: value for name, value in body.items() if value is not None}
    own = {"messages", "max_completion_tokens", "top_logprobs"} if chat else {"prompt"}
    known = own | {"model", "max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop", "stream", "stream_options"}
    known |= {"logprobs", "ignore_eos", "return_token_ids"}
    # An error names the first field that is not supported.
    for name, value in fields.items():
        if name in known or name in IGNORED:
            continue
        if name in REFUSED:
            if not any(isinstance(value, bool) == isinstance(same, bool) and value == same for same in REFUSED[name]):
                raise ApiError(400, f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
            continue
        near = difflib.get_close_matches(name, sorted(known), n=1)
        remedy = f"did you mean {near[0]}?" if near else f"this endpoint reads {', '.join(sorted(known))}"
        raise ApiError(400, f"unknown field {name[:80]!r}; {remedy}", name[:80], "unknown_parameter")
    # The model, the prompts, and the length.
    name = _take(fields, "model", _text, None)
    if name is None:
        raise ApiError(400, f"model is missing; this server has {model!r}", "model")
    if name != model:
        raise ApiError(404, f"the model {name[:200]!r} does not exist; this server has {model!r}", "model", "model_not_found")
    source = "messages" if chat else "prompt"
    if source not in fields:
        raise ApiError(400, f"{source} is missing", source)
    prompts = [_messages(fields["messages"])] if chat else _prompts(fields["prompt"])
    limits = {name: _take(fields, name, _integer(1), None) for name in ("max_tokens", "max_completion_tokens")}
    if len({limit for limit in limits.values() if limit is not None}) > 1:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one", "max_tokens")
    limit = limits["max_tokens"] or limits["max_completion_tokens"]
    # The rest.
    stream = _take(fields, "stream", _boolean, False)
    options = _take(fields, "stream_options", _object, None)
    if options is not None and not stream:
        raise ApiError(400, "stream_options: only with stream true", "stream_options")
    for name in options or {}:
        if name != "include_usage":
            raise ApiError(400, f"stream_options.{name[:80]}: unknown; give include_usage", f"stream_options.{name[:80]}")
    logprobs = _take(fields, "logprobs", _boolean, False) if chat else _take(fields, "logprobs", _integer(0, TOP), None)
    top = _take(fields, "top_logprobs", _integer(0, TOP), 0)
    if chat and top and not logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs true", "top_logprobs")
    return Call(
        chat,
        prompts,
        max_tokens=limit or (None if chat else DEFAULT_COMPLETION_TOKENS),
        temperature=_take(fields, "temperature", _number(0, 100), 1.0),
        top_p=_take(fields, "top_p", _number(0, 1, above=True), 1.0),
        top_k=_take(fields, "top_k", _integer(0, 2**31 - 1), 0),
        n=_take(fields, "n", _integer(1, MAX_SAMPLES), 1),
        seed=_take(fields, "seed", _integer(-(2**63), 2**63 - 1), None),
        stop=_take(fields, "stop", _stops, ()),
        stream=stream,
        include_usage=bool(options) and _take(options, "include_usage", _boolean, False, "stream_options."),
        logprobs=(top if logprobs else None) if chat else logprobs,
        ignore_end=_take(fields, "ignore_eos", _boolean, False),
        token_ids=_take(fields, "return_token_ids", _boolean, False),
    )


def _take(fields: dict[str, Any], name: str, check: Callable[[Any], Any], default: Any, prefix: str = "") -> Any:
    """The checked value of a field, or the default if it is absent; a ValueError of the check becomes an error of the field."""
    value = fields.get(name)
    if value is None:
        return default
    try:
        return check(value)
    except ValueError as error:
        raise ApiError(400, f"{prefix}{name}: {error}", f"{prefix}{name}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return check_unicode("text", value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


def _integer(minimum: int, maximum: int | None = None) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int:
            raise ValueError("must be an integer")
        if value < minimum or (maximum is not None and value > maximum):
            raise ValueError(f"must be at least {minimum}" if maximum is None else f"must be from {minimum} to {maximum}")
        return value

    return check


def _number(minimum: float, maximum: float, above: bool = False) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) not in (int, float):
            raise ValueError("must be a number")
        if not minimum <= value <= maximum or (above and value == minimum):
            raise ValueError(f"must be {'above' if above else 'at least'} {minimum:g} and at most {maximum:g}")
        return float(value)

    return check


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"must be a string, or a list of at most {MAX_STOPS} strings, none of them empty")
    return tuple(check_unicode("text", text) for text in texts)


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, a list of texts, a list of token ids, or a list of such lists, as a list of texts or of token ids."""
    single = isinstance(value, str) or (isinstance(value, list) and bool(value) and type(value[0]) is int)
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not 0 < len(prompts) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt: must be a text, token ids, or a list of 1 to {MAX_PROMPTS} of them", "prompt")
    for index, prompt in enumerate(prompts):
        where = "prompt" if single else f"prompt[{index}]"
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
            raise ApiError(400, f"{where}: must be a text or a list of token ids", "prompt")
        if isinstance(prompt, str):
            _checked_text(prompt, where, "prompt")
    return prompts


def _messages(value: Any) -> list[dict[str, str]]:
    """The messages of a chat, each with a role that chat templates know and one text."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ApiError(400, 'messages: must be a list of at least one {"role": ..., "content": ...}', "messages")
    messages = []
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        given = {name: part for name, part in message.items() if part is not None}
        for name in given:
            if name not in ("role", "content"):
                raise ApiError(400, f"{where}.{name[:80]}: not supported; give role and content", f"{where}.{name[:80]}")
        role, content = given.get("role"), given.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f"{where}.role: must be one of {', '.join(ROLES)}", f"{where}.role")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise ApiError(400, f"{where}.content: only parts of type text are supported", f"{where}.content")
            content = "\n".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise ApiError(400, f"{where}.content: must be a text, or a list of parts of type text", f"{where}.content")
        messages.append({"role": ROLES[role], "content": _checked_text(content, f"{where}.content", f"{where}.content")})
    return messages


def _checked_text(text: str, where: str, param: str) -> str:
    try:
        return check_unicode(where, text)
    except UserError as error:
        raise ApiError(400, str(error), param) from None
