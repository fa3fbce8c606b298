"""A target of a named shape with random weights, and a drafter that is right by a script: speed without a checkpoint.

The scripted drafter goes through the real round: it pays for a decoder layer and an output head at each level, keeps a cache
of its own, and is verified and committed as any other. Only its choice of token is not its network's: it proposes the target's
own greedy continuation, which is known beforehand, for as many levels as the script accepts in that round, then a wrong token.
It is no drafter kind: nothing trains or exports it.
"""

# B batch  F frontier nodes  V vocabulary  R rounds of the script  S positions of the text

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.drafters.base import Divergence, DraftBatch, Drafter, Frontier, LossOutput, State, StepOutput, TargetHandle
from trainkit.errors import UserError
from trainkit.layers.attention import causal_bias, tree_bias
from trainkit.layers.blocks import Decoder
from trainkit.layers.shape import DecoderShape
from trainkit.models.shape import TargetShape

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, DecoderShape] = {
    "tiny": DecoderShape(512, 64, 128, 2, 4, 2, 16, max_positions=4096),
    "llama3-1b": DecoderShape(
        128256, 2048, 8192, 16, 32, 8, 64, norm_eps=1e-5, rope={**_LLAMA3_ROPE, "factor": 32.0}, max_positions=131072
    ),
    "llama3-8b": DecoderShape(
        128256, 4096, 14336, 32, 32, 8, 128, norm_eps=1e-5, rope=_LLAMA3_ROPE, max_positions=131072, tied=False
    ),
}  # fmt: skip
"""Published sizes of Llama 3.2 1B and Llama 3.1 8B, and one that a test can afford."""


