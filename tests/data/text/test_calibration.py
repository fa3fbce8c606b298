"""Calibration text: windows of training rows, and the recognition of shared text."""

# S windows  T positions

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.support.targets import make_tokenizer
from trainkit.data.text.calibration import calibration, fingerprints, shared_text
from trainkit.data.text.chat_template import Encoder
from trainkit.data.text.formats import PlainText, PromptResponse
from trainkit.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_windows_are_rows_in_random_order(tokenizer: str, tmp_path: Path, seed: int) -> None:
    """Every row is rendered as for training; windows follow one another without a gap; the seed draws the order."""
    chats = write(tmp_path / "a.jsonl", [{"question": f"{n} and {n}?", "answer": f"That is {2 * n}."} for n in range(8)])
    texts = write(tmp_path / "b.jsonl", [{"text": f"In May she sold {n} clips."} for n in range(8)])
    first = calibration([chats, texts], tokenizer, 6, 16, seed)
    encoder = Encoder(make_tokenizer())
    rows = [encoder.documents(PromptResponse(f"{n} and {n}?", f"That is {2 * n}.", "\n"))[0] for n in range(8)]
    rows += [encoder.documents(PlainText(f"In May she sold {n} clips."))[0] for n in range(8)]
    stream, texts_left = first.tokens_ST.flatten().tolist(), [row.tokens.tolist() for row in rows]
    while stream:  # the last row may be cut
        row = next(row for row in texts_left if row[: len(stream)] == stream[: len(row)])
        texts_left.remove(row)
        stream = stream[len(row) :]
    assert first.counted_ST.all() and first.counted_ST.shape == (6, 16)
    same, other = (calibration([chats, texts], tokenizer, 6, 16, s).digest for s in (seed, seed + 1))
    assert same == first.digest != other


def test_shared_text_is_found_and_other_text_is_not(seed: int) -> None:
    """A passage of 2,000 tokens at another offset, but neither fresh text nor a prompt that all windows repeat."""
    generator = torch.Generator().manual_seed(seed)
    ours = torch.randint(5000, (40, 512), generator=generator)
    ours[:, 100:200] = ours[0, 100:200]  # a system prompt of 100 tokens in every window
    marks = fingerprints(ours)
    assert shared_text(marks, torch.randint(5000, (40, 512), generator=generator)) == 0
    assert shared_text(marks, ours[:, 100:200]) == 0
    # 20 passages of 300 tokens have 5,380 32-grams, of which one in 64 is a mark: none is found with probability 1e-37
    passage = torch.cat([torch.randint(5000, (20, 37), generator=generator), ours[:20, 200:500]], 1)
    found = shared_text(marks, passage)
    assert 84 - 60 < found < 84 + 60
    assert shared_text(set(marks), passage) == found


def test_bad_calibration_text_ends_with_one_line(tokenizer: str, tmp_path: Path) -> None:
    """Fewer windows than asked for, a bad row, an unknown column, no such file."""
    few = write(tmp_path / "few.jsonl", [{"text": "In May she sold 24 clips."}] * 3)
    bad = write(tmp_path / "bad.jsonl", [{"label": "x"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"\n')
    cases = [
        ([few], {}, rf"--samples 4: {re.escape(few)} has \d+ tokens, only \d windows of 16; lower --samples"),
        ([bad], {}, r"bad.jsonl:1: columns are 'label', expected"),
        ([str(broken)], {}, r"broken.jsonl:1: not JSON"),
        ([few], {"txt": "body"}, r"columns: unknown key 'txt'"),
        ([str(tmp_path / "none.jsonl")], {}, r"none.jsonl: there is no such file"),
    ]
    for files, columns, message in cases:
        with pytest.raises(UserError, match=message) as raised:
            calibration(files, tokenizer, 4, 16, 0, columns)
        assert "\n" not in str(raised.value)
