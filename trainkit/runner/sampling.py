"""Counter-based noise and the processing of logits: everything random in the runner, without generator state.

Noise is a pure function of (key, position, token id, stream). A key identifies (seed, request), so the same request gives the
same text in any batch slot, at any depth, with any drafter; and a replayed graph draws new numbers, since positions advance.
"""

# B batch  R rows of noise (one per position)  V vocabulary  N nodes

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from trainkit.errors import UserError

# Streams: the purpose of each independent draw at one (key, position).
CHOICE: Final = 0  # the target's choice, and under `coupled` the drafter's too
PROPOSAL: Final = 1  # the drafter's choice under `residual`, another in each round
ACCEPT: Final = 2  # acceptance tests under `residual`
RESIDUAL: Final = 3  # draws from what remains after rejections

_TOP: Final = 1 - 2.0**-24

COLDEST: Final = 1e-6
"""Lower temperatures are treated as 0: the likeliest token has all the probability, and the division would overflow."""

CHUNK: Final = 1 << 24
"""Number of noise values computed at once; the intermediate tensors take several times the memory of the result."""


@dataclass(frozen=True)
class Sampling:
    """How logits become a distribution.

    Attributes:
        temperature: Softmax temperature; 0 takes the likeliest token, and so does one below `COLDEST`, which is set to 0.
        top_k: Number of likeliest tokens kept, of equal ones those of lowest id; 0 keeps all.
        top_p: The smallest set of likeliest tokens whose probability reaches this is kept; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be a finite number of at least 0")
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be at least 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1; 1 keeps every token")

    @property
    def greedy(self) -> bool:
        """Whether there is no noise: always the likeliest token."""
        return self.temperature == 0

    def process(self, logits: Tensor) -> Tensor:
        """float32 logits of the distribution to sample from, -inf where it has no mass; the same for target and draft."""
        logits = logits.float()
        if self.greedy:
            return logits
        logits = logits / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k, dim=-1).values
            floor, equal = best[..., -1:], logits == best[..., -1:]
            # counted in float32, which is exact here and three times as fast as integers on a CPU
            too_many = equal.float().cumsum(-1) > (best == floor).sum(-1, keepdim=True)
            logits = logits.masked_fill((logits < floor) | (equal & too_many), float("-inf"))
        if self.top_p < 1:
            # Stable, so that among equal tokens the lowest ids are kept, on every device.
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            probabilities = ordered.softmax(-1)
            cut = probabilities.cumsum(-1) - probabilities >= self.top_p
            cut[..., 0] = False  # otherwise a top_p below the smallest float32 leaves no token
            logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), float("-inf"))
        return logits


@dataclass(frozen=True)
class Mixed:
    """The steps that a round computes if each row has its own sampling parameters; a captured round depends only on these.

    Attributes:
        noise: Whether any row has a temperature above 0.
        filters: Whether any row has a top-k or top-p.
    """

    noise: bool
    filters: bool

    @property
    def greedy(self) -> bool:
        """Whether no row has noise."""
        return not self.noise

    @classmethod
    def from_requests(cls, samplings: Iterable[Sampling]) -> Mixed:
        """What rows with these parameters need."""
        warm = [sampling for sampling in samplings if not sampling.greedy]
        return cls(bool(warm), any(sampling.top_k > 0 or sampling.top_p < 1 for sampling in warm))


@dataclass(frozen=True)
class RowSampling:
    """`Sampling` with parameters of each row: a row's output is, bit for bit, that of `Sampling` with its parameters.

    Attributes:
        steps: Which steps any row needs.
        temperature_B: float32; 0 takes the likeliest token.
        top_k_B: int64; 0 keeps all.
        top_p_B: float32; 1 keeps all.
    """

    steps: Mixed
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor

    @property
    def greedy(self) -> bool:
        """Whether no row has noise."""
        return self.steps.greedy

    @property
    def temperature(self) -> Tensor:
        """[B, 1, 1] temperatures."""
        return self.temperature_B[:, None, None]

    def process(self, logits_BNV: Tensor) -> Tensor:
        """As `Sampling.process`; rows at temperature 0 keep their logits."""
        logits_BNV = logits_BNV.float()
        if self.greedy:
            return logits_BNV
        logits_BNV = logits_BNV / torch.where(self.temperature > 0, self.temperature, 1.0)
        if not self.steps.filters:
            return logits_BNV
        warm_B11 = self.temperature > 0
        ordered, order = logits_BNV.sort(dim=-1, descending=True, stable=True)
        top_k_B11, top_p_B11 = self.top_k_B[:, None, None], self.top_p_B[:, None, None]
        late = (torch.arange(ordered.shape[-1], device=ordered.device) >= top_k_B11) & (top_k_B11 > 0)
        probabilities = ordered.masked_fill(late, float("-inf")).softmax(-1)
        cut = (probabilities.cumsum(-1) - probabilities >= top_p_B11) & (top_p_B11 < 1)
        cut[..., 0] = False
        return logits_BNV.masked_fill(torch.zeros_like(cut).scatter(-1, order, (cut | late) & warm_B11), float("-inf"))


def request_keys(seed: int, prompt: int, sample: int = 0) -> tuple[int, int]:
    """Two signed 32-bit integers that identify a seed, the index of a prompt in the call, and the number of a sample."""
    digest = hashlib.blake2b(f"{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True)


def mix(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer on int32 tensors (xor-shift-multiply, constants of Wellons' lowbias32); wraps on overflow."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def uniform(keys_B2: Tensor, positions_BR: Tensor, tokens_V: Tensor, stream: int) -> Tensor:
    """[B, R, V] float32 in (0, 1 - 2^-24]: (h + 1/2) 2^-32 of the 32-bit hash h of (key, position, token, stream).

    Args:
        keys_B2: int32, from `request_keys`.
        positions_BR: Absolute position of the token being chosen.
        tokens_V: Token ids, each with its own hash.
        stream: Purpose of the draw; streams are independent.
    """
    salt = (stream * 0x9E3779B1 + 0x7F4A7C15) & 0x7FFFFFFF
    rows = mix(mix(positions_BR.int() ^ keys_B2[:, :1]) ^ salt)[..., None]
    h = mix(mix(tokens_V.int() ^ rows) + keys_B2[:, 1:, None] ^ rows * 0x27D4EB2F)
    return h.view(torch.uint32).float().add_(0.5).mul_(2.0**-32).clamp_(max=_TOP)


def gumbel(keys_B2: Tensor, positions_BR: Tensor, tokens_V: Tensor, stream: int) -> Tensor:
    """[B, R, V] float32 Gumbel noise, -log(-log1p(-v)): precise where it is large, which decides, and never infinite."""
    if positions_BR.shape[1] > 1 and positions_BR.numel() * len(tokens_V) > CHUNK:
        noise_BRV = torch.empty(*positions_BR.shape, len(tokens_V), device=tokens_V.device)
        rows = max(1, CHUNK // (len(positions_BR) * len(tokens_V)))
        for part_BRV, part_BR in zip(noise_BRV.split(rows, 1), positions_BR.split(rows, 1), strict=True):
            part_BRV.copy_(gumbel(keys_B2, part_BR, tokens_V, stream))
        return noise_BRV
    return uniform(keys_B2, positions_BR, tokens_V, stream).neg_().log1p_().neg_().log_().neg_()


class Noise:
    """`gumbel` at the positions after a round's root, sliced like a tensor [B, R, V]; rows are computed when first read.

    Args:
        keys_B2: As in `uniform`.
        root_B: Absolute position of the root.
        tokens_V: As in `uniform`.
        stream: As in `uniform`.
        rows: Number of rows computed together. By default four, for drafts of unknown length, because on a CPU four rows take
            only a third more time than one.
        silent_B: True in batch rows without noise, whose noise is 0; None if there are none.
    """

    def __init__(
        self, keys_B2: Tensor, root_B: Tensor, tokens_V: Tensor, stream: int, rows: int = 4, silent_B: Tensor | None = None
    ) -> None:
        self.silent_B = silent_B
        self.keys_B2, self.root_B, self.tokens_V, self.stream, self.rows = keys_B2, root_B, tokens_V, stream, rows
        self._noise_BRV = torch.empty(len(root_B), 0, len(tokens_V), device=root_B.device)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        known = self._noise_BRV.shape[1]
        if (needed := index[1].stop) > known:
            offsets_R = 1 + torch.arange(known, -(-needed // self.rows) * self.rows, device=self.root_B.device)
            more_BRV = gumbel(self.keys_B2, self.root_B[:, None] + offsets_R, self.tokens_V, self.stream)
            if self.silent_B is not None:
                more_BRV.masked_fill_(self.silent_B[:, None, None], 0.0)
            self._noise_BRV = torch.cat([self._noise_BRV, more_BRV], dim=1) if known else more_BRV
        return self._noise_BRV[index]


AnyNoise: TypeAlias = Noise | Tensor | None
"""Gumbel noise [B, R, V] of a round; None at temperature 0."""
