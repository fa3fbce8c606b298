"""Tasks of every kind of row: prompts in tokens and as reward functions see them, columns, indices and mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_data import TINY
from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.data.text.prompts import read_prompt_rows
from trainkit.errors import UserError
from trainkit.rl.rewards.score import Rewards
from trainkit.rl.tasks import read_tasks

USER = {"role": "user", "content": "Hi"}
GYM = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=2"


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(str(TINY / "tokenizer")))


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: Any) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"question": "Hi", "answer": "#### 3", "level": 2}, "Hi", {"answer": "#### 3", "level": 2}),
        ({"prompt": "Hi", "ground_truth": "3"}, "Hi", {"ground_truth": "3"}),
        ({"prompt": [USER], "answer": "3"}, [USER], {"answer": "3"}),
        ({"messages": [USER, {"role": "assistant", "content": "Yes"}]}, [USER], {}),
        ({"conversations": [{"from": "human", "value": "Hi"}], "id": 1}, [USER], {"id": 1}),
        ({"turns": ["Hi", "And?"], "id": 1}, "Hi", {"id": 1}),
        ({"text": "Hi", "answer": "3"}, "Hi", {"answer": "3"}),
    ],
)
def test_rows_become_tasks(
    row: dict[str, Any], prompt: Any, columns: dict[str, Any], rows_file: Callable[..., str], encoder: Encoder
) -> None:
    """Functions see the prompt as the row has it and all other columns; tokens are those of `read_prompt_rows`."""
    path = rows_file(row)
    (task,) = read_tasks(path, encoder)
    assert (task.prompt, dict(task.columns), task.index, task.source) == (prompt, columns, 0, f"{path}:1")
    assert task.tokens == read_prompt_rows(path, encoder)[0].tokens


def test_token_rows_are_decoded(rows_file: Callable[..., str], encoder: Encoder) -> None:
    """Functions see the text of a prompt that is given as token ids."""
    ids = encoder.encode("How many?")
    (task,) = read_tasks(rows_file({"input_ids": [*ids, 7], "loss_mask": [0] * len(ids) + [1], "answer": "3"}), encoder)
    assert (task.tokens, task.prompt, dict(task.columns)) == (ids, "How many?", {"answer": "3"})


def test_rows_of_several_kinds_share_their_columns(rows_file: Callable[..., str], encoder: Encoder) -> None:
    """A row without a column of the others has None there; indices count rows, and sources lines."""
    path = rows_file({"prompt": "a", "answer": "3"}, "", {"question": "b", "tests": ["c"]}, {"prompt": "d"})
    tasks = read_tasks(path, encoder)
    assert [dict(task.columns) for task in tasks] == [
        {"answer": "3", "tests": None},
        {"answer": None, "tests": ["c"]},
        {"answer": None, "tests": None},
    ]
    assert [(task.index, task.source) for task in tasks] == [(0, f"{path}:1"), (1, f"{path}:3"), (2, f"{path}:4")]
    assert read_tasks(path, encoder, limit=2)[1].prompt == "b"


def test_columns_are_mapped(rows_file: Callable[..., str], encoder: Encoder) -> None:
    """The prompt's column may have another name; the column that has the usual name is then one of the others."""
    (task,) = read_tasks(rows_file({"body": "Hi", "answer": "3", "question": "q"}), encoder, columns={"prompt": "body"})
    assert task.prompt == "Hi" and dict(task.columns) == {"answer": "3", "question": "q"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "3"}, "rows.jsonl:2: columns are 'answer', expected"),
        ({"question": ""}, "rows.jsonl:2: question must be text, not empty; fix or remove this row"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "rows.jsonl:2: the chat has no user turn"),
        ("{", "rows.jsonl:2: not JSON"),
    ],
)
def test_bad_rows_are_named(row: Any, message: str, rows_file: Callable[..., str], encoder: Encoder) -> None:
    """A row without a prompt is one line with file and row."""
    with pytest.raises(UserError) as caught:
        read_tasks(rows_file({"prompt": "a"}, row), encoder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreadable_reference_is_named_by_its_line(rows_file: Callable[..., str], encoder: Encoder) -> None:
    """The check before training names the line of the file."""
    path = rows_file({"question": "a", "answer": "#### 3"}, {"question": "b", "answer": "three"})
    with pytest.raises(UserError) as caught:
        Rewards([{"function": "numeric"}]).check(read_tasks(path, encoder))
    assert str(caught.value).startswith(f"{path}:2: answer 'three' is not a number")


def test_missing_reasoning_gym_is_one_line(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    """Without the package, tasks and reward say how it is installed."""
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="reasoning-gym cannot be imported .* pip install --no-deps reasoning-gym"):
        read_tasks(GYM, encoder)
    with pytest.raises(UserError, match="reasoning_gym cannot be imported .* pip install --no-deps reasoning-gym"):
        Rewards([{"function": "reasoning_gym"}])


def test_reasoning_gym_items_are_tasks(encoder: Encoder) -> None:
    """Items are the same for each size and limit, and the package's verifier scores what is in the answer tag."""
    pytest.importorskip("reasoning_gym")
    tasks = read_tasks(f"{GYM}&size=20&seed=3&instruction=Write+<answer>n</answer>.", encoder)
    assert [task.columns["answer"] for task in tasks[:5]] == [
        t.columns["answer"] for t in read_tasks(f"{GYM}&seed=3", encoder, 5)
    ]
    assert len(tasks) == 20 and len({task.columns["answer"] for task in tasks}) > 5
    assert tasks[0].prompt.endswith(" =\n\nWrite <answer>n</answer>.") and tasks[1].source.endswith(": item 1")
    assert encoder.tokenizer.decode(tasks[0].tokens).count(tasks[0].prompt) == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reasoning_gym:chain_sun", "has no task 'chain_sun'; choose one of its 1"),
        (f"{GYM}&size=0", "size is 0; it must be a whole number, at least 1"),
        (f"{GYM}&seed=x", "seed is 'x'; it must be a whole number"),
        (f"{GYM}&terms=3", "the generator refuses its options"),
        (f"{GYM}&min_terms=9", "the generator refuses its options"),
    ],
)
def test_bad_generators_are_one_line(path: str, message: str, encoder: Encoder) -> None:
    """A generator that does not exist, or refuses its options, is one line."""
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError) as caught:
        read_tasks(path, encoder)
    assert message in str(caught.value) and "\n" not in str(caught.value)
