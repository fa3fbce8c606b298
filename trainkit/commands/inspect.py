"""`trainkit inspect`: what a bundle holds, whether its files are intact, and whether it fits a target."""

from __future__ import annotations

from pathlib import Path

from trainkit import bundle as bundles
from trainkit.card import describe
from trainkit.errors import UserError


def inspect(bundle: Path, *, target: Path | None = None) -> str:
    """Shows a bundle's card and checks the checksum of every file; with --target also whether the bundle fits that target.

    Args:
        bundle: Folder with a trainkit.json.
        target: Hugging Face folder of the target to draft for.

    Example:
        trainkit inspect runs/draft/bundle
        trainkit inspect runs/draft/bundle --target models/target

    Raises:
        UserError: the bundle is broken, or does not fit the target.
    """
    read = bundles.read(bundle)
    lines = [describe(read), f"{len(read.files)} files, all checksums agree."]
    if target is not None:
        from trainkit.models.target import target_shape  # takes seconds to import, which a card alone does not need

        if not read.target:
            raise UserError(f"{bundle}: kind {read.kind!r} is not made for a target; leave --target out")
        shape = target_shape(target)
        notes = bundles.check_fit(read, shape.fingerprint or {}, shape.decoder.to_dict())
        lines += [*(f"note: {note}" for note in notes), f"It fits {target}."]
    return "\n".join(lines)
