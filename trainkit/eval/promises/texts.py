"""The promise of losslessness: texts decoded with the drafter equal those of plain decoding, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from trainkit.eval.bench.identity import Difference, Identity
from trainkit.eval.promises.types import Check, Subject, dynamic_tree
from trainkit.runner.sampling import Sampling

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0},
    "nucleus": {"temperature": 0.8, "top_p": 0.9},
}
"""Sampling of the compared texts, by name."""


def check_texts(subject: Subject) -> Check:
    """Compares each way to draft with plain decoding one prompt at a time, greedy and seeded.

    Where two texts first differ, the target's scores of both tokens are compared. If they are within the tolerance, the
    difference is a tie caused by rounding and is listed; otherwise the promise is broken. In half precision the share of
    differing texts is reported instead; for prompts decoded one at a time also the share that differs from plain decoding with
    as many rows in each step as verification has.
    """
    promise = "Texts decoded with the drafter are those of plain decoding, token for token."
    exact, decisions = subject.arguments.exact, 0
    compared: list[tuple[str, Identity]] = []
    equal_rows: list[Identity] = []
    ways = _ways(subject)
    with tqdm(total=len(SETTINGS) * (len(ways) + 1), desc="texts", unit=" runs", disable=None, leave=False) as bar:
        for setting, values in SETTINGS.items():
            plain = list(_decode(subject, 1, values | {"depth": 0}))
            bar.update()
            decisions += sum(map(len, plain))
            checker = subject.checker(Sampling(**values))
            for name, (batch, draft) in ways.items():
                texts = list(_decode(subject, batch, values | draft))
                compared.append((f"{setting}, {name}", checker.compare(subject.prompts, plain, texts)))
                if not exact and batch == 1:
                    same_rows = list(_decode(subject, 1, values | draft | {"plain": True}))
                    equal_rows.append(checker.compare(subject.prompts, same_rows, texts))
                bar.update()
    # Count, and list every difference
    total, differing = sum(identity.total for _, identity in compared), [len(identity.differences) for _, identity in compared]
    mismatches = sum(identity.mismatches for _, identity in compared)
    details = [_line(name, difference) for name, identity in compared for difference in identity.differences]
    ties = sum(differing) - mismatches
    if exact:
        status, figure = ("BROKEN" if mismatches else "kept"), f"{mismatches} of {total} texts differ, {ties} ties"
    else:
        status, figure = "measured", f"{sum(differing)} of {total} texts differ ({sum(differing) / total:.1%}), {ties} by a tie"
    figure += f" (scores closer than {subject.tolerance:.1e}); {len(compared)} ways to draft, {decisions:,} plain tokens"
    if equal_rows:
        differ, count = sum(len(item.differences) for item in equal_rows), sum(item.total for item in equal_rows)
        details.insert(0, f"{differ} of {count} texts differ from plain decoding with as many rows in each step (batch 1)")
    counts = {"total": total, "tolerance": subject.tolerance, "ways": {name: item.to_dict() for name, item in compared}}
    return Check("texts", promise, status, figure, details, counts | {"ties": ties, "mismatches": mismatches})


def _line(way: str, difference: Difference) -> str:
    """A difference in one line."""
    kind, (one, other) = "tie" if difference.is_tie else "DIFFERENT", difference.tokens
    place = f"prompt {difference.prompt} after {difference.position} tokens"
    return f"{kind}: {way}, {place}: token {one} or {other}, scores {difference.gap:.1e} apart"


def _ways(subject: Subject) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name -> (batch, options) of every way to draft that is compared; a tree in the bundle is one of them."""
    drafts: dict[str, dict[str, Any]] = {f"chain {subject.depth}": {"depth": subject.depth}, "tree": {"tree": subject.tree}}
    if subject.drafter.default_tree is not None:
        drafts["recommended tree"] = {}
    ways = {f"{name}, batch {batch}": (batch, draft) for name, draft in drafts.items() for batch in (1, 8)}
    top_k = min(3, subject.drafter.draft_vocab_size)
    if subject.drafter.max_width is None or subject.drafter.max_width >= top_k:
        ways["dynamic tree, batch 8"] = 8, {"tree": dynamic_tree(min(3, subject.depth), top_k, 8)}
    ways["confidence policy, batch 8"] = 8, {"depth": subject.depth, "policy": "confidence:0.4"}
    return ways


def _decode(subject: Subject, batch: int, options: dict[str, Any]) -> Iterator[list[int]]:
    """Tokens of each prompt, `batch` prompts decoded together; a prompt's noise does not depend on its batch."""
    arguments, prompts = subject.arguments, subject.prompts
    for start in range(0, len(prompts), batch):
        group = prompts[start : start + batch]
        draws = [(start + index, 0) for index in range(len(group))]
        options = {**options, "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
        outputs = dict(subject.runner.generate_each(group, draws, **options))
        yield from (outputs[index].tokens for index in range(len(group)))
