"""The sums of the small RL task: reproducible, right, disjoint from validation, with noisy answers and a tokenizer for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.support.tiny_data import ROOT


def make(out: Path, *flags: str) -> Path:
    subprocess.run([sys.executable, str(ROOT / "data" / "digit_sums.py"), str(out), *flags], check=True, timeout=120)
    return out


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("sums") / "first", "--noise", "0.6", "--copies", "3", "--validation", "600")


def test_digit_sums_are_right_and_disjoint(folder):
    """Every pair is in one of the two files, with its sum."""
    train, validation = (rows(folder / f"{name}.jsonl") for name in ("train", "validation"))
    assert len(validation) == 600 and len({row["prompt"] for row in train + validation}) == len(train + validation) == 8100
    for row in train + validation:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert int(a) + int(b) == int(row["answer"])


def test_start_answers_have_noisy_digits(folder):
    """Three answers of the right length to each training prompt, 60 % of whose digits are wrong (within 4 standard errors)."""
    answers = {row["prompt"]: row["answer"] for row in rows(folder / "train.jsonl")}
    start = [(row["response"], answers[row["prompt"]]) for row in rows(folder / "start.jsonl")]
    assert len(start) == 3 * len(answers) and all(len(noisy) == len(answer) for noisy, answer in start)
    wrong = [a != b for noisy, answer in start for a, b in zip(noisy, answer, strict=True)]
    assert sum(wrong) / len(wrong) == pytest.approx(0.6, abs=4 * (0.6 * 0.4 / len(wrong)) ** 0.5)


def test_digit_sums_depend_on_the_seed_alone(folder, tmp_path):
    """The same arguments give the same bytes, another seed gives other rows."""
    again = make(tmp_path / "again", "--noise", "0.6", "--copies", "3", "--validation", "600")
    other = make(tmp_path / "other", "--noise", "0.6", "--copies", "3", "--validation", "600", "--seed", "1")
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 5 and all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)
    assert (folder / "validation.jsonl").read_bytes() != (other / "validation.jsonl").read_bytes()


def test_tokenizer_has_a_token_per_character(folder):
    """A sum has a token for each character, text comes back as it went in, and the end token ends it."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer("47+85=132", add_special_tokens=False)["input_ids"]
    assert len(tokenizer) == 14 and len(ids) == 9 and tokenizer.eos_token == "<end>"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "47+85=132"


def test_prompt_template_makes_questions(tmp_path):
    """With `--prompt` the tasks are questions in words."""
    row = rows(make(tmp_path, "--prompt", "What is {a} + {b}?") / "validation.jsonl")[0]
    a, b = row["prompt"].removeprefix("What is ").removesuffix("?").split(" + ")
    assert int(row["answer"]) == int(a) + int(b)
