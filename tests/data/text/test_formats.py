"""Row formats, column mapping, and the reason given for each kind of bad row."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.packed import documents_of
from trainkit.data.text.formats import Chat, PlainText, PromptResponse, TokenRow, check_columns, parse_row
from trainkit.data.text.prepare import prepare
from trainkit.data.text.sources import RowError, read_rows
from trainkit.errors import UserError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS}, Chat(TURNS)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, Chat(TURNS)),
        ({"prompt": "Hi", "response": "Hello"}, PromptResponse("Hi", "Hello")),
        ({"question": "Hi", "answer": "Hello"}, PromptResponse("Hi", "Hello", "\n")),
        ({"text": "Hi"}, PlainText("Hi")),
        ({"input_ids": [5, 6], "loss_mask": [0, 1]}, TokenRow([5, 6], [0, 1])),
        ({"input_ids": [5, 6], "loss_mask": [False, True]}, TokenRow([5, 6], [0, 1])),
    ],
)
def test_format_is_recognised_by_its_columns(row: dict[str, Any], expected: object) -> None:
    """Each format is recognised by its columns."""
    assert parse_row(row, {}) == (expected, [])


def test_chat_columns_take_precedence_over_text() -> None:
    """Chat columns take precedence over text, and unused columns are named."""
    assert parse_row({"text": "x", "messages": TURNS, "id": 3}, {}) == (Chat(TURNS), ["text", "id"])


def test_null_key_of_a_turn_is_ignored() -> None:
    """A null key of a turn is ignored."""
    row, _ = parse_row({"messages": [{**turn, "tool_calls": None} for turn in TURNS]}, {})
    assert row == Chat(TURNS)


def test_column_mapping_selects_the_format() -> None:
    """A column mapping selects the columns and so the format."""
    columns = check_columns({"prompt": "instruction", "response": "output"})
    row, unused = parse_row({"instruction": "Hi", "output": "Hello", "messages": TURNS}, columns)
    assert row == PromptResponse("Hi", "Hello") and unused == ["messages"]
    assert parse_row({"prompt": "Hi", "canonical_solution": "x"}, {"response": "canonical_solution"})[0] == PromptResponse(
        "Hi", "x"
    )


def test_mapping_to_missing_column_is_a_bad_row() -> None:
    """A mapping to a missing column makes a bad row."""
    with pytest.raises(RowError, match="expected body;"):
        parse_row({"text": "Hi"}, {"text": "body"})


def test_unknown_key_of_the_mapping_is_refused() -> None:
    """An unknown key of the column mapping is refused."""
    with pytest.raises(UserError, match="unknown key 'instruction'; choose from .*prompt"):
        check_columns({"instruction": "prompt"})


BAD = [
    ('{"messages": [', "not JSON: .* at column"),
    ("[1, 2]", "a row must be an object, not list"),
    ({"body": "x"}, "columns are 'body', expected .* or messages or conversations or .* or text"),
    ({}, "columns are none"),
    ({"prompt": "x"}, "columns are 'prompt'"),
    ({"messages": []}, "messages must be a list of turns, not an empty list"),
    ({"messages": "x"}, "messages must be a list of turns, not text"),
    ({"messages": ["x"]}, r"messages\[0\] must be an object"),
    ({"messages": [{"content": "x"}]}, r"messages\[0\]\.role must be a name, not null"),
    ({"messages": [*TURNS[:1], {"role": "assistant", "content": None}]}, r"messages\[1\]\.content must be text, not null"),
    ({"messages": [*TURNS[:1], {"role": "assistant", "content": ["x"]}]}, r"messages\[1\]\.content must be text, not a list"),
    ({"messages": TURNS[:1]}, "no assistant turn"),
    ({"messages": [*TURNS[:1], {"role": "assistant", "content": "x", "weight": 0.5}]}, "turn 1 has weight 0.5"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]}, "have weight 0"),
    ({"messages": [*TURNS[:1], {"role": "assistant", "content": " "}]}, "turn 1 is an empty assistant turn"),
    ({"messages": [{"role": "judge", "content": "x"}, *TURNS]}, "the chat template rejects the turns: roles are user and"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, r"conversations\[0\]\.from is 'alien'; it must be one of human"),
    ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\]\.value must be text, not int 3"),
    ({"prompt": "x", "response": ""}, "response must be text, not empty"),
    ({"question": None, "answer": "x"}, "question must be text, not null"),
    ({"text": "\n"}, "text must be text, not empty"),
    ({"input_ids": [1, 2], "loss_mask": [1]}, "input_ids has 2 entries, loss_mask 1"),
    ({"input_ids": [1, 2.5], "loss_mask": [0, 1]}, "input_ids must be a list of whole numbers"),
    ({"input_ids": [1, 2], "loss_mask": [0, 2]}, "loss_mask must hold only 0 and 1"),
    ({"input_ids": [1, 1024], "loss_mask": [0, 1]}, "token id 1024 is outside the vocabulary of 1024"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_row_is_reported_or_skipped_and_counted(
    row: Any, reason: str, rows_file: Callable[..., str], tokenizer: Any
) -> None:
    """A bad row stops with file, line and reason, or is skipped and counted."""
    path = rows_file({"messages": TURNS}, "", row, {"messages": TURNS})
    with pytest.raises(UserError, match=f"^{re.escape(path)}:3: .*{reason}") as error:
        prepare([path], None, tokenizer, 64)
    assert "\n" not in str(error.value)
    report = prepare([path], None, tokenizer, 64, on_bad_row="skip", validation_share=0).report.train
    assert (report.rows, report.documents, sum(report.skipped.values())) == (3, 2, 1)
    assert list(report.examples.values()) == [f"{path}:3"] and "1 skipped: " in str(report)


def test_non_utf8_line_is_a_bad_row(tmp_path: Path) -> None:
    """A line that is not UTF-8 is a bad row."""
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    first, second = read_rows(str(tmp_path / "x.jsonl"))
    assert first[1] == {"text": "a"}
    assert isinstance(second[1], RowError) and str(second[1]) == "not UTF-8 at byte 11 of the line"


def test_limit_takes_first_rows_over_all_files(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """`limit` takes the first rows over all files together."""
    files = [rows_file(*({"text": f"{name} {n}"} for n in range(5)), name=name) for name in ("a.jsonl", "b.jsonl")]
    prepared = prepare(files, None, tokenizer, 16, limit=7, validation_share=0)
    texts = sorted(tokenizer.decode(tokens[:-1]) for tokens, _ in documents_of(prepared.train))
    assert texts == sorted([f"a.jsonl {n}" for n in range(5)] + [f"b.jsonl {n}" for n in range(2)])


def test_json_parquet_and_csv_read_like_jsonl(tmp_path: Path) -> None:
    """JSON, Parquet and CSV files give the same rows as JSON lines."""

    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.csv").write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    for name in ("x.jsonl", "x.json", "x.parquet", "x.csv"):
        assert [row for _, row in read_rows(str(tmp_path / name))] == rows
    assert next(read_rows(str(tmp_path / "x.parquet")))[0] == f"{tmp_path / 'x.parquet'}: row 1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '{"a": 1}', "holds one JSON dict; a .json file must be a list of rows"),
        ("x.json", '{"a": 1}\n{"a": 2}', ":2: not JSON: Extra data .* name it .jsonl"),
        ("x.doc", "text", "unknown file type '.doc'"),
        ("x.parquet", "text", "neither a readable local file nor"),
    ],
)
def test_unreadable_file_is_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    """A file that cannot be read is named, with the reason."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}.*{message}" if message[0] != ":" else f"{name}{message}"):
        list(read_rows(str(tmp_path / name)))


def test_missing_file_is_named(tokenizer: Any) -> None:
    """A missing file is named in the error."""
    with pytest.raises(UserError, match="^nowhere.jsonl: there is no such file"):
        prepare(["nowhere.jsonl"], None, tokenizer, 64)
