"""Preparation: long rows, the split, the report, and which changes make a new cache entry."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainkit.data.text.prepare as module
from tests.support.packed import documents_of
from tests.support.tiny_data import TINY
from trainkit.data.text.prepare import Prepared, prepare
from trainkit.errors import UserError

TOKENIZER = str(TINY / "tokenizer")


def texts(packed: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(tokens) for tokens, _ in documents_of(packed)]


def chat_rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(count)]


def test_split_is_disjoint_complete_and_seeded(rows_file: Callable[..., str], tokenizer: Any, seed: int) -> None:
    """The split by rows is disjoint, complete and seeded."""
    path = rows_file(*chat_rows(60))

    def split(seed: int) -> tuple[set[str], set[str]]:
        prepared = prepare([path], None, tokenizer, 64, validation_share=0.2, seed=seed)
        return set(texts(prepared.train, tokenizer)), set(texts(prepared.validation, tokenizer))

    train, validation = split(seed)
    assert (len(train), len(validation)) == (48, 12) and not train & validation
    assert split(seed) == (train, validation) and split(seed + 1)[1] != validation


def test_turns_of_one_chat_stay_in_one_split(rows_file: Callable[..., str], tokenizer: Any, seed: int) -> None:
    """All turns of a chat are in the same split."""
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    rows = [
        {"messages": [{"role": ("user", "assistant")[k % 2], "content": f"chat {n};{k}"} for k in range(4)]} for n in range(20)
    ]
    prepared = prepare([rows_file(*rows)], None, tokenizer, 256, validation_share=0.3, seed=seed)
    chats = [{text.split(";")[0] for text in texts(packed, tokenizer)} for packed in (prepared.train, prepared.validation)]
    assert len(chats[0]) == 14 and len(chats[1]) == 6 and not chats[0] & chats[1]
    assert prepared.report.validation.documents == 12


def test_long_chats_are_truncated_skipped_or_refused(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """Long chats are truncated, skipped or refused as requested, and counted."""
    path = rows_file({"prompt": "Hi", "response": "word " * 50}, {"prompt": "word " * 50, "response": "Hi"}, *chat_rows(3))
    options: dict[str, Any] = {"validation_share": 0}
    report = prepare([path], None, tokenizer, 24, **options).report.train
    # one of the two lost its whole answer
    assert (report.rows, report.documents, report.truncated, report.unlabelled) == (5, 4, 2, 1)
    assert "2 truncated to 24 tokens" in str(report) and "1 left out, no token is a label" in str(report)
    report = prepare([path], None, tokenizer, 24, on_long_row="skip", **options).report.train
    assert (report.documents, report.too_long) == (3, 2)
    with pytest.raises(UserError, match=r"rows.jsonl:1: \d+ tokens, longer than length 24; raise length"):
        prepare([path], None, tokenizer, 24, on_long_row="error", **options)


def test_long_text_is_cut_without_loss(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """Long plain text is cut into documents without losing a token."""
    text = " ".join(str(n) for n in range(200))
    prepared = prepare([rows_file({"text": text})], None, tokenizer, 32, validation_share=0)
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert np.concatenate([tokens for tokens, _ in documents_of(prepared.train)]).tolist() == ids
    assert prepared.report.train.cut == 1 and prepared.report.train.counted == len(ids) - len(prepared.train)
    assert all(not mask[0] and mask[1:].all() for _, mask in documents_of(prepared.train))


def test_report_adds_up_on_the_bundled_corpus(tokenizer: Any) -> None:
    """The report's counts are right for the bundled corpus."""
    train, validation = str(TINY / "train.jsonl"), str(TINY / "validation.jsonl")
    prepared = prepare([train], [validation], tokenizer, 256, limit=200, limit_validation=50)
    report = prepared.report.train
    rows = [json.loads(line) for line in Path(train).read_text().splitlines()[:200]]
    encoded = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True) for row in rows
    ]
    assert report.rows == report.documents == 200 and prepared.report.validation.rows == 50
    assert report.tokens == sum(len(one["input_ids"]) for one in encoded)
    assert report.counted == sum(sum(one["assistant_masks"]) for one in encoded)
    assert str(prepared.report).startswith("train: 200 rows read, 200 documents, ")


