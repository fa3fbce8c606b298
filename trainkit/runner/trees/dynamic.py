"""Draft trees that grow where the draft is sure: EAGLE-2 (Li et al. 2024, arXiv 2406.16858), DySpec (arXiv 2410.11744).

A node's score is the sum along its path of log softmax(log q + G). G is the noise that its children are picked by; there is
none at temperature 0 and under `residual`. With the noise the score estimates how likely the target chooses the node given that
noise; log q alone would rank by a probability whose draw has already happened. Each level expands the best nodes of the level
before. At the end all proposed nodes are ranked together and the best are kept. No term is above 0, so an ancestor never ranks
below its descendant, and the kept nodes form a tree.

Shapes are static and nothing is read on the host: how nodes are connected is data, so one captured graph serves every tree.
"""

# B batch  N nodes kept, root first  F frontier nodes  K children of a node  M nodes expanded, root first  V vocabulary
# C nodes proposed, root first; the root's children follow, then level by level the children of each frontier node
# W words of 64 bits

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.drafters.base import Frontier, parse_rank_paths
from trainkit.errors import UserError
from trainkit.layers.visible import node_bits, unpack_bits
from trainkit.runner.trees.shape import Draft, RankPath, Shape, Steps, Topology


@dataclass(frozen=True)
class DynamicTree(Shape):
    """A tree whose shape follows the draft's probabilities.

    Args:
        depth: Number of levels: the most tokens that a round can accept.
        top_k: Number of children of an expanded node, and of nodes expanded on a level.
        nodes: Number of nodes kept, root included: rows that the target verifies.
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
        """Number of nodes that it chooses from, root included."""
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

    def grow(self, steps: Steps) -> Draft:
        """Expands the best nodes of each level and keeps the best of all; kept nodes are numbered by rank, best first."""
        root_B, device, width = steps.root_B, steps.root_B.device, self.top_k
        B, M = root_B.shape[0], self._expanded
        # The frontier: tokens, scores, numbers, indices among the proposed nodes, parents' indices, bits of ancestors.
        tokens_BF, scores_BF = root_B[:, None], torch.zeros(B, 1, device=device)
        numbers_F = torch.zeros(1, dtype=torch.long, device=device)
        proposed_BF = above_BF = torch.zeros(B, 1, dtype=torch.long, device=device)
        bits_BFW = node_bits(numbers_F, M).expand(B, -1, -1)
        # All proposed nodes, level by level: tokens, scores, parents' indices, and the numbers of those that are expanded.
        tokens, scores, parents = [tokens_BF], [], [proposed_BF]
        numbers_BC = torch.zeros(B, self.proposed, dtype=torch.long, device=device)
        for depth in range(self.depth):
            # Expand the frontier.
            F, first = tokens_BF.shape[1], 1 if depth == 0 else 1 + width + (depth - 1) * width**2
            positions_BF = (steps.position_B + depth)[:, None].expand(B, F)
            proposals = steps.expand(Frontier(tokens_BF, positions_BF, numbers_F, above_BF, bits_BFW, depth), width)
            terms_BFK, columns_BFK = likeliest(proposals.noisy_BFK, width)
            children_BC = proposals.tokens(columns_BFK).flatten(1)
            # A child of unknown score must not rank before its parent, which would then not be kept.
            scores_BC = (scores_BF[..., None] + terms_BFK).flatten(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            tokens.append(children_BC)
            scores.append(scores_BC)
            parents.append(proposed_BF.repeat_interleave(width, 1))
            if depth + 1 == self.depth:
                break
            # The best children are the next frontier.
            best_BF = best(scores_BC, width)
            above_BF = best_BF // width
            tokens_BF, scores_BF = children_BC.gather(1, best_BF), scores_BC.gather(1, best_BF)
            proposed_BF = first + best_BF
            numbers_F = 1 + depth * width + torch.arange(width, device=device)
            numbers_BC.scatter_(1, proposed_BF, numbers_F.expand(B, -1))
            bits_BFW = _rows(bits_BFW, above_BF) | node_bits(numbers_F, M)
        # Keep the best of all: indices among the proposed nodes.
        kept_BN = torch.cat([torch.zeros_like(above_BF[:, :1]), 1 + best(torch.cat(scores, 1), self.nodes - 1)], dim=1)
        topology = self._topology(kept_BN, torch.cat(parents, 1))
        tokens_BN, numbers_BN = torch.cat(tokens, 1).gather(1, kept_BN), numbers_BC.gather(1, kept_BN)
        return Draft(self, tokens_BN, topology, self.depth, tuple(steps.logits), tuple(steps.signals), numbers_BN)

    def _topology(self, kept_BN: Tensor, parents_BC: Tensor) -> Topology:
        """How the kept nodes are connected, from the indices of all parents among the proposed nodes."""
        N, device = kept_BN.shape[1], kept_BN.device
        rank_BC = torch.zeros_like(parents_BC).scatter(1, kept_BN, torch.arange(N, device=device).expand_as(kept_BN))
        parents_BN = rank_BC.gather(1, parents_BC.gather(1, kept_BN))
        # A node's bits are its own and those of its parent; after `depth` repeats all ancestors are reached.
        own_NW = node_bits(torch.arange(N, device=device), N)
        bits_BNW = own_NW.expand(len(kept_BN), -1, -1)
        for _ in range(self.depth):
            bits_BNW = own_NW | _rows(bits_BNW, parents_BN)
        return Topology(unpack_bits(bits_BNW, N).sum(-1) - 1, parents_BN, bits_BNW)


def _rows(values_BFW: Tensor, index_BN: Tensor) -> Tensor:
    """[B, N, W] the rows of each batch row at these indices."""
    return values_BFW.gather(1, index_BN[..., None].expand(-1, -1, values_BFW.shape[2]))


def likeliest(noisy_BFV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Each node's best children [B, F, K]: log softmax(log q + G) of each, at most 0, and their columns."""
    top = noisy_BFV.topk(width, dim=-1)
    return top.values - noisy_BFV.logsumexp(-1, keepdim=True), top.indices


def best(scores_BC: Tensor, count: int) -> Tensor:
    """Indices of the highest scores, best first; among equals the first, so that a parent comes before its children."""
    return scores_BC.sort(dim=1, descending=True, stable=True).indices[:, :count]


def parse_tree(text: str) -> DynamicTree | list[RankPath]:
    """A tree as the command line writes it: rank paths [[0],[1],[0,0]], or dynamic:DEPTH,TOP_K,NODES.

    Raises:
        UserError: it is neither.
    """
    if text == "dynamic":
        return DynamicTree()
    if match := re.fullmatch(r"dynamic:(\d+),(\d+),(\d+)", text.replace(" ", "")):
        return DynamicTree(*map(int, match.groups()))
    with suppress(ValueError):
        return list(parse_rank_paths(json.loads(text)))
    raise UserError(f"tree {text}: give rank paths, as [[0],[1],[0,0]], or dynamic:DEPTH,TOP_K,NODES, as dynamic:5,4,16")
