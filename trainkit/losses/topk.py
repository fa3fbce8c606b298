"""A teacher stored as its k largest probabilities and the sum of the others, instead of hidden states and an output head.

Store `compress(logits, k)`; train with `divergence(draft_hidden, draft_head, stored_rows, TopKHead(k, V))`. Only chunked.py
treats a stored teacher differently. Unstored tokens get p_x = p_rest q_x / q_rest: the proportions of the draft and the stored
sum p_rest. All f-divergences are then those of k + 1 buckets (k tokens and the rest), whose p does not depend on the draft. The
derivative by the logit of an unstored x is g_rest q_x / q_rest, with g_rest the derivative by the logit of the rest's bucket,
and the formula of each loss gives exactly this for the filled p (forward KL: q_x - p_x = (q_rest - p_rest) q_x / q_rest). So
the losses need no special case.

At k = V nothing is lost. For k < V, by the data processing inequality (merging tokens cannot raise a divergence):
- the KLs, `jsd`, `tv`, `tvdpp` and `lk` without `hybrid` are lower bounds of their values for the complete teacher, and the
  metric `alpha` is an upper bound; they tighten as k grows. `lk` with `hybrid` is a blend of bounds, but not a bound itself;
- `agreement` is exact, and so is `ce`, which reads the first stored id, or labels;
- `alpha_coupled` is that of the buckets, an approximation (all tokens of the rest count as the same choice);
- with a trimmed vocabulary S, stored ids outside S are outside as usual, and the whole rest is assumed to be within S, unless S
  has no unstored token: `tv`, `tvdpp`, `lk` and `alpha` stay bounds; KLs and `jsd` (p renormalised on S) become approximations.
Stored probabilities are those at temperature 1. They do not determine the rest at another temperature, so k < V refuses it.
"""

# N tokens  n tokens of a chunk  V target vocabulary  K draft vocabulary (V unless trimmed)  k stored tokens

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.losses.log_softmax import FLOOR, log_softmax


