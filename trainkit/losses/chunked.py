"""The computation that all divergences share: token chunks, recomputed in backward, so that [tokens, vocabulary] never exists.

For each chunk the forward pass computes draft and target logits, keeps the loss and the metrics, and frees the logits. Backward
computes the logits again and turns them into the gradient in closed form (`gradient` of the loss), so that there are no
activations of the loss either. This costs one more call of each head; in exchange a batch statistic gathered in forward is
available in backward. Recomputation goes through `torch.utils.checkpoint`, whose single autograd graph is what DDP, FSDP and
DeepSpeed expect of a head whose weights are used several times. Uncounted tokens are removed before the heads are called.
Heads that predict the same token (`HeadRows`) share the target's logits: a chunk then holds the rows of all heads for some
target rows, so that the target's head computes each target row twice, whatever the number of heads.
Left out on purpose: gradients computed in forward (one head call less, but a [V, D] buffer for each call of the head).
"""

# N given tokens  n counted tokens of one chunk  u target rows of one chunk  H heads  D hidden  S draws per token
# V target vocabulary  K draft vocabulary (V unless trimmed)

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from trainkit.errors import UserError
from trainkit.losses.log_softmax import log_softmax
from trainkit.losses.measures import coupled_acceptance, top_id
from trainkit.losses.output import LossOutput
from trainkit.losses.topk import TopK


