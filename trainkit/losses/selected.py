"""Log-probabilities of given tokens and entropies, in token chunks, so that [tokens, vocabulary] never exists.

As in `chunked`, backward calls the head again inside `torch.utils.checkpoint`; the gradient by logits is in closed form.
"""

# N tokens  n tokens of one chunk  D hidden  V vocabulary

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainkit.losses.log_softmax import log_softmax


def selected_logprobs(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], labels_N: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of each label, differentiable, and entropy [N] of its distribution, detached; both in nats, float32.

    log softmax(head(hidden) / temperature) at the label; by the logits its derivative is (onehot(label) - p) / temperature.
    Differentiable by the hidden states and by whatever the head depends on. In float64 if the logits are.

    Args:
        hidden_ND: Hidden states that predict the labels.
        head: Maps [n, D] to logits [n, V].
        labels_N: Token ids.
        temperature: Softmax temperature, above 0.
        chunk: Tokens whose logits exist at once; memory grows with chunk x vocabulary.
    """
    assert temperature > 0 and chunk > 0
    chunks = [_Chunk(head, labels_n, temperature) for labels_n in labels_N.split(chunk)]
    parts = zip(chunks, hidden_ND.split(chunk), strict=True)
    if torch.is_grad_enabled():
        logps = [checkpoint(part, hidden_nD, use_reentrant=False) for part, hidden_nD in parts]
    else:
        logps = [part(hidden_nD) for part, hidden_nD in parts]
    return torch.cat(logps), torch.cat([part.entropy_n for part in chunks if part.entropy_n is not None])


@dataclass(eq=False)
class _Chunk:
    """One chunk: called in forward for its values, and again in backward, where only its logits are read."""

    head: Callable[[Tensor], Tensor]
    labels_n: Tensor
    temperature: float
    entropy_n: Tensor | None = None

    def __call__(self, hidden_nD: Tensor) -> Tensor:
        return _Selected.apply(self.head(hidden_nD), self)  # type: ignore[no-any-return]

    def values(self, logits_nV: Tensor) -> Tensor:
        """[n] log-probabilities of the labels; stores the entropies."""
        logp_nV = log_softmax(logits_nV, self.temperature)
        logp_n = logp_nV.gather(-1, self.labels_n[:, None]).squeeze(-1)
        self.entropy_n = -logp_nV.exp().mul_(logp_nV).sum(-1)
        return logp_n

    def gradient(self, logits_nV: Tensor, upstream_n: Tensor) -> Tensor:
        """[n, V] derivative of sum(upstream * log-probability) by the logits."""
        scale_n1 = (upstream_n / self.temperature)[:, None]
        gradient_nV = log_softmax(logits_nV, self.temperature).exp_().mul_(-scale_n1)
        return gradient_nV.scatter_add_(-1, self.labels_n[:, None], scale_n1).to(logits_nV.dtype)


class _Selected(torch.autograd.Function):
    """Logits -> log-probabilities of the labels. The checkpoint drops the logits and computes them again for backward."""

    @staticmethod
    def forward(ctx: Any, logits_nV: Tensor, chunk: _Chunk) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.chunk = chunk
        ctx.save_for_backward(logits_nV)
        if chunk.entropy_n is not None:  # the second call, whose value nobody reads
            return logits_nV.new_zeros(len(logits_nV), dtype=chunk.entropy_n.dtype)
        return chunk.values(logits_nV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_n: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logits_nV,) = ctx.saved_tensors
        return ctx.chunk.gradient(logits_nV, upstream_n), None
