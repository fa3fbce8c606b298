"""The acceptance predictor: how likely the target is to keep a token that a drafter has just proposed.

After SpecDec++ (Huang et al. 2024, arXiv 2405.19715): residual blocks on the drafter's hidden state. Theirs reads the state
after the draft consumed the token, which is one draft step late: what it would have saved has then been paid. This one reads
the state that proposed the token, and, for the token itself, how it was proposed (`signals`): its score in the draft's own
distribution with the noise it was drawn by, and its runner-up's. So its word is there before the next step.
Left out on purpose: the target's own states, which only some kinds read.
"""

# B batch  F frontier nodes  W children of a node  D hidden  K ids it may propose  C signals  H width

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.layers.heads import ResidualBlock

FILE = "predictor/model.safetensors"
"""In a folder of its own: outside programs read every safetensors file beside a model as the model's."""
SIGNALS = 5
"""Of a proposed token: log-probability, probability, the best other's log-probability, its probability, the temperature."""

RANKS = 4
"""Proposals of a node that a set has labels of, likeliest first: a chain takes the first, a tree hangs others beside it."""

_FLOOR = -20.0


def signals(noisy_BFK: Tensor, width: int, temperature: float) -> Tensor:
    """[B, F, W, C] what a level says of each node's best `width` proposals, best first; float32.

    Probabilities are those of softmax(log q + G) with the noise G that the tokens were picked by (none at temperature 0): given
    that noise, log q alone is a chance that has been drawn already. The best other of the first is the second, of all others
    the first.

    Args:
        noisy_BFK: Processed draft logits, noise added.
        width: W, at most K.
        temperature: Of the processing.
    """
    top_BFW = noisy_BFK.topk(min(max(width, 2), noisy_BFK.shape[-1]), dim=-1).values
    log_p_BFW = (top_BFW - noisy_BFK.logsumexp(-1, keepdim=True)).clamp(min=_FLOOR)
    if log_p_BFW.shape[-1] == 1:  # a vocabulary of one
        log_p_BFW = torch.cat([log_p_BFW, torch.full_like(log_p_BFW, _FLOOR)], dim=-1)
    if width == 1:  # a chain's, and there every operation counts
        both_BF2 = log_p_BFW[..., :2]
        return F.pad(torch.stack([both_BF2, both_BF2.exp()], dim=-1).flatten(2), (0, 1), value=temperature)[:, :, None]
    own_BFW = log_p_BFW[..., :width]
    other_BFW = torch.cat([log_p_BFW[..., 1:2], log_p_BFW[..., :1].expand_as(own_BFW)[..., 1:]], dim=-1)
    heat_BFW = torch.full_like(own_BFW, temperature)
    return torch.stack([own_BFW, own_BFW.exp(), other_BFW, other_BFW.exp(), heat_BFW], dim=-1)


