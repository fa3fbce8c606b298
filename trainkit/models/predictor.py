"""The acceptance predictor: the probability that the target accepts a token that a drafter has just proposed.

After SpecDec++ (Huang et al. 2024, arXiv 2405.19715): a small network on the drafter's hidden state. SpecDec++ reads the state
after the draft consumed the token; by then the draft step that could have been saved has run. This predictor reads the state
that proposed the token and, for the token itself, `signals` of the proposal: its score in the draft distribution with the noise
it was drawn by, and the runner-up's score. So its probability is known before the next draft step.
Left out on purpose: the target's hidden states, which only some kinds read.
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
"""Path in a bundle; a folder of its own, because other programs read every safetensors file beside a model as its weights."""
SIGNALS = 5
"""C: log-probability and probability of the proposed token, log-probability and probability of the best other, temperature."""
RANKS = 4
"""Proposals of a node that have labels in a training set, likeliest first: a chain takes the first, a tree also the others."""

_FLOOR = -20.0
_EPS = 1e-6


def signals(noisy_BFK: Tensor, width: int, temperature: float | Tensor) -> Tensor:
    """[B, F, W, C] float32 inputs of the predictor for the best `width` proposals of each node, best first.

    Probabilities are those of softmax(log q + G), with the noise G that the tokens were drawn by (none at temperature 0): once
    the noise is known, the draw is decided, and log q alone no longer tells its outcome. The best other token is the second for
    the first proposal, and the first for all others.

    Args:
        noisy_BFK: Processed draft logits plus noise.
        width: W, at most K.
        temperature: Sampling temperature of the draft logits, or one for each row [B, 1, 1].
    """
    log_p_BFW2, _ = _scores(noisy_BFK, width)
    signals_BFWC = F.pad(torch.stack([log_p_BFW2, log_p_BFW2.exp()], dim=-1).flatten(-2), (0, 1))
    signals_BFWC[..., -1] = temperature
    return signals_BFWC


def _scores(noisy_BFK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, F, W, 2] of the best W proposals and of the best other of each; columns [B, F, W] of them."""
    top = noisy_BFK.log_softmax(-1).topk(min(max(width, 2), noisy_BFK.shape[-1]), dim=-1)
    log_p = top.values.clamp(min=_FLOOR)
    if log_p.shape[-1] == 1:  # a vocabulary of one token
        log_p = F.pad(log_p, (0, 1), value=_FLOOR)
    if width == 1:
        return log_p[:, :, None], top.indices[..., :1]
    other = torch.cat([log_p[..., 1:2], log_p[..., :1].expand_as(log_p[..., 1:])], dim=-1)
    return torch.stack([log_p, other], dim=-1)[:, :, :width], top.indices[..., :width]


class AcceptancePredictor(nn.Module):
    """Predicts the logit of "the target accepts this proposal, given that it accepted all proposals before it".

    One hidden layer over the normalised hidden state, the signals and the draft position, plus a linear path around it, which
    alone can recalibrate the draft's own probability. The predictor runs at every draft level, and with a small target a second
    layer would cost more time than it saves: on 42,703 held-out positions of one drafter two residual blocks gave a log-loss of
    0.410, none gave 0.412, half the width gave 0.411.

    Args:
        hidden_size: D of the drafter's `StepOutput.hidden_BFD`.
        width: H.
        max_depth: Number of draft positions with an embedding of their own; deeper ones use the last.
        seen: Training settings for the card, JSON-able: temperatures, verification.
    """

    def __init__(self, hidden_size: int, width: int = 64, max_depth: int = 16, seen: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        for name, value in {"hidden_size": hidden_size, "width": width, "max_depth": max_depth}.items():
            if value < 1:
                raise UserError(f"predictor.{name}: {value} must be at least 1")
        self.hidden_size, self.width, self.max_depth = hidden_size, width, max_depth
        self.seen = dict(seen or {})
        # Of the R rows H feed the hidden layer, and the last is the linear path. Weight files fix the names `said` (signals)
        # and `place` (draft position).
        self.state = nn.Linear(hidden_size, width + 1)
        self.said = nn.Linear(SIGNALS, width + 1, bias=False)
        self.place = nn.Embedding(max_depth, width + 1)
        self.out = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.place.weight, std=0.02)
        with torch.no_grad():  # an untrained predictor gives probability 1/2
            self.out.weight.zero_()
            for weight in (self.state.weight, self.state.bias, self.said.weight):
                weight[-1:].zero_()
            self.place.weight[:, -1].zero_()
        # recalibration, logit -> scale * logit + shift; the first entry for temperature 0, the second for any other
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("shift", torch.zeros(2))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, hidden_BFD: Tensor, signals_BFWC: Tensor, depth: int | Tensor) -> Tensor:
        """[B, F, W] logits before recalibration.

        Args:
            hidden_BFD: Draft hidden states that made the proposals.
            signals_BFWC: Output of `signals`.
            depth: Depth of the proposing nodes, 0 for the root; an integer, or one value per node [B, F].
        """
        dtype = self.state.weight.dtype
        position = torch.as_tensor(depth, device=hidden_BFD.device).clamp(max=self.max_depth - 1)
        normed_BFD = F.rms_norm(hidden_BFD.to(dtype), hidden_BFD.shape[-1:], None, _EPS)
        trunk_BFR = self.state(normed_BFD) + self.place(position.expand(hidden_BFD.shape[:2]))
        x_BFWR = trunk_BFR[:, :, None] + self.said(signals_BFWC.to(dtype))
        return (self.out(F.silu(x_BFWR[..., :-1])) + x_BFWR[..., -1:])[..., 0].float()

    def calibrated(self, logits: Tensor, temperature: Tensor) -> Tensor:
        """Probabilities of the logits after recalibration for their sampling temperatures."""
        sampled = (temperature > 0).long()
        return (logits * self.scale[sampled] + self.shift[sampled]).sigmoid()

    def probability(self, hidden_BFD: Tensor, signals_BFWC: Tensor, depth: int | Tensor) -> Tensor:
        """[B, F, W] recalibrated probabilities; arguments as in `forward`."""
        return self.calibrated(self(hidden_BFD, signals_BFWC, depth), signals_BFWC[..., -1])

    def config(self) -> dict[str, Any]:
        """JSON-able constructor arguments that rebuild the predictor."""
        return {"hidden_size": self.hidden_size, "width": self.width, "max_depth": self.max_depth, "seen": self.seen}


