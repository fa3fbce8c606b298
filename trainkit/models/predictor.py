"""The acceptance predictor: how likely the target is to keep a token that a drafter has just proposed.

After SpecDec++ (Huang et al. 2024, arXiv 2405.19715): a small network on the drafter's hidden state. Theirs reads the state
after the draft consumed the token, which is one draft step late: what it would have saved has then been paid. This one reads
the state that proposed the token, and, for the token itself, how it was proposed (`signals`): its score in the draft's own
distribution with the noise it was drawn by, and its runner-up's. So its word is there before the next step.
Left out on purpose: the target's own states, which only some kinds read.
"""

# B batch  F frontier nodes  W children of a node  D hidden  K ids it may propose  C signals  P positions
# H width  R = H + 1  U = H + 2  X = D + 4 inputs

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from trainkit.errors import UserError

FILE = "predictor/model.safetensors"
"""In a folder of its own: outside programs read every safetensors file beside a model as the model's."""
SIGNALS = 5
"""Of a proposed token: log-probability, probability, the best other's log-probability, its probability, the temperature."""

RANKS = 4
"""Proposals of a node that a set has labels of, likeliest first: a chain takes the first, a tree hangs others beside it."""

_FLOOR = -20.0
_EPS = 1e-6


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
    own_BFW = log_p_BFW[..., :width]
    other_BFW = torch.cat([log_p_BFW[..., 1:2], log_p_BFW[..., :1].expand_as(own_BFW)[..., 1:]], dim=-1)
    heat_BFW = torch.full_like(own_BFW, temperature)
    return torch.stack([own_BFW, own_BFW.exp(), other_BFW, other_BFW.exp(), heat_BFW], dim=-1)


