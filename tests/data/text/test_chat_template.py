"""The loss mask, read back as text, for templates with and without generation spans."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.targets import make_tokenizer
from tests.support.tiny_data import NO_SPANS, STRIPS_THINKING
from trainkit.data.text.chat_template import Document, Encoder, load_tokenizer, span_mask
from trainkit.data.text.formats import Chat, PlainText, PromptResponse, TokenRow
from trainkit.data.text.prepare import prepare
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError


def chat(*contents: str) -> Chat:
    return Chat([{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)])


def spans(tokenizer: Any, document: Document) -> list[tuple[bool, str]]:
    """(is label, text) of each run of tokens with equal mask."""
    edges = np.flatnonzero(np.diff(document.mask)) + 1
    return [
        (bool(mask[0]), tokenizer.decode(tokens))
        for tokens, mask in zip(np.split(document.tokens, edges), np.split(document.mask, edges), strict=True)
    ]


def test_generation_spans_mask_every_assistant_turn(tokenizer: Any) -> None:
    """With generation spans a chat is one document, and the mask covers every assistant turn."""
    (document,) = Encoder(tokenizer).documents(chat("2 + 2?", "It is 4.", "And 3 + 3?", "That is 6."))
    assert spans(tokenizer, document) == [
        (False, "<|bos|><|user|>2 + 2?<|end|><|assistant|>"),
        (True, "It is 4.<|end|>"),
        (False, "<|user|>And 3 + 3?<|end|><|assistant|>"),
        (True, "That is 6.<|end|>"),
    ]


def test_without_spans_each_turn_is_a_document(tokenizer: Any) -> None:
    """Without spans each assistant turn is a document, and nothing after its end token counts."""
    tokenizer.chat_template = NO_SPANS
    first, second = Encoder(tokenizer).documents(chat("Hi", "Yes?", "Bye", "Good night"))
    assert spans(tokenizer, first) == [(False, "<|user|>Hi<|end|>\n<|assistant|>"), (True, "Yes?<|end|>"), (False, "\n")]
    assert spans(tokenizer, second) == [
        (False, "<|user|>Hi<|end|>\n<|assistant|>Yes?<|end|>\n<|user|>Bye<|end|>\n<|assistant|>"),
        (True, "Good night<|end|>"),
        (False, "\n"),
    ]


@pytest.mark.parametrize("template", [None, NO_SPANS])
def test_turn_of_weight_0_is_context_only(template: str | None, tokenizer: Any) -> None:
    """An assistant turn of weight 0 is read by the model but has no labels, with generation spans and without."""
    tokenizer.chat_template = template or tokenizer.chat_template
    plain, weighted = chat("Hi", "Wrong", "Sure?", "No, right"), chat("Hi", "Wrong", "Sure?", "No, right")
    weighted.messages[1]["weight"], weighted.messages[3]["weight"] = 0, 1
    (document,) = Encoder(tokenizer).documents(weighted)
    assert [text for label, text in spans(tokenizer, document) if label] == ["No, right<|end|>"]
    assert document.tokens.tolist() == Encoder(tokenizer).documents(plain)[-1].tokens.tolist()


def test_thinking_counts_only_in_its_own_turn(tokenizer: Any) -> None:
    """Thinking that the template strips counts in its own turn and is absent where it would be context."""
    tokenizer.chat_template = STRIPS_THINKING
    first, second = Encoder(tokenizer).documents(chat("A?", "<think>x y</think>One", "B?", "<think>z</think>Two"))
    assert spans(tokenizer, first) == [(False, "<|user|>A?<|end|><|assistant|>"), (True, "<think>x y</think>One<|end|>")]
    assert spans(tokenizer, second) == [
        (False, "<|user|>A?<|end|><|assistant|>One<|end|><|user|>B?<|end|><|assistant|>"),
        (True, "<think>z</think>Two<|end|>"),
    ]


def test_spans_and_prefixes_give_the_same_mask(tokenizer: Any) -> None:
    """Spans and prefixes give the same tokens and mask for a chat of two turns."""
    (by_spans,) = Encoder(tokenizer).documents(chat("What is 7 * 8?", "It is\n7 * 8 = 56."))
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (by_prefix,) = Encoder(tokenizer).documents(chat("What is 7 * 8?", "It is\n7 * 8 = 56."))
    assert by_spans.tokens.tolist() == by_prefix.tokens.tolist() and by_spans.mask.tolist() == by_prefix.mask.tolist()


def test_prompt_tokens_changed_by_answer_is_bad_row(tokenizer: Any) -> None:
    """A prompt that is tokenised differently once its answer follows is a bad row."""
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # letters join across the turn
    with pytest.raises(RowError, match="tokenise differently together than apart"):
        Encoder(tokenizer).documents(chat("the answ", "er is"))


def test_prompt_text_changed_by_answer_is_bad_row(tokenizer: Any) -> None:
    """A prompt whose text changes once its answer follows is a bad row."""
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(RowError, match="renders a prompt differently when its answer follows"):
        Encoder(tokenizer).documents(chat("a", "b"))


def test_pairs_use_the_template_if_there_is_one(tokenizer: Any) -> None:
    """Pairs are encoded as chats if there is a template, else as two texts joined."""
    (document,) = Encoder(tokenizer).documents(PromptResponse("Hi", "Hello"))
    assert spans(tokenizer, document) == [(False, "<|bos|><|user|>Hi<|end|><|assistant|>"), (True, "Hello<|end|>")]
    tokenizer.chat_template = None
    (document,) = Encoder(tokenizer).documents(PromptResponse("Hi", "Hello", "\n"))
    assert spans(tokenizer, document) == [(False, "Hi\n"), (True, "Hello<|end|>")]


def test_text_counts_wholly_and_tokens_stay_as_given(tokenizer: Any) -> None:
    """All tokens of a text count, with an end token; given tokens and masks stay as they are."""
    (document,) = Encoder(tokenizer).documents(PlainText("Once upon"))
    assert spans(tokenizer, document) == [(True, "Once upon<|end|>")] and document.divisible
    (document,) = Encoder(tokenizer).documents(TokenRow([9, 8, 7], [0, 1, 0]))
    assert document.tokens.tolist() == [9, 8, 7] and document.mask.tolist() == [False, True, False]


def test_chats_need_a_template(tokenizer: Any) -> None:
    """Chats without a template are refused, and the error names the fix."""
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template.*chat_template.jinja"):
        Encoder(tokenizer).documents(chat("a", "b"))


@pytest.mark.parametrize(
    ("template", "share"),
    [
        ("{% generation %}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}{% endgeneration %}", "every token"),
        ("{% if add_generation_prompt %}{% else %}{{ messages[-1]['content'] }}<|end|>{% endif %}", "every token"),
    ],
)
def test_mask_over_all_tokens_is_an_error(template: str, share: str, tokenizer: Any, rows_file: Callable[..., str]) -> None:
    """A mask that covers every token of every chat is an error."""
    tokenizer.chat_template = template
    path = rows_file(*({"prompt": f"q{n}", "response": f"a{n}"} for n in range(3)))
    with pytest.raises(UserError, match=f"train: {share} of the chats is a label"):
        prepare([path], None, tokenizer, 64)


def test_empty_generation_spans_are_an_error(tokenizer: Any, rows_file: Callable[..., str]) -> None:
    """Generation spans without a token are an error; skipping all of them leaves no usable row, which is an error too."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if no %}{% generation %}{% endgeneration %}{% endif %}"
    )
    path = rows_file({"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match="generation spans contain no token"):
        prepare([path], None, tokenizer, 64)
    with pytest.raises(UserError, match="no usable row"):
        prepare([path], None, tokenizer, 64, on_bad_row="skip")


def test_unloadable_tokenizer_is_named(tmp_path: Any) -> None:
    """A tokenizer that cannot be loaded is named in the error."""
    with pytest.raises(UserError, match=f"^tokenizer {tmp_path}: cannot be loaded"):
        load_tokenizer(str(tmp_path))


MARKED = "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
MARKED += "{% else %}<|user|>{{ m['content'] }}{% endif %}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("turns", "labels"),
    [
        ([("assistant", "A"), ("user", "and B?"), ("assistant", "no")], ["A", "no"]),
        ([("user", "which?"), ("assistant", "this 😀"), ("user", "and?"), ("assistant", "é")], ["this 😀", "é"]),
        ([("user", "which?"), ("assistant", "yes"), ("user", "and?"), ("assistant", " sold")], ["yes", " sold"]),
    ],
)
def test_span_mask_covers_whole_answers_only(turns: list[tuple[str, str]], labels: list[str]) -> None:
    """Labels are all tokens of every answer: one token at the start, a last character of several tokens, a first blank."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)  # as that of GPT-2 and Llama 3
    tokenizer.chat_template = MARKED
    (document,) = Encoder(tokenizer).documents(Chat([{"role": role, "content": content} for role, content in turns]))
    assert [text for label, text in spans(tokenizer, document) if label] == labels


def test_span_mask_is_of_the_tokens_inside(seed: int) -> None:
    """Labels are the tokens whose bytes all lie inside a span, wherever the edges of the spans lie."""
    tokenizer, rng = make_tokenizer(), random.Random(seed)
    for _ in range(50):
        text = "".join(rng.choices(["Natalia", " sold", " clips", "4", "8", " ", "\n", "é", "😀", "<|end|>"], k=12))
        edges = sorted(rng.sample(range(len(text) + 1), 4))
        out = tokenizer(text, return_offsets_mapping=True)
        bounds, inside, at = [len(text[:edge].encode()) for edge in edges], [], 0
        for token in tokenizer.convert_ids_to_tokens(out["input_ids"]):
            start, at = at, at + len(token)  # a byte-level token has one character per byte
            inside.append(any(first <= start and at <= last for first, last in (bounds[:2], bounds[2:])))
        assert span_mask(out["offset_mapping"], [(edges[0], edges[1]), (edges[2], edges[3])]) == inside, (text, edges)