class FoldedPredictor:
    """An `AcceptancePredictor` at one temperature, for decoding: from noisy draft logits to probabilities in eleven operations.

    A draft level of a small model has only a few dozen operations. For the same reason the predictor also returns the
    proposals, which it has to find anyway. Everything that depends on the temperature alone is folded into the weights. The
    linear path becomes two more hidden units, because x = silu(x) - silu(-x).

    Args:
        predictor: Trained predictor.
        temperature: Sampling temperature of the draft logits.
    """

    @torch.no_grad()
    def __init__(self, predictor: AcceptancePredictor, temperature: float) -> None:
        sampled, D = int(temperature > 0), predictor.hidden_size
        signals_RC = predictor.said.weight.float()
        weight_RX = torch.cat([predictor.state.weight.float() * D**0.5, signals_RC[:, [0, 2, 1, 3]]], dim=1)
        bias_PR = predictor.place.weight.float() + predictor.state.bias.float() + temperature * signals_RC[:, -1]
        self.weight_UX = torch.cat([weight_RX, -weight_RX[-1:]])
        self.bias_PU = torch.cat([bias_PR, -bias_PR[:, -1:]], dim=1)
        linear_12 = predictor.out.weight.new_tensor([[1.0, -1.0]])
        self.out_1U = torch.cat([predictor.out.weight, linear_12], dim=1).float() * predictor.scale[sampled]
        self.shift_1 = predictor.shift[sampled : sampled + 1].float()

    def __call__(self, hidden_BFD: Tensor, noisy_BFK: Tensor, width: int, depth: int) -> tuple[Tensor, Tensor]:
        """Recalibrated probabilities [B, F, W] of the best `width` proposals of each node, best first, and their columns.

        Arguments as in `signals` and `AcceptancePredictor.forward`; hidden states in any precision.
        """
        log_p_BFW2, columns_BFW = _scores(noisy_BFK, width)
        hidden = hidden_BFD.float()
        # The state of a row before its prefill may be zero; 0/0 = NaN would stay in a policy's running means for good.
        normed = hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).clamp_min_(_EPS)
        normed_BFWD = normed[:, :, None].expand(-1, -1, log_p_BFW2.shape[2], -1)
        x_BFWX = torch.cat([normed_BFWD, log_p_BFW2, log_p_BFW2.exp()], dim=-1)
        units_BFWU = F.linear(x_BFWX, self.weight_UX, self.bias_PU[min(depth, len(self.bias_PU) - 1)])
        logit = F.linear(F.silu(units_BFWU), self.out_1U, self.shift_1)
        return logit[..., 0].sigmoid(), columns_BFW


def load_predictor(folder: Path, config: Mapping[str, Any]) -> AcceptancePredictor:
    """The predictor in a bundle's folder, on the CPU.

    Args:
        folder: Folder of the bundle.
        config: `runner.predictor` of its manifest.

    Raises:
        UserError: its weights are missing, of other sizes, or not finite.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, though the bundle lists a predictor; train and export it again")
    try:
        predictor = AcceptancePredictor(**config)
        predictor.load_state_dict(load_file(path))
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{path}: does not fit the bundle's settings ({' '.join(str(error).split())[:120]})") from None
    if not all(weight.isfinite().all() for weight in predictor.state_dict().values()):
        raise UserError(f"{path}: holds weights that are not finite (its training diverged); train it again")
    return predictor.eval().requires_grad_(False)
