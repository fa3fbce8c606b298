"""THR, Token Hidden Reward: which tokens of a group move the likelihood of its correct responses, and by how much.

THR reweights the advantages of a group before the optimisation phase, whatever the algorithm. arXiv 2510.03669; its threshold
as in NTHR, arXiv 2505.18830. There was no public code to compare with, and two points are our reading: the threshold (`tau`),
and that the reduction of the loss still counts all tokens of a response.
"""

# n tokens of a response  N tokens of a group  D hidden  U distinct tokens of a group (V* in the paper)  V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.losses.log_softmax import log_softmax


class THR:
    """Keeps the advantages of tokens with a large influence on correct responses, and scales them by the sign of the influence.

    With h the hidden state that predicts a token y, and g = onehot(y) - policy probabilities, restricted to the distinct tokens
    of the group: M = sum over correct responses of the mean over their tokens of g h^T, and a token's influence is
    THR = (2 r - 1) g^T M h, r = 1 for tokens of correct responses and 0 for others. Its advantage is multiplied by
    1{|THR| > tau} (1 + sign(THR) p).

    Args:
        p: Above 0 the policy becomes more confident (the paper uses +0.1 for greedy accuracy), below 0 it explores (-0.1 for
            pass@k); 0 only removes tokens with little influence.
        tau: Threshold, from the mean influence s of each correct response's tokens: the smallest s, or the mean of all.
        threshold: Reward above which a response is correct, for graded rewards; by default rewards must be 0 or 1.
        chunk: Tokens whose logits exist at once.
    """

    def __init__(
        self, p: float = 0.0, tau: Literal["min", "mean"] = "min", threshold: float | None = None, chunk: int = 1024
    ) -> None:
        if not -1 <= p <= 1:
            raise UserError(f"model.reweight.p is {p}; it must be between -1 and 1")
        if tau not in ("min", "mean"):
            raise UserError(f"model.reweight.tau is {tau!r}; it must be min or mean")
        self.p, self.tau, self.threshold, self.chunk = p, tau, threshold, chunk

    def correct(self, rewards: Sequence[float]) -> list[bool]:
        """Which responses are correct, by their rewards before shaping; a missing reward (NaN) is not.

        Raises:
            UserError: a graded reward, and no `threshold`.
        """
        if self.threshold is not None:
            return [reward > self.threshold for reward in rewards]
        if graded := next((reward for reward in rewards if not math.isnan(reward) and reward not in (0.0, 1.0)), None):
            raise UserError(f"model.reweight: THR needs rewards of 0 or 1, not {graded:g}; set model.reweight.threshold")
        return [reward == 1.0 for reward in rewards]

    @torch.no_grad()
    def reweight(
        self,
        hidden: Sequence[Tensor],
        tokens: Sequence[Tensor],
        head: Callable[[Tensor], Tensor],
        correct: Sequence[bool],
        advantage: Sequence[Tensor],
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """The advantages [n] of each response of one group, reweighted; unchanged if all with tokens are correct, or none.

        Args:
            hidden: For each response the output head's inputs [n, D] at the positions that predict its tokens, under the policy
                that sampled them.
            tokens: Its token ids [n], those that count.
            head: Maps [n, D] to logits [n, V].
            correct: Whether it is correct.
            advantage: Advantages [n] of its tokens.
            temperature: Sampling temperature.
        """
        counted = [(is_correct, len(token_n) > 0) for is_correct, token_n in zip(correct, tokens, strict=True)]
        right = [is_correct and has_tokens for is_correct, has_tokens in counted]
        if not any(right) or all(is_correct for is_correct, has_tokens in counted if has_tokens):
            return list(advantage)
        influence = self.influence(hidden, tokens, head, right, temperature)
        means = torch.stack([influence_n.mean() for influence_n, is_right in zip(influence, right, strict=True) if is_right])
        tau = means.min() if self.tau == "min" else means.mean()
        factors = [(score_n.abs() > tau) * (1 + self.p * score_n.sign()) for score_n in influence]
        return [advantage_n * factor_n.to(advantage_n.dtype) for advantage_n, factor_n in zip(advantage, factors, strict=True)]

    @torch.no_grad()
    def influence(
        self,
        hidden: Sequence[Tensor],
        tokens: Sequence[Tensor],
        head: Callable[[Tensor], Tensor],
        correct: Sequence[bool],
        temperature: float = 1.0,
    ) -> list[Tensor]:
        """THR [n] of the tokens of each response, in float32 or, for float64 logits, in float64; arguments as in `reweight`."""
        sizes, token_N, hidden_ND = [len(token_n) for token_n in tokens], torch.cat(list(tokens)), torch.cat(list(hidden))
        distinct_U, column_N = token_N.unique(return_inverse=True)
        # g: onehot minus probabilities among all V tokens, on the columns of the group's tokens.
        parts = [
            log_softmax(head(hidden_nD), temperature).index_select(-1, distinct_U).exp_()
            for hidden_nD in hidden_ND.split(self.chunk)
        ]
        g_NU = torch.cat(parts).neg_()
        g_NU[torch.arange(len(column_N), device=g_NU.device), column_N] += 1
        hidden_ND = hidden_ND.to(g_NU.dtype)
        # M: the sum over correct responses of the mean of g h^T.
        share = [float(is_correct) / max(size, 1) for is_correct, size in zip(correct, sizes, strict=True)]
        share_N1 = g_NU.new_tensor(share).repeat_interleave(torch.tensor(sizes, device=g_NU.device))[:, None]
        moment_UD = (g_NU * share_N1).T @ hidden_ND
        # g^T M h, with the sign of the response.
        influence = ((g_NU @ moment_UD) * hidden_ND).sum(-1).split(sizes)
        return [score_n if is_correct else -score_n for score_n, is_correct in zip(influence, correct, strict=True)]
