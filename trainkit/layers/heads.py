"""What heads are made of, and which tokens they may propose."""

# D hidden  K ids a head may propose  V vocabulary

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.layers.linear import Linear

WIDEST = 256
"""Nodes on one level of a tree, at most, of a drafter that keeps something of each for the next."""


class ResidualBlock(nn.Module):
    """x + silu(W x + b), W and b zero at first, so that a new head starts as what it projects with (arXiv 2401.10774, 2.1)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class OutputHeads(nn.ModuleList):
    """A projection to the vocabulary for each head, or none of them, where heads share the target's.

    Args:
        count: Heads.
        hidden_size: D.
        vocab_size: V.
        ids_K: Token ids that a trimmed vocabulary keeps; None for all.
        own: Whether the heads have their own.
    """

    def __init__(self, count: int, hidden_size: int, vocab_size: int, ids_K: Tensor | None, own: bool) -> None:
        rows = vocab_size if ids_K is None else len(ids_K)
        super().__init__(Linear(hidden_size, rows, bias=False) for _ in range(count if own else 0))

    def copy_from(self, weight_VD: Tensor, ids_K: Tensor | None) -> None:
        """Starts each as the target's head."""
        for projection in self:
            projection.weight.data.copy_(weight_VD if ids_K is None else weight_VD[ids_K])  # type: ignore[union-attr, operator]

    def of(self, index: int, shared: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Head number `index`, or what all share."""
        return self[index] if len(self) else shared


def trim_rows(state: dict[str, Tensor], prefix: str, held_K: Tensor | None, wanted_K: Tensor | None) -> dict[str, Tensor]:
    """A state dict whose projections, named `prefix`..., keep of the ids that they have those that are wanted.

    Args:
        state: With rows for `held_K`.
        prefix: Of the projections' names.
        held_K: Ids that the rows stand for, ascending; None for all.
        wanted_K: Some of these; None for all.
    """
    if wanted_K is None or (held_K is not None and torch.equal(held_K, wanted_K)):
        return state
    rows_K = wanted_K if held_K is None else torch.searchsorted(held_K, wanted_K).clamp_(max=len(held_K) - 1)
    if held_K is not None and not torch.equal(held_K[rows_K], wanted_K):
        raise UserError("drafter.draft_vocab: has ids that these heads never had; choose among theirs")
    return {name: value[rows_K] if name.startswith(prefix) else value for name, value in state.items()}


def checked_heads(
    num_heads: int, num_layers: int, head: str, draft_vocab: list[int] | str | None, vocab_size: int
) -> Tensor | None:
    """The ids that heads may propose [K], None for all.

    Raises:
        UserError: no head, no layer, or a trimmed vocabulary that is not one or has no projection of its own.
    """
    for name, value in (("num_heads", num_heads), ("num_layers", num_layers)):
        if value < 1:
            raise UserError(f"drafter.{name}: {value} must be at least 1")
    if head == "target" and draft_vocab is not None:
        raise UserError("drafter.draft_vocab: the target's head has all ids; set drafter.head: own")
    return checked_vocab(draft_vocab, vocab_size)


def checked_vocab(draft_vocab: list[int] | str | None, vocab_size: int) -> Tensor | None:
    """The ids of a trimmed vocabulary as a tensor [K]; None for the whole one. A string names a JSON file of them.

    Raises:
        UserError: no such file, not ascending, or outside the vocabulary.
    """
    if draft_vocab is None:
        return None
    if isinstance(draft_vocab, str):
        try:
            draft_vocab = json.loads(Path(draft_vocab).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            said = f"drafter.draft_vocab: {draft_vocab}: no JSON list of ids ({error})"
            raise UserError(f"{said}; make it by trainkit vocab") from None
    if not isinstance(draft_vocab, list) or not all(type(value) is int for value in draft_vocab):
        raise UserError("drafter.draft_vocab: must be a list of token ids; make it by trainkit vocab")
    ids_K = torch.tensor(draft_vocab, dtype=torch.long)
    if not len(ids_K) or int(ids_K[0]) < 0 or int(ids_K[-1]) >= vocab_size or not bool((ids_K.diff() > 0).all()):
        raise UserError(f"drafter.draft_vocab: must be ascending ids within the vocabulary of {vocab_size}")
    return ids_K