@torch.no_grad()
def compress(logits_NV: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, 2k + 1] rows: the k likeliest ids, their log-probabilities, the log of the remaining probability (FLOOR at k = V).

    Ids are in order of probability, the lowest id first among equals, so that column 0 is the argmax. At temperature 1.

    Args:
        logits_NV: Teacher logits of a few thousand tokens at a time, because several [N, V] tensors are needed.
        k: Number of probabilities to store.
        dtype: Precision of the rows; must hold every id exactly, as float32 does below 2^24.

    Raises:
        UserError: k is not within 1..V.
    """
    vocabulary = logits_NV.shape[-1]
    _check_k(k, vocabulary)
    assert vocabulary <= _exact_integers(dtype), f"{dtype} cannot hold the ids of {vocabulary} tokens"
    ids_Nk = _largest(logits_NV, k)
    log_p_NV = log_softmax(logits_NV)
    log_p_Nk = log_p_NV.gather(-1, ids_Nk)
    log_rest_N1 = log_p_NV.scatter_(-1, ids_Nk, -torch.inf).logsumexp(-1, keepdim=True).clamp_(min=FLOOR)
    return torch.cat([ids_Nk.to(dtype), log_p_Nk.to(dtype), log_rest_N1.to(dtype)], -1)


@dataclass(frozen=True)
class TopK:
    """The stored teacher at n tokens; takes the place of its logits.

    Attributes:
        ids_nk: The k likeliest token ids, likeliest first.
        log_p_nk: Their log-probabilities.
        log_rest_n: Log of the total probability of all other tokens.
        vocab_size: V.
    """

    ids_nk: Tensor
    log_p_nk: Tensor
    log_rest_n: Tensor
    vocab_size: int

    def rows(self, index_m: Tensor) -> TopK:
        """The stored teacher at the given rows."""
        return TopK(self.ids_nk[index_m], self.log_p_nk[index_m], self.log_rest_n[index_m], self.vocab_size)

    def log_probabilities(self, draft_nK: Tensor, ids_K: Tensor | None, temperature: float) -> Tensor:
        """[n, V] log-probabilities; those of unstored tokens have the proportions of the draft.

        Args:
            draft_nK: Draft logits.
            ids_K: Token ids of the K columns; None: the whole vocabulary.
            temperature: Softmax temperature of teacher and draft.

        Raises:
            UserError: k < V and the temperature is not 1.
        """
        (n, k), vocabulary = self.ids_nk.shape, self.vocab_size
        if k == vocabulary:
            log_p_nV = torch.empty_like(self.log_p_nk).scatter_(-1, self.ids_nk, self.log_p_nk)
            return log_p_nV if temperature == 1.0 else log_softmax(log_p_nV, temperature)
        if temperature != 1.0:
            raise UserError(
                f"the teacher is stored as {k} of {vocabulary} probabilities, at temperature 1; set the temperature to 1: "
                f"a divergence at temperature {temperature} needs all {vocabulary}"
            )
        lowest = torch.finfo(draft_nK.dtype).min  # finite: if q is 0 on the whole rest, the shares are equal instead of NaN
        shares_nV = draft_nK.clamp(min=lowest)
        if ids_K is not None:
            shares_nV = shares_nV.new_full((n, vocabulary), lowest).index_copy_(-1, ids_K, shares_nV)
        log_p_nV = log_softmax(shares_nV.scatter_(-1, self.ids_nk, -torch.inf)).add_(self.log_rest_n[:, None])
        return log_p_nV.scatter_(-1, self.ids_nk, self.log_p_nk.to(log_p_nV.dtype))


class TopKHead:
    """Decodes rows of `compress`; takes the place of the teacher's output head.

    Args:
        k: Number of stored probabilities.
        vocab_size: V of the teacher.
    """

    def __init__(self, k: int, vocab_size: int) -> None:
        _check_k(k, vocab_size)
        self.k, self.vocab_size = k, vocab_size

    def __call__(self, rows_nR: Tensor) -> TopK:
        """The teacher at n tokens, from rows [n, 2k + 1].

        Raises:
            UserError: the rows have another k, or a dtype that rounds ids.
        """
        k, vocabulary = self.k, self.vocab_size
        if rows_nR.shape[-1] != 2 * k + 1:
            raise UserError(f"the stored teacher has rows of {rows_nR.shape[-1]} numbers; k = {k} makes {2 * k + 1}, so fix k")
        if vocabulary > _exact_integers(rows_nR.dtype):
            raise UserError(f"the stored teacher is in {rows_nR.dtype}, which rounds ids of {vocabulary} tokens; store float32")
        ids_nk, log_p_nk, log_rest_n1 = rows_nR.split([k, k, 1], -1)
        log_p_nk, log_rest_n1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (log_p_nk, log_rest_n1))
        # The floor again, because narrow dtypes store it as -inf.
        return TopK(ids_nk.long(), log_p_nk.clamp(min=FLOOR), log_rest_n1.squeeze(-1).clamp(min=FLOOR), vocabulary)


def _check_k(k: int, vocabulary: int) -> None:
    if not 1 <= k <= vocabulary:
        raise UserError(f"k is {k}; a teacher of {vocabulary} tokens can be stored by its 1 to {vocabulary} largest")


def _exact_integers(dtype: torch.dtype) -> float:
    """Upper limit of the integers that `dtype` holds exactly."""
    return 2 / torch.finfo(dtype).eps


def _largest(logits_NV: Tensor, k: int) -> Tensor:
    """[N, k] ids of the largest entries in descending order, the lowest id first among equals, which `topk` does not guarantee.

    Four times faster than a stable sort of all V = 131072 entries on a CPU.
    """
    smallest_N1 = logits_NV.topk(k, -1).values[:, -1:]
    above_NV, equal_NV = logits_NV > smallest_N1, logits_NV == smallest_N1
    room_N1 = k - above_NV.sum(-1, keepdim=True)
    chosen_NV = above_NV | (equal_NV & (equal_NV.cumsum(-1, dtype=torch.int32) <= room_N1))
    ids_Nk = chosen_NV.nonzero()[:, 1].view(-1, k)
    order_Nk = logits_NV.gather(-1, ids_Nk).sort(dim=-1, descending=True, stable=True).indices
    return ids_Nk.gather(-1, order_Nk)
