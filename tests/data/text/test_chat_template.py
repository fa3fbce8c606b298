"""The loss mask, read back as text, for templates with and without generation spans."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.targets import make_tokenizer
from tests.support.tiny_data import NO_SPANS, STRIPS_THINKING
from trainkit.data.text.chat_template import Document, Encoder, load_tokenizer, span_mask
from trainkit.data.text.formats import Chat, PlainText, PromptResponse, TokenRow, parse_row
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
    ("template", "message"),
    [
        (
            "{% generation %}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}{% endgeneration %}",
            "generation spans contain every token of this chat",
        ),
        (
            "{% if add_generation_prompt %}{% else %}{{ messages[-1]['content'] }}<|end|>{% endif %}",
            "train: every token of the chats is a label",
        ),
    ],
)
def test_mask_over_all_tokens_is_an_error(template: str, message: str, tokenizer: Any, rows_file: Callable[..., str]) -> None:
    """A mask that covers every token of every chat is an error."""
    tokenizer.chat_template = template
    path = rows_file(*({"prompt": f"q{n}", "response": f"a{n}"} for n in range(3)))
    with pytest.raises(UserError, match=message):
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


TWO_ENDS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A template that writes a line break after the end token, as Qwen's and Gemma's do."""


def model_folder(folder: Path, tokenizer: Any, **config: Any) -> str:
    """A folder with the tokenizer and a config.json, as far as encoding reads it; the tokenizer's end token is <|bos|>."""
    tokenizer.eos_token = "<|bos|>"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": tokenizer.eos_token_id} | config))
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return str(folder)


