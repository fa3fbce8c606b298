"""Every divergence written out on whole logits, differentiated by autograd: the reference for the closed-form, chunked code."""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.losses.divergence import JSD, LK, TV, ChunkedDivergence, CrossEntropy, ForwardKL, ReverseKL, TVDpp

# N tokens  V vocabulary  K columns of the draft

LOSSES: dict[str, ChunkedDivergence] = {
    "ce": CrossEntropy(),
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": JSD(beta=0.3),
    "tv": TV(),
    "tvdpp_position": TVDpp(normalise="position"),
    "tvdpp_batch": TVDpp(normalise="batch"),
    "lk": LK(),
    "lk_hybrid": LK(hybrid=True),
}
"""The divergences with a deterministic gradient."""


def eager(
    name: str,
    draft_NK: Tensor,
    target_NV: Tensor,
    labels_N: Tensor,
    weight_N: Tensor,
    ids_K: Tensor | None = None,
    temperature: float = 1.0,
    frozen_NK: Tensor | None = None,
) -> Tensor:
    """Summed loss; its derivative by `draft_NK` is the gradient that training must use.

    Args:
        labels_N: Columns of the draft.
        weight_N: 1 where the token counts, else 0.
        frozen_NK: Draft logits within stop-gradients, which finite differences hold fixed; None: `draft_NK`.
    """
    log_q = (draft_NK / temperature).log_softmax(-1)
    q = log_q.exp()
    frozen = (draft_NK if frozen_NK is None else frozen_NK).detach() / temperature
    frozen_q = frozen.softmax(-1)
    log_p = (target_NV.detach() / temperature).log_softmax(-1)
    if ids_K is not None:
        log_p = log_p[:, ids_K]
    p = log_p.exp()
    inner_log_p = log_p.log_softmax(-1)
    inner_p = inner_log_p.exp()
    alpha = torch.minimum(p, q).sum(-1)
    kl = (inner_p * (inner_log_p - log_q)).sum(-1)
    if name == "ce":
        loss = -log_q.gather(-1, labels_N[:, None])[:, 0]
    elif name == "forward_kl":
        loss = kl
    elif name == "reverse_kl":
        loss = (q * (log_q - inner_log_p)).sum(-1)
    elif name == "jsd":
        m = 0.3 * inner_p + 0.7 * q
        loss = (0.3 * inner_p * (inner_log_p - m.log()) + 0.7 * q * (log_q - m.log())).sum(-1)
    elif name == "tv":
        loss = (p - q).clamp(min=0).sum(-1) + 1 - p.sum(-1)
    elif name == "lk":
        loss = -alpha.log()
    elif name == "lk_hybrid":
        lam = torch.exp(-3 * torch.minimum(p, frozen_q).sum(-1))
        loss = lam * kl + (1 - lam) * (1 - alpha)
    else:
        reward = (p > frozen_q).to(q.dtype)
        mu = (frozen_q * reward).sum(-1, keepdim=True)
        square = (frozen_q * reward**2).sum(-1, keepdim=True)
        if name == "tvdpp_batch":
            mu, square = ((x[:, 0] * weight_N).sum() / weight_N.sum() for x in (mu, square))
        advantage = (reward - mu) / ((square - mu**2).sqrt() + 1e-6)
        surrogate = -(frozen_q * advantage * log_q).sum(-1)
        loss = (1 - alpha).detach() + surrogate - surrogate.detach()
    return (loss * weight_N).sum()
