"""Speed without a checkpoint: a target of a named shape with random weights, and drafters with a scripted acceptance.

A scripted drafter runs the network of a drafter kind at every level, keeps that kind's state, and is verified and committed
like any drafter. Only the token choice is not the network's: it proposes the target's greedy continuation, which is known in
advance, for as many levels as the script accepts in that round, and then a wrong token. In a tree these are the first children;
the others are wrong. It is not a drafter kind: it cannot be trained or exported.
"""

# B batch  F frontier nodes  V vocabulary  R rounds of the script  S positions of the text

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from trainkit.drafters.base import Accepted, Chunk, Drafter, Frontier, State, StepOutput, load_kind
from trainkit.errors import UserError
from trainkit.layers.blocks import Decoder
from trainkit.layers.shape import DecoderShape
from trainkit.models.shape import TargetHandle, TargetShape


def _llama3(*sizes: int, rope_factor: float, tied: bool) -> DecoderShape:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": rope_factor, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return DecoderShape(128256, *sizes, norm_eps=1e-5, rope=rope, max_positions=131072, tied=tied)


SHAPES: dict[str, DecoderShape] = {
    "tiny": DecoderShape(512, 64, 128, 2, 4, 2, 16, max_positions=4096),
    "llama3-1b": _llama3(2048, 8192, 16, 32, 8, 64, rope_factor=32.0, tied=True),
    "llama3-8b": _llama3(4096, 14336, 32, 32, 8, 128, rope_factor=8.0, tied=False),
}
"""Published sizes of Llama 3.2 1B and Llama 3.1 8B, and a small one for tests."""


def random_target(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """A decoder of a named shape with random weights, created on the device.

    The last token determines the next one by a wide margin (the token repeats; with an untied head the next id follows). With
    flat random logits, rounding alone would choose different tokens for one row and for many.

    Raises:
        UserError: unknown shape.
    """
    if name not in SHAPES:
        raise UserError(f"synthetic {name!r}: must be one of {', '.join(SHAPES)}")
    with torch.device("meta"):
        decoder = Decoder(SHAPES[name])
    decoder = decoder.to(dtype).to_empty(device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        decoder.initialise()
        torch.nn.init.normal_(decoder.embed.weight, std=1.0)
        if decoder.lm_head is not None:
            decoder.lm_head.weight.copy_(decoder.embed.weight.roll(1, dims=0))
    return decoder.requires_grad_(False).eval()


def random_prompts(vocab_size: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` copies of one prompt of random tokens, because the script holds a single text."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist()] * count


def accepted_lengths(tau: float, depth: int, rounds: int = 20) -> list[int]:
    """Number of drafted tokens to accept in each of `rounds` rounds; their mean is tau - 1, at most `depth`.

    Raises:
        UserError: tau is below 1.
    """
    if not tau >= 1:
        raise UserError(f"synthetic_tau {tau}: must be at least 1, the tau of plain decoding")
    mean = min(tau - 1, depth)
    return [int((r + 1) * mean + 1e-9) - int(r * mean + 1e-9) for r in range(rounds)]


class ScriptedDrafter(Drafter):
    """Drafts a known text, correct for a scripted number of tokens each round, at the cost of the drafter `inner`.

    The network of `inner` runs, and its token choices are discarded.
    """

    ROUNDS = 20

    def __init__(self, target: TargetShape, inner: Drafter) -> None:
        super().__init__(target)
        self.inner, self.taps = inner, inner.taps
        self.max_depth, self.max_width = inner.max_depth, inner.max_width
        device = next(inner.parameters()).device
        self.text_S = torch.zeros(1, dtype=torch.long, device=device)
        self.accepts_R = torch.zeros(self.ROUNDS, dtype=torch.long, device=device)

    @staticmethod
    def build(
        kind: str, target: TargetShape, device: torch.device, dtype: torch.dtype, head_rows: int = 32000
    ) -> ScriptedDrafter:
        """A scripted drafter at the cost of a kind with default settings and random weights; call `set_text` before use.

        A kind whose vocabulary can be trimmed gets `head_rows` tokens.

        Raises:
            UserError: unknown kind.
        """
        kind_class = load_kind(kind)
        trims = "draft_vocab" in inspect.signature(kind_class).parameters and head_rows < target.decoder.vocab_size
        options = {"draft_vocab": list(range(head_rows))} if trims else {}
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
            torch.manual_seed(1)
            inner = kind_class(target, **options)
        return ScriptedDrafter(target, inner.to(dtype).requires_grad_(False).eval())

    def set_text(self, text: Sequence[int]) -> None:
        """Sets the text to draft, prompt included, before the first round: captured graphs keep the tensor."""
        self.text_S = torch.tensor(text, dtype=torch.long, device=self.text_S.device)

    def set_accepted(self, lengths: Sequence[int]) -> None:
        """Sets how many drafted tokens are correct in each round, repeating after `ROUNDS` rounds; graphs stay valid."""
        assert len(lengths) == self.ROUNDS
        self.accepts_R.copy_(torch.tensor(lengths))

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        count_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        return {**self.inner.init_state(batch_size, slots, device, dtype), "round": count_B}

    def prefill(self, state: State, chunk: Chunk, handle: TargetHandle, span: int) -> None:
        self.inner.prefill(state, chunk, handle, span)
        state["round"].zero_()

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        out = self.inner.step(state, frontier, handle, span)
        correct_BF = self.text_S[(frontier.positions_BF + 1).clamp(max=len(self.text_S) - 1)]
        is_wrong_B = self.accepts_R[state["round"] % self.ROUNDS] <= frontier.depth
        choice_BF = (correct_BF + is_wrong_B[:, None]) % handle.vocab_size
        logits_BFV = out.logits_BFK.new_zeros(*choice_BF.shape, handle.vocab_size).scatter_(2, choice_BF[..., None], 1.0)
        return StepOutput(logits_BFV, None, out.hidden_BFD)

    def commit(self, state: State, accepted: Accepted, handle: TargetHandle, span: int) -> None:
        self.inner.commit(state, accepted, handle, span)
        state["round"].add_(accepted.counts_B > 0)

    def step_bytes(self, head_bytes: int) -> int:
        return self.inner.step_bytes(head_bytes)

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("a scripted drafter can be neither trained nor exported")

    forward = config = export = load = _refuse
