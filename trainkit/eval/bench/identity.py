"""Checks that two decodings of the same prompts are the same text, and whether rounding alone explains a difference.

Logits computed one row at a time and several rows at a time differ by about 1e-5 in float32. Where two texts first differ, the
target scores both tokens after the common text. If both scores are within a tolerance of the best one, the difference is a tie;
otherwise it is a mismatch, which means an error in one of the two decoders.
"""

# T positions  V vocabulary

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.layers.blocks import Decoder
from trainkit.layers.linear import Linear, rounds_products
from trainkit.layers.visible import Visible
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys

TIE = 1e-4
"""Largest score difference that counts as a tie in float32."""


@dataclass(frozen=True)
class Difference:
    """The first difference between two texts.

    Attributes:
        prompt: Index of the prompt.
        position: Number of equal new tokens before the difference.
        tokens: Token of the reference and token of the other text; -1 where a text has ended.
        gap: Distance of the lower of the two scores from the best token's score; infinite where a text has ended.
        is_tie: Whether the gap is below the tolerance.
    """

    prompt: int
    position: int
    tokens: tuple[int, int]
    gap: float
    is_tie: bool


@dataclass(frozen=True)
class Identity:
    """Number of compared texts, and the first difference of each text that differs."""

    total: int
    differences: tuple[Difference, ...] = ()

    @property
    def mismatches(self) -> int:
        """Number of texts whose difference is not explained by rounding."""
        return sum(not difference.is_tie for difference in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Numbers of texts: all, equal token for token, with a tie as first difference, mismatches; and all differences."""
        return {
            "total": self.total,
            "equal": self.total - len(self.differences),
            "ties": len(self.differences) - self.mismatches,
            "mismatches": self.mismatches,
            "differences": [asdict(difference) for difference in self.differences],
        }


@dataclass(frozen=True)
class IdentityChecker:
    """Compares texts of the decoder `target`, sampled with noise of `seed`; score gaps below `tolerance` count as ties."""

    target: Decoder
    sampling: Sampling
    seed: int
    tolerance: float = TIE

    def compare(
        self, prompts: Sequence[Sequence[int]], reference: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
    ) -> Identity:
        """The first difference of each text in `others` from the text of the same prompt in `reference`."""
        differences = []
        for i, (prompt, expected, other) in enumerate(zip(prompts, reference, others, strict=True)):
            if list(expected) == list(other):
                continue
            shorter = min(len(expected), len(other))
            position = next((k for k in range(shorter) if expected[k] != other[k]), shorter)
            first, second = (text[position] if position < len(text) else -1 for text in (expected, other))
            ended = -1 in (first, second)
            gap = float("inf") if ended else self.gap(i, [*prompt, *expected[:position]], (first, second))
            differences.append(Difference(i, position, (first, second), gap, gap < self.tolerance))
        return Identity(len(prompts), tuple(differences))

    @torch.inference_mode()
    def gap(self, request: int, text: Sequence[int], tokens: Sequence[int]) -> float:
        """Difference between the best score after `text` and the lowest score of `tokens`, sampling noise included.

        At the boundary of top-k or top-p, rounding decides whether a token is kept. Only tokens that are kept whatever the
        rounding can have the best score; the difference is infinite if one of `tokens` is removed whatever the rounding.
        """
        scores_V = logits(self.target, text)[-1].float()
        if self.sampling.greedy:
            return float(scores_V.max() - scores_V[list(tokens)].min())
        scores_V = scores_V / self.sampling.temperature
        possible_V, certain_V = _sampling_bounds(scores_V, self.sampling, self.tolerance)
        device, position = scores_V.device, torch.tensor([[len(text)]], device=scores_V.device)
        keys = torch.tensor([request_keys(self.seed, request)], dtype=torch.int32, device=device)
        scores_V = scores_V + gumbel(keys, position, torch.arange(len(scores_V), device=device), CHOICE)[0, 0]
        if not possible_V[list(tokens)].all():
            return float("inf")
        return max(0.0, float(scores_V[certain_V].max() - scores_V[list(tokens)].min()))


def _sampling_bounds(scores_V: Tensor, sampling: Sampling, tolerance: float) -> tuple[Tensor, Tensor]:
    """Which tokens top-k and top-p possibly keep, and which they certainly keep, for rounding errors up to `tolerance`."""
    ordered_V = scores_V.sort(descending=True).values
    above_V = torch.searchsorted(-ordered_V, -(scores_V + tolerance))  # number of tokens that certainly rank higher
    others_V = torch.searchsorted(-ordered_V, -(scores_V - tolerance), right=True) - 1  # and of those that possibly do
    possible_V = certain_V = torch.ones_like(scores_V, dtype=torch.bool)
    if 0 < sampling.top_k < len(scores_V):
        possible_V, certain_V = above_V < sampling.top_k, others_V < sampling.top_k
        ordered_V = ordered_V.masked_fill(
            torch.arange(len(ordered_V), device=ordered_V.device) >= sampling.top_k, float("-inf")
        )
    if sampling.top_p < 1:
        mass_V = F.pad(ordered_V.softmax(-1).cumsum(-1), (1, 0))  # probability of the first 0, 1, 2, ... tokens
        own_V = (scores_V - ordered_V.logsumexp(-1)).exp()
        possible_V = possible_V & (mass_V[above_V] < sampling.top_p + tolerance)
        certain_V = certain_V & (mass_V[others_V + 1] - own_V < sampling.top_p - tolerance)
    certain_V = certain_V | (scores_V == ordered_V[0])  # the likeliest token is always kept
    return possible_V, certain_V


@torch.inference_mode()
def logits(target: Decoder, text: Sequence[int]) -> Tensor:
    """[T, V] logits of one forward pass over a whole text."""
    device = target.embed.weight.device
    target.reserve_positions(len(text))
    positions = torch.arange(len(text), device=device)[None]
    hidden, _ = target(torch.tensor([list(text)], device=device), positions, Visible.causal(positions))
    return target.head(hidden)[0]


def _unpacked(target: Decoder) -> Decoder:
    """A copy of the target with dense weights."""
    dense = copy.deepcopy(target)
    for part in dense.modules():
        if isinstance(part, Linear) and part.packed is not None:
            part.weight = nn.Parameter(part.packed.dense(part.weight.dtype), requires_grad=False)
            part.packed = None
    return dense


@torch.inference_mode()
def tie_tolerance(target: Decoder, text: Sequence[int], max_tokens: int = 32) -> float:
    """Score gap below which a difference is a tie: 1e-4 in float32, but measured where this target rounds to 16 bits.

    In half precision it is four times the largest logit difference between one forward pass over `text` and decoding it token
    by token, over its first `max_tokens` tokens: each of two scores may be off by that difference, and by more with the kernels
    of transformers. If a CPU's products with packed weights round to bfloat16, it is four times the largest difference from
    the same weights unpacked, as transformers has them.
    """
    device, dtype = target.embed.weight.device, target.embed.weight.dtype
    text = list(text)[:max_tokens]
    whole = logits(target, text)
    if dtype == torch.float32:
        if not rounds_products(target):
            return TIE
        return max(TIE, 4 * float((whole - logits(_unpacked(target), text)).abs().max()))
    cache = target.new_cache(1, len(text), device, dtype)
    largest = 0.0
    for index, token in enumerate(text):
        position = torch.tensor([[index]], device=device)
        hidden, _ = target(torch.tensor([[token]], device=device), position, Visible.causal(position), cache, position)
        largest = max(largest, float((target.head(hidden)[0, 0].float() - whole[index].float()).abs().max()))
    return max(TIE, 4 * largest)
