"""Draft trees that grow where the draft is sure: EAGLE-2 (Li et al. 2024, arXiv 2406.16858), DySpec (arXiv 2410.11744).

A node's score is the sum along its path of log softmax(log q + G), G the noise its children are picked by: none at temperature
0 and under `residual`. With the noise it says how likely the target is to choose the node given that noise; log q alone would
rank by a chance that has already been drawn. Each level expands the best nodes of the one before; at the end all that were
proposed are ranked together and the best are kept. No term is above 0, so an ancestor never ranks below its descendant, and
what is kept is a tree.

Shapes are static and nothing is read on the host: which node hangs where is data, so one captured graph serves every tree.
A `Guide` may score children otherwise, or end the growth early.
"""

# B batch  N nodes kept, root first  F frontier nodes  K children of a node  M nodes expanded, root first  V vocabulary
# C nodes proposed, root first; the root's children follow, then level by level the children of each frontier node

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.drafters.base import Frontier, parse_rank_paths
from trainkit.errors import UserError
from trainkit.runner.trees.shape import Draft, Proposals, RankPath, Shape, Steps, Topology


class Guide:
    """Steers the growth of a dynamic tree: this one by the draft's word alone, to the full size."""

    def terms(self, made: Proposals, depth: int, width: int) -> tuple[Tensor, Tensor]:
        """Each node's best children [B, F, K]: the logarithm of each one's chance, at most 0, and their columns."""
        return likeliest(made.noisy_BFK, width)

    def goes_on(self, terms_BFK: Tensor) -> bool:
        """Whether to expand another level, after one that gave these terms."""
        return True

    def keeps(self, most: int) -> int:
        """How many nodes stay beside the root, at most so many."""
        return most


