"""`trainkit vocab`: the token ids that a drafter with a trimmed vocabulary is trained on."""

from __future__ import annotations

import json
from pathlib import Path

from trainkit.data.text.vocabulary import frequent_ids
from trainkit.errors import UserError
from trainkit.files import write_file
from trainkit.models.target import target_shape


def vocab(
    out: str, *, target: str, text: str, keep: float = 0.25, limit: int | None = None, columns: dict[str, str] | None = None
) -> str:
    """Writes the most frequent token ids of TEXT, for training a drafter whose output head has only these.

    Name the file in a recipe: `model.drafter.init_args.draft_vocab: ids.json`.

    Examples:
        trainkit vocab ids.json --target models/target --text data/distilled --keep 32000

    Args:
        out: JSON file to write.
        target: Folder of the target.
        text: File, folder or hub name of text that the target generated, such as a set of `trainkit distill`.
        keep: Share of the vocabulary to keep, or a number of ids if above 1.
        limit: Number of rows of the text to read, from the beginning; all by default.
        columns: Column mapping, from trainkit's names to the file's.
    """
    if Path(out).is_dir():
        raise UserError(f"{out}: is a folder; give the path of a file")
    ids, _, summary = frequent_ids(target, target_shape(target), text, keep, limit, columns)
    write_file(out, lambda file: file.write_text(json.dumps(ids) + "\n", encoding="utf-8"))
    return f"{out}: {summary}"
