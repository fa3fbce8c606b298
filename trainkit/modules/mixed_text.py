"""Text that draft and target write together, token by token, to train a draft on (on-policy data)."""

# B batch  D drafted tokens  V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.runner.sampling import ACCEPT, CHOICE, PROPOSAL, AnyNoise, gumbel, uniform
from trainkit.runner.trees.shape import Draft
from trainkit.runner.verify import Verdict, Verification


@dataclass(frozen=True)
class Mixed(Verification):
    """Each token is the draft's with probability `share`, otherwise the target's, whatever either of them assigns to it.

    So given the tokens before it every token comes from share q + (1 - share) p, as on-policy distillation wants it (Agarwal et
    al. 2023, arXiv 2306.13649, mixes by sequence; here by token). A round ends with the first token of the target's own, or
    with the last drafted one: a bonus token would be the target's more often than it should. So the target does not read the
    last drafted token.

    Args:
        share: Probability of the draft's token.
        greedy: Whether the target takes its likeliest token.
    """

    share: float
    greedy: bool = False
    lossy = True
    stream = PROPOSAL
    may_drop = False
    verifies_last_level = False

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UserError(f"share {self.share}: must be between 0 and 1")

    def verify(self, draft: Draft, scores_BNV: Tensor, noise: AnyNoise, keys_B2: Tensor, position_B: Tensor) -> Verdict:
        D = scores_BNV.shape[1]
        steps_D = torch.arange(D, device=position_B.device)
        coins_BD = uniform(keys_B2, position_B[:, None] + 1 + steps_D, steps_D[:1], ACCEPT)[..., 0]
        drafted_B = (coins_BD < self.share).long().cumprod(1).sum(1)
        if not self.greedy:
            vocabulary = torch.arange(scores_BNV.shape[-1], device=position_B.device)
            scores_BNV = scores_BNV + gumbel(keys_B2, position_B[:, None] + 1 + steps_D, vocabulary, CHOICE)
        emitted_BD = torch.where(steps_D < drafted_B[:, None], draft.tokens_BN[:, 1:], scores_BNV.argmax(-1))
        return Verdict(None, (drafted_B + 1).clamp(max=D), emitted_BD)
