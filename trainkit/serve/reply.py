"""The JSON of OpenAI's responses: whole, or as the chunks of a stream."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import Any

from trainkit.runner.stats import Stats
from trainkit.serve.codec import Codec
from trainkit.serve.engine import Update
from trainkit.serve.fields import Call

FINISH = {"end": "stop", "stop": "stop", "length": "length", "max_len": "length"}
"""`Output.finish` -> `finish_reason`."""
MIN_LOGPROB = -9999.0
"""Replaces minus infinity, which JSON cannot represent."""


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability.

    Attributes:
        text: Its text, or U+FFFD for a part of a character.
        logprob: Its log-probability at temperature 1.
        offset: Number of characters of the text before it.
        likeliest: Text and log-probability of the likeliest tokens at its position.
    """

    text: str
    logprob: float
    offset: int
    likeliest: list[tuple[str, float]]


class Choice:
    """One text of a response as it grows.

    Attributes:
        content: The text that may be shown so far.
        tokens: Its token ids, those of the end token and of a stop string included.
        logprobs: Each token with its log-probability, if requested.
        finish: `finish_reason`, or None until it ends.
    """

    def __init__(self, codec: Codec, stop: tuple[str, ...]) -> None:
        self.codec, self.text = codec, codec.text(stop)
        self.content = ""
        self.tokens: list[int] = []
        self.logprobs: list[Scored] = []
        self.finish: str | None = None

    def add(self, update: Update) -> tuple[str, int]:
        """Adds the tokens of a step; returns the text that they add, and their number."""
        stop_at = None
        for i, token in enumerate(update.tokens):
            if update.logprobs:
                others = update.likeliest[i] if update.likeliest else ()
                likeliest = [(self.codec.token(other), max(logprob, MIN_LOGPROB)) for other, logprob in others]
                logprob = max(update.logprobs[i], MIN_LOGPROB)
                self.logprobs.append(Scored(self.codec.token(token), logprob, len(self.text.shown), likeliest))
            stop_at = self.text.add(token)
        self.tokens += update.tokens
        if not update.finish:
            content = self.text.shown[: self.text.safe_length]
        elif update.finish == "stop":
            content = self.text.shown[:stop_at]
        else:
            content = self.codec.decode(self.tokens)  # with what is left of an unfinished character
        self.finish = FINISH[update.finish] if update.finish else None
        piece, self.content = content[len(self.content) :], content
        return piece, len(update.tokens)


class Reply:
    """The response to one call.

    Args:
        call: The request.
        codec: Decodes tokens.
        model: Name of the model.
        seed: Seed of the noise.
        prompt_tokens: Number of tokens of all prompts, each counted once.
    """

    def __init__(self, call: Call, codec: Codec, model: str, seed: int, prompt_tokens: int) -> None:
        self.call, self.seed, self.prompt_tokens = call, seed, prompt_tokens
        self.id = f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.choices = [Choice(codec, call.stop) for _ in range(len(call.prompts) * call.n)]
        self._base = {"id": self.id, "created": int(time.time()), "model": model}

    @property
    def ended(self) -> bool:
        """Whether all texts have ended."""
        return all(choice.finish for choice in self.choices)

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and tokens generated."""
        generated = sum(len(choice.tokens) for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
        }

    def measures(self, stats: Stats, seconds: dict[str, float]) -> dict[str, Any]:
        """The extension field `trainkit`: counts of decoding, and seconds in queue, prefill and decoding."""
        rounds = stats.rounds
        return {
            "tau": round(stats.tau, 4) if rounds else None,
            "rounds": rounds,
            "drafted": stats.drafted,
            "accepted": sum(k * count for k, count in enumerate(stats.accepted)),
            "prefilled": stats.prefilled,
            "shared": stats.shared,
            "seed": self.seed,
            **{name: round(value, 6) for name, value in seconds.items()},
        }

    def body(self, measures: dict[str, Any]) -> dict[str, Any]:
        """The whole response."""
        choices = []
        for index, choice in enumerate(self.choices):
            content: dict[str, Any] = {"text": choice.content}
            if self.call.chat:
                content = {"message": {"role": "assistant", "content": choice.content, "refusal": None}}
            choices.append({"index": index, **content, **self._details(choice, len(choice.tokens))})
        kind = "chat.completion" if self.call.chat else "text_completion"
        return {**self._base, "object": kind, "choices": choices, "usage": self.usage(), "trainkit": measures}

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks that begin the stream of a chat: one for each text, with its role."""
        if not self.call.chat:
            return []
        return [self._chunk([self._delta(index, "", 0, role="assistant")]) for index in range(len(self.choices))]

    def chunk(self, updates: list[Update]) -> dict[str, Any] | None:
        """The chunk with what these updates add, or None if they add nothing that may be shown yet."""
        added: dict[int, tuple[str, int]] = {}
        for update in updates:
            text, count = added.get(update.index, ("", 0))
            piece, more = self.choices[update.index].add(update)
            added[update.index] = (text + piece, count + more)
        choices = [
            self._delta(index, text, count)
            for index, (text, count) in added.items()
            if text or self.choices[index].finish or self.call.logprobs is not None or self.call.token_ids
        ]
        return self._chunk(choices) if choices else None

    def last_chunk(self, measures: dict[str, Any]) -> dict[str, Any]:
        """The chunk after all texts: without choices, with the usage."""
        return {**self._chunk([]), "usage": self.usage(), "trainkit": measures}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.call.chat else "text_completion"
        usage = {"usage": None} if self.call.include_usage else {}
        return {**self._base, "object": kind, "choices": choices, **usage}

    def _delta(self, index: int, text: str, count: int, role: str | None = None) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.call.chat:
            content = {"delta": ({"role": role} if role else {}) | ({"content": text} if text or role else {})}
        return {"index": index, **content, **self._details(self.choices[index], count)}

    def _details(self, choice: Choice, count: int) -> dict[str, Any]:
        """Log-probabilities and ids of the last `count` tokens of a text, and its finish reason."""
        ids = {"token_ids": choice.tokens[len(choice.tokens) - count :]} if self.call.token_ids else {}
        return {"logprobs": self._logprobs(choice, count), "finish_reason": choice.finish, **ids}

    def _logprobs(self, choice: Choice, count: int) -> dict[str, Any] | None:
        """The log-probabilities of the last `count` tokens of a text, in the form of the endpoint."""
        if self.call.logprobs is None:
            return None
        entries = choice.logprobs[len(choice.logprobs) - count :]
        if self.call.chat:
            content = [
                _entry(entry.text, entry.logprob) | {"top_logprobs": [_entry(*other) for other in entry.likeliest]}
                for entry in entries
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "text_offset": [entry.offset for entry in entries],
            "top_logprobs": [dict(reversed(entry.likeliest)) for entry in entries] if self.call.logprobs else None,
        }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    """A token of a chat's log-probabilities; its bytes are null if it is a part of a character."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