@dataclass(eq=False)
class Pair:
    """Target p and draft q of one chunk, on the K columns of the draft.

    Attributes:
        log_p_nK: Log-probabilities of the target among ALL V tokens, so the columns of a trimmed draft sum to less than 1;
            no columns [n, 0] if the loss has no target.
        log_q_nK: Log-probabilities of the draft.
        log_mass_n1: Log of the target's probability within the K columns; None for an untrimmed draft, where it is 0.
        labels_n: Columns of the hard labels, or None.
        uniforms_nS: Uniform draws for sampled estimators, or None.
        totals: Sums of the loss's `moments` over the call (or over the optimiser step), and their `count`.
    """

    log_p_nK: Tensor
    log_q_nK: Tensor
    log_mass_n1: Tensor | None
    labels_n: Tensor | None
    uniforms_nS: Tensor | None
    totals: Mapping[str, Tensor]

    @cached_property
    def alpha_n(self) -> Tensor:
        """The acceptance rate, sum of min(p, q)."""
        rows = max(1, self.log_q_nK.shape[0] // 4)  # a quarter at a time, to avoid a third [n, K]
        parts = zip(self.log_p_nK.split(rows), self.log_q_nK.split(rows), strict=True)
        return torch.cat([torch.minimum(log_p, log_q).exp_().sum(-1) for log_p, log_q in parts]).clamp_(max=1.0)

    @cached_property
    def inner_log_p_nK(self) -> Tensor:
        """The target's log-probabilities renormalised on the draft's columns."""
        return self.log_p_nK if self.log_mass_n1 is None else self.log_p_nK - self.log_mass_n1


@dataclass(frozen=True)
class HeadRows:
    """How the rows of several heads, or of several unrolled steps of one head, are compared with shared target rows.

    Attributes:
        sizes: Number of rows of each of the H heads; the draft's rows are sorted by head.
        index_N: For each draft row the row of the target.
        decay: Weight of head i in the loss is decay^i; metrics are not weighted.
        target_in_ids: Whether rows count only if the target's likeliest token is one of the draft's columns.
    """

    sizes: Sequence[int]
    index_N: Tensor
    decay: float = 1.0
    target_in_ids: bool = False


class ChunkedDivergence(ABC):
    """A divergence between draft and target, given as hidden states and heads.

    Args:
        chunk: Tokens whose logits exist at once; memory grows with chunk x vocabulary.
        temperature: Softmax temperature of both draft and target; serve with the same.
    """

    spans_batch: bool = False
    """Whether the gradient needs statistics of the whole optimiser step; see `TVDpp`."""
    hard_labels: ClassVar[bool] = False
    """Whether the gradient reads labels instead of the target's probabilities."""
    coupled: bool = False
    """Whether the metrics include `alpha_coupled`; set by `measuring`."""
    measures_kl: bool = False
    """Whether the metrics include `kl`, from target to draft, in nats; set by `measuring`."""
    gathers: bool = False
    """Whether the metrics include the sums of `moments`; set by `TVDpp.first_pass`."""

    def __init__(self, chunk: int = 1024, temperature: float = 1.0) -> None:
        if chunk < 1:
            raise UserError(f"chunk is {chunk}; it must be at least 1 token")
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}; it must be above 0 (greedy acceptance is the metric `agreement`)")
        self.chunk = chunk
        self.temperature = temperature

    @abstractmethod
    def value(self, pair: Pair) -> Tensor:
        """[n] losses of a chunk."""

    @abstractmethod
    def gradient(self, pair: Pair) -> Tensor:
        """[n, K] derivatives of the n losses by the draft's (temperature-scaled) logits; overwrites the tensors of `pair`.

        In place, because memory peaks here: draft logits, log p and log q, and little else.
        """

    def moments(self, pair: Pair) -> Mapping[str, Tensor]:
        """[n] quantities whose sums over the call are in `pair.totals` when `gradient` runs."""
        return {}

    def uniforms(self, tokens: int, like_ND: Tensor) -> Tensor | None:
        """Uniform draws [tokens, S] for a sampled gradient, drawn once per call so that chunking cannot change them."""
        return None

    def measuring(self, coupled: bool = True, kl: bool = False) -> Self:
        """A copy whose metrics include `alpha_coupled`, which sorts the vocabulary of every token, or `kl`."""
        other = copy.copy(self)
        other.coupled, other.measures_kl = coupled, kl
        return other

    def __call__(
        self,
        draft_hidden_ND: Tensor,
        draft_head: Any,
        target_hidden_ND: Tensor,
        target_head: Any,
        ids_K: Tensor | None = None,
        mask_N: Tensor | None = None,
        labels_N: Tensor | None = None,
        rows: HeadRows | None = None,
    ) -> LossOutput:
        """The loss summed over counted tokens; differentiable by the draft's hidden states and head, not by the target.

        Args:
            draft_hidden_ND: Draft hidden states [N, D].
            draft_head: Maps [n, D] to draft logits [n, V], or [n, K] with `ids_K`; with `rows` also a list, one for each head.
            target_hidden_ND: Target hidden states, of any width; or rows of a stored teacher, see `topk`.
            target_head: Maps them to target logits [n, V], or to a `TopK`; called without gradient.
            ids_K: Token ids of the draft's columns, the only ones it proposes. None: the whole vocabulary.
            mask_N: True where the token counts. None: all count.
            labels_N: Token ids of hard labels; read by `CrossEntropy` alone.
            rows: The heads of the draft's rows, and the target row of each; None: row i is compared with target row i. With it
                `per_token` also has `counted`, 1 where the row counts.

        Raises:
            UserError: the vocabularies of draft and target (or `ids_K`) differ in size.
        """
        # Labels as columns of the draft; a label outside a trimmed vocabulary does not count.
        draft_ND, target_ND, total, counted_n = draft_hidden_ND, target_hidden_ND, draft_hidden_ND.shape[0], None
        index_N, head_N = (None, None) if rows is None else (rows.index_N, _head_numbers(rows))
        columns_N = None
        if self.hard_labels:
            if labels_N is None:
                choices_N = target_choices(target_ND, target_head, self.chunk)
                labels_N = choices_N if index_N is None else choices_N[index_N]
            columns_N = labels_N
        if columns_N is not None and ids_K is not None:
            columns_N, inside_N = _columns(columns_N, ids_K)
            mask_N = inside_N if mask_N is None else mask_N.bool() & inside_N
        # Remove uncounted tokens.
        if mask_N is not None and not bool(mask_N.all()):
            counted_n = mask_N.nonzero().squeeze(-1)
            draft_ND, columns_N, index_N, head_N = (_select(x, counted_n) for x in (draft_ND, columns_N, index_N, head_N))
            target_ND = target_ND.index_select(0, counted_n) if rows is None else target_ND
        uniforms_NS = self.uniforms(draft_ND.shape[0], draft_ND) if torch.is_grad_enabled() else None
        # Chunks. `split` gives one backward for all of them, and one chunk for an empty input.
        if rows is None:
            sizes, parts = None, [(target, None, None, None) for target in target_ND.split(self.chunk)]
        else:
            assert index_N is not None and head_N is not None
            order_n, sizes, parts = _shared(rows, index_N, head_N, target_ND, self.chunk, draft_ND.dtype)
            draft_ND, columns_N, uniforms_NS = (_select(x, order_n) for x in (draft_ND, columns_N, uniforms_NS))
            counted_n = order_n if counted_n is None else counted_n[order_n]
        sums, chunks, totals, start = [], [], dict[str, Tensor](), 0
        for hidden_nD, part in zip(draft_ND.split(self.chunk if sizes is None else sizes), parts, strict=True):
            span = slice(start, start := start + len(hidden_nD))
            labels_n, uniforms_nS = (None if x is None else x[span] for x in (columns_N, uniforms_NS))
            target_in_ids = rows is not None and rows.target_in_ids and ids_K is not None
            chunk = _Chunk(self, draft_head, target_head, ids_K, totals, *part, labels_n, uniforms_nS, target_in_ids)
            sums.append(checkpoint(chunk, hidden_nD, use_reentrant=False) if torch.is_grad_enabled() else chunk(hidden_nD))
            chunks.append(chunk)
        # Sums, and values by token.
        moments = {name: torch.cat([chunk.moments[name] for chunk in chunks]) for name in chunks[0].moments}
        values = {name: torch.cat([chunk.metrics[name] for chunk in chunks]) for name in chunks[0].metrics}
        values |= moments if self.gathers else {}
        count = sums[0].new_full((), draft_ND.shape[0]).detach() if rows is None else values["counted"].sum()
        totals.update({name: value_n.sum() for name, value_n in moments.items()}, count=count)
        metrics = {name: value_n.sum() for name, value_n in values.items() if name != "counted"}
        if counted_n is not None:
            values = {name: value_n.new_zeros(total).index_copy_(0, counted_n, value_n) for name, value_n in values.items()}
        return LossOutput(torch.stack(sums).sum(), count, metrics, values)


