"""`trainkit vocab`: the token ids that a drafter with a trimmed vocabulary is trained on."""

from __future__ import annotations

import json
from pathlib import Path

from trainkit.data.text.vocabulary import frequent_ids
from trainkit.errors import UserError
from trainkit.files import put_in_place
from trainkit.models.target import target_shape


def vocab(
    out: str, *, target: str, text: str, keep: float = 0.25, limit: int | None = None, columns: dict[str, str] | None = None
) -> str:
    """Writes the ids most often counted in TEXT, for a drafter whose head is to be trained on these alone.

    Name the file in a recipe: `model.drafter.init_args.draft_vocab: ids.json`.

    Examples:
        trainkit vocab ids.json --target models/target --text data/distilled --keep 32000

    Args:
        out: JSON file to write.
        target: Folder of the target.
        text: What the target wrote, best a set of `trainkit distill`; assistant tokens are counted.
        keep: Share of the vocabulary to keep, or a number of ids if above 1.
        limit: First rows of the text to take.
        columns: Our column names -> the file's.
    """
    ids, _, said = frequent_ids(target, target_shape(target), text, keep, limit, columns)
    if Path(out).is_dir():
        raise UserError(f"{out}: is a folder; name a file in it")
    partial = Path(f"{out}.partial")
    partial.write_text(json.dumps(ids) + "\n", encoding="utf-8")
    put_in_place(partial, Path(out))
    return f"{out}: {said}"
