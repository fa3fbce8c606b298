"""What a bundle is, whether it is whole, and whether it fits a target: the `inspect` command."""

from __future__ import annotations

from pathlib import Path

from trainkit import bundle as bundles
from trainkit.card import describe
from trainkit.errors import UserError


def inspect(bundle: Path, *, target: Path | None = None) -> str:
    """Shows a bundle's card after checking every file's checksum; with --target, also whether the two belong together.

    Args:
        bundle: Folder with a trainkit.json.
        target: Hugging Face folder of the target that it shall draft for.

    Example:
        trainkit inspect runs/draft/bundle
        trainkit inspect runs/draft/bundle --target models/target

    Raises:
        UserError: the bundle is broken, or does not fit the target.
    """
    found = bundles.read(bundle)
    lines = [describe(found), f"{len(found.files)} files, all checksums agree."]
    if target is not None:
        lines += [f"note: {note}" for note in _fit(found, target)] + [f"It fits {target}."]
    return "\n".join(lines)


def _fit(found: bundles.Bundle, target: Path) -> list[str]:
    from trainkit.models.target import target_shape  # seconds of imports that a card alone does not need

    if not found.target:
        raise UserError(f"{found.path}: a model of its own (kind {found.kind}), not made for any target; leave --target out")
    shape = target_shape(target)
    reads_hidden = bool(found.extra.get("taps"))
    return bundles.check_fit(found.target, shape.fingerprint or {}, shape.decoder.to_dict(), hidden=reads_hidden)