@pytest.mark.parametrize("generation", ["{% generation %}", ""], ids=["spans", "prefixes"])
def test_labels_end_at_the_first_end_id_of_the_model(generation: str, tokenizer: Any, tmp_path: Path) -> None:
    """Labels end at the first end token of the model, also where the tokenizer names another end token."""
    tokenizer.chat_template = (
        TWO_ENDS if generation else TWO_ENDS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    encoder = Encoder(load_tokenizer(model_folder(tmp_path, tokenizer)))
    assert len(encoder.end_ids) == 2 and encoder.tokenizer.eos_token == "<|bos|>"
    turns = chat("2 + 2?", "It is 4.", "And 3 + 3?", "That is<|end|>6.")
    labels = [text for document in encoder.documents(turns) for label, text in spans(encoder.tokenizer, document) if label]
    assert labels == ["It is 4.<|end|>", "That is<|end|>"]
    assert sum(document.unended for document in encoder.documents(turns)) == 0
    assert encoder.turn_end_id == tokenizer.convert_tokens_to_ids("<|end|>")


@pytest.mark.parametrize("generation", ["{% generation %}", ""], ids=["spans", "prefixes"])
def test_template_without_end_label_is_reported(generation: str, tokenizer: Any, rows_file: Callable[..., str]) -> None:
    """A template whose labels leave the end token out is reported, with the number of turns."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}END{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    if generation:
        tokenizer.chat_template = tokenizer.chat_template.replace("END", "<|end|>")
    else:
        tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    rows = [{"messages": chat("a", "b", "c", "d").messages}, {"prompt": "e", "response": "f"}]
    report = prepare([rows_file(*rows)], None, tokenizer, 64, validation_share=0).report
    assert report.train.unended == 3 and "3 assistant turns without an end token as label" in str(report)
    assert Encoder(tokenizer).turn_end_id is None


@pytest.mark.parametrize("size", [1100, 1000])
def test_ids_are_compared_with_the_vocabulary_of_the_model(size: int, tokenizer: Any, tmp_path: Path) -> None:
    """Ids are compared with the vocabulary of the model, which may be larger or smaller than the tokenizer's."""
    encoder = Encoder(load_tokenizer(model_folder(tmp_path, tokenizer, vocab_size=size)))
    assert len(encoder.tokenizer) == 1024
    (document,) = encoder.documents(TokenRow([size - 1, 3], [0, 1]))
    assert document.tokens.tolist() == [size - 1, 3]
    for token in (size, -1, 2**40):
        with pytest.raises(RowError, match=f"token id {token} is outside the vocabulary of {size}"):
            encoder.documents(TokenRow([token, 3], [0, 1]))
    rare = encoder.tokenizer.decode([1023])
    for row in (PlainText(rare), PromptResponse("a", rare), PromptResponse(rare, "a")):
        if size < 1024:
            with pytest.raises(RowError, match="token id 1023 is outside"):
                encoder.documents(row)
        else:
            assert encoder.documents(row)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
WITH_TOOLS = "{% if tools %}<|system|>{{ tools[0]['function']['name'] }}{% endif %}"


def test_tools_reach_the_chat_template(tokenizer: Any, rows_file: Callable[..., str]) -> None:
    """Tools are written by the template, with spans and without; a template that does not read them is reported."""
    plain = tokenizer.chat_template
    row = {"prompt": "2 + 2?", "completion": "It is 4.", "tools": TOOLS}
    report = prepare([rows_file(row)], None, tokenizer, 64, validation_share=0).report
    assert report.train.unused == {"tools": 1}
    for template in (WITH_TOOLS + plain, WITH_TOOLS + NO_SPANS):
        tokenizer.chat_template = template
        prepared = prepare([rows_file(row)], None, tokenizer, 64, validation_share=0)
        assert tokenizer.decode(prepared.train.tokens_N).startswith("<|system|>add<|") and not prepared.report.train.unused


def test_tool_calls_with_null_content_are_rendered(tokenizer: Any) -> None:
    """A turn of tool calls with null content is a turn with labels, its arguments an object."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is none %}"
        "{{ m['tool_calls'][0].function.arguments | tojson }}{% else %}{{ m['content'] }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row, _ = parse_row({"messages": turns}, {})
    (document,) = Encoder(tokenizer).documents(row)
    assert spans(tokenizer, document)[1] == (True, '{"a": 2}<|end|>')


@pytest.mark.parametrize("generation", [True, False], ids=["spans", "prefixes"])
def test_turns_of_a_given_prompt_have_no_labels(generation: bool, tokenizer: Any) -> None:
    """In a prompt and a completion of several turns, only the assistant turns of the completion count."""
    if not generation:
        tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns = chat("1?", "One.", "2?", "Two.", "3?", "Three.").messages
    row, _ = parse_row({"prompt": turns[:3], "completion": turns[3:]}, {})
    documents = Encoder(tokenizer).documents(row)
    assert [text for document in documents for label, text in spans(tokenizer, document) if label] == [
        "Two.<|end|>",
        "Three.<|end|>",
    ]


@pytest.mark.parametrize("generation", [True, False], ids=["spans", "prefixes"])
def test_completion_may_begin_with_another_role(generation: bool, tokenizer: Any) -> None:
    """A completion may begin with a turn of the user or of a tool; what the assistant says after it counts."""
    if not generation:
        tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    turns = chat("1?", "One.", "2?", "Two.").messages
    row, _ = parse_row({"prompt": turns[:2], "completion": turns[2:]}, {})
    (document,) = Encoder(tokenizer).documents(row)
    assert [text for label, text in spans(tokenizer, document) if label] == ["Two.<|end|>"]


def test_named_templates_need_a_default(tokenizer: Any, rows_file: Callable[..., str]) -> None:
    """Of several chat templates the default is used, and `tool_use` for tools; without a default, one line says so."""
    plain = tokenizer.chat_template
    row = {"prompt": "2 + 2?", "response": "It is 4."}
    path = rows_file(row, row | {"tools": TOOLS})
    tokenizer.chat_template = {"default": plain, "tool_use": WITH_TOOLS + NO_SPANS}
    texts = tokenizer.decode(prepare([path], None, tokenizer, 64, validation_share=0).train.tokens_N)
    assert texts.count("<|system|>add") == 1 and texts.count("<|end|>\n") == 2
    tokenizer.chat_template = {"rag": plain, "tool_use": plain}
    with pytest.raises(UserError, match="has the chat templates rag, tool_use, but none is the default; copy") as caught:
        prepare([path], None, tokenizer, 64)
    assert "\n" not in str(caught.value)
    assert Encoder(tokenizer).documents(PlainText("needs no template"))


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