@dataclass(frozen=True)
class DynamicTree(Shape):
    """A tree whose shape follows the draft's probabilities.

    Args:
        depth: Levels; the most tokens a round can accept.
        top_k: Children of an expanded node, and nodes expanded on a level.
        nodes: Nodes kept, root included: rows the target verifies.
    """

    depth: int = 5
    top_k: int = 4
    nodes: int = 16
    ranked = True

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise UserError(f"tree: depth {self.depth} must be at least 1")
        if self.top_k < 1:
            raise UserError(f"tree: top_k {self.top_k} must be at least 1")
        if not 2 <= self.nodes <= self.proposed:
            raise UserError(
                f"tree: nodes {self.nodes} must be at least 2 and at most {self.proposed}, what depth {self.depth} and "
                f"top_k {self.top_k} propose with the root"
            )

    @property
    def proposed(self) -> int:
        """Nodes that it chooses among, root included."""
        return 1 + self.top_k + (self.depth - 1) * self.top_k**2

    @property
    def _expanded(self) -> int:
        return 1 + (self.depth - 1) * self.top_k

    @property
    def size(self) -> int:
        return self.nodes

    @property
    def slots(self) -> int:
        return max(self.nodes, self._expanded)

    @property
    def widest(self) -> int:
        return 1 if self.depth == 1 else self.top_k

    @property
    def is_chain(self) -> bool:
        return False

    @property
    def key(self) -> Hashable:
        return self

    def grow(self, steps: Steps) -> Draft:
        """Expands the best nodes of each level and keeps the best of all; kept nodes are numbered by rank, best first."""
        return self.guided(steps, Guide())

    def guided(self, steps: Steps, guide: Guide) -> Draft:
        """As `grow`, steered."""
        root_B, device, width = steps.root_B, steps.root_B.device, self.top_k
        B, M = root_B.shape[0], self._expanded
        # of the frontier: token, score, number, place among the proposed, parent's number and place in its frontier, ancestors
        tokens_BF, scores_BF = root_B[:, None], torch.zeros(B, 1, device=device)
        numbers_F = torch.zeros(1, dtype=torch.long, device=device)
        proposed_BF = above_BF = torch.zeros(B, 1, dtype=torch.long, device=device)
        parents_BF = above_BF - 1
        ancestors_BFM = torch.zeros(B, 1, M, dtype=torch.bool, device=device)
        ancestors_BFM[..., 0] = True
        # of all that is proposed, level by level
        tokens, scores, parents, rows = [tokens_BF], [], [proposed_BF], [ancestors_BFM]
        numbers_BC = torch.zeros(B, self.proposed, dtype=torch.long, device=device)
        for depth in range(self.depth):
            F, first = tokens_BF.shape[1], 1 if depth == 0 else 1 + width + (depth - 1) * width**2
            frontier = Frontier(
                tokens_BF=tokens_BF,
                positions_BF=(steps.position_B + depth)[:, None].expand(B, F),
                nodes_F=numbers_F,
                parents_BF=parents_BF,
                parent_index_BF=above_BF,
                ancestors_BFM=ancestors_BFM,
                depth=depth,
                is_chain=False,
            )
            made = steps.expand(frontier, width)
            terms_BFK, picked_BFK = guide.terms(made, depth, width)
            children_BC = (picked_BFK if made.ids_K is None else made.ids_K[picked_BFK]).flatten(1)
            # a child of unknown chance must not rank before its parent, which would then not stay
            found_BC = (scores_BF[..., None] + terms_BFK).flatten(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            tokens.append(children_BC)
            scores.append(found_BC)
            parents.append(proposed_BF.repeat_interleave(width, 1))
            if not guide.goes_on(terms_BFK) or depth + 1 == self.depth:
                break
            best_BF = best(found_BC, width)
            above_BF = best_BF // width
            tokens_BF, scores_BF = children_BC.gather(1, best_BF), found_BC.gather(1, best_BF)
            proposed_BF = first + best_BF
            parents_BF = numbers_F[above_BF]
            numbers_F = 1 + depth * width + torch.arange(width, device=device)
            numbers_BC.scatter_(1, proposed_BF, numbers_F.expand(B, -1))
            ancestors_BFM = ancestors_BFM.gather(1, above_BF[..., None].expand(-1, -1, M)).scatter(
                2, numbers_F.expand(B, -1)[..., None], True
            )
            rows.append(ancestors_BFM)
        found_BC = torch.cat(scores, 1)
        kept = guide.keeps(min(self.nodes - 1, found_BC.shape[1]))
        kept_BN = torch.cat([torch.zeros_like(above_BF[:, :1]), 1 + best(found_BC, kept)], dim=1)
        numbers_BN = numbers_BC.gather(1, kept_BN)
        topology = self._topology(kept_BN, numbers_BN, torch.cat(parents, 1), numbers_BC, torch.cat(rows, 1))
        return Draft(torch.cat(tokens, 1).gather(1, kept_BN), tuple(steps.scores), topology, numbers_BN)

    def _topology(
        self, kept_BN: Tensor, numbers_BN: Tensor, parents_BC: Tensor, numbers_BC: Tensor, ancestors_BMM: Tensor
    ) -> Topology:
        """Where the kept nodes hang, from where all that were proposed hang.

        Args:
            kept_BN: Places of the kept nodes among the proposed.
            numbers_BN: Their numbers among the expanded nodes, 0 where never expanded.
            parents_BC: Place of each proposed node's parent.
            numbers_BC: Numbers of all proposed.
            ancestors_BMM: True at ancestors and self, over the expanded nodes.
        """
        N, device = kept_BN.shape[1], kept_BN.device
        order_N = torch.arange(N, device=device)
        rank_BC = torch.zeros_like(parents_BC).scatter(1, kept_BN, order_N.expand_as(kept_BN))
        above_BN = parents_BC.gather(1, kept_BN)
        # an ancestor was expanded: i sees j where j is among what i's parent saw, or is i
        seen_BNM = ancestors_BMM.gather(1, numbers_BC.gather(1, above_BN)[..., None].expand(-1, -1, ancestors_BMM.shape[2]))
        seen_BNN = seen_BNM.gather(2, numbers_BN[:, None].expand(-1, N, -1))
        expanded_BN = (numbers_BN > 0) | (order_N == 0)
        ancestors_BNN = (seen_BNN & expanded_BN[:, None]) | torch.eye(N, dtype=torch.bool, device=device)
        return Topology(ancestors_BNN.sum(-1) - 1, rank_BC.gather(1, above_BN), ancestors_BNN)


def likeliest(noisy_BFV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Each node's best children [B, F, K]: log softmax(log q + G) of each, at most 0, and their columns."""
    top = noisy_BFV.topk(width, dim=-1)
    return top.values - noisy_BFV.logsumexp(-1, keepdim=True), top.indices


def best(scores_BC: Tensor, count: int) -> Tensor:
    """Places of the highest scores, best first; of equal ones the first, so that a parent stays before its children."""
    return scores_BC.sort(dim=1, descending=True, stable=True).indices[:, :count]


def read_tree(text: str) -> DynamicTree | list[RankPath]:
    """A tree as the command line spells it: rank paths [[0],[1],[0,0]], or dynamic:DEPTH,TOP_K,NODES.

    Raises:
        UserError: it is neither.
    """
    if text == "dynamic":
        return DynamicTree()
    if found := re.fullmatch(r"dynamic:(\d+),(\d+),(\d+)", text.replace(" ", "")):
        return DynamicTree(*map(int, found.groups()))
    with suppress(ValueError):
        return list(parse_rank_paths(json.loads(text)))
    raise UserError(f"tree {text}: give rank paths, as [[0],[1],[0,0]], or dynamic:DEPTH,TOP_K,NODES, as dynamic:5,4,16")