class AcceptancePredictor(nn.Module):
    """The logit of "this proposal is accepted, given that those before it were".

    One hidden layer over the normalised state, the signals and the draft position, and a straight line past it, so that
    recalibrating the draft's own probability is a case of it. It is asked once a draft level, and with a small target a second
    layer would take longer than it saves: on 42,703 held-out positions of one drafter two residual blocks gave a log-loss of
    0.410, none of them 0.412, half the width 0.411.

    Args:
        hidden_size: D of the drafter's `StepOutput.hidden_BFD`.
        width: H.
        max_depth: Draft positions told apart; deeper ones count as the last.
        seen: What it was trained on, JSON-able, for the card: temperatures, verification.
    """

    def __init__(self, hidden_size: int, width: int = 64, max_depth: int = 16, seen: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        for name, value in {"hidden_size": hidden_size, "width": width, "max_depth": max_depth}.items():
            if value < 1:
                raise UserError(f"predictor.{name}: {value} must be at least 1")
        self.hidden_size, self.width, self.max_depth = hidden_size, width, max_depth
        self.seen = dict(seen or {})
        # H rows that the hidden layer reads, and one that passes it by
        self.state = nn.Linear(hidden_size, width + 1)
        self.said = nn.Linear(SIGNALS, width + 1, bias=False)
        self.place = nn.Embedding(max_depth, width + 1)
        self.out = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.place.weight, std=0.02)
        with torch.no_grad():  # at first it knows nothing: even chances
            self.out.weight.zero_()
            for weight in (self.state.weight, self.state.bias, self.said.weight):
                weight[-1:].zero_()
            self.place.weight[:, -1].zero_()
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
        place = torch.as_tensor(depth, device=hidden_BFD.device).clamp(max=self.max_depth - 1)
        normed_BFD = F.rms_norm(hidden_BFD.to(dtype), hidden_BFD.shape[-1:], None, _EPS)
        trunk_BFR = self.state(normed_BFD) + self.place(place.expand(hidden_BFD.shape[:2]))
        x = trunk_BFR[:, :, None] + self.said(signals_BFWC.to(dtype))
        return (self.out(F.silu(x[..., :-1])) + x[..., -1:])[..., 0].float()

    def calibrated(self, logits: Tensor, heat: Tensor) -> Tensor:
        """Probabilities of logits, recalibrated as at that temperature."""
        warm = (heat > 0).long()
        return (logits * self.scale[warm] + self.shift[warm]).sigmoid()

    def probability(self, hidden_BFD: Tensor, signals_BFWC: Tensor, depth: int | Tensor) -> Tensor:
        """[B, F, W] recalibrated probabilities; arguments as in `forward`."""
        return self.calibrated(self(hidden_BFD, signals_BFWC, depth), signals_BFWC[..., -1])

    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild it; JSON-able."""
        return {"hidden_size": self.hidden_size, "width": self.width, "max_depth": self.max_depth, "seen": self.seen}


class FoldedPredictor:
    """An `AcceptancePredictor` at one temperature, for decoding: from the noisy logits to its word in eleven operations.

    A draft level of a small model is a few dozen. So it also says which proposals they are, which somebody would have to find.
    All that the temperature settles is in the weights, and so is the straight line past the hidden layer, of which two units
    are enough: x = silu(x) - silu(-x).

    Args:
        predictor: Trained.
        temperature: Of the processing.
    """

    @torch.no_grad()
    def __init__(self, predictor: AcceptancePredictor, temperature: float) -> None:
        warm, D = int(temperature > 0), predictor.hidden_size
        said_RC = predictor.said.weight.float()
        weight_RX = torch.cat([predictor.state.weight.float() * D**0.5, said_RC[:, [0, 2, 1, 3]]], dim=1)
        place_PR = predictor.place.weight.float() + predictor.state.bias.float() + temperature * said_RC[:, -1]
        self.weight_UX = torch.cat([weight_RX, -weight_RX[-1:]])
        self.place_PU = torch.cat([place_PR, -place_PR[:, -1:]], dim=1)
        past_12 = predictor.out.weight.new_tensor([[1.0, -1.0]])
        self.out_1U = torch.cat([predictor.out.weight, past_12], dim=1).float() * predictor.scale[warm]
        self.shift_1 = predictor.shift[warm : warm + 1].float()

    def __call__(self, hidden_BFD: Tensor, noisy_BFK: Tensor, width: int, depth: int) -> tuple[Tensor, Tensor]:
        """Recalibrated probabilities [B, F, W] of each node's best `width` proposals, best first, and their columns.

        Args:
            hidden_BFD: The states that the proposals were made from, in any precision.
            noisy_BFK: Processed draft logits, noise added.
            width: W, at most K.
            depth: Of the nodes proposed from.
        """
        top = noisy_BFK.log_softmax(-1).topk(min(max(width, 2), noisy_BFK.shape[-1]), dim=-1)
        log_p = top.values.clamp(min=_FLOOR)
        if log_p.shape[-1] == 1:
            log_p = F.pad(log_p, (0, 1), value=_FLOOR)
        hidden = hidden_BFD.float()
        # a row that has not been read yet may hold zeros, and no number would outlast all others in what a policy has learnt
        normed = hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_min_(_EPS)
        if width == 1:
            read = torch.cat([normed, log_p, log_p.exp()], dim=-1)[:, :, None]
        else:
            other = torch.cat([log_p[..., 1:2], log_p[..., :1].expand_as(log_p[..., 1:])], dim=-1)
            own_other = torch.stack([log_p, other], dim=-1)[:, :, :width]
            normed = normed[:, :, None].expand(-1, -1, own_other.shape[2], -1)
            read = torch.cat([normed, own_other, own_other.exp()], dim=-1)
        units = F.linear(read, self.weight_UX, self.place_PU[min(depth, len(self.place_PU) - 1)])
        logit = F.linear(F.silu(units), self.out_1U, self.shift_1)
        return logit[..., 0].sigmoid(), top.indices[..., :width]


def load_predictor(folder: Path, config: Mapping[str, Any]) -> AcceptancePredictor:
    """The predictor in a bundle's folder, on the CPU; `config` is its manifest's `runner.predictor`.

    Raises:
        UserError: its weights are missing, of other sizes, or no numbers.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, though the bundle speaks of a predictor; train and export it again")
    try:
        made = AcceptancePredictor(**config)
        made.load_state_dict(load_file(path))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not fit the bundle's settings ({' '.join(str(error).split())[:120]})") from None
    if not all(weight.isfinite().all() for weight in made.state_dict().values()):
        raise UserError(f"{path}: holds weights that are no numbers (its training diverged); train it again")
    return made.eval().requires_grad_(False)
