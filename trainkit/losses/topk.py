"""A teacher stored as its k largest probabilities and the sum of the rest, in place of hidden states and an output head.

Store `compress(logits, k)`; train with `divergence(draft_hidden, draft_head, stored_rows, TopKHead(k, V))`. Only the chunk
machinery sees the difference. The unstored tokens are given p_x = p_rest q_x / q_rest: the draft's own proportions, the stored
total. All f-divergences are then those of the k + 1 buckets (k tokens, one rest), whose p does not depend on the draft; by
the logit of an unstored x their derivative is g_rest q_x / q_rest, g_rest that by the bucket's logit, and this is what each
loss's formula gives for the filled p (forward KL: q_x - p_x = (q_rest - p_rest) q_x / q_rest). So no loss needs to know.

At k = V nothing is lost. Below, by the data processing inequality (merging tokens cannot raise a divergence):
- the KLs, `jsd`, `tv`, `tvdpp` and `lk` without `hybrid` are lower bounds of their values with the whole teacher, and metric
  `alpha` an upper one; they tighten as k grows. `lk` with `hybrid` is a blend of bounds and itself none;
- `agreement` is exact; so is `ce`, which reads the first stored id, or labels;
- `alpha_coupled` is that of the buckets, an approximation (tokens of the rest count as chosen together);
- with a trimmed vocabulary S, ids stored outside S are outside as ever, and all the rest is taken to lie within S, unless S
  holds none of it: `tv`, `tvdpp`, `lk` and `alpha` stay bounds, KLs and `jsd` (p renormalised on S) become approximations.
Stored probabilities are those at temperature 1; of another temperature the rest's sum says nothing, so k < V refuses it.
"""

# N tokens  n tokens of a chunk  V target vocabulary  K draft vocabulary (V unless trimmed)  k stored tokens

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.losses.log_softmax import FLOOR, log_softmax

__all__ = ["TopK", "TopKHead", "compress"]


