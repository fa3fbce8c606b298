"""Token equality of two decodings, except for ties, which floating point makes unavoidable; each tie is proved to be one.

Rows computed one at a time and several at a time differ by up to about 1e-5 in float32. Where two decodings first differ, the
text up to there is computed again in float64. Either the scores (noise included) of both choices differ by less than `TIE`, or
a change of less than `TIE` would add or remove a token at the edge of top-k or top-p.
"""

# T positions  V vocabulary

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.layers.blocks import Decoder
from trainkit.layers.visible import Visible
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys

TIE = 1e-4


@dataclass(frozen=True)
class Tie:
    """A position where two decodings differ although both are right."""

    request: int
    position: int
    gap: float
    tokens: tuple[int, int]


def exact_logits(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[T, V] float64 logits of one forward over a whole text, without a cache."""
    fresh = copy.deepcopy(decoder).double()
    fresh.rope.table = torch.empty(0, *fresh.rope.table.shape[1:], dtype=torch.float64)
    fresh.reserve_positions(len(tokens))
    positions = torch.arange(len(tokens))[None]
    with torch.inference_mode():
        hidden, _ = fresh(torch.tensor([list(tokens)]), positions, Visible.causal(positions))
        return fresh.head(hidden)[0]


def tie_gap(logits_V: Tensor, sampling: Sampling, noise_V: Tensor | None, one: int, other: int) -> float:
    """How far the two tokens are from an exact tie: below TIE, rounding could turn either choice into the other."""
    if sampling.greedy or noise_V is None:
        return float((logits_V.max() - torch.stack([logits_V[one], logits_V[other]]).min()).abs())
    warm = logits_V / sampling.temperature
    edge = float("inf")  # smallest change that moves the edge of top-k or top-p by a token
    if 0 < sampling.top_k < len(warm):
        last, first_out = warm.sort(descending=True).values[sampling.top_k - 1 : sampling.top_k + 1]
        edge = float(last - first_out)
        warm = warm.masked_fill(warm < last, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = warm.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        edge = min(edge, float((p.cumsum(-1) - p - sampling.top_p).abs().min()))
        cut = p.cumsum(-1) - p >= sampling.top_p
        warm = warm.masked_fill(torch.zeros_like(cut).scatter(0, order, cut), float("-inf"))
    scores = warm + noise_V
    return min(edge, float(scores.max() - torch.stack([scores[one], scores[other]]).min()))


def compare(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    n: int = 1,
) -> list[Tie]:
    """The ties among requests that differ; fails at the first difference that is not a tie. Request i has `prompts[i // n]`."""
    assert len(ours) == len(theirs) == n * len(prompts)
    ties = []
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        at = next((k for k, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
        if at is None:
            assert len(mine) == len(other), (
                f"request {i}: {len(mine)} tokens against {len(other)}; one is a prefix of the other"
            )
            continue
        prompt = list(prompts[i // n])
        logits = exact_logits(decoder, prompt + list(mine[:at]))[-1]
        noise = None
        if not sampling.greedy:
            keys = torch.tensor([request_keys(seed, i // n, i % n)], dtype=torch.int32)
            position = torch.tensor([[len(prompt) + at]])
            noise = gumbel(keys, position, torch.arange(logits.shape[0]), CHOICE)[0, 0].double()
        gap = tie_gap(logits, sampling, noise, mine[at], other[at])
        assert gap < TIE, f"request {i} differs at new token {at}: {mine[at]} against {other[at]}, gap {gap:.3g}; {sampling}"
        ties.append(Tie(i, at, gap, (mine[at], other[at])))
    return ties


def assert_few(ties: Sequence[Tie], decisions: int) -> None:
    """At most one tie in 1e5 decisions, and one more because small runs may have one by chance; each is printed."""
    for tie in ties:
        print(f"tie: {tie}")
    assert len(ties) <= 1 + decisions / 1e5, f"{len(ties)} ties in {decisions} decisions"
