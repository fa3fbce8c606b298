"""Prompts of every kind of row, read back as text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.packed import documents_of
from tests.support.tiny_data import TINY
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
HI = "<|bos|><|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("row", "with_template", "raw"),
    [
        ({"messages": [USER]}, HI, None),
        ({"messages": [USER, ANSWER]}, HI, None),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, f"{HI}Yes<|end|><|user|>Hi<|end|><|assistant|>", None),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}, HI, None),
        ({"question": "Hi", "answer": "Yes"}, HI, "Hi\n"),
        ({"prompt": "Hi", "response": "Yes"}, HI, "Hi"),
        ({"task_id": "HumanEval/0", "prompt": "Hi", "canonical_solution": "x", "test": "y"}, HI, "Hi"),
        ({"question_id": 81, "category": "writing", "turns": ["Hi", "And?"]}, HI, "Hi"),
        ({"text": "Hi"}, "Hi", "Hi"),
        ({"conversations": [USER, ANSWER]}, HI, None),
        ({"prompt": [USER]}, HI, None),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, f"{HI}Yes<|end|><|user|>Hi<|end|><|assistant|>", None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, HI, None),
    ],
)
def test_each_row_format_gives_its_prompt(
    row: dict[str, Any], with_template: str, raw: str | None, rows_file: Callable[..., str], tokenizer: Any
) -> None:
    """Each row format gives its prompt, with and without a chat template."""
    path = rows_file(row)
    assert [tokenizer.decode(ids) for ids in read_prompts(path, tokenizer)] == [with_template]
    tokenizer.chat_template = None
    if raw is None:
        with pytest.raises(UserError, match="has no chat template"):
            read_prompts(path, tokenizer)
    else:
        assert [tokenizer.decode(ids) for ids in read_prompts(path, tokenizer)] == [raw]


def test_given_tokens_end_before_the_loss_mask(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """Given tokens end before the first token that the loss mask counts."""
    assert read_prompts(rows_file({"input_ids": [7, 8, 9], "loss_mask": [0, 0, 1]}), tokenizer) == [[7, 8]]


def test_prompt_is_the_start_of_the_training_document(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """The prompt equals the beginning of the training document."""

    from trainkit.data.text.prepare import prepare

    path = rows_file({"question": "What is 6 * 7?", "answer": "It is 42."})
    ((tokens, mask),) = documents_of(prepare([path], None, tokenizer, 64, validation_share=0).train)
    assert read_prompts(path, tokenizer) == [tokens[~mask].tolist()]


def test_bundled_prompts_are_64_and_limit_works() -> None:
    """There are 64 bundled prompts, and `limit` takes the first."""
    path, tokenizer = str(TINY / "prompts.jsonl"), str(TINY / "tokenizer")
    prompts = read_prompts(path, tokenizer)
    assert len(prompts) == 64 and read_prompts(path, tokenizer, limit=5) == prompts[:5]


def test_columns_can_be_named(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """The column of the prompt can be named."""
    assert tokenizer.decode(read_prompts(rows_file({"body": "Hi"}), tokenizer, columns={"prompt": "body"})[0]) == HI


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": "x"}, "columns are 'answer', expected input_ids\\+loss_mask or messages or .*turns or prompt"),
        ({"messages": [ANSWER]}, "the chat has no user turn"),
        ({"prompt": [USER, ANSWER]}, "the prompt ends with an assistant turn"),
        ({"prompt": "Hi", "tools": "["}, "tools is text that is not JSON"),
        ({"input_ids": [7, 1024], "loss_mask": [0, 0]}, "token id 1024 is outside the vocabulary of 1024"),
        ('{"prompt": "bad \\ud83d emoji"}', r"has a lone surrogate, '.ud83d'"),
        ({"turns": []}, "turns must be a list of texts"),
        ({"turns": [3]}, "turns must be text, not int 3"),
        ({"prompt": ""}, "prompt must be text, not empty"),
        ({"input_ids": [7], "loss_mask": [1]}, "there is no prompt"),
        ("{", "not JSON"),
    ],
)
def test_row_without_prompt_is_named(row: Any, reason: str, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A row without a prompt is named with file, line and reason."""
    path = rows_file({"text": "ok"}, row)
    with pytest.raises(UserError, match=f"^{path}:2: .*{reason}"):
        read_prompts(path, tokenizer)


def test_empty_file_is_an_error(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A file without prompts is an error."""
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(rows_file(), tokenizer)


def test_tools_of_prompts_reach_the_template(rows_file: Callable[..., str], tokenizer: Any, capsys: Any) -> None:
    """Tools of a prompt are written by the template; a template that does not read them is reported."""
    tools = [{"type": "function", "function": {"name": "add"}}]
    path = rows_file({"messages": [USER], "tools": json.dumps(tools)}, {"prompt": "Hi", "tools": tools}, {"prompt": "Hi"})
    assert [tokenizer.decode(ids) for ids in read_prompts(path, tokenizer)] == [HI] * 3
    assert "2 rows have tools, which the chat template does not read" in capsys.readouterr().err
    tokenizer.chat_template = "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}" + tokenizer.chat_template
    assert [tokenizer.decode(ids) for ids in read_prompts(path, tokenizer)] == [f"add{HI}", f"add{HI}", HI]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_of_prompts_below_one_is_refused(limit: int, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A limit below 1 is refused in one line."""
    with pytest.raises(UserError, match=f"limit: {limit} must be at least 1"):
        read_prompts(rows_file({"prompt": "Hi"}), tokenizer, limit)


def test_files_left_out_of_a_folder_are_named(
    rows_file: Callable[..., str], tokenizer: Any, tmp_path: Path, capsys: Any
) -> None:
    """Files of a folder that hold no prompts are named."""
    rows_file({"prompt": "Hi"}, name="a.jsonl")
    rows_file({"prompt": "Hi"}, name="test.jsonl")
    assert len(read_prompts(str(tmp_path), tokenizer)) == 1
    assert capsys.readouterr().err == f"{tmp_path}: left out: test.jsonl\n"