def _select(x: Any, index_n: Tensor) -> Any:
    return None if x is None else x.index_select(0, index_n)


def _head_numbers(rows: HeadRows) -> Tensor:
    """[N] number of the head of each draft row."""
    device = rows.index_N.device
    return torch.arange(len(rows.sizes), device=device).repeat_interleave(torch.tensor(rows.sizes, device=device))


def _shared(
    rows: HeadRows, index_N: Tensor, head_N: Tensor, target_ND: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, list[int], list[tuple[Tensor, Tensor, Tensor, list[int]]]]:
    """Chunks of at most `chunk` draft rows, each with all rows of some target rows, sorted by head.

    Returns:
        order_N: The draft rows in the order of the chunks.
        sizes: Number of draft rows of each chunk; at least one chunk.
        parts: For each chunk its target rows [u, D], the index into them of each draft row, the weight of each draft row in the
            loss, and the number of draft rows of each head.
    """
    H = len(rows.sizes)
    at_once = max(1, chunk // H)
    unique_U, inverse_N = index_N.unique(return_inverse=True)
    blocks = max(1, -(-len(unique_U) // at_once))
    key_N = inverse_N // at_once * H + head_N
    order_N = key_N.argsort(stable=True)
    by_head = key_N.bincount(minlength=blocks * H).view(blocks, H).tolist()
    sizes = [sum(head_sizes) for head_sizes in by_head]
    weights_N = rows.decay ** head_N[order_N].to(torch.promote_types(dtype, torch.float32))
    local_N, targets = (inverse_N % at_once)[order_N], unique_U.split(at_once)
    parts = zip(targets, local_N.split(sizes), weights_N.split(sizes), by_head, strict=True)
    return order_N, sizes, [(target_ND[rows_u], local_n, weights_n, heads) for rows_u, local_n, weights_n, heads in parts]


@dataclass(eq=False)
class _Chunk:
    """One chunk: called in forward for its loss, and again in backward for the gradient, when `totals` is complete."""

    loss: ChunkedDivergence
    draft_head: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]]
    target_head: Callable[[Tensor], Tensor | TopK] | None
    ids_K: Tensor | None
    totals: Mapping[str, Tensor]
    target_uD: Tensor
    rows_n: Tensor | None  # index into `target_uD` for each draft row; None: row i of both
    scale_n: Tensor | None  # weight of each row in the loss
    head_sizes: list[int] | None  # number of draft rows of each head
    labels_n: Tensor | None
    uniforms_nS: Tensor | None
    target_in_ids: bool
    metrics: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    choices_n: Tensor | None = None
    measured: bool = False

    def __call__(self, hidden_nD: Tensor) -> Tensor:
        if isinstance(self.draft_head, Sequence):
            assert self.head_sizes is not None
            inputs = zip(self.draft_head, hidden_nD.split(self.head_sizes), strict=True)
            draft_nK = torch.cat([head(hidden) for head, hidden in inputs])
        else:
            draft_nK = self.draft_head(hidden_nD)
        return _Loss.apply(draft_nK, self)  # type: ignore[no-any-return]

    def loss_sum(self, draft_nK: Tensor) -> Tensor:
        """The chunk's summed loss; stores metrics and moments."""
        pair = self._pair(draft_nK, self.target_head)
        value_n = self.loss.value(pair)
        self.moments.update(self.loss.moments(pair))
        if self.target_head is not None:
            self.metrics["alpha"] = pair.alpha_n
            self.metrics["agreement"] = (self.choices_n == top_id(draft_nK, self.ids_K)).to(pair.alpha_n.dtype)
            if self.loss.coupled:
                self.metrics["alpha_coupled"] = coupled_acceptance(pair.log_p_nK.exp(), pair.log_q_nK.exp())
            if self.loss.measures_kl:
                log_p_nK = pair.inner_log_p_nK
                self.metrics["kl"] = (log_p_nK - pair.log_q_nK).mul_(log_p_nK.exp()).sum(-1)
        if self.rows_n is not None:
            self._count(torch.ones_like(value_n))
        self.measured = True
        return (value_n if self.scale_n is None else value_n * self.scale_n).sum()

    def _count(self, counted_n: Tensor) -> None:
        """Stores which rows count, and sets the others to 0 in metrics, moments and the loss."""
        if self.target_in_ids:
            assert self.ids_K is not None and self.choices_n is not None and self.scale_n is not None
            counted_n = torch.isin(self.choices_n, self.ids_K).to(counted_n.dtype)
            self.scale_n = self.scale_n * counted_n
            for values in (self.metrics, self.moments):
                values.update({name: value_n * counted_n for name, value_n in values.items()})
        self.metrics["counted"] = counted_n

    def loss_gradient(self, draft_nK: Tensor) -> Tensor:
        """The gradient of the chunk's summed loss by the draft's logits."""
        gradient_nK = self.loss.gradient(self._pair(draft_nK, None if self.loss.hard_labels else self.target_head))
        if self.scale_n is not None:
            gradient_nK.mul_((self.scale_n / self.loss.temperature)[:, None])
        elif self.loss.temperature != 1.0:
            gradient_nK.div_(self.loss.temperature)
        return gradient_nK

    def _pair(self, draft_nK: Tensor, target_head: Callable[[Tensor], Tensor | TopK] | None) -> Pair:
        ids_K, temperature, rows_n, log_mass_n1 = self.ids_K, self.loss.temperature, self.rows_n, None
        if target_head is None:
            log_p_nK = draft_nK.detach()[:, :0]
        else:
            target_uV = target_head(self.target_uD)  # autograd is off within a Function
            if not self.measured:
                _check(draft_nK, ids_K, target_uV.vocab_size if isinstance(target_uV, TopK) else target_uV.shape[-1])
                self.choices_n = self._at_rows(_choices(target_uV))
            if isinstance(target_uV, TopK):
                target_nV = target_uV if rows_n is None else target_uV.rows(rows_n)
                log_p_nK = target_nV.log_probabilities(draft_nK, ids_K, temperature)
            else:
                log_p_nK = log_softmax(target_uV, temperature)
            stored = isinstance(target_uV, TopK)
            del target_uV  # freed before the draft's softmax
            if ids_K is not None:
                log_p_nK = log_p_nK.index_select(-1, ids_K)
                log_mass_n1 = log_p_nK.logsumexp(-1, keepdim=True)
            if not stored:
                log_p_nK, log_mass_n1 = self._at_rows(log_p_nK), self._at_rows(log_mass_n1)
        log_q_nK = log_softmax(draft_nK, temperature)
        return Pair(log_p_nK, log_q_nK, log_mass_n1, self.labels_n, self.uniforms_nS, self.totals)

    def _at_rows(self, x: Any) -> Any:
        """For each draft row the entry of its target row."""
        return x if self.rows_n is None else _select(x, self.rows_n)


class _Loss(torch.autograd.Function):
    """Logits -> summed loss. The checkpoint drops what it saves; only the gradient of the second call is ever read."""

    @staticmethod
    def forward(ctx: Any, draft_nK: Tensor, chunk: _Chunk) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if chunk.measured:
            ctx.save_for_backward(chunk.loss_gradient(draft_nK).to(draft_nK.dtype))  # the checkpoint stops here
            return draft_nK.new_zeros((), dtype=torch.promote_types(draft_nK.dtype, torch.float32))
        ctx.save_for_backward(draft_nK)  # a placeholder of the same shape, which the checkpoint compares
        return chunk.loss_sum(draft_nK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient_nK,) = ctx.saved_tensors
        return gradient_nK.mul_(upstream), None  # in place: each backward recomputes its own


@torch.no_grad()
def target_choices(target_ND: Tensor, target_head: Callable[[Tensor], Tensor | TopK] | None, chunk: int) -> Tensor:
    """[N] argmax of the target's logits, the lowest id among equals."""
    if target_head is None:
        raise UserError("cross entropy needs labels, or a target to choose them; it has neither, so give one")
    return torch.cat([_choices(target_head(hidden_nD)) for hidden_nD in target_ND.split(chunk)])


def _choices(target_nV: Tensor | TopK) -> Tensor:
    return target_nV.ids_nk[:, 0] if isinstance(target_nV, TopK) else target_nV.argmax(-1)


def _columns(labels_N: Tensor, ids_K: Tensor) -> tuple[Tensor, Tensor]:
    """The column of each label in `ids_K`, and whether `ids_K` has it."""
    ascending, order = ids_K.sort()
    index_N = torch.searchsorted(ascending, labels_N).clamp_(max=ids_K.numel() - 1)
    return order[index_N], ascending[index_N] == labels_N


def _check(draft_nK: Tensor, ids_K: Tensor | None, vocabulary: int) -> None:
    if ids_K is not None and draft_nK.shape[-1] != ids_K.numel():
        raise UserError(f"the draft head gives {draft_nK.shape[-1]} logits for {ids_K.numel()} vocabulary ids; make them equal")
    if ids_K is None and draft_nK.shape[-1] != vocabulary:
        raise UserError(
            f"draft vocabulary {draft_nK.shape[-1]} differs from the target's {vocabulary}; "
            "use the target's vocabulary, or name the ids of a trimmed one"
        )
