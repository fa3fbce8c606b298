"""The bundled tokenizer, whole and with other chat templates, and files of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_data import TINY


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TINY / "tokenizer"))


@pytest.fixture
def rows_file(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON lines (a string stands as it is) and gives the path."""

    def write(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
