"""Encodes rows as token ids with a loss mask; in a chat, the mask covers only the tokens that the assistant writes.

A chat template with `{% generation %}` spans marks these tokens. Without such spans, each assistant turn becomes a document of
its own: the template renders the turns before it (with `add_generation_prompt`), and then the same turns and itself; the mask
covers what was added. So a template that removes the thinking of earlier turns is followed exactly.

In both cases the labels of a turn end with the first token that ends a text of the model. What the template writes after it,
often a line break, is never generated.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from trainkit.data.text.formats import Chat, PlainText, PromptResponse, Row, TokenRow
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError, first_lines, lone_surrogate
from trainkit.models.load import read_config, read_tokenizer
from trainkit.models.target import end_ids

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
        unended: Number of assistant turns whose labels contain no end token.
    """

    tokens: np.ndarray
    mask: np.ndarray
    chat: bool = True
    divisible: bool = False
    unended: int = 0


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


def prompt_digest(tokens: Sequence[int] | np.ndarray) -> str:
    """Digest that rows of the same prompt share, 16 hex digits."""
    return hashlib.sha256(np.asarray(tokens, np.int32).tobytes()).hexdigest()[:16]


class Encoder:
    """Turns rows into documents, with one tokenizer for one model.

    Args:
        tokenizer: The tokenizer.
        model: Folder of the model that will read the tokens; None takes the folder that the tokenizer was loaded from. Without
            a config.json there, the tokenizer's own end token and size are used.

    Attributes:
        end_ids: Ids that end a text of the model: the union of its config, generation_config and tokenizer.
        vocab_size: Number of ids that the model knows, often more than the tokenizer has.
        has_template: Whether the tokenizer has a chat template.

    Raises:
        UserError: the model's config or generation_config cannot be read.
    """

    def __init__(self, tokenizer: Tokenizer, model: str | None = None) -> None:
        self.tokenizer, self.has_template = tokenizer, bool(tokenizer.chat_template)
        folder = model or tokenizer.name_or_path
        if folder and (Path(folder) / "config.json").is_file():
            config = _model_fields(folder)
            self.end_ids = frozenset(end_ids(folder, config))
            self.vocab_size: int = config.vocab_size or len(tokenizer)
        else:
            self.end_ids = frozenset(id for id in [tokenizer.eos_token_id] if isinstance(id, int))
            self.vocab_size = len(tokenizer)

    @cached_property
    def end_id(self) -> int:
        """Id of the tokenizer's token that ends a text.

        Raises:
            UserError: the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise UserError(f"tokenizer {self.tokenizer.name_or_path}: has no end token; set eos_token in its config")
        return end

    @cached_property
    def turn_end_id(self) -> int | None:
        """Id of the end token that the chat template writes after an answer, or None."""
        try:
            document = self.documents(PromptResponse("a", "b"))[-1]
        except RowError:  # the template accepts only chats of another form
            return None
        return next((token for token in document.tokens[document.mask].tolist() if token in self.end_ids), None)

    def template(self, tools: Any = None) -> str | None:
        """The chat template for chats with or without tools, or None.

        Raises:
            UserError: there are several templates, and none of them is the default.
        """
        templates = self.tokenizer.chat_template
        if not isinstance(templates, dict):
            return templates or None
        name = "tool_use" if tools and "tool_use" in templates else "default"
        if templates and name not in templates:
            names = ", ".join(sorted(templates))
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path}: has the chat templates {names}, but none is the default; copy "
                "the one to use to its folder as chat_template.jinja"
            )
        return templates.get(name)

    def reads_tools(self, tools: Any) -> bool:
        """Whether the chat template writes the definitions of tools."""
        return "tools" in (self.template(tools) or "")

    def documents(self, row: Row) -> list[Document]:
        """The row's documents: one; or one for each counted turn if the template has no generation spans or some have weight 0.

        Raises:
            RowError: the template rejects the row, the tokens of prompt and response cannot be separated, or an id is outside
                the model's vocabulary.
            UserError: the row is a chat and there is no chat template.
        """
        if isinstance(row, TokenRow):
            return [self._document(row.input_ids, np.asarray(row.loss_mask, np.bool_), chat=False)]
        if isinstance(row, PlainText):
            ids = [*self.encode(row.text), self.end_id]
            return [self._document(ids, np.ones(len(ids), np.bool_), chat=False, divisible=True)]
        if isinstance(row, PromptResponse):
            if not self.has_template:
                prompt, response = self.encode(row.prompt + row.separator), [*self.encode(row.response), self.end_id]
                return [self._document(prompt + response, np.arange(len(prompt) + len(response)) >= len(prompt))]
            row = Chat(row.messages, tools=row.tools)
        template, turns = self.template(row.tools), row.counted
        assistant = [n for n, message in enumerate(row.messages) if message["role"] == "assistant" and n >= row.context]
        # a span does not name its turn, so a chat with a turn of weight 0 is rendered by prefixes
        if template and _GENERATION.search(template) and self.tokenizer.is_fast and turns == assistant:
            return [self._from_spans(row)]
        return [self._from_prefix(row.messages[: n + 1], row.tools) for n in turns]

    def prompt_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Token ids of a chat up to the point where the assistant starts to write."""
        return self.encode(self._render(messages, tools, prompt=True))

    def text(self, row: Chat | PromptResponse | PlainText) -> str:
        """The text of a row: a chat as the template renders it; prompt and response one after the other if there is none."""
        if isinstance(row, PlainText):
            return row.text
        if isinstance(row, PromptResponse) and not self.has_template:
            return row.prompt + row.separator + row.response
        return self._render(row.messages, row.tools, prompt=False)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special token is added, as in the runner.

        Raises:
            RowError: the text has half of a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(lone_surrogate(error)) from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def check_ids(self, ids: list[int]) -> list[int]:
        """The ids; raises RowError if the model does not know one of them."""
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.vocab_size:
                larger = len(self.tokenizer) > self.vocab_size
                fix = f"; the tokenizer has {len(self.tokenizer)}, use the model's own tokenizer" if larger else ""
                raise RowError(f"token id {token} is outside the vocabulary of {self.vocab_size}{fix}")
        return ids

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, messages: list[dict[str, Any]], tools: Any, spans: bool = False, **options: Any) -> Any:
        template = self.template(tools)
        if template is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path}: has no chat template, but the data has chats; "
                "add a chat_template.jinja, or use prompt and response columns"
            )
        try:
            if spans:
                return _render_spans(self.tokenizer, messages, tools, template)
            return self.tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **options)
        except Exception as error:  # a template is a small program: its own exceptions, and any that its mistakes cause
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RowError(f"the chat template rejects the turns: {reason}") from None

    def _from_spans(self, row: Chat) -> Document:
        text, spans = self._apply(row.messages, row.tools, spans=True)
        out: Any = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, mask = out["input_ids"], np.asarray(span_mask(out["offset_mapping"], spans), np.bool_)
        if row.context:
            begins = row.messages[row.context]["role"] == "assistant"  # right after the prompt, not after a tool's answer
            context = self.encode(self._render(row.messages[: row.context], row.tools, prompt=begins))
            if ids[: len(context)] != context:
                raise RowError("the chat template renders the prompt's turns differently when the response follows")
            mask[: len(context)] = False
        if mask.all() or not mask.any():
            raise RowError(f"the template's generation spans contain {'every' if mask.all() else 'no'} token of this chat")
        return self._document(ids, mask, unended=self._end_labels(ids, mask))

    def _from_prefix(self, messages: list[dict[str, Any]], tools: Any) -> Document:
        before, after = self._render(messages[:-1], tools, prompt=True), self._render(messages, tools, prompt=False)
        if not after.startswith(before):
            raise RowError("the chat template renders a prompt differently when its answer follows; add generation spans to it")
        prompt, ids = self.encode(before), self.encode(after)
        if ids[: len(prompt)] != prompt:
            raise RowError("prompt and answer tokenise differently together than apart; add generation spans to the template")
        if len(ids) == len(prompt):
            raise RowError("the template renders nothing for the assistant's turn")
        mask = np.arange(len(ids)) >= len(prompt)
        return self._document(ids, mask, unended=self._end_labels(ids, mask))

    def _end_labels(self, ids: list[int], mask: np.ndarray) -> int:
        """Removes the labels after the first end token of each run of labels; returns the number of runs without one."""
        is_end, unended = np.isin(ids, list(self.end_ids)), 0
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        for start, stop in edges.reshape(-1, 2):
            ends = np.flatnonzero(is_end[start:stop])
            if len(ends):
                mask[start + ends[0] + 1 : stop] = False
            else:
                unended += 1
        return unended

    def _document(self, ids: list[int], mask: np.ndarray, **options: Any) -> Document:
        return Document(np.asarray(self.check_ids(ids), np.int32), mask, **options)


