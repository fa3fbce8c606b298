"""Rows to token ids with the mask of what counts as a label: assistant tokens only, from the chat template.

Templates with `{% generation %}` spans say themselves what the assistant wrote. Without them every assistant turn becomes a
document of its own: the template renders what the model was given (`add_generation_prompt`) and what it was given plus the
turn, and the difference counts. So a template that strips the thinking of earlier turns is followed exactly, turn by turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from trainkit.data.text.formats import Chat, Pair, Row, Text, Tokens
from trainkit.data.text.sources import BadRow
from trainkit.errors import UserError
from trainkit.models.load import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
    SyntaxError,
)
"""A template is a small program: what it raises of its own accord, and what programs raise by mistake."""
_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")


@dataclass(frozen=True)
class Document:
    """Token ids and what counts of them.

    Attributes:
        tokens: Token ids, int32.
        mask: True where the token counts as a label.
        chat: The mask came from a template or a prompt, so that over a set it can be neither everything nor nothing.
        divisible: Plain text, which may be cut anywhere.
    """

    tokens: np.ndarray
    mask: np.ndarray
    chat: bool = True
    divisible: bool = False


def load_tokenizer(tokenizer: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name; one that is loaded already comes back as it is.

    Raises:
        UserError: it cannot be loaded.
    """
    if not isinstance(tokenizer, str):
        return tokenizer
    return read_tokenizer(tokenizer)


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of what turns text into ids."""
    return hashlib.sha256(json.dumps(_core(tokenizer), sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all of a tokenizer that shapes training rows: its vocabulary, chat template, end and padding."""
    parts = [_core(tokenizer), tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _core(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core: Any = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(core, dict):  # left over from whoever called the tokenizer last
        core = {key: value for key, value in core.items() if key not in ("truncation", "padding")}
    return core


class Encoder:
    """Turns rows into documents with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = tokenizer.get_chat_template()
        self.template: str | None = template or None
        self.has_spans = bool(self.template and _GENERATION.search(self.template)) and tokenizer.is_fast

    @cached_property
    def end_id(self) -> int:
        """The id that ends a text.

        Raises:
            UserError: the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(f"tokenizer {self.tokenizer.name_or_path}: has no end token; set eos_token in its config")
        return end

    def documents(self, row: Row) -> list[Document]:
        """The row's documents: one, or one for each assistant turn where the template has no generation spans.

        Raises:
            BadRow: the template refuses the row, its tokens do not divide at the assistant's turn, or an id is out of range.
            UserError: chat turns without a chat template.
        """
        if isinstance(row, Tokens):
            return [self._given(row)]
        if isinstance(row, Text):
            ids = [*self.ids(row.text), self.end_id]
            return [_document(ids, [1] * len(ids), chat=False, divisible=True)]
        if self.template is None and isinstance(row, Pair):
            prompt, response = self.ids(row.prompt + row.separator), [*self.ids(row.response), self.end_id]
            return [_document(prompt + response, [0] * len(prompt) + [1] * len(response))]
        assert isinstance(row, (Chat, Pair))
        if self.has_spans:
            return [self._by_spans(row.messages)]
        turns = [n for n, message in enumerate(row.messages) if message["role"] == "assistant"]
        return [self._by_prefix(row.messages[: n + 1]) for n in turns]

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a chat up to where the assistant begins to write."""
        return self.ids(self.render(messages, prompt=True))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands: nothing is added, as the runner adds nothing."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        """The chat as the template writes it; `prompt` appends the assistant's header."""
        return self._apply(messages, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        if self.template is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path}: has no chat template, but the data holds chats; "
                "add a chat_template.jinja, or give prompt and response columns"
            )
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except _TEMPLATE_FAULTS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise BadRow(f"the chat template refuses the turns: {said}") from None

    def _given(self, row: Tokens) -> Document:
        vocabulary = len(self.tokenizer)
        for token in (min(row.input_ids), max(row.input_ids)):
            if not 0 <= token < vocabulary:
                raise BadRow(f"token id {token} is outside the vocabulary of {vocabulary}")
        return _document(row.input_ids, row.loss_mask, chat=False)

    def _by_spans(self, messages: list[dict[str, Any]]) -> Document:
        out = self._apply(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        if not any(out["assistant_masks"]):
            raise BadRow("the template's generation spans hold no token of this chat")
        return _document(out["input_ids"], out["assistant_masks"])

    def _by_prefix(self, messages: list[dict[str, Any]]) -> Document:
        before, after = self.render(messages[:-1], prompt=True), self.render(messages, prompt=False)
        if not after.startswith(before):
            raise BadRow("the chat template writes a prompt differently once its answer follows; add generation spans to it")
        prompt, ids = self.ids(before), self.ids(after)
        if ids[: len(prompt)] != prompt:
            raise BadRow("prompt and answer tokenise differently together than apart; add generation spans to the template")
        # what the template writes after the end token (often a line break) is not the model's to write
        end = len(ids)
        if self.end_id in ids[len(prompt) :]:
            end -= ids[::-1].index(self.end_id)
        if end == len(prompt):
            raise BadRow("the template writes nothing for the assistant's turn")
        return _document(ids, [0] * len(prompt) + [1] * (end - len(prompt)) + [0] * (len(ids) - end))


def _document(ids: list[int], mask: list[int], chat: bool = True, divisible: bool = False) -> Document:
    return Document(np.asarray(ids, np.int32), np.asarray(mask, np.bool_), chat, divisible)
