"""`trainkit trim`, `trainkit vocab`: a drafter whose head proposes only the ids that the target often writes.

VocabTrim, arXiv 2506.22694. Trimming trains nothing: rows of the head are left out at serving, so a draft step reads less.
Verification still runs over the whole vocabulary, so the output stays what it was; tau falls as far as the target writes ids
that were left out.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from trainkit import bundle
from trainkit.card import describe
from trainkit.data.text.vocabulary import frequent_ids
from trainkit.drafters.base import load_bundle, load_kind
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.target import target_shape


def trim(
    drafter: str,
    out: str,
    *,
    target: str,
    text: str,
    keep: float = 0.25,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
) -> str:
    """Trims a drafter's output vocabulary to the ids most often counted in TEXT, and writes it as a new bundle.

    The bundle keeps the whole head, so that other programs load it as before; the ids stand in its trainkit.json. A searched
    tree and an acceptance predictor were made for the whole vocabulary and are not taken along.

    Examples:
        trainkit trim models/draft models/draft-trimmed --target models/target --text data/distilled --keep 0.25

    Args:
        drafter: Bundle to trim.
        out: Bundle to write.
        target: Folder of its target.
        text: What the target wrote, best a set of `trainkit distill`; assistant tokens are counted.
        keep: Share of the vocabulary to keep, or a number of ids if above 1.
        limit: First rows of the text to take.
        columns: Our column names -> the file's.
    """
    found = bundle.read(Path(drafter))
    if not found.target:
        raise UserError(f"{drafter}: a model of its own (kind {found.kind}), no drafter; give the bundle of a drafter")
    if "draft_vocab" not in inspect.signature(load_kind(found.kind)).parameters:
        raise UserError(f"{drafter}: kind {found.kind!r} has no output head of its own to trim")
    shape = target_shape(target)
    reads_hidden = bool(found.extra.get("taps"))
    bundle.check_fit(found.target, shape.fingerprint or {}, shape.decoder.to_dict(), hidden=reads_hidden)
    ids, coverage, said = frequent_ids(target, shape, text, keep, limit, columns)
    network = load_bundle(found, shape, draft_vocab=ids)
    made = export_drafter(
        network,
        out,
        tokenizer=target,
        dtype=next(network.parameters()).dtype,
        recipe=found.recipe,
        seed=found.seed,
        data=found.data,
        format=found.extra.get("format", "native"),
        metrics={"vocabulary_kept": len(ids) / shape.decoder.vocab_size, "coverage": round(coverage, 5)},
    )
    return "\n".join([describe(made), said, *_left_behind(found)])


def _left_behind(found: bundle.Bundle) -> list[str]:
    """What was made for the whole vocabulary's chances and speed."""
    advice = {"tree": "search a tree for it (trainkit tree)", "predictor": "train an acceptance predictor on it"}
    left = [name for name in advice if name in found.runner]
    if not left:
        return []
    return [f"not taken along: the {' and the '.join(left)} of {found.path}; {', '.join(advice[name] for name in left)}"]
