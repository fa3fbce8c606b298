"""The loss mask: what it covers, read back as text, under templates with and without generation spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.tiny_data import NO_SPANS, STRIPS_THINKING
from trainkit.data.text.chat_template import Document, Encoder, load_tokenizer
from trainkit.data.text.formats import Chat, Pair, Text, Tokens
from trainkit.data.text.prepare import prepare
from trainkit.data.text.sources import BadRow
from trainkit.errors import UserError


def chat(*contents: str) -> Chat:
    return Chat([{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)])


def spans(tokenizer: Any, document: Document) -> list[tuple[bool, str]]:
    """(counts, text) of each stretch of equal mask."""
    edges = np.flatnonzero(np.diff(document.mask)) + 1
    return [
        (bool(mask[0]), tokenizer.decode(tokens))
        for tokens, mask in zip(np.split(document.tokens, edges), np.split(document.mask, edges), strict=True)
    ]


def test_generation_spans_mark_every_assistant_turn_in_one_document(tokenizer: Any) -> None:
    (document,) = Encoder(tokenizer).documents(chat("2 + 2?", "It is 4.", "And 3 + 3?", "That is 6."))
    assert spans(tokenizer, document) == [
        (False, "<|bos|><|user|>2 + 2?<|end|><|assistant|>"),
        (True, "It is 4.<|end|>"),
        (False, "<|user|>And 3 + 3?<|end|><|assistant|>"),
        (True, "That is 6.<|end|>"),
    ]


def test_without_spans_each_assistant_turn_is_a_document_and_nothing_after_its_end_token_counts(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SPANS
    first, second = Encoder(tokenizer).documents(chat("Hi", "Yes?", "Bye", "Good night"))
    assert spans(tokenizer, first) == [(False, "<|user|>Hi<|end|>\n<|assistant|>"), (True, "Yes?<|end|>"), (False, "\n")]
    assert spans(tokenizer, second) == [
        (False, "<|user|>Hi<|end|>\n<|assistant|>Yes?<|end|>\n<|user|>Bye<|end|>\n<|assistant|>"),
        (True, "Good night<|end|>"),
        (False, "\n"),
    ]


def test_stripped_thinking_counts_where_it_was_written_and_is_gone_where_it_is_context(tokenizer: Any) -> None:
    tokenizer.chat_template = STRIPS_THINKING
    first, second = Encoder(tokenizer).documents(chat("A?", "<think>x y</think>One", "B?", "<think>z</think>Two"))
    assert spans(tokenizer, first) == [(False, "<|user|>A?<|end|><|assistant|>"), (True, "<think>x y</think>One<|end|>")]
    assert spans(tokenizer, second) == [
        (False, "<|user|>A?<|end|><|assistant|>One<|end|><|user|>B?<|end|><|assistant|>"),
        (True, "<think>z</think>Two<|end|>"),
    ]


def test_both_ways_count_the_same_tokens_of_a_two_turn_chat(tokenizer: Any) -> None:
    (by_spans,) = Encoder(tokenizer).documents(chat("What is 7 * 8?", "It is\n7 * 8 = 56."))
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (by_prefix,) = Encoder(tokenizer).documents(chat("What is 7 * 8?", "It is\n7 * 8 = 56."))
    assert by_spans.tokens.tolist() == by_prefix.tokens.tolist() and by_spans.mask.tolist() == by_prefix.mask.tolist()


def test_a_prompt_that_tokenises_differently_with_its_answer_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # letters join across the turn
    with pytest.raises(BadRow, match="tokenise differently together than apart"):
        Encoder(tokenizer).documents(chat("the answ", "er is"))


def test_a_prompt_that_changes_with_its_answer_is_a_bad_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadRow, match="writes a prompt differently once its answer follows"):
        Encoder(tokenizer).documents(chat("a", "b"))


def test_pairs_are_chats_with_a_template_and_texts_end_to_end_without(tokenizer: Any) -> None:
    (document,) = Encoder(tokenizer).documents(Pair("Hi", "Hello"))
    assert spans(tokenizer, document) == [(False, "<|bos|><|user|>Hi<|end|><|assistant|>"), (True, "Hello<|end|>")]
    tokenizer.chat_template = None
    (document,) = Encoder(tokenizer).documents(Pair("Hi", "Hello", "\n"))
    assert spans(tokenizer, document) == [(False, "Hi\n"), (True, "Hello<|end|>")]


def test_text_counts_whole_with_an_end_token_and_given_tokens_stand_as_they_are(tokenizer: Any) -> None:
    (document,) = Encoder(tokenizer).documents(Text("Once upon"))
    assert spans(tokenizer, document) == [(True, "Once upon<|end|>")] and document.divisible
    (document,) = Encoder(tokenizer).documents(Tokens([9, 8, 7], [0, 1, 0]))
    assert document.tokens.tolist() == [9, 8, 7] and document.mask.tolist() == [False, True, False]


def test_chats_without_a_template_name_the_mend(tokenizer: Any) -> None:
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
def test_a_mask_over_everything_is_an_error(template: str, share: str, tokenizer: Any, rows_file: Callable[..., str]) -> None:
    tokenizer.chat_template = template
    path = rows_file(*({"prompt": f"q{n}", "response": f"a{n}"} for n in range(3)))
    with pytest.raises(UserError, match=f"train: {share} of the chats counts"):
        prepare([path], None, tokenizer, 64)


def test_spans_that_hold_nothing_are_an_error_and_skipping_them_all_leaves_no_row(
    tokenizer: Any, rows_file: Callable[..., str]
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if no %}{% generation %}{% endgeneration %}{% endif %}"
    )
    path = rows_file({"prompt": "q", "response": "a"})
    with pytest.raises(UserError, match="generation spans hold no token"):
        prepare([path], None, tokenizer, 64)
    with pytest.raises(UserError, match="no usable row"):
        prepare([path], None, tokenizer, 64, on_bad_row="skip")


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Any) -> None:
    with pytest.raises(UserError, match=f"^tokenizer {tmp_path}: cannot be loaded"):
        load_tokenizer(str(tmp_path))
