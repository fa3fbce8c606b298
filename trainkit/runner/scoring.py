"""Log-probabilities of given continuations under the target, several texts in one forward pass."""

# B rows  T positions of a chunk  N scored tokens  S cache slots  V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.layers.visible import Visible


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prompt.

    Attributes:
        logprobs: Log-probability of each of its tokens under the target at temperature 1, in nats.
        greedy: Whether each of its tokens is the likeliest at its position, so that greedy decoding would write it.
    """

    logprobs: list[float]
    greedy: bool


def score_rows(target: Any, cache: Tensor, pairs: Sequence[tuple[list[int], list[int]]], chunk: int) -> list[Score]:
    """The score of each (prompt, continuation); the texts are padded at their end, which no scored token sees.

    The last token of a text is not read, because nothing after it is scored.

    Args:
        target: The decoder.
        cache: Cache with a row for each pair and a slot for each token that is read; overwritten.
        pairs: Token ids of prompt and continuation, neither of them empty.
        chunk: Number of positions that are read at once; also the number of tokens whose logits exist at once.
    """
    width, device = max(len(head) + len(tail) for head, tail in pairs) - 1, cache.device
    texts_BT = torch.zeros(len(pairs), width + 1, dtype=torch.long)
    scored_BT = torch.zeros(len(pairs), width, dtype=torch.bool)
    for row, (head, tail) in enumerate(pairs):
        texts_BT[row, : len(head) + len(tail)] = torch.tensor(head + tail)
        scored_BT[row, len(head) - 1 : len(head) + len(tail) - 1] = True
    texts_BT, scored_BT = texts_BT.to(device), scored_BT.to(device)
    logprobs_BT = torch.zeros(len(pairs), width, device=device)
    likeliest_BT = torch.zeros_like(scored_BT)
    for start in range(0, width, chunk):
        stop = min(start + chunk, width)
        positions_BT = torch.arange(start, stop, device=device).repeat(len(pairs), 1)
        seen = Visible.causal(positions_BT)
        hidden_BTD, _ = target(texts_BT[:, start:stop], positions_BT, seen, cache, positions_BT, span=stop)
        rows_N, columns_N = scored_BT[:, start:stop].nonzero(as_tuple=True)
        for rows, columns in zip(rows_N.split(chunk), columns_N.split(chunk), strict=True):
            logits_NV = target.head(hidden_BTD[rows, columns]).float()
            labels_N = texts_BT[rows, start + columns + 1]
            logprobs_BT[rows, start + columns] = logits_NV.log_softmax(-1).gather(1, labels_N[:, None])[:, 0]
            likeliest_BT[rows, start + columns] = logits_NV.argmax(-1) == labels_N
    found = zip(logprobs_BT.cpu(), likeliest_BT.cpu(), scored_BT.cpu(), strict=True)
    return [Score(logprobs[scored].tolist(), bool(likeliest[scored].all())) for logprobs, likeliest, scored in found]
