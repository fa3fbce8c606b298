"""Row formats, column mapping, and the reason given for each kind of bad row."""

from __future__ import annotations

import csv
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
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TURNS}, Chat(TURNS)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, Chat(TURNS)),
        ({"conversations": TURNS}, Chat(TURNS)),
        ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, Chat(TURNS)),
        ({"prompt": "Hi", "response": "Hello"}, PromptResponse("Hi", "Hello")),
        ({"prompt": "Hi", "completion": "Hello"}, PromptResponse("Hi", "Hello")),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, Chat(TURNS, 1)),
        ({"prompt": TURNS + TURNS[:1], "response": TURNS[1:]}, Chat(TURNS + TURNS, 3)),
        ({"messages": TURNS, "tools": [TOOL]}, Chat(TURNS, 0, [TOOL])),
        ({"conversations": TURNS, "tools": json.dumps([TOOL])}, Chat(TURNS, 0, [TOOL])),
        ({"prompt": "Hi", "completion": "Hello", "tools": "[]"}, PromptResponse("Hi", "Hello")),
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


def test_parts_and_tool_calls_are_read_in_openai_form() -> None:
    """Text parts are joined; null content stays null beside tool calls, whose arguments become objects."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2]}'}}
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call, {"function": {"name": "now", "arguments": ""}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "3", "tool_calls": []},
    ]
    row, unused = parse_row({"messages": turns, "functions": [TOOL]}, {"tools": "functions"})
    assert isinstance(row, Chat) and row.tools == [TOOL] and not unused
    assert row.messages[0]["content"] == "How many?" and row.messages[1]["content"] is None
    functions = [called["function"] for called in row.messages[1]["tool_calls"]]
    assert functions == [{"name": "add", "arguments": {"a": [1, 2]}}, {"name": "now", "arguments": {}}]
    assert row.messages[1]["tool_calls"][0]["id"] == "c1" and turns[1]["tool_calls"][0] is call
    assert call["function"] == {"name": "add", "arguments": '{"a": [1, 2]}'}  # the row of the file is as it was


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
    (
        {"messages": [*TURNS[:1], {"role": "assistant", "content": ["x"]}]},
        r"messages\[1\]\.content\[0\] is text; only parts of type 'text'",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, *TURNS]},
        r"messages\[0\]\.content\[1\] is of type 'image_url'; only parts of type 'text'",
    ),
    (
        {"messages": [*TURNS, {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{1"}}]}]},
        r"messages\[2\]\.tool_calls\[0\]\.function\.arguments is text that is not JSON",
    ),
    (
        {"messages": [*TURNS, {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "3"}}]}]},
        r"arguments must be an object, not int 3",
    ),
    ({"messages": TURNS, "tools": "add"}, "tools is text that is not JSON"),
    ({"messages": TURNS, "tools": ["add"]}, "tools must be a list of objects, not a list"),
    ({"prompt": TURNS[:1], "completion": "x"}, "completion must be a list of turns, not text"),
    ({"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": TURNS[1:]}, "columns are 'prompt', 'chosen', 'rejected', expected"),
    ('{"messages": [{"role": "user", "content": "bad \\ud83d emoji"}]}', r"has a lone surrogate, '\\ud83d'"),
    ('{"id": "\\uDE00\\uD83D", "text": "x"}', r"has a lone surrogate, '\\ude00'"),
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
        ("x.txt", "text", "unknown file type '.txt'; use .jsonl.* each line is a row, such as .\"prompt\": .* for a prompt"),
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


def test_pair_of_surrogates_is_a_character(rows_file: Callable[..., str]) -> None:
    """An escaped pair of surrogates is one character, in both kinds of JSON files."""
    line = '{"text": "a \\ud83d\\ude00"}'
    lines, array = rows_file(line), rows_file(f"[{line}]", name="rows.json")
    assert [row for path in (lines, array) for _, row in read_rows(path)] == [{"text": "a \U0001f600"}] * 2


def test_lone_surrogate_in_a_json_list_is_a_bad_row(rows_file: Callable[..., str]) -> None:
    """A lone surrogate in a list of rows makes only its own row bad."""
    path = rows_file('[{"text": "a"}, {"text": "\\udc00"}]', name="rows.json")
    (_, first), (location, second) = read_rows(path)
    assert first == {"text": "a"} and isinstance(second, RowError) and location == f"{path}: row 2"


def test_csv_values_stay_texts(tmp_path: Path) -> None:
    """CSV values that look like None, numbers, dates or truth values are texts, and lines are counted."""
    texts = ["None", "nan", "null", "3", "1e3", "2024-01-02", "true", "007", "", 'a "quoted", comma']
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([("prompt", "response"), *((text, "two\nlines") for text in texts)])
    rows = list(read_rows(str(tmp_path / "x.csv")))
    assert [row["prompt"] for _, row in rows if not isinstance(row, RowError)] == texts
    assert [location for location, _ in rows] == [f"{tmp_path}/x.csv:{2 + 2 * n}" for n in range(len(texts))]


def test_faulty_csv_is_named(tmp_path: Path) -> None:
    """A line with another number of fields is a bad row; bytes and quotes that cannot be read stop, with the line."""
    (tmp_path / "x.csv").write_text("prompt,response\na,b\na,b,c\na\n\na,b\n")
    rows = [row for _, row in read_rows(str(tmp_path / "x.csv"))]
    assert [str(row) for row in rows if isinstance(row, RowError)] == [
        f"{n} fields, but the header has 2; put quotes around texts that hold a comma" for n in (3, 1)
    ]
    for content, message in ((b'prompt\n"a"b\n', "x.csv:2: not CSV"), (b"prompt\n\xff\n", "x.csv:2: not UTF-8")):
        (tmp_path / "x.csv").write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_rows(str(tmp_path / "x.csv")))


def test_every_data_file_of_a_folder_is_read(tmp_path: Path, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A folder's data files are read whatever their names, or reported as left out; strings like dates stay strings."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "set"
    (folder / "more" / ".cache").mkdir(parents=True)
    for name in ("math.jsonl", "code.jsonl", "extra_train.jsonl", "latest.jsonl", "test.jsonl", "more/validation-01.jsonl"):
        (folder / name).write_text(json.dumps({"text": f"{name} 2024-01-02"}) + "\n")
    (folder / "rows.json").write_text(' [{"text": "2024-01-02"}]')
    (folder / "info.json").write_text('{"text": "no row"}')
    (folder / "README.md").write_text("no row")
    (folder / "more" / ".cache" / "hidden.jsonl").write_text("no row")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "2024-01-03"}]), folder / "more" / "x.parquet")
    texts = [row["text"] for _, row in read_rows(str(folder)) if not isinstance(row, RowError)]
    named = [f"{name} 2024-01-02" for name in ("code.jsonl", "extra_train.jsonl", "latest.jsonl", "math.jsonl")]
    assert texts == [*named, "2024-01-03", "2024-01-02"]
    report = prepare([str(folder)], None, tokenizer, 64, validation_share=0).report
    assert report.train.rows == 6
    assert "files not read: README.md, info.json, more/validation-01.jsonl, test.jsonl" in str(report)


def test_folder_of_validation_files_alone_is_read(tmp_path: Path) -> None:
    """Files named as validation sets are read if there are no others; a folder without data files is refused."""
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match="a: holds no data file; give a folder with .jsonl"):
        read_rows(str(tmp_path / "a"))
    (tmp_path / "a" / "dev.jsonl").write_text('{"text": "x"}\n')
    assert [row for _, row in read_rows(str(tmp_path / "a"))] == [{"text": "x"}]


@pytest.mark.parametrize("option", ["limit", "limit_validation"])
@pytest.mark.parametrize("count", [0, -1])
def test_limit_below_one_is_refused(option: str, count: int, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A limit below 1 is refused in one line."""
    with pytest.raises(UserError, match=f"{option}: {count} must be at least 1; leave it out"):
        prepare([rows_file({"text": "x"})], None, tokenizer, 64, **{option: count})
