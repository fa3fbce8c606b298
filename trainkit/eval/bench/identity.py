"""Whether two decodings of the same prompts are the same text, and where not, whether rounding alone explains it.

Rows computed one at a time and several at a time differ by about 1e-5 in float32. Where two texts first differ, the common part
is read afresh and both tokens must score within a tolerance of the best: a tie. Anything else is a mismatch: somebody is wrong.
"""

# T positions  V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.layers.attention import causal_bias
from trainkit.layers.blocks import Decoder
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys

TIE = 1e-4
"""Largest score difference that counts as a tie in float32."""


@dataclass(frozen=True)
class Difference:
    """The first difference of one text.

    Attributes:
        prompt: The prompt's number.
        place: New tokens before it.
        tokens: The token of the reference and the other's; -1 where a text has ended.
        gap: How far the worse of the two scores below the best token.
        is_tie: Whether the gap is within the tolerance.
    """

    prompt: int
    place: int
    tokens: tuple[int, int]
    gap: float
    is_tie: bool


@dataclass(frozen=True)
class Identity:
    """How many of the texts are equal, and every difference."""

    total: int
    differences: tuple[Difference, ...] = ()

    @property
    def ties(self) -> int:
        """Texts that part at a tie."""
        return sum(one.is_tie for one in self.differences)

    @property
    def mismatches(self) -> int:
        """Texts that part where rounding does not explain it."""
        return len(self.differences) - self.ties

    @property
    def equal(self) -> int:
        """Texts that are the same, token for token."""
        return self.total - len(self.differences)


@dataclass(frozen=True)
class Judge:
    """Compares texts by what the target would choose.

    Attributes:
        target: The decoder that is asked where texts differ.
        sampling: How its logits become choices.
        seed: Of the noise.
        tolerance: Largest gap of a tie; `tolerance_of` measures one for half precision.
    """

    target: Decoder
    sampling: Sampling
    seed: int
    tolerance: float = TIE

    def compare(
        self, prompts: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
    ) -> Identity:
        """The differences of `others` from `reference`, prompt by prompt."""
        found = []
        for i, (prompt, one, other) in enumerate(zip(prompts, reference, others, strict=True)):
            if list(one) == list(other):
                continue
            place = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
            tokens = tuple(text[place] if place < len(text) else -1 for text in (one, other))
            gap = float("inf") if -1 in tokens else self.gap(i, len(prompt), [*prompt, *one[:place]], tokens)
            found.append(Difference(i, place, (tokens[0], tokens[1]), gap, gap < self.tolerance))
        return Identity(len(prompts), tuple(found))

    @torch.inference_mode()
    def gap(self, request: int, prompt_length: int, text: Sequence[int], tokens: Sequence[int]) -> float:
        """How far the worse of `tokens` scores below the best token after `text`, noise included."""
        scores_V = self.sampling.process(logits(self.target, text)[-1])
        if not self.sampling.greedy:
            device = scores_V.device
            keys = torch.tensor([request_keys(self.seed, request)], dtype=torch.int32, device=device)
            place = torch.tensor([[len(text)]], device=device)
            scores_V = scores_V + gumbel(keys, place, torch.arange(len(scores_V), device=device), CHOICE)[0, 0]
        return float(scores_V.max() - scores_V[list(tokens)].min())


@torch.inference_mode()
def logits(target: Decoder, text: Sequence[int]) -> Tensor:
    """[T, V] logits of one forward over a whole text."""
    device = target.embed.weight.device
    target.reserve_positions(len(text))
    positions = torch.arange(len(text), device=device)[None]
    bias = causal_bias(positions, len(text), target.embed.weight.dtype)
    hidden, _ = target(torch.tensor([list(text)], device=device), positions, bias)
    return target.head(hidden)[0]


@torch.inference_mode()
def tolerance_of(target: Decoder, text: Sequence[int], most: int = 32) -> float:
    """The gap below which a difference is a tie: 1e-4 in float32; in half precision what rounding does here.

    That is four times the largest logit difference between one forward over `text` and one row at a time, over its first
    `most` tokens: two choices may each be off by as much, and other kernels (transformers') by more.
    """
    if target.embed.weight.dtype in (torch.float32, torch.float64):
        return TIE
    text = list(text)[:most]
    whole = logits(target, text)
    device, dtype = target.embed.weight.device, target.embed.weight.dtype
    cache = target.new_cache(1, len(text), device, dtype)
    worst = 0.0
    for place, token in enumerate(text):
        position = torch.tensor([[place]], device=device)
        bias = causal_bias(position, len(text), dtype)
        hidden, _ = target(torch.tensor([[token]], device=device), position, bias, cache, position)
        worst = max(worst, float((target.head(hidden)[0, 0].float() - whole[place].float()).abs().max()))
    return max(TIE, 4 * worst)
