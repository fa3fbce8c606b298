"""Tasks for RL: the prompts of a file, or of a generator of the package reasoning-gym, with the columns that rewards need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any
from urllib.parse import parse_qsl

from tqdm import tqdm

from trainkit.data.text.chat_template import Encoder
from trainkit.data.text.formats import PROMPT_FORMATS, check_columns, pick_format
from trainkit.data.text.prompts import Prompt, encode_prompt, read_located_prompts
from trainkit.data.text.sources import RowError
from trainkit.errors import UserError, first_lines
from trainkit.rl.rewards.packages import GYM_INSTALL
from trainkit.rl.types import Task

GYM = "reasoning_gym:"


def read_tasks(path: str, encoder: Encoder, limit: int | None = None, columns: Mapping[str, str] | None = None) -> list[Task]:
    """The task of each row.

    The chat template renders the prompt if the tokenizer has one. But reward functions receive the prompt as the row has it: a
    text, and then completions as texts, or the turns of a chat, and then completions as turns. Token ids are decoded to text.

    Args:
        path: File, folder or hub name, as in `data.text.sources.read_rows`, whose rows have any of the prompt formats of
            `data.text.prompts`; or `reasoning_gym:NAME?KEY=VALUE&...`, where `size` (default 1000), `seed` (default 0) and
            `instruction` (text put below each question) are ours, and other keys are those of the generator NAME.
        encoder: Encodes the prompts.
        limit: Number of rows to read, from the beginning; None reads all.
        columns: Column mapping, from trainkit's names to the file's.

    Raises:
        UserError: the file is empty, a row lacks a prompt (the message names file and row), or the generator cannot be used.
    """
    if path.startswith(GYM):
        rows = _gym_rows(path, encoder, limit)
    else:
        rows = read_located_prompts(path, encoder, limit, columns)
    mapping = check_columns(columns)
    tasks = [_task(n, *row, mapping, encoder) for n, row in enumerate(rows)]
    names = dict.fromkeys(name for task in tasks for name in task.columns)  # a row that lacks a column of others has None there
    return [replace(task, columns={name: task.columns.get(name) for name in names}) for task in tasks]


def _task(
    index: int, source: str, row: Mapping[str, Any], prompt: Prompt, columns: Mapping[str, str], encoder: Encoder
) -> Task:
    """A task with the columns that its prompt does not come from."""
    fmt = pick_format(row, columns, PROMPT_FORMATS)
    used = [columns.get(name, name) for name in fmt]
    value: Any = row[used[0]]
    if fmt[0] == "input_ids":
        value = encoder.tokenizer.decode(prompt.tokens)
    elif fmt[0] == "turns":
        value = value[0]
    elif not isinstance(value, str):
        value = prompt.messages
    return Task(index, prompt.tokens, value, {name: entry for name, entry in row.items() if name not in used}, source)


def _gym_rows(path: str, encoder: Encoder, limit: int | None) -> list[tuple[str, Mapping[str, Any], Prompt]]:
    """Location, values and prompt of each item of a generator; deterministic in its seed and the item's number."""
    try:
        gym, datasets = import_module("reasoning_gym"), import_module("reasoning_gym.factory").DATASETS
    except ImportError as error:
        raise UserError(f"{path}: reasoning-gym cannot be imported ({first_lines(error)}); {GYM_INSTALL}") from None

    # The generator.
    name, _, query = path.removeprefix(GYM).partition("?")
    options = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    instruction, size = str(options.pop("instruction", "")), options.setdefault("size", 1000)
    options.setdefault("seed", 0)
    for key in ("size", "seed"):
        if type(options[key]) is not int or options[key] < (key == "size"):
            raise UserError(f"{path}: {key} is {options[key]!r}; it must be a whole number, at least {int(key == 'size')}")
    if name not in datasets:
        near = get_close_matches(name, datasets, 3) or sorted(datasets)[:3]
        raise UserError(
            f"{path}: reasoning-gym has no task {name!r}; choose one of its {len(datasets)}, such as {', '.join(near)}"
        )
    try:
        items = gym.create_dataset(name, **options)
    except Exception as error:  # an unknown key, or a value that the generator's own checks refuse
        raise UserError(f"{path}: the generator refuses its options: {first_lines(error)}; correct them") from None

    # Its items.
    rows = []
    for n in tqdm(range(min(size, limit or size)), desc=name, unit=" tasks", delay=2, disable=None):
        item = items[n]
        row = {"question": item["question"] + f"\n\n{instruction}" * bool(instruction), "answer": item["answer"], "entry": item}
        location = f"{path}: item {n}"
        try:
            rows.append((location, row, encode_prompt(row, {}, encoder)))
        except RowError as reason:
            raise UserError(f"{location}: {reason}; choose another seed") from None
    return rows


def _value(text: str) -> Any:
    """A number, truth value or list in JSON, otherwise the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
