"""Sentence templates with choices: `[has|owns] {n} {things}` becomes one of its variants."""

from __future__ import annotations

import random
import re

_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")


def say(rng: random.Random, template: str, **values: object) -> str:
    """A random variant of `template`: each `[a|b]` is replaced, innermost first, then each `{name}`. A choice may be empty."""
    while match := _CHOICE.search(template):
        template = template[: match.start()] + rng.choice(match.group(1).split("|")) + template[match.end() :]
    return " ".join(template.format(**values).split(" "))