def test_unread_columns_are_reported(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """Columns that were not read are named in the report."""
    path = rows_file(*({**row, "id": n} for n, row in enumerate(chat_rows(4))))
    assert "columns not read: id (4)" in str(prepare([path], None, tokenizer, 64).report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length: 1"),
        ({"train": []}, "train: no files"),
        ({"on_bad_row": "x"}, "on_bad_row: 'x'"),
        ({"on_long_row": "x"}, "on_long_row: 'x'"),
        ({"validation_share": 1.0}, "validation_share: 1.0"),
        ({"validation_share": 0.9}, "validation_share: 0.9 of 4 rows leaves none"),
    ],
)
def test_invalid_settings_are_named(
    options: dict[str, Any], message: str, rows_file: Callable[..., str], tokenizer: Any
) -> None:
    """An invalid setting is named in the error."""
    settings = {"train": [rows_file(*chat_rows(4))], "validation": None, "tokenizer": tokenizer, "length": 64} | options
    with pytest.raises(UserError, match=message):
        prepare(**settings)


def equal(a: Prepared, b: Prepared) -> bool:
    fields = ("tokens_N", "mask_N", "documents_D", "rows_R", "length", "fingerprint")
    pairs = [(a.train, b.train), (a.validation, b.validation)]
    same_sets = all(np.array_equal(getattr(x, name), getattr(y, name)) for x, y in pairs for name in fields)
    return a.fingerprint == b.fingerprint and a.report == b.report and same_sets


