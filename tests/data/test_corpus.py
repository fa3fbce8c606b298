"""The bundled corpus: reproducible byte for byte, disjoint files, correct in every equation and every line of code."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_data import ROOT, TINY

EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = (\d+)")
CLOCK = re.compile(r"(?:(\d+) minutes after (\d+):(\d\d) it is|From (\d+):(\d\d), (\d+) minutes later it is) (\d+):(\d\d)")
EXAMPLE = re.compile(r"(?:For example, |Example: |So )(\w+\(.*\)) (?:returns|gives|is) (.*)\.$", re.MULTILINE)


def chats(name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (TINY / name).read_text(encoding="utf-8").splitlines()]


ALL = chats("train.jsonl") + chats("validation.jsonl")


def value_of(expression: str) -> Fraction:
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


def test_corpus_script_reproduces_the_folder(tmp_path: Path) -> None:
    """The script makes the same folder again, byte for byte."""
    subprocess.run([sys.executable, str(ROOT / "data" / "make_corpus.py"), "--out", str(tmp_path)], check=True, timeout=120)
    made = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert made == sorted(p.relative_to(TINY) for p in TINY.rglob("*") if p.is_file())
    assert [p for p in made if (tmp_path / p).read_bytes() != (TINY / p).read_bytes()] == []


def test_no_question_is_in_two_files() -> None:
    """No question is in two of the files."""
    questions = [chat[0]["content"] for name in ("train.jsonl", "validation.jsonl", "prompts.jsonl") for chat in chats(name)]
    assert len(questions) == len(set(questions)) == 6364


def test_every_equation_and_final_answer_is_right() -> None:
    """Every equation holds, and the answer is the last result."""
    problems = 0
    for question, answer in ALL:
        text = answer["content"]
        if "```" in text:
            continue
        problems += 1
        for left, right in EQUATION.findall(text):
            assert value_of(left) == int(right), text
        for a, h, m, h2, m2, b, end_h, end_m in CLOCK.findall(text):
            assert int(h or h2) * 60 + int(m or m2) + int(a or b) == int(end_h) * 60 + int(end_m), text
        given = re.search(r"(?:answer is|Answer:) \$?(\d+(?::\d\d)?)", text)
        assert given, text
        body = text[: given.start()]
        assert re.findall(r"= (\d+)|it is (\d+:\d\d)", body)[-1][":" in given[1]] == given[1], text
        used = set(re.findall(r"\d+", question["content"]))
        assert used, question
    assert problems > 3000


def test_equation_pattern_finds_every_equals_sign() -> None:
    """The pattern that finds equations finds every equals sign."""
    for _, answer in ALL:
        if "```" not in answer["content"]:
            assert answer["content"].count(" = ") == len(EQUATION.findall(answer["content"]))


def test_every_function_gives_its_example_result() -> None:
    """Every function compiles and returns the result of its example."""
    functions = examples = 0
    for question, answer in ALL:
        found = re.search(r"```python\n(.*?)\n```", answer["content"], re.DOTALL)
        if not found:
            continue
        functions += 1
        scope: dict[str, Any] = {}
        exec(found[1], scope)
        for call, result in EXAMPLE.findall(question["content"] + "\n" + answer["content"]):
            examples += 1
            assert repr(eval(call, scope)) == result, (call, result, found[1])
    assert functions > 2000 and examples > 1000


def test_questions_differ_in_wording() -> None:
    """More than 70 % of the questions still differ when numbers and names are removed."""
    forms = {re.sub(r"\d+|[A-Z][a-z]+", "#", chat[0]["content"]) for chat in ALL}
    assert len(forms) > 0.7 * len(ALL)


@pytest.mark.parametrize("start", range(3))
def test_any_seed_gives_valid_problems(start: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any seed gives problems whose equations hold."""
    monkeypatch.syspath_prepend(str(ROOT / "data"))
    import word_problems  # type: ignore[import-not-found]

    rng = random.Random(seed + start)
    for _ in range(300):
        question, answer = word_problems.problem(rng)
        assert "{" not in question + answer and "[" not in question + answer and "  " not in question + answer
        assert all(value_of(left) == int(right) for left, right in EQUATION.findall(answer))


def test_tokenizer_has_its_documented_properties(tokenizer: Any) -> None:
    """The tokenizer has 1,024 tokens, single digits, exact decoding and its chat template."""
    assert len(tokenizer) == 1024 and tokenizer.eos_token == "<|end|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.tokenize("a 4096") == ["a", "Ġ", "4", "0", "9", "6"]
    for chat in ALL[:200]:
        for turn in chat:
            assert tokenizer.decode(tokenizer(turn["content"])["input_ids"]) == turn["content"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|bos|><|user|>Hi<|end|><|assistant|>"


def test_corpus_is_below_5_megabytes() -> None:
    """The corpus is smaller than 5 MB."""
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) < 5_000_000