class AcceptancePredictor(nn.Module):
    """The logit of "this proposal is accepted, given that those before it were".

    Args:
        hidden_size: D of the drafter's `StepOutput.hidden_BFD`.
        width: H.
        num_layers: Residual blocks.
        max_depth: Draft positions told apart; deeper ones count as the last.
        seen: What it was trained on, JSON-able, for the card: temperatures, verification.
    """

    def __init__(
        self, hidden_size: int, width: int = 64, num_layers: int = 2, max_depth: int = 16, seen: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "width": width, "num_layers": num_layers, "max_depth": max_depth}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"predictor.{name}: {value} must be at least 1")
        self.hidden_size, self.width, self.num_layers, self.max_depth = hidden_size, width, num_layers, max_depth
        self.seen = dict(seen or {})
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.state = nn.Linear(hidden_size, width)
        self.said = nn.Linear(SIGNALS, width, bias=False)
        self.place = nn.Embedding(max_depth, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(num_layers)))
        self.out = nn.Linear(width, 1)
        self.straight = nn.Linear(SIGNALS, 1, bias=False)  # so that recalibrating the draft's own probability is a case of it
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.straight.weight)
        nn.init.normal_(self.place.weight, std=0.02)
        # recalibration, at temperature 0 and above it: logit -> scale * logit + shift
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("shift", torch.zeros(2))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, hidden_BFD: Tensor, signals_BFWC: Tensor, depth: int | Tensor) -> Tensor:
        """[B, F, W] uncalibrated logits.

        Args:
            hidden_BFD: The states that the proposals were made from.
            signals_BFWC: From `signals`.
            depth: Of the nodes proposed from, 0 for the root; an integer, or one for each node [B, F].
        """
        dtype = self.state.weight.dtype
        signals_BFWC = signals_BFWC.to(dtype)
        place = torch.as_tensor(depth, device=hidden_BFD.device).clamp(max=self.max_depth - 1)
        place_BFH = self.place(place.expand(hidden_BFD.shape[:2]))
        trunk_BFH = self.state(self.norm(hidden_BFD.to(dtype))) + place_BFH
        x = self.blocks(trunk_BFH[:, :, None] + self.said(signals_BFWC))
        return (self.out(x) + self.straight(signals_BFWC))[..., 0].float()

    def calibrated(self, logits: Tensor, heat: Tensor) -> Tensor:
        """Probabilities of logits, recalibrated as at that temperature."""
        warm = (heat > 0).long()
        return (logits * self.scale[warm] + self.shift[warm]).sigmoid()

    def probability(self, hidden_BFD: Tensor, signals_BFWC: Tensor, depth: int | Tensor) -> Tensor:
        """[B, F, W] recalibrated probabilities; arguments as in `forward`."""
        return self.calibrated(self(hidden_BFD, signals_BFWC, depth), signals_BFWC[..., -1])

    @torch.no_grad()
    def folded(self) -> FoldedPredictor:
        """What decodes: the same word in a third of the operations."""
        scale_2, shift_2 = self.scale.float(), self.shift.float()
        return FoldedPredictor(
            eps=self.norm.eps or 0.0,
            state_HD=(self.state.weight * self.norm.weight).float(),
            place_PH=(self.place.weight + self.state.bias).float(),
            said_HC=self.said.weight.float(),
            blocks=[(block.linear.weight.float(), block.linear.bias.float()) for block in self.blocks],
            out_2H=self.out.weight.float() * scale_2[:, None],
            out_2=self.out.bias.float() * scale_2 + shift_2,
            straight_2C=self.straight.weight.float() * scale_2[:, None],
        )

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild it; JSON-able."""
        return {
            "hidden_size": self.hidden_size, "width": self.width, "num_layers": self.num_layers, "max_depth": self.max_depth,
            "seen": self.seen,
        }  # fmt: skip


@dataclass(frozen=True)
class FoldedPredictor:
    """An `AcceptancePredictor` with all that is fixed multiplied out: a draft step of a small model takes hardly longer.

    Attributes:
        eps: Of the norm.
        state_HD: Projection of the state, the norm's weight in it.
        place_PH: Biases by draft position.
        said_HC: Projection of the signals.
        blocks: Weight and bias of each.
        out_2H, out_2, straight_2C: What gives the logit, recalibrated as at temperature 0 and as above it.
    """

    eps: float
    state_HD: Tensor
    place_PH: Tensor
    said_HC: Tensor
    blocks: Sequence[tuple[Tensor, Tensor]]
    out_2H: Tensor
    out_2: Tensor
    straight_2C: Tensor

    def __call__(self, hidden_BFD: Tensor, signals_BFWC: Tensor, depth: int, warm: bool) -> Tensor:
        """[B, F, W] recalibrated probabilities.

        Args:
            hidden_BFD: The states that the proposals were made from, in any precision.
            signals_BFWC: From `signals`.
            depth: Of the nodes proposed from.
            warm: Whether the temperature is above 0.
        """
        normed_BFD = F.rms_norm(hidden_BFD.float(), hidden_BFD.shape[-1:], None, self.eps)
        trunk_BFH = F.linear(normed_BFD, self.state_HD, self.place_PH[min(depth, len(self.place_PH) - 1)])
        x = trunk_BFH[:, :, None] + F.linear(signals_BFWC, self.said_HC)
        for weight_HH, bias_H in self.blocks:
            x = x + F.silu(F.linear(x, weight_HH, bias_H))
        row = slice(int(warm), int(warm) + 1)
        logit = F.linear(x, self.out_2H[row], self.out_2[row]) + F.linear(signals_BFWC, self.straight_2C[row])
        return logit[..., 0].sigmoid()


def load_predictor(folder: Path, config: Mapping[str, Any]) -> AcceptancePredictor:
    """The predictor in a bundle's folder, on the CPU; `config` is its manifest's `runner.predictor`.

    Raises:
        UserError: its weights are missing or of other sizes.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, though the bundle speaks of a predictor; train and export it again")
    try:
        made = AcceptancePredictor(**config)
        made.load_state_dict(load_file(path))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not fit the bundle's settings ({' '.join(str(error).split())[:120]})") from None
    return made.eval().requires_grad_(False)
