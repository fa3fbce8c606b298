"""Sentences with choices: `[has|owns] {n} {things}` becomes one of its readings."""

from __future__ import annotations

import random
import re

_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


def say(rng: random.Random, template: str, **values: object) -> str:
    """One reading of `template`: innermost `[a|b]` first, drawn evenly, then `{name}` filled in. A choice may be empty."""
    while match := _CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match.group(1).split("|")) + template[match.end() :]
    return " ".join(template.format(**values).split(" "))