def test_cache_is_used_only_for_equal_content(
    tmp_path: Path, rows_file: Callable[..., str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache returns what was prepared, and only for equal content and settings."""
    cache, path = tmp_path / "cache", rows_file(*chat_rows(20))
    made: list[str] = []
    encode = module._encode
    monkeypatch.setattr(module, "_encode", lambda *args: made.append(args[0]) or encode(*args))

    def run(**options: Any) -> Prepared:
        settings: dict[str, Any] = {"train": [path], "validation": None, "tokenizer": tokenizer, "length": 64}
        settings |= {"cache_dir": cache} | options
        return prepare(**settings)

    first = run()
    assert equal(first, run(cache_dir=None)) and equal(first, run())
    assert len(made) == 2  # two runs prepared, the third loaded from the cache
    moved = rows_file(*chat_rows(20), name="other.jsonl")
    assert equal(first, run(train=[moved])) and equal(first, run(tokenizer=TOKENIZER)) and len(made) == 2
    for number, options in enumerate(
        [
            {"length": 65},
            {"seed": 1},
            {"validation_share": 0.5},
            {"limit": 19},
            {"on_bad_row": "skip"},
            {"on_long_row": "skip"},
            {"train": [path, path]},
            {"validation": [path]},
            {"columns": {"prompt": "prompt"}},
        ],
        start=3,
    ):
        assert run(**options).fingerprint != first.fingerprint and len(made) >= number
    done = len(made)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|bos|>", "")
    tokenizer.chat_template += " "
    run()
    assert len(made) == done + 1
    rows_file(*chat_rows(19), {"prompt": "What is 19?", "response": "It is 91."})
    run()
    assert len(made) == done + 2
    monkeypatch.setattr(module, "CODE_VERSION", -1)
    run()
    assert len(made) == done + 3


def test_empty_validation_set_can_be_cached(tmp_path: Path, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """An empty validation set can be cached."""
    path = rows_file(*chat_rows(3))
    for _ in range(2):
        prepared = prepare([path], None, tokenizer, 64, validation_share=0, cache_dir=tmp_path / "cache")
        assert len(prepared.validation) == 0 and len(prepared.train) == 1


def _prepare_slowly(path: str, cache: str, log: str, seconds: float) -> None:
    from transformers import AutoTokenizer

    encode = module._encode

    def slow(*args: Any) -> Any:
        with open(log, "a") as stream:
            stream.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        return encode(*args)

    module._encode = slow
    prepare([path], None, AutoTokenizer.from_pretrained(TOKENIZER), 64, cache_dir=cache)


def test_two_processes_prepare_once_even_after_a_kill(tmp_path: Path, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """Of two processes one prepares and the other loads; a kill leaves nothing half written."""
    path, cache, log = rows_file(*chat_rows(20)), tmp_path / "cache", tmp_path / "log"
    context = multiprocessing.get_context("fork")

    def start(seconds: float) -> Any:
        process = context.Process(target=_prepare_slowly, args=(path, str(cache), str(log), seconds))
        process.start()
        return process

    def wait_for(lines: int) -> None:
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < lines:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    killed = start(3600)
    wait_for(1)
    leftover = cache / f".{next(cache.glob('*.lock')).stem}.x.partial"
    leftover.mkdir()
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not [p for p in cache.iterdir() if p.is_dir() and p != leftover]
    pair = [start(0.3), start(0.3)]
    for process in pair:
        process.join(120)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 2  # the killed one and one of the pair
    assert not list(cache.glob(".*.partial"))
    assert equal(prepare([path], None, tokenizer, 64, cache_dir=cache), prepare([path], None, tokenizer, 64))


def test_report_survives_the_cache(tmp_path: Path, rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A report with unread columns and bad rows survives the cache."""
    path = rows_file({"text": ""}, *({**row, "id": 1, "score": 2} for row in chat_rows(3)))
    reports = [prepare([path], None, tokenizer, 64, on_bad_row="skip", cache_dir=cache).report for cache in (None, tmp_path)]
    assert reports[0] == reports[1] and reports[0].train.unused == {"id": 3, "score": 3}
    assert reports[0].train.skipped == {"text must be text, not empty": 1}


def prompt_of(text: str) -> str:
    return text.split("<|assistant|>")[0]


@pytest.mark.parametrize("form", ["chats", "tokens"])
def test_rows_of_a_prompt_are_held_out_together(
    form: str, rows_file: Callable[..., str], tokenizer: Any, seed: int, tmp_path: Path
) -> None:
    """Held-out rows share no prompt with training rows, and another set can leave their prompts out."""
    rows = [{"prompt": f"What is {n}?", "response": f"It is {n + k}."} for n in range(10) for k in range(4)]
    path = rows_file(*rows)
    if form == "tokens":  # as a distillation set has them
        documents = documents_of(prepare([path], None, tokenizer, 64, validation_share=0).train)
        given = [{"input_ids": ids.tolist(), "loss_mask": mask.astype(int).tolist()} for ids, mask in documents]
        path = rows_file(*given, name="tokens.jsonl")
    other = rows_file(*({"question": f"What is {n}?", "answer": "Who knows."} for n in range(12)), name="other.jsonl")
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        prepared = prepare([path], None, tokenizer, 64, validation_share=0.2, seed=seed, cache_dir=cache)
        train, validation = ({*map(prompt_of, texts(part, tokenizer))} for part in (prepared.train, prepared.validation))
        assert (len(train), len(validation), prepared.report.validation.rows) == (8, 2, 8) and not train & validation
        rest = prepare([other], None, tokenizer, 64, validation_share=0, exclude=prepared.held_out, cache_dir=cache)
        asked = {f"<|bos|><|user|>What is {n}?<|end|>" for n in range(12)}
        assert {*map(prompt_of, texts(rest.train, tokenizer))} == asked - validation
        assert "2 rows left out, their prompt is held out for validation" in str(rest.report)


def test_rows_of_one_prompt_are_held_out_one_by_one(rows_file: Callable[..., str], tokenizer: Any, seed: int) -> None:
    """Where all rows have the same prompt, or a prompt has more rows than the share, the share is kept as far as possible."""
    path = rows_file(*({"prompt": "Tell a story.", "response": f"Story {n}."} for n in range(20)))
    prepared = prepare([path], None, tokenizer, 64, validation_share=0.2, seed=seed)
    assert prepared.report.validation.rows == 4 and not prepared.held_out
    rows = [{"prompt": "Tell a story.", "response": f"Story {n}."} for n in range(20)]
    path = rows_file(*rows, *({"prompt": "Tell a joke.", "response": f"Joke {n}."} for n in range(3)))
    prepared = prepare([path], None, tokenizer, 64, validation_share=0.04, seed=seed)
    assert prepared.report.validation.rows == 3 and all("joke" in text for text in texts(prepared.validation, tokenizer))


def test_chats_that_start_with_the_assistant_are_no_one_prompt(
    rows_file: Callable[..., str], tokenizer: Any, seed: int
) -> None:
    """Chats that start with an assistant turn, and plain texts, do not count as rows of one empty prompt."""
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "X"}]
    rows = [{"conversations": [*turns[:2], {"from": "gpt", "value": f"{n}"}]} for n in range(10)]
    rows += [{"text": f"{n} sheep"} for n in range(10)]
    prepared = prepare([rows_file(*rows)], None, tokenizer, 64, validation_share=0.2, seed=seed)
    assert prepared.report.validation.rows == 4


def test_negative_seed_is_refused(rows_file: Callable[..., str], tokenizer: Any) -> None:
    """A negative seed is refused in one line."""
    with pytest.raises(UserError, match="seed: -1 must be at least 0"):
        prepare([rows_file(*chat_rows(4))], None, tokenizer, 64, seed=-1)
