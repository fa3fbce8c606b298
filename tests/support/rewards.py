"""Groups of responses with given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainkit.rl.types import Group, Response, Task


def group(texts: Sequence[str], prompt: Any = "What is it?", index: int = 0, **columns: Any) -> Group:
    """Responses with these texts, whose tokens are the numbers of their characters."""
    responses = [Response([ord(letter) for letter in text], text, "end", []) for text in texts]
    return Group(Task(index, [1], prompt, columns, f"rows.jsonl:{index + 1}"), responses)


def rewards_of(groups: Sequence[Group], name: str) -> list[float]:
    return [response.rewards[name] for group in groups for response in group.responses]
