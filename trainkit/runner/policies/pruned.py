"""Dynamic trees that an acceptance predictor ranks, and that grow and keep only what pays.

Where a chain has one way on, a tree has many. The predictor says of each proposed child how likely the target is to choose it;
the product along its path orders expansion and ranking in place of the draft's word. A policy that knows the costs ends the
growth where another level is worth less than it takes, and cuts off what is worth less than the row that would verify it.
Lossless under every verification that a dynamic tree has: which nodes stay never decides what the target chooses.
"""

# B rows  F frontier nodes  K children of a node  C nodes proposed  D levels

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainkit.models.predictor import FoldedPredictor
from trainkit.runner.policies.chain import Paced
from trainkit.runner.policies.cost import PRIOR, Cost, Fading
from trainkit.runner.policies.cost_model import ChainCosts
from trainkit.runner.policy import RoundOutcome
from trainkit.runner.trees.dynamic import DynamicTree, Guide
from trainkit.runner.trees.shape import Draft, Proposals, Shape, Steps
from trainkit.runner.trees.static import Tree, build, chain

_LEAST = 1e-6
"""Chances are taken from here to 1 less this: their logarithm is finite, and a child never ranks with its parent."""


class Predicted(Guide):
    """Ranks nodes by what a predictor says of them; by the draft's word without one."""

    def __init__(self, predictor: FoldedPredictor | None) -> None:
        self.predictor = predictor

    def terms(self, made: Proposals, depth: int, width: int) -> tuple[Tensor, Tensor]:
        if self.predictor is None:
            return super().terms(made, depth, width)
        said_BFK, picked_BFK = self.predictor(made.hidden_BFD, made.noisy_BFK, width, depth)
        return said_BFK.clamp(_LEAST, 1 - _LEAST).log(), picked_BFK


@dataclass(frozen=True)
class PredictedTree(DynamicTree):
    """A dynamic tree of fixed size that a predictor ranks; a captured graph can hold it.

    Args:
        predictor: Its word at the temperature that is decoded with; without one the draft's.
    """

    predictor: FoldedPredictor | None = None

    def grow(self, steps: Steps) -> Draft:
        return self.guided(steps, Predicted(self.predictor))

    def cut(self, depth: int, nodes: int) -> PredictedTree:
        """The same of so many levels, and at most so many nodes."""
        fewer = replace(self, depth=depth, nodes=2)
        return replace(fewer, nodes=min(nodes, self.nodes, fewer.proposed))


class TreeCost(Cost):
    """Expands a level while it is worth more than it costs, and keeps the nodes that are.

    Args:
        costs: Of a round's parts, `tree`'s levels and numbers of nodes.
        tree: The largest.
    """

    def __init__(self, costs: ChainCosts, tree: PredictedTree) -> None:
        super().__init__(costs, tree.depth, "predictor")
        self.tree = tree
        first = [PRIOR] + [(1 - PRIOR) / tree.top_k] * (tree.top_k - 1)
        self.known = Fading(tree.depth, np.array(first))  # chances of a node's children, best first
        self._reached_BF, self._proposed_BC, self._level = np.ones((1, 1)), np.empty((1, 0)), 0

    def begin(self, rows: int) -> int:
        # chances of the nodes that the coming level expands, and of all that were proposed
        self._reached_BF, self._proposed_BC, self._level = np.ones((rows, 1)), np.empty((rows, 0)), 0
        return super().begin(rows)

    def _seconds(self, rows: int, levels: int, total: int, longest: int) -> float:
        return self.costs.round(rows, levels, self.tree.cut(levels, self.tree.nodes).nodes - 1)

    def spread(self, chances_BFK: np.ndarray) -> bool:
        """Whether to expand another level, after one of whose nodes' children these are the chances, best first."""
        rows, level = self._rows, self._level
        found_BFK = self._reached_BF[..., None] * np.nan_to_num(chances_BFK)
        self.known.add(level, self._reached_BF.sum() / rows, found_BFK.sum((0, 1)) / rows)
        found_BC = found_BFK.reshape(rows, -1)
        self._proposed_BC = np.concatenate([self._proposed_BC, found_BC], axis=1)
        self._reached_BF = -np.sort(-found_BC)[:, : self.tree.top_k]
        self._level += 1
        if level + 1 >= self.most:
            return False
        rate, nodes = self.rate(rows), self.tree.nodes
        row = (self.costs.verify(rows, nodes) - self.costs.verify(rows, 1)) / (rows * (nodes - 1))  # of a node, on average
        worth_BFK = self._reached_BF[..., None] * self.known.means[level + 1] - rate * row
        return worth_BFK.clip(min=0).sum() > rate * self.costs.level(rows)

    def nodes(self, most: int) -> int:
        """How many nodes to verify beside the root: as many in each row."""
        rows, rate = self._rows, self.rate(self._rows)
        gained = -np.sort(-self._proposed_BC).sum(0)[:most].cumsum()
        values = [gain - rate * self.costs.verify(rows, count + 1) for count, gain in enumerate([0.0, *gained.tolist()])]
        return max(range(len(values)), key=lambda count: values[count])

    def learn(self, came: RoundOutcome) -> None:
        rows, accepted = came.rows, came.accepted
        if came.levels and accepted:
            tokens = sum(accepted) + len(accepted)
            self._book(rows).add(self.costs.round(rows, came.levels, came.nodes), tokens * self.costs.plain(rows) / rows)


class _Pruned(Predicted):
    """Asks a policy; the host reads a level's chances for that."""

    def __init__(self, predictor: FoldedPredictor | None, policy: TreeCost) -> None:
        super().__init__(predictor)
        self.policy, self.levels = policy, 0

    def goes_on(self, terms_BFK: Tensor) -> bool:
        self.levels += 1
        return self.policy.spread(terms_BFK.exp().cpu().numpy())

    def keeps(self, most: int) -> int:
        return self.policy.nodes(most)


class AdaptiveTree(Paced):
    """A tree that its policy ends and prunes; where rounds are captured, one of a few sizes.

    Args:
        policy: What decides.
        device: Of the tree tensors.
    """

    ranked = True

    def __init__(self, policy: TreeCost, device: torch.device) -> None:
        self.policy = self.pruning = policy
        self.whole = policy.tree
        self.depth = self.most = policy.most
        self.root: Tree = build(chain(0), device)

    @property
    def size(self) -> int:
        return self.whole.size

    @property
    def slots(self) -> int:
        return self.whole.slots

    @property
    def widest(self) -> int:
        return self.whole.widest

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def key(self) -> Hashable:
        return None

    def captured(self, levels: int, each: int) -> Shape:
        return self.whole.cut(levels, self.whole.nodes) if levels else self.root

    def grow(self, steps: Steps) -> Draft:
        guide = _Pruned(self.whole.predictor, self.pruning)
        draft = self.whole.cut(self.most, self.whole.nodes).guided(steps, guide)
        nodes = draft.tokens_BN.shape[1]
        if nodes == 1:  # nothing of it pays
            return Draft(draft.tokens_BN, (), self.root.topology, shape=self.root, levels=guide.levels)
        return replace(draft, shape=self.whole.cut(guide.levels, nodes), levels=guide.levels)
