"""Models of the runner's tests: random decoders in memory, and toy models whose distributions are given by a table."""

# B batch  T positions  V vocabulary  D hidden  F frontier nodes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.drafters.base import Drafter, Frontier, State, StepOutput, TargetHandle
from trainkit.drafters.lm import LMDraft
from trainkit.layers.blocks import Decoder
from trainkit.layers.shape import DecoderShape
from trainkit.layers.visible import Visible
from trainkit.models.predictor import AcceptancePredictor
from trainkit.models.shape import TargetShape
from trainkit.runner import Runner

SHAPE = DecoderShape(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, tied=True
)
END = 7
SIBLINGS = ((0,), (1,), (0, 0), (0, 1))
BUSHY = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0))


def random_decoder(shape: DecoderShape = SHAPE, std: float = 0.35) -> Decoder:
    """Weights wide enough that distributions are peaked and differ by context; drawn from torch's generator."""
    decoder = Decoder(shape).requires_grad_(False).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.normal_(1.0, 0.2)
        else:
            parameter.normal_(0.0, std)
    return decoder


def near(decoder: Decoder, noise: float, num_layers: int | None = None) -> Decoder:
    """A copy of the first layers with noise on the weights: a draft that agrees often, but not always."""
    shape = replace(decoder.shape, num_layers=num_layers or decoder.shape.num_layers)
    copy = Decoder(shape).requires_grad_(False).eval()
    theirs = decoder.state_dict()
    copy.load_state_dict({name: theirs[name] + noise * torch.randn_like(theirs[name]) for name in copy.state_dict()})
    return copy


def lm_draft(shape: TargetShape, decoder: Decoder) -> LMDraft:
    """A draft of kind lm with this decoder."""
    draft = LMDraft(shape, num_layers=decoder.shape.num_layers, init="scratch")
    draft.decoder = decoder
    return draft


def pair(
    shape: DecoderShape = SHAPE,
    noise: float | None = 0.03,
    draft_layers: int | None = None,
    ends: Sequence[int] = (END,),
    max_batch: int = 8,
    max_len: int = 96,
    std: float = 0.35,
) -> Runner:
    """A random target with a draft near it (`noise` None: no drafter)."""
    target = random_decoder(shape, std)
    full_shape = TargetShape(shape, tuple(ends))
    draft = None if noise is None else lm_draft(full_shape, near(target, noise, draft_layers))
    return Runner(target, draft, full_shape, max_batch=max_batch, max_len=max_len)


def predicting(runner: Runner, max_depth: int = 16) -> AcceptancePredictor:
    """An acceptance predictor with random weights, large enough that its estimates differ from the draft's probabilities."""
    assert runner.drafter is not None
    predictor = AcceptancePredictor(runner.drafter.target.decoder.hidden_size, width=8, max_depth=max_depth)
    for weight in (*predictor.parameters(), predictor.scale, predictor.shift):
        nn.init.normal_(weight, std=0.5)
    return predictor.eval().requires_grad_(False)


def ragged_prompts(count: int, vocab_size: int = 48, longest: int = 21) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens."""
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    return [torch.randint(0, vocab_size, (n,)).tolist() for n in lengths]


class TableTarget(nn.Module):
    """A target whose logits are a table of (position modulo phases, last token); it has the parts of `Decoder` that rounds use.

    Its cache keeps the tokens read, and the last token is looked up there: the highest slot that a node sees, so that a wrong
    slot, mask or compaction changes the distribution.
    """

    def __init__(self, logits_PVV: Tensor) -> None:
        super().__init__()
        V = logits_PVV.shape[-1]
        self.shape = replace(SHAPE, vocab_size=V, hidden_size=V)
        self.embed = nn.Embedding.from_pretrained(torch.eye(V))
        self.norm = nn.Identity()
        self.table = nn.Parameter(logits_PVV.float(), requires_grad=False)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def reserve_positions(self, length: int) -> None:
        pass

    def new_cache(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch_size, 1, 1, slots, 1, device=device, dtype=dtype)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        visible: Visible,
        cache: Tensor,
        slots_BT: Tensor,
        taps: Any = (),
        packing: None = None,
        span: int = 0,
    ) -> tuple[Tensor, None]:
        row_BS = cache[:, 0, 0, :, 0]
        row_BS.scatter_(1, slots_BT, tokens_BT.to(row_BS.dtype))
        bias_BTS = visible.bias(tokens_BT.shape[1], span, torch.float32)
        highest_BT = torch.where(bias_BTS == 0, torch.arange(bias_BTS.shape[2]), -1).amax(-1)
        last_BT = row_BS.gather(1, highest_BT).long()
        return self.table[positions_BT % self.table.shape[0], last_BT], None


class TableDraft(Drafter):
    """A drafter whose logits are such a table too."""

    def __init__(self, target: TargetShape, logits_PVV: Tensor) -> None:
        super().__init__(target)
        self.table = nn.Parameter(logits_PVV.float(), requires_grad=False)

    def forward(self, batch: Any, divergence: Any) -> Any:
        raise NotImplementedError

    def init_state(self, batch_size: int, slots: int, device: torch.device, dtype: torch.dtype) -> State:
        return {}

    def prefill(self, state: State, chunk: Any, handle: TargetHandle, span: int) -> None:
        pass

    def step(self, state: State, frontier: Frontier, handle: TargetHandle, span: int) -> StepOutput:
        logits = self.table[frontier.positions_BF % self.table.shape[0], frontier.tokens_BF]
        return StepOutput(logits, None, logits)

    def commit(self, state: State, *_: Any) -> None:
        pass

    def config(self) -> dict[str, Any]:
        return {}

    def export(self, folder: Any, dtype: torch.dtype) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Any, target: TargetShape, config: Any) -> TableDraft:
        raise NotImplementedError


def table_runner(target_PVV: Tensor, draft_PVV: Tensor, max_batch: int, max_len: int) -> Runner:
    """The real rounds over two tables of logits, [position modulo P, last token, next token]."""
    target = TableTarget(target_PVV)
    shape = TargetShape(target.shape, ())
    return Runner(target, TableDraft(shape, draft_PVV), shape, max_batch=max_batch, max_len=max_len)


def noisy_16_bit_pair(device: torch.device, dtype: torch.dtype, max_batch: int = 8) -> Runner:
    """A 16-bit target whose likeliest tokens have close scores, so that different rounding changes texts; and a draft.

    On a CPU it is small, because Triton's interpreter runs it.
    """
    torch.manual_seed(5)
    sizes = (2048, 256, 512, 4, 8, 2, 64) if device.type == "cuda" else (512, 64, 128, 2, 4, 2, 16)
    shape = DecoderShape(*sizes, max_positions=2048)
    target = random_decoder(shape, 0.07 if device.type == "cuda" else 0.14)
    draft = lm_draft(TargetShape(shape), near(target, 0.004)).to(device=device, dtype=dtype)
    return Runner(target.to(device=device, dtype=dtype), draft, TargetShape(shape), max_batch=max_batch, max_len=512)
