"""Counter-based noise and the processing of logits: everything random in the runner, without generator state.

Noise is a pure function of (key, position, token id, stream). A key stands for (seed, request); so the same request gives
the same text in any batch slot, at any depth, with any drafter; and a replayed graph draws fresh numbers, since positions
move on.
"""

# B batch  R rows of noise (one a position)  V vocabulary  N nodes

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainkit.errors import UserError

# streams: what each independent draw at one (key, position) is for
CHOICE: Final = 0  # the target's own choice, and under `coupled` the drafter's too
PROPOSAL: Final = 1  # the drafter's choice under `residual`, another in each round
ACCEPT: Final = 2  # acceptance tests under `residual`
RESIDUAL: Final = 3  # draws from what remains after rejections

_TOP: Final = 1 - 2.0**-24


@dataclass(frozen=True)
class Sampling:
    """How logits become a distribution.

    Attributes:
        temperature: Softmax temperature; 0 takes the likeliest token.
        top_k: Keeps the k likeliest tokens; 0 keeps all.
        top_p: Keeps the smallest set of likeliest tokens whose probability reaches p; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be a finite number of at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k}: must be at least 0; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p}: must be above 0 and at most 1; 1 keeps every token")

    @property
    def greedy(self) -> bool:
        """No noise: the likeliest token each time."""
        return self.temperature == 0

    def process(self, logits: Tensor) -> Tensor:
        """float32 logits of the distribution sampled from, -inf where it has no mass; applied to target and draft alike."""
        logits = logits.float()
        if self.greedy:
            return logits
        logits = logits / self.temperature
        if self.top_k and self.top_k < logits.shape[-1]:
            floor = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < floor, float("-inf"))
        if self.top_p < 1:
            # stable, so that of equal tokens the lowest ids stay, on every device
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            probabilities = ordered.softmax(-1)
            cut = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), float("-inf"))
        return logits


def request_keys(seed: int, prompt: int, sample: int = 0) -> tuple[int, int]:
    """Two 32-bit integers (signed) that stand for a seed, a prompt's number in the call and a sample's number."""
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
        tokens_V: Token ids; one hash each.
        stream: Which independent draw this is.
    """
    salt = (stream * 0x9E3779B1 + 0x7F4A7C15) & 0x7FFFFFFF
    rows = mix(mix(positions_BR.int() ^ keys_B2[:, :1]) ^ salt)[..., None]
    h = mix(mix(tokens_V.int() ^ rows) + keys_B2[:, 1:, None] ^ rows * 0x27D4EB2F)
    v = ((h.long() & 0xFFFFFFFF).float() + 0.5) * 2.0**-32
    return v.clamp(max=_TOP)


def gumbel(keys_B2: Tensor, positions_BR: Tensor, tokens_V: Tensor, stream: int) -> Tensor:
    """[B, R, V] float32 Gumbel noise, -log(-log1p(-v)): precise where it is large, which decides, and never infinite."""
    return -(-torch.log1p(-uniform(keys_B2, positions_BR, tokens_V, stream))).log()


class Noise:
    """`gumbel` at the positions after a round's root, sliced as a tensor [B, R, V]; rows are made when first asked for.

    Four at a time, for who does not know how many: on a CPU one takes three quarters of the time of four.

    Args:
        keys_B2: As in `uniform`.
        root_B: The root's position.
        tokens_V: As in `uniform`.
        stream: Likewise.
    """

    def __init__(self, keys_B2: Tensor, root_B: Tensor, tokens_V: Tensor, stream: int) -> None:
        self.keys_B2, self.root_B, self.tokens_V, self.stream = keys_B2, root_B, tokens_V, stream
        self.made_BRV = torch.empty(len(root_B), 0, len(tokens_V), device=root_B.device)

    def __getitem__(self, index: tuple[slice, slice]) -> Tensor:
        made = self.made_BRV.shape[1]
        if (needed := index[1].stop) > made:
            more_BRV = self._rows(made, -(-needed // 4) * 4)
            self.made_BRV = torch.cat([self.made_BRV, more_BRV], dim=1) if made else more_BRV
        return self.made_BRV[index]

    def first(self, rows: int) -> Tensor:
        """So many rows and no more."""
        return self._rows(0, rows)

    def _rows(self, start: int, stop: int) -> Tensor:
        places_R = 1 + torch.arange(start, stop, device=self.root_B.device)
        return gumbel(self.keys_B2, self.root_B[:, None] + places_R, self.tokens_V, self.stream)
