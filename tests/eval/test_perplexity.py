"""What is evaluated: documents joined and cut into windows, and texts that the model writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.errors import UserError
from trainkit.eval.perplexity import cut_windows, read_documents, write_own_texts
from trainkit.runner import Runner


@pytest.fixture(scope="module")
def encoder(tiny_target: Path) -> Encoder:
    return Encoder(load_tokenizer(str(tiny_target)))


def write_rows(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_documents_are_joined_by_blank_lines(encoder, tmp_path):
    """Texts and chats are tokenised as one text; token rows keep their ids; a .txt file is one document."""
    texts = ["In May ", "She sold 24 clips.\n"]
    ids = lambda text: encoder.tokenizer.encode(text, add_special_tokens=False)
    plain = write_rows(tmp_path / "plain.jsonl", *({"text": text} for text in texts))
    assert read_documents(plain, encoder) == ids("In May \n\nShe sold 24 clips.\n")
    (tmp_path / "plain.txt").write_text("In May \n\nShe sold 24 clips.\n")
    assert read_documents(str(tmp_path / "plain.txt"), encoder) == read_documents(plain, encoder)
    chat = {"prompt": "How many?", "response": "24"}
    rendered = "<|user|>How many?<|assistant|>24<|end|>"
    row = {"input_ids": [9, 8, 7], "loss_mask": [0, 1, 1]}
    mixed = write_rows(tmp_path / "mixed.jsonl", chat, {"text": "x"}, row, row)
    blank = ids("\n\n")
    assert read_documents(mixed, encoder) == [*ids(f"{rendered}\n\nx"), *blank, 9, 8, 7, *blank, 9, 8, 7]


def test_start_token_is_put_first_once(tiny_target, tmp_path):
    """The first id is the start token if the tokenizer puts it before every text, and only then."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(str(tiny_target))
    tokenizer.bos_token = "<|system|>"
    source = write_rows(tmp_path / "plain.jsonl", {"text": "In May"}, {"text": "In May"})
    without = read_documents(source, Encoder(tokenizer))
    start = tokenizer.bos_token_id
    assert start not in without
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", start)]
    )
    assert read_documents(source, Encoder(tokenizer)) == [start, *without]


def test_windows_do_not_overlap_and_drop_the_tail():
    """Windows follow each other; the tail is counted; `limit` takes the first windows."""
    windows, dropped = cut_windows(list(range(23)), 5, "rows")
    assert [window.tokens_T.tolist() for window in windows] == [list(range(at, at + 5)) for at in (0, 5, 10, 15)]
    assert dropped == 3 and {window.start for window in windows} == {1}
    assert len(cut_windows(list(range(23)), 5, "rows", limit=2)[0]) == 2
    with pytest.raises(UserError, match="rows: 4 tokens, fewer than one window of 5; give more text"):
        cut_windows(list(range(4)), 5, "rows")


def test_own_texts_are_what_the_runner_generates(encoder, tiny_target, tmp_path, seed):
    """Prompts are those that `generate` reads, cut to half a window; what the model wrote starts at `start`."""
    runner = Runner.load(tiny_target)
    source = write_rows(tmp_path / "rows.jsonl", *({"prompt": f"How many of {n}?"} for n in range(4)))
    windows, _ = cut_windows(torch.randint(5, 320, (40,)).tolist(), 20, source)
    options = {"max_new_tokens": 7, "temperature": 1.0, "seed": seed}
    own = write_own_texts(runner, source, encoder, windows, 3, None, **options)
    prompts = [encoder.prompt_ids([{"role": "user", "content": f"How many of {n}?"}])[:10] for n in range(3)]
    outputs = runner.generate(prompts, **options)
    assert [text.start for text in own] == list(map(len, prompts))
    assert [text.tokens_T.tolist() for text in own] == [p + out.tokens for p, out in zip(prompts, outputs, strict=True)]
    plain = write_own_texts(runner, "text.txt", encoder, windows, 2, None, max_new_tokens=3)
    assert [text.tokens_T[:10].tolist() for text in plain] == [window.tokens_T[:10].tolist() for window in windows]
    with pytest.raises(UserError, match="--own 5: .* has 4 prompts"):
        write_own_texts(runner, source, encoder, windows, 5, None, **options)