@torch.no_grad()
def compress(logits_NV: Tensor, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[N, 2k + 1] rows: the k likeliest ids, their log-probabilities, the log of the remaining probability (FLOOR at k = V).

    Likeliest first, the lowest id first among equals, so that column 0 is the argmax. At temperature 1.

    Args:
        logits_NV: Logits of the teacher; a few thousand tokens at a time, for it needs several [N, V].
        k: Probabilities to keep.
        dtype: Of the rows; it must hold every id exactly, as float32 does below 2^24.

    Raises:
        UserError: k is not within 1..V.
    """
    vocabulary = logits_NV.shape[-1]
    if not 1 <= k <= vocabulary:
        raise UserError(f"k is {k}; a teacher of {vocabulary} tokens can be stored by its 1 to {vocabulary} largest")
    assert vocabulary <= _exact_integers(dtype), f"{dtype} cannot hold the ids of {vocabulary} tokens"
    ids_Nk = _largest(logits_NV, k)
    log_p_NV = log_softmax(logits_NV)
    log_p_Nk = log_p_NV.gather(-1, ids_Nk)
    log_rest_N1 = log_p_NV.scatter_(-1, ids_Nk, -torch.inf).logsumexp(-1, keepdim=True).clamp_(min=FLOOR)
    return torch.cat([ids_Nk.to(dtype), log_p_Nk.to(dtype), log_rest_N1.to(dtype)], -1)


@dataclass(frozen=True)
class TopK:
    """What is known of the teacher at n tokens; stands where its logits would.

    Attributes:
        ids_nk: The likeliest token ids, likeliest first.
        log_p_nk: Their log-probabilities.
        log_rest_n: Log of the probability of all others.
        vocab_size: V.
    """

    ids_nk: Tensor
    log_p_nk: Tensor
    log_rest_n: Tensor
    vocab_size: int

    def log_probabilities(self, draft_nK: Tensor, ids_K: Tensor | None, temperature: float) -> Tensor:
        """[n, V] log-probabilities, those not stored in the proportions of the draft, whose logits are given.

        Raises:
            UserError: k < V and the temperature is not 1.
        """
        (n, k), vocabulary = self.ids_nk.shape, self.vocab_size
        if k == vocabulary:
            log_p_nV = torch.empty_like(self.log_p_nk).scatter_(-1, self.ids_nk, self.log_p_nk)
            return log_p_nV if temperature == 1.0 else log_softmax(log_p_nV, temperature)
        if temperature != 1.0:
            raise UserError(
                f"the teacher is stored as {k} of {vocabulary} probabilities, at temperature 1; "
                f"a divergence at temperature {temperature} needs all {vocabulary}"
            )
        never = torch.finfo(draft_nK.dtype).min  # finite: where the draft forbids the whole rest, shares are equal, not NaN
        shares_nV = draft_nK.clamp(min=never)
        if ids_K is not None:
            shares_nV = shares_nV.new_full((n, vocabulary), never).index_copy_(-1, ids_K, shares_nV)
        log_p_nV = log_softmax(shares_nV.scatter_(-1, self.ids_nk, -torch.inf)).add_(self.log_rest_n[:, None])
        return log_p_nV.scatter_(-1, self.ids_nk, self.log_p_nk.to(log_p_nV.dtype))


class TopKHead:
    """Reads rows of `compress` where training would call the teacher's output head.

    Args:
        k: As given to `compress`.
        vocab_size: V of the teacher.
    """

    def __init__(self, k: int, vocab_size: int) -> None:
        if not 1 <= k <= vocab_size:
            raise UserError(f"k is {k}; a teacher of {vocab_size} tokens can be stored by its 1 to {vocab_size} largest")
        self.k, self.vocab_size = k, vocab_size

    def __call__(self, rows_nR: Tensor) -> TopK:
        """The teacher at n tokens, from rows [n, 2k + 1].

        Raises:
            UserError: the rows are of another k, or of a dtype that rounds ids.
        """
        k, vocabulary = self.k, self.vocab_size
        if rows_nR.shape[-1] != 2 * k + 1:
            raise UserError(f"the stored teacher has rows of {rows_nR.shape[-1]} numbers; k = {k} makes {2 * k + 1}")
        if vocabulary > _exact_integers(rows_nR.dtype):
            raise UserError(f"the stored teacher is in {rows_nR.dtype}, which rounds ids of {vocabulary} tokens; keep float32")
        ids_nk, log_p_nk, log_rest_n1 = rows_nR.split([k, k, 1], -1)
        log_p_nk, log_rest_n1 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (log_p_nk, log_rest_n1))
        # The floor again, because a narrow dtype stored it as -inf.
        return TopK(ids_nk.long(), log_p_nk.clamp(min=FLOOR), log_rest_n1.squeeze(-1).clamp(min=FLOOR), vocabulary)


def _exact_integers(dtype: torch.dtype) -> float:
    return 2 / torch.finfo(dtype).eps


def _largest(logits_NV: Tensor, k: int) -> Tensor:
    """[N, k] ids of the largest entries in descending order, the lowest id first among equals, as `topk` does not promise.

    Four times faster than a stable sort of all V = 131072, on a CPU.
    """
    smallest_N1 = logits_NV.topk(k, -1).values[:, -1:]
    above_NV, equal_NV = logits_NV > smallest_N1, logits_NV == smallest_N1
    room_N1 = k - above_NV.sum(-1, keepdim=True)
    kept_NV = above_NV | (equal_NV & (equal_NV.cumsum(-1, dtype=torch.int32) <= room_N1))
    ids_Nk = kept_NV.nonzero()[:, 1].view(-1, k)
    order_Nk = logits_NV.gather(-1, ids_Nk).sort(dim=-1, descending=True, stable=True).indices
    return ids_Nk.gather(-1, order_Nk)