def random_target(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """A decoder of a named shape with random weights, made on the device.

    Weights are drawn so that the next token follows from the last one by a wide margin (each token repeats; with an untied head
    its successor follows): with flat random logits, rounding alone would choose differently for one row and for many.

    Raises:
        UserError: no shape has that name.
    """
    if name not in SHAPES:
        raise UserError(f"synthetic {name!r}: must be one of {', '.join(SHAPES)}")
    with torch.device("meta"):
        decoder = Decoder(SHAPES[name])
    decoder = _materialise(decoder, device, dtype, seed, embed_std=1.0)
    if decoder.lm_head is not None:
        decoder.lm_head.weight.copy_(decoder.embed.weight.roll(1, dims=0))
    return decoder


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """One prompt of random tokens, `count` times: the script is of one text."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist()] * count


def accepted_lengths(tau: float, depth: int, rounds: int = 20) -> list[int]:
    """Drafted tokens to accept in each of `rounds` rounds so that their mean is tau - 1, or `depth` if that is less.

    Raises:
        UserError: tau is below 1.
    """
    if not tau >= 1:
        raise UserError(f"synthetic_tau {tau}: must be at least 1, which is plain decoding")
    mean = min(tau - 1, depth)
    return [int((r + 1) * mean + 1e-9) - int(r * mean + 1e-9) for r in range(rounds)]


class ScriptedDrafter(Drafter):
    """Drafts a known text, right for a scripted number of tokens each round.

    Args:
        target: Sizes of the target.
        num_layers: Decoder layers of the network whose cost each level pays.
        head_rows: Rows of its output head: its draft vocabulary, as if trimmed.
    """

    ROUNDS = 20

    def __init__(self, target: TargetShape, *, num_layers: int = 1, head_rows: int = 32000) -> None:
        super().__init__(target)
        shape = target.decoder
        self.decoder = Decoder(replace(shape, num_layers=num_layers, vocab_size=min(head_rows, shape.vocab_size), tied=True))
        self.register_buffer("text_S", torch.zeros(1, dtype=torch.long), persistent=False)
        self.register_buffer("accepts_R", torch.zeros(self.ROUNDS, dtype=torch.long), persistent=False)
        self.text_S: Tensor
        self.accepts_R: Tensor

    @staticmethod
    def on_device(
        target: TargetShape, device: torch.device, dtype: torch.dtype, seed: int = 1, **config: int
    ) -> ScriptedDrafter:
        """One with random weights, made on the device; give it a text before use."""
        with torch.device("meta"):
            drafter = ScriptedDrafter(target, **config)
        drafter.decoder = _materialise(drafter.decoder, device, dtype, seed)
        drafter.text_S = torch.zeros(1, dtype=torch.long, device=device)
        drafter.accepts_R = torch.zeros(ScriptedDrafter.ROUNDS, dtype=torch.long, device=device)
        return drafter

    def read(self, text: Sequence[int]) -> None:
        """Takes the text it will draft, prompt included. To be called before the first round: graphs keep it."""
        self.text_S = torch.tensor(text, dtype=torch.long, device=self.text_S.device)

    def accept(self, lengths: Sequence[int]) -> None:
        """Sets how many drafted tokens are right in each round, repeating after `ROUNDS`; graphs stay valid."""
        assert len(lengths) == self.ROUNDS
        self.accepts_R.copy_(torch.tensor(lengths))

    def forward(self, batch: DraftBatch, divergence: Divergence) -> LossOutput:
        raise NotImplementedError("a scripted drafter is not trained")

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        self.decoder.reserve_positions(slots)
        return {
            "cache": self.decoder.new_cache(batch_size, slots, device, dtype),
            "round": torch.zeros(batch_size, dtype=torch.long, device=device),
        }

    def prefill(
        self, state: State, tokens_BT: Tensor, positions_BT: Tensor, taps_BTAD: Tensor | None, handle: TargetHandle, span: int
    ) -> None:
        bias = causal_bias(positions_BT, span, state["cache"].dtype)
        self.decoder(self._known(tokens_BT), positions_BT, bias, state["cache"], positions_BT)
        state["round"].zero_()

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        positions_BF, depth = frontier.positions_BF, frontier.depth
        root_B = positions_BF[:, 0] - depth
        bias = tree_bias(root_B, frontier.ancestors_BFM, span, state["cache"].dtype)
        slots = root_B[:, None] + frontier.nodes_F
        hidden_BFD, _ = self.decoder(self._known(frontier.tokens_BF), positions_BF, bias, state["cache"], slots)
        draft_BFK = self.decoder.head(hidden_BFD)
        right_BF = self.text_S[(positions_BF + 1).clamp(max=len(self.text_S) - 1)]
        is_wrong_B = self.accepts_R[state["round"] % self.ROUNDS] <= depth
        choice_BF = (right_BF + is_wrong_B[:, None]) % handle.vocab_size
        logits_BFV = draft_BFK.new_zeros(*choice_BF.shape, handle.vocab_size).scatter_(2, choice_BF[..., None], 1.0)
        return StepOutput(logits_BFV, None, hidden_BFD)

    def commit(
        self, state: State, path_BP: Tensor | None, tokens_BP: Tensor, counts_B: Tensor, root_B: Tensor,
        taps_BPAD: Tensor | None, handle: TargetHandle, span: int,
    ) -> None:  # fmt: skip
        assert path_BP is None, "a script is a chain"
        state["round"].add_(counts_B > 0)

    def step_bytes(self, head_bytes: int) -> int:
        return self.decoder.step_bytes()

    def config(self) -> dict[str, Any]:
        return {"num_layers": self.decoder.shape.num_layers, "head_rows": self.decoder.shape.vocab_size}

    def export(self, folder: Path, dtype: torch.dtype) -> None:
        raise NotImplementedError("a scripted drafter is not exported")

    @classmethod
    def load(cls, folder: Path, target: TargetShape, config: Mapping[str, Any]) -> ScriptedDrafter:
        raise NotImplementedError("a scripted drafter is not exported")

    def _known(self, tokens: Tensor) -> Tensor:
        """Tokens of the small vocabulary that it embeds; which ones does not matter."""
        return tokens % self.decoder.shape.vocab_size


@torch.no_grad()
def _materialise(
    decoder: Decoder, device: torch.device, dtype: torch.dtype, seed: int, embed_std: float | None = None
) -> Decoder:
    """Random weights for a decoder built without any, drawn on the device."""
    decoder = decoder.to(dtype).to_empty(device=device)
    decoder.rope = torch.empty(0, *decoder.rope.shape[1:], device=device, dtype=dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        decoder.initialise()
        if embed_std is not None:
            torch.nn.init.normal_(decoder.embed.weight, std=embed_std)
    return decoder.requires_grad_(False).eval()
