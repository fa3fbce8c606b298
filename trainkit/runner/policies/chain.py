"""A chain that is drafted level by level for as long as a policy asks for more, and verified in each row as far as it says.

And what stands in for it where rounds are captured, so that none can be stopped within: a chain of a given depth, whose
likeliest tokens are verified, over all rows a given number.
"""

# B rows  D draft levels  K ids it may propose

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.drafters.base import Frontier
from trainkit.layers.attention import Packing
from trainkit.models.predictor import FoldedPredictor
from trainkit.runner.policy import Policy
from trainkit.runner.trees.shape import Draft, Proposals, Shape, Steps
from trainkit.runner.trees.static import Level, Tree, build, chain


class Chain(Shape):
    """What chains have in common."""

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


class Paced(Shape):
    """A shape that a policy decides round by round.

    Attributes:
        policy: What decides.
        most: Levels of the coming round at most.
    """

    policy: Policy
    most: int

    @abstractmethod
    def captured(self, levels: int, each: int) -> Shape:
        """The shape of a round that drafts so many levels, decided beforehand, as a captured graph needs it.

        Args:
            levels: Draft levels; the root alone with none.
            each: Tokens verified in the mean of rows, where that may be fewer than are drafted.
        """


class AdaptiveChain(Chain, Paced):
    """Asks its policy after each level; for that the host reads a number a row, so no graph can hold it.

    Args:
        policy: What decides.
        device: Of the tree tensors.
        predictor: For a policy that reads one, at the temperature that is decoded with.
        drops: Whether drafted tokens may go unverified. Under `residual` they must not: a token that is verified or not by
            what it is was not drawn from q, as acceptance supposes, and the text would not be distributed as the target's.
            Under `coupled` what is emitted is the target's choice whatever is verified.

    Attributes:
        most: Levels of the coming round at most.
    """

    def __init__(
        self, policy: Policy, device: torch.device, predictor: FoldedPredictor | None = None, drops: bool = True
    ) -> None:
        assert policy.reads != "predictor" or predictor is not None
        self.policy, self.predictor, self.device, self.drops = policy, predictor, device, drops
        self.depth = self.most = policy.most
        self._trees: dict[int, Tree] = {}

    def tree(self, depth: int) -> Tree:
        """The chain of a depth that a round has come to; built once."""
        if depth not in self._trees:
            self._trees[depth] = build(chain(depth), self.device)
        return self._trees[depth]

    @property
    def key(self) -> Hashable:
        return None

    def captured(self, levels: int, each: int) -> Shape:
        tree = self.tree(levels)
        if not levels or self.policy.reads == "nothing":
            return tree
        return RankedChain(tree, each if self.drops else levels, self.predictor)

    def grow(self, steps: Steps) -> Draft:
        policy, whole = self.policy, self.tree(self.depth)
        tokens = [steps.root_B[:, None]]
        for depth, level in enumerate(whole.levels[: self.most]):
            made = _step(steps, level, tokens[-1], depth)
            said_B, picked_B1 = self._said(made, depth)
            tokens.append(picked_B1 if made.ids_K is None else made.ids_K[picked_B1])
            if not policy.more([] if said_B is None else said_B.tolist()):
                break
        drafted = len(tokens) - 1
        lengths = policy.share(drafted) if self.drops else ()
        kept = max(lengths) if lengths else policy.keep(drafted) if self.drops else drafted
        packing = None
        if lengths and min(lengths) < kept:
            nodes_B = 1 + torch.tensor(lengths, device=self.device)
            packing = Packing.from_lengths(nodes_B, kept + 1, sum(lengths) + len(lengths))
        reached = self.tree(kept)
        return Draft(
            torch.cat(tokens[: kept + 1], dim=1),
            tuple(steps.scores[:kept]),
            reached.topology,
            said=tuple(steps.said[:kept]),
            shape=reached,
            levels=drafted,
            packing=packing,
        )

    def _said(self, made: Proposals, depth: int) -> tuple[Tensor | None, Tensor]:
        """[B] what the policy reads of a level, if it does; and the columns of the best proposals [B, 1]."""
        if self.policy.reads == "nothing":
            return None, made.noisy_BFK.argmax(-1)
        return _chance(made, depth, None if self.policy.reads == "confidence" else self.predictor)


@dataclass(frozen=True, eq=False)
class RankedChain(Chain):
    """Drafts a chain in every row; of all tokens those likeliest to be kept are verified. Nothing is read on the host.

    What is likelier than others is so with its whole path, since a token is never likelier than the one before it.

    Attributes:
        tree: The chain.
        each: Tokens verified in the mean of rows; those that are done take none while others have any.
        predictor: Says how likely they are; without one, the draft's own probabilities do.
    """

    tree: Tree
    each: int
    predictor: FoldedPredictor | None = None

    @property
    def depth(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tree.depth

    @property
    def key(self) -> Hashable:
        return self.tree.paths, self.each, self.predictor

    def grow(self, steps: Steps) -> Draft:
        B, D = steps.root_B.shape[0], self.depth
        tokens, said = [steps.root_B[:, None]], []
        for depth, level in enumerate(self.tree.levels):
            made = _step(steps, level, tokens[-1], depth)
            said_B, picked_B1 = _chance(made, depth, self.predictor)
            tokens.append(picked_B1 if made.ids_K is None else made.ids_K[picked_B1])
            said.append(said_B)
        chances_BD = torch.stack(said, 1).clamp(max=1.0).cumprod(1)
        if steps.done_B is not None:
            chances_BD = chances_BD.masked_fill(steps.done_B[:, None], 0.0)
        packing = None
        if self.each < D:
            # stable, so that of equally likely tokens of a row the first come first
            best = chances_BD.flatten().sort(descending=True, stable=True).indices[: B * self.each]
            nodes_B = torch.ones_like(steps.root_B).scatter_add(0, best // D, torch.ones_like(best))
            packing = Packing.from_lengths(nodes_B, D + 1, B * (1 + self.each))
        return Draft(
            torch.cat(tokens, dim=1),
            tuple(steps.scores),
            self.tree.topology,
            said=tuple(steps.said),
            shape=self.tree,
            packing=packing,
            chances_BD=chances_BD,
        )


def _step(steps: Steps, level: Level, token_B1: Tensor, depth: int) -> Proposals:
    """What a chain's level proposes after a token."""
    frontier = Frontier.chain(token_B1, (steps.position_B + depth)[:, None], depth, level.ancestors_FN.shape[1])
    return steps.expand(frontier, 1)


def _chance(made: Proposals, depth: int, predictor: FoldedPredictor | None) -> tuple[Tensor, Tensor]:
    """[B] how likely a level's best proposal is to be kept, by the predictor or else by the draft; its column [B, 1]."""
    if predictor is not None:
        said_B11, picked_B11 = predictor(made.hidden_BFD, made.noisy_BFK, 1, depth)
        return said_B11[:, 0, 0], picked_B11[:, 0]
    best_B1 = made.noisy_BFK.softmax(-1).max(-1)
    return best_B1.values[:, 0], best_B1.indices
