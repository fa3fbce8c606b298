"""Trimmed draft vocabularies: which ids a drafter may propose, and the rows of its output head for them."""

# K ids that a drafter may propose

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from trainkit.errors import UserError


def trim_rows(state: dict[str, Tensor], held_K: Tensor | None, wanted_K: Tensor | None) -> dict[str, Tensor]:
    """A state dict whose output heads (tensors with the prefix `lm_head`) have only the rows of the ids in `wanted_K`.

    Args:
        state: State dict whose output heads have the rows of the ids in `held_K`.
        held_K: Ids of the present rows, ascending; None for all ids.
        wanted_K: Ids of the rows to return, a subset of `held_K`; None for all of them.

    Raises:
        UserError: an id in `wanted_K` has no row.
    """
    if wanted_K is None or (held_K is not None and torch.equal(held_K, wanted_K)):
        return state
    rows_K = wanted_K if held_K is None else torch.searchsorted(held_K, wanted_K).clamp_(max=len(held_K) - 1)
    if held_K is not None and not torch.equal(held_K[rows_K], wanted_K):
        raise UserError("drafter.draft_vocab: has ids that the drafter never had; choose among its own")
    return {name: value[rows_K] if name.startswith("lm_head") else value for name, value in state.items()}


def checked_vocab(draft_vocab: list[int] | str | None, vocab_size: int) -> Tensor | None:
    """Token ids [K] of a trimmed vocabulary, None for all; a string is the path of a JSON file with the ids.

    Raises:
        UserError: no such file, ids not ascending, or ids outside the vocabulary.
    """
    if draft_vocab is None:
        return None
    remedy = "make it by trainkit vocab"
    if isinstance(draft_vocab, str):
        try:
            draft_vocab = json.loads(Path(draft_vocab).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"drafter.draft_vocab: {draft_vocab}: not a JSON list of ids ({error}); {remedy}") from None
    if not isinstance(draft_vocab, list) or not all(type(value) is int for value in draft_vocab):
        raise UserError(f"drafter.draft_vocab: must be a list of token ids; {remedy}")
    ids_K = torch.tensor(draft_vocab, dtype=torch.long)
    if not len(ids_K) or int(ids_K[0]) < 0 or int(ids_K[-1]) >= vocab_size or not bool((ids_K.diff() > 0).all()):
        raise UserError(f"drafter.draft_vocab: must be ascending ids within the vocabulary of {vocab_size}; {remedy}")
    return ids_K
