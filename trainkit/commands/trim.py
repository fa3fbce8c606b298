"""`trainkit trim`: restricts a drafter's proposals to the token ids that the target often writes.

VocabTrim, arXiv 2506.22694. Nothing is trained: serving leaves rows of the head out, so a draft step reads fewer bytes.
Verification still covers the whole vocabulary, so the output does not change; tau falls the more often the target writes ids
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

_REMEDIES = {"tree": "search a tree for it (trainkit tree)", "predictor": "train an acceptance predictor on it"}
"""Runner settings that were made for the whole vocabulary -> how to make them for the trimmed one."""


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

    The files contain the whole head, so other programs load them as before; the ids are in trainkit.json. A searched tree and
    an acceptance predictor were made for the whole vocabulary and are not copied.

    Examples:
        trainkit trim models/draft models/draft-trimmed --target models/target --text data/distilled --keep 0.25

    Args:
        drafter: Bundle to trim.
        out: Bundle to write.
        target: Folder of its target.
        text: Text that the target wrote, best a set of `trainkit distill`; assistant tokens are counted.
        keep: Share of the vocabulary to keep, or a number of ids if above 1.
        limit: Number of rows of the text to read, from the first; all by default.
        columns: Our column names -> the file's.
    """
    # Refuse what cannot be trimmed
    source = bundle.read(Path(drafter))
    if not source.target:
        raise UserError(f"{drafter}: kind {source.kind!r} is not a drafter; give the bundle of a drafter")
    if "draft_vocab" not in inspect.signature(load_kind(source.kind)).parameters:
        raise UserError(f"{drafter}: kind {source.kind!r} has no output head of its own to trim")
    shape = target_shape(target)
    bundle.check_fit(source, shape.fingerprint or {}, shape.decoder.to_dict())
    # The same weights with another `draft_vocab`
    ids, coverage, summary = frequent_ids(target, shape, text, keep, limit, columns)
    network = load_bundle(source, shape, draft_vocab=ids)
    origin = {name: getattr(source, name) for name in ("recipe", "seed", "data")}
    format, dtype = source.extra.get("format", "native"), next(network.parameters()).dtype
    metrics = {"vocabulary_kept": len(ids) / shape.decoder.vocab_size, "coverage": round(coverage, 5)}
    made = export_drafter(network, out, tokenizer=target, dtype=dtype, format=format, metrics=metrics, **origin)
    lines = [describe(made), summary]
    if names := [name for name in _REMEDIES if name in source.runner]:
        remedies = ", ".join(_REMEDIES[name] for name in names)
        lines.append(f"not copied: the {' and the '.join(names)} of {source.path}; {remedies}")
    return "\n".join(lines)
