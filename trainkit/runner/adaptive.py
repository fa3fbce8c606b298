"""A chain that is drafted level by level for as long as a policy asks for more, and verified as far as it says."""

# B rows  D draft levels  N nodes  K ids it may propose

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from functools import cached_property

import torch
from torch import Tensor

from trainkit.drafters.base import Frontier
from trainkit.models.acceptance import AcceptancePredictor, FoldedPredictor
from trainkit.runner.control import Policy
from trainkit.runner.tree import Draft, Proposals, Shape, Steps, Tree, build, chain


class Paced(Shape):
    """A shape that a policy decides round by round.

    Attributes:
        policy: What decides.
        most: Levels of the coming round at most.
    """

    policy: Policy
    most: int

    @abstractmethod
    def fixed(self, levels: int) -> Shape:
        """The shape of this many levels that is decided beforehand, as a captured graph needs it; the root alone with none."""


class AdaptiveChain(Paced):
    """Asks its policy after each level; for that the host reads a number a row, so no graph can hold it.

    Args:
        policy: What decides.
        device: Of the tree tensors.
        predictor: For a policy that reads one.
        drops: Whether drafted tokens may go unverified. Under `residual` they must not: a token that is verified or not by
            what it is was not drawn from q, as acceptance supposes, and the text would not be distributed as the target's.
            Under `coupled` what is emitted is the target's choice whatever is verified.

    Attributes:
        trees: The chain of each depth that it may come to, from none.
    """

    def __init__(
        self, policy: Policy, device: torch.device, predictor: AcceptancePredictor | None = None, drops: bool = True
    ) -> None:
        assert policy.reads != "predictor" or predictor is not None
        self.policy, self.device, self.drops = policy, device, drops
        self.predictor = predictor
        self._folded: dict[float, FoldedPredictor] = {}  # by temperature
        self.depth = self.most = policy.most

    @cached_property
    def trees(self) -> list[Tree]:
        return [build(chain(depth), self.device) for depth in range(self.depth + 1)]

    @property
    def size(self) -> int:
        return self.depth + 1

    @property
    def slots(self) -> int:
        return self.depth + 1

    @property
    def widest(self) -> int:
        return 1

    @property
    def is_chain(self) -> bool:
        return True

    @property
    def key(self) -> Hashable:
        return None

    def fixed(self, levels: int) -> Shape:
        return self.trees[levels]

    def grow(self, steps: Steps) -> Draft:
        policy, whole = self.policy, self.trees[self.depth]
        B = steps.root_B.shape[0]
        tokens = [steps.root_B[:, None]]
        for depth, level in enumerate(whole.levels[: self.most]):
            frontier = Frontier(
                tokens_BF=tokens[-1], positions_BF=(steps.position_B + depth)[:, None], nodes_F=level.nodes_F,
                parents_BF=level.parents_F.expand(B, -1), parent_places_BF=level.parent_places_F.expand(B, -1),
                ancestors_BFM=level.ancestors_FN.expand(B, -1, -1), depth=depth, chain=True,
            )  # fmt: skip
            made = steps.expand(frontier, 1)
            said_B, picked_B1 = self._said(made, depth, steps.sampling.temperature)
            tokens.append(picked_B1 if made.ids_K is None else made.ids_K[picked_B1])
            if not policy.more([] if said_B is None else said_B.tolist()):
                break
        drafted = len(tokens) - 1
        kept = policy.keep(drafted) if self.drops else drafted
        return Draft(
            torch.cat(tokens[: kept + 1], dim=1), tuple(steps.scores[:kept]), self.trees[kept].topology,
            said=tuple(steps.said[:kept]), shape=self.trees[kept], levels=drafted,
        )  # fmt: skip

    def _said(self, made: Proposals, depth: int, temperature: float) -> tuple[Tensor | None, Tensor]:
        """[B] what the policy reads of a level, or None; and the columns of the proposals [B, 1]."""
        noisy_B1K = made.noisy_BFK
        if self.policy.reads == "predictor":
            assert self.predictor is not None
            if temperature not in self._folded:
                self._folded[temperature] = FoldedPredictor(self.predictor, temperature)
            said_B11, picked_B11 = self._folded[temperature](made.hidden_BFD, noisy_B1K, 1, depth)
            return said_B11[:, 0, 0], picked_B11[:, 0]
        picked_B1 = noisy_B1K.argmax(-1)
        if self.policy.reads == "nothing":
            return None, picked_B1
        return noisy_B1K.softmax(-1).gather(2, picked_B1[..., None])[:, 0, 0], picked_B1