def _render_spans(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: Any, template: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered chat, and the characters (start, end) of each generation span in it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    options: dict[str, Any] = {**tokenizer.special_tokens_map, "chat_template": template, "return_assistant_tokens_mask": True}
    rendered: Any = render_jinja_template([messages], tools=tools, **options)
    (text,), (spans,) = rendered
    return text, spans


def span_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 at the tokens that lie inside a span, 0 elsewhere.

    transformers' own mask is not used, because it looks up the tokens of a span's first and last character
    (huggingface/transformers issue 47325). If that character has several tokens, the last ones get no label. If offsets are
    trimmed and a span begins with a space, this span and all later ones get no label. If a span ends at the first token, the
    rest of the chat gets labels.

    Args:
        offsets: First character of each token and the one after its last; tokens of one character have equal offsets.
        spans: First character of each span and the one after its last, ascending.
    """
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), np.int64)
    for start, end in spans:
        mask |= (starts >= start) & (ends > start) & (ends <= end)
    return mask.tolist()


def _model_fields(folder: str) -> Any:
    """`eos_token_id` and `vocab_size` of a model folder, or None; a config with custom code is read as JSON."""
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise UserError(f"{folder}/config.json: {first_lines(error, 1)}; fix it or copy it again") from None
    config = SimpleNamespace(**values) if "auto_map" in values else read_config(folder).get_text_config()
    size = getattr(config, "vocab_size", None)
    return SimpleNamespace(eos_token_id=getattr(config, "eos_token_id", None), vocab_size=size if type(size) is int else None)
