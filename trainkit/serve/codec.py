"""Prompts to token ids, and tokens to text, for one tokenizer."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from trainkit.data.text.chat_template import Encoder
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError
from trainkit.runner.text import IncrementalText, special_tokens
from trainkit.serve.fields import ApiError, Call


class Codec:
    """Encodes the prompts of calls and decodes their texts.

    Args:
        tokenizer: The target's tokenizer.
        max_len: Largest number of tokens of prompt and text together.
    """

    def __init__(self, tokenizer: Any, max_len: int) -> None:
        self.tokenizer, self.max_len = tokenizer, max_len
        self._encoder = Encoder(tokenizer)

    def prompts(self, call: Call) -> list[list[int]]:
        """The token ids of each prompt; a text gets no template and no BOS token, a chat gets the tokenizer's template.

        Raises:
            ApiError: a prompt that is empty, has an unknown token id, is rejected by the template, or is too long.
        """
        try:
            encoded = [self._encoder.prompt_ids(prompt) if call.chat else self._ids(prompt) for prompt in call.prompts]
            for prompt in encoded:
                self._encoder.check_ids(prompt)
        except RowError as error:
            raise ApiError(400, f"{call.source}: {error}", call.source) from None
        except UserError:
            raise ApiError(400, "messages: this model has no chat template; use /v1/completions", "messages") from None
        for prompt in encoded:
            if not prompt:
                raise ApiError(400, f"{call.source}: empty; give at least one token", call.source)
            if len(prompt) + (call.max_tokens or 1) > self.max_len:
                raise ApiError(
                    400,
                    f"{call.source}: {len(prompt)} prompt tokens and {call.max_tokens or 1} new ones exceed the "
                    f"limit of {self.max_len} tokens; shorten the prompt or lower max_tokens",
                    call.source,
                    "context_length_exceeded",
                )
        return encoded

    def _ids(self, prompt: str | list[int]) -> list[int]:
        return self._encoder.encode(prompt) if isinstance(prompt, str) else prompt

    @cached_property
    def _special(self) -> dict[int, str]:
        return special_tokens(self.tokenizer)

    def text(self, stop: tuple[str, ...]) -> IncrementalText:
        """An empty text that ends at the stop strings."""
        return IncrementalText(self.decode, self._special, stop)

    def decode(self, tokens: Any) -> str:
        """The text of tokens, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def token(self, token: int) -> str:
        """The text of one token, special tokens included."""
        return self.tokenizer.decode([token])
