"""The mismatch between sampler and trainer: two programs, or two precisions, give the same tokens other log-probabilities.

With c = log(old / sampler) per token: `old` as the trainer computes it, `sampler` as the runner reported it, both under the
policy and the temperature that drew the tokens. In float32 |c| is below 1e-5, and nothing needs a correction; in bfloat16 its
mean is near 0.01. Stale or half-copied weights, another temperature, or a shifted mask make it much larger.
"""

# R responses  T response tokens, padded at the end

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trainkit.errors import UserError
from trainkit.rl.algorithms.base import MAX_LOG_RATIO, k3

Kind = Literal["none", "auto", "token_truncate", "sequence_truncate", "sequence_mask"]
KINDS: tuple[Kind, ...] = ("none", "auto", "token_truncate", "sequence_truncate", "sequence_mask")
AUTO_K3 = 1e-4
"""Mean k3 in nats per token up to which `auto` corrects nothing."""


def mismatch(old_RT: Tensor, sampler_RT: Tensor, mask_RT: Tensor, cap: float = 2.0) -> dict[str, Tensor]:
    """Sums over the tokens that count; add them over micro-batches and ranks, then divide by `tokens`.

    `tokens` (their number), `abs` (|c|, nats), `k3` (estimate of KL(sampler || trainer), nats), and the numbers of tokens with
    a ratio exp(c) above `cap` (`token_capped`), and of those whose response's ratio exp(sum c) is (`sequence_capped`).
    """
    log_ratio_RT = (old_RT - sampler_RT).detach() * mask_RT
    token_RT, sequence_R1 = log_ratio_RT.exp(), log_ratio_RT.sum(-1, keepdim=True).exp()
    return {
        "tokens": mask_RT.sum(),
        "abs": log_ratio_RT.abs().sum(),
        "k3": (k3(log_ratio_RT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) * mask_RT).sum(),
        "token_capped": ((token_RT > cap) * mask_RT).sum(),
        "sequence_capped": ((sequence_R1 > cap) * mask_RT).sum(),
    }


def choose(kind: Kind, k3_mean: float) -> Kind:
    """The correction of a step by its mean k3 over all ranks: `auto` is `none` up to 1e-4 nats, else `token_truncate`."""
    if kind != "auto":
        return kind
    return "none" if k3_mean <= AUTO_K3 else "token_truncate"


def correction(kind: Kind, cap: float, old_RT: Tensor, sampler_RT: Tensor, mask_RT: Tensor) -> Tensor | None:
    """Factor [R, T] of each token's policy loss, without gradient, which makes up for the sampler's distribution; None for 1.

    `token_truncate`: min(exp(c), cap) of the token. `sequence_truncate`: min(exp(sum c), cap) of the response, for all its
    tokens. `sequence_mask`: the response's ratio, or 0 if it is above `cap`. The log of a response's ratio spreads with the
    root of its length, so in bfloat16 the sequence kinds cut long responses. Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"; the kinds as in TRL.

    Args:
        kind: The correction, not `auto`; see `choose`.
        cap: Largest factor, at least 1.
        old_RT: Log-probabilities of the sampled tokens as the trainer computes them, before the optimisation phase.
        sampler_RT: The same as the sampler reported them.
        mask_RT: 1 where a token counts.

    Raises:
        UserError: unknown kind, or a cap below 1.
    """
    check_correction(kind, cap)
    assert kind != "auto", "resolve auto by choose"
    if kind == "none":
        return None
    log_ratio_RT = (old_RT - sampler_RT).detach() * mask_RT
    if kind == "token_truncate":
        return log_ratio_RT.exp().clamp(max=cap)
    ratio_RT = log_ratio_RT.sum(-1, keepdim=True).exp().expand_as(mask_RT)
    return ratio_RT.clamp(max=cap) if kind == "sequence_truncate" else ratio_RT.masked_fill(ratio_RT > cap, 0.0)


def check_correction(kind: str, cap: float) -> None:
    """Raises UserError for an unknown kind or a cap below 1."""
    if kind not in KINDS:
        raise UserError(f"model.correction is {kind!r}; choose from {', '.join(KINDS)}")
    if not cap >= 1:
        raise UserError(f"model.correction_cap is {cap}; it must be at least 1")
