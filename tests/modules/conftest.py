"""Rows to train on."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    answers = [f"In May she sold {n} / 2 = {n / 2} clips. " * (1 + n % 3) for n in range(64)]
    path.write_text("".join(json.dumps({"prompt": f"How many of {n}?", "response": a}) + "\n" for n, a in enumerate(answers)))
    return path
