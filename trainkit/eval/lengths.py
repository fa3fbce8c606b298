"""Selects the prompts that fit into the positions of a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainkit.errors import UserError
from trainkit.models.load import covered_positions


def prompts_that_fit(
    prompts: Sequence[list[int]], max_new_tokens: int, max_len: int | None, target: str | Path, source: str
) -> tuple[list[list[int]], int, str]:
    """The prompts that fit with their new tokens, the positions that the longest needs, and a note on the others ("" if none).

    Args:
        prompts: Token ids of each prompt.
        max_new_tokens: Largest number of new tokens.
        max_len: Largest number of tokens of a prompt and its text; longer prompts are left out. None: all must fit.
        target: Folder of the target.
        source: Where the prompts are from, for messages.

    Raises:
        UserError: the target covers fewer positions, or no prompt fits.
    """
    covered, longest = covered_positions(target), max(map(len, prompts)) + max_new_tokens
    if max_len is None and longest > covered:
        raise UserError(
            f"{source}: the longest prompt and {max_new_tokens} new tokens need {longest} positions, {target} covers "
            f"{covered}; lower max_new_tokens or remove long prompts (--max_len leaves them out, where a command has it)"
        )
    if max_len is not None and max_len > covered:
        raise UserError(f"max_len {max_len}: {target} covers {covered} positions; lower it")
    kept = [prompt for prompt in prompts if max_len is None or len(prompt) + max_new_tokens <= max_len]
    if not kept:
        raise UserError(f"{source}: no prompt and {max_new_tokens} new tokens fit max_len {max_len}; raise it")
    left_out = len(prompts) - len(kept)
    note = f"{left_out} of {len(prompts)} prompts left out: with their new tokens they need more than max_len {max_len}"
    return kept, max(map(len, kept)) + max_new_tokens, note if left_out else ""
