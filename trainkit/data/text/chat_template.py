"""Encodes rows as token ids with a loss mask; in a chat, the mask covers only the tokens that the assistant writes.

A chat template with `{% generation %}` spans marks these tokens. Without such spans, each assistant turn becomes a document of
its own: the template renders the turns before it (with `add_generation_prompt`), and then the same turns and itself; the mask
covers what was added. So a template that removes the thinking of earlier turns is followed exactly.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.data.text.formats import Chat, PlainText, PromptResponse, Row, TokenRow
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError
from trainkit.models.load import read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # transformers takes seconds to import

_GENERATION = re.compile(r"\{%-?\+?\s*generation\s*-?\+?%\}")


@dataclass(frozen=True)
class Document:
    """Token ids and which of them count as labels.

    Attributes:
        tokens: Token ids, int32.
        mask: True where the token counts as a label.
        chat: Whether the mask is from a template or a prompt. Over all such documents of a set, some tokens must be labels
            and some must not.
        divisible: Whether it is plain text, which may be cut anywhere.
    """

    tokens: np.ndarray
    mask: np.ndarray
    chat: bool = True
    divisible: bool = False


def load_tokenizer(tokenizer: str | Tokenizer) -> Tokenizer:
    """The tokenizer of a folder or hub name; a loaded tokenizer is returned unchanged.

    Raises:
        UserError: it cannot be loaded.
    """
    return read_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of everything in a tokenizer that turns text into ids."""
    return hashlib.sha256(json.dumps(_core(tokenizer), sort_keys=True).encode()).hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """SHA-256 of everything in a tokenizer that affects training rows: vocabulary, chat template, end and padding token."""
    parts = [_core(tokenizer), tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _core(tokenizer: Tokenizer) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core: Any = json.loads(backend.to_str()) if backend is not None else sorted(tokenizer.get_vocab().items())
    if isinstance(core, dict):  # truncation and padding are settings of the last call, not of the tokenizer
        core = {key: value for key, value in core.items() if key not in ("truncation", "padding")}
    return core


class Encoder:
    """Turns rows into documents with one tokenizer.

    Attributes:
        template: Chat template, or None.
        has_spans: Whether the template marks the assistant's tokens with generation spans.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, template = tokenizer, tokenizer.chat_template
        self.template: str | None = (tokenizer.get_chat_template() if isinstance(template, dict) else template) or None
        self.has_spans = bool(self.template and _GENERATION.search(self.template)) and tokenizer.is_fast

    @cached_property
    def end_id(self) -> int:
        """Id of the token that ends a text.

        Raises:
            UserError: the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(f"tokenizer {self.tokenizer.name_or_path}: has no end token; set eos_token in its config")
        return end

    def documents(self, row: Row) -> list[Document]:
        """The row's documents: one; or one for each counted turn if the template has no generation spans or some have weight 0.

        Raises:
            RowError: the template rejects the row, the tokens of prompt and response cannot be separated, or an id is outside
                the vocabulary.
            UserError: the row is a chat and there is no chat template.
        """
        if isinstance(row, TokenRow):
            return [self._from_tokens(row)]
        if isinstance(row, PlainText):
            ids = [*self.encode(row.text), self.end_id]
            return [_document(ids, [1] * len(ids), chat=False, divisible=True)]
        if self.template is None and isinstance(row, PromptResponse):
            prompt, response = self.encode(row.prompt + row.separator), [*self.encode(row.response), self.end_id]
            return [_document(prompt + response, [0] * len(prompt) + [1] * len(response))]
        assert isinstance(row, (Chat, PromptResponse))
        roles = [message["role"] for message in row.messages]
        turns = row.counted if isinstance(row, Chat) else [len(roles) - 1]
        if self.has_spans and len(turns) == roles.count("assistant"):  # spans do not say which turn they are of
            return [self._from_spans(row.messages)]
        return [self._from_prefix(row.messages[: n + 1]) for n in turns]

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a chat up to the point where the assistant starts to write."""
        return self.encode(self._render(messages, prompt=True))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added, as in the runner."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self._apply(messages, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, messages: list[dict[str, Any]], spans: bool = False, **options: Any) -> Any:
        if self.template is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path}: has no chat template, but the data has chats; "
                "add a chat_template.jinja, or use prompt and response columns"
            )
        try:
            if spans:
                return _render_spans(self.tokenizer, messages, self.template)
            return self.tokenizer.apply_chat_template(messages, **options)
        except Exception as error:  # a template is a small program: its own exceptions, and any that its mistakes cause
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(f"the chat template rejects the turns: {reason}") from None

    def _from_tokens(self, row: TokenRow) -> Document:
        vocabulary = len(self.tokenizer)
        for token in (min(row.input_ids), max(row.input_ids)):
            if not 0 <= token < vocabulary:
                raise RowError(f"token id {token} is outside the vocabulary of {vocabulary}")
        return _document(row.input_ids, row.loss_mask, chat=False)

    def _from_spans(self, messages: list[dict[str, Any]]) -> Document:
        text, spans = self._apply(messages, spans=True)
        out: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        mask = span_mask(out["offset_mapping"], spans)
        if not any(mask):
            raise RowError("the template's generation spans contain no token of this chat")
        return _document(out["input_ids"], mask)

    def _from_prefix(self, messages: list[dict[str, Any]]) -> Document:
        before, after = self._render(messages[:-1], prompt=True), self._render(messages, prompt=False)
        if not after.startswith(before):
            raise RowError("the chat template renders a prompt differently when its answer follows; add generation spans to it")
        prompt, ids = self.encode(before), self.encode(after)
        if ids[: len(prompt)] != prompt:
            raise RowError("prompt and answer tokenise differently together than apart; add generation spans to the template")
        # what the template renders after the end token (often a line break) is not written by the model
        end = len(ids)
        if self.end_id in ids[len(prompt) :]:
            end -= ids[::-1].index(self.end_id)
        if end == len(prompt):
            raise RowError("the template renders nothing for the assistant's turn")
        return _document(ids, [0] * len(prompt) + [1] * (end - len(prompt)) + [0] * (len(ids) - end))


def _render_spans(tokenizer: Tokenizer, messages: list[dict[str, Any]], template: str) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and the characters (start, end) of each generation span in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {**tokenizer.special_tokens_map, "chat_template": template, "return_assistant_tokens_mask": True}
    rendered: Any = render_jinja_template([messages], **options)
    (text,), (spans,) = rendered
    return text, spans


def span_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 at the tokens that lie inside a span, 0 elsewhere.

    transformers' own mask is not used. It looks up the tokens of a span's first and last character, so it loses the last tokens
    of a character that has several, and all spans from one on that begins with a blank if offsets are trimmed; and after a span
    that ends at the first token it labels the rest of the chat (huggingface/transformers issue 47325).

    Args:
        offsets: First character of each token and the one after its last; tokens of one character have equal offsets.
        spans: First character of each span and the one after its last, ascending.
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), np.int64)
    for start, end in spans:
        mask |= (starts >= start) & (ends > start) & (ends <= end)
    return mask.tolist()


def _document(ids: list[int], mask: list[int], chat: bool = True, divisible: bool = False) -> Document:
    return Document(np.asarray(ids, np.int32), np.asarray(mask, np.bool_), chat, divisible)
