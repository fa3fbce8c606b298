"""`trainkit trim`: restricts a drafter's proposals to the token ids that the target generates most often.

VocabTrim, arXiv 2506.22694. Nothing is trained: at serving, the other rows of the head are not used, so a draft step reads
fewer bytes. Verification still covers the whole vocabulary, so the output does not change. tau is lower, the more often the
target generates an id that was removed.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from trainkit import bundle
from trainkit.data.text.vocabulary import frequent_ids
from trainkit.drafters.base import load_bundle, load_kind
from trainkit.errors import UserError, note
from trainkit.export.checks import export_report
from trainkit.export.drafter import export_drafter
from trainkit.models.target import target_shape

_REMEDIES = {"tree": "search a tree for it (trainkit tree)", "predictor": "train an acceptance predictor on it"}
"""Runner settings that fit only the whole vocabulary -> how to get them for the trimmed one."""


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
    """Trims a drafter's output vocabulary to the most frequent token ids of TEXT, and writes it as a new bundle.

    The files contain the whole head, so other programs load them as before; the ids are in trainkit.json. A searched tree and
    an acceptance predictor fit only the whole vocabulary, so they are not copied.

    Examples:
        trainkit trim models/draft models/draft-trimmed --target models/target --text data/distilled --keep 0.25

    Args:
        drafter: Bundle to trim.
        out: Bundle to write.
        target: Folder of its target.
        text: File, folder or hub name of text that the target generated, such as a set of `trainkit distill`.
        keep: Share of the vocabulary to keep, or a number of ids if above 1.
        limit: Number of rows of the text to read, from the beginning; all by default.
        columns: Column mapping, from trainkit's names to the file's.
    """
    # Refuse bundles that cannot be trimmed.
    source = bundle.read(Path(drafter))
    if not source.target:
        raise UserError(f"{drafter}: kind {source.kind!r} is not a drafter; give the bundle of a drafter")
    if "draft_vocab" not in inspect.signature(load_kind(source.kind)).parameters:
        raise UserError(f"{drafter}: kind {source.kind!r} has no output head of its own to trim")
    shape = target_shape(target)
    for line in bundle.check_fit(source, shape.fingerprint or {}, shape.decoder.to_dict()):
        note(line)
    # The same weights with another `draft_vocab`
    ids, coverage, summary = frequent_ids(target, shape, text, keep, limit, columns)
    network = load_bundle(source, shape, draft_vocab=ids)
    origin = {name: getattr(source, name) for name in ("recipe", "seed", "data")}
    format, dtype = source.extra.get("format", "native"), next(network.parameters()).dtype
    metrics = {"vocabulary_kept": len(ids) / shape.decoder.vocab_size, "coverage": round(coverage, 5)}
    trimmed = export_drafter(network, out, tokenizer=target, dtype=dtype, format=format, metrics=metrics, **origin)
    lines = [export_report(trimmed), summary]
    if names := [name for name in _REMEDIES if name in source.runner]:
        remedies = ", ".join(_REMEDIES[name] for name in names)
        lines.append(f"not copied: the {' and the '.join(names)} of {source.path}; {remedies}")
    return "\n".join(lines)
