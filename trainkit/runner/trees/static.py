"""Chains and static draft trees, built from rank paths."""

# B batch  N nodes, root first  F frontier nodes  C children of one level  W largest number of children, or words of 64 bits

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from trainkit.drafters.base import Frontier
from trainkit.errors import UserError
from trainkit.layers.visible import node_bits
from trainkit.runner.trees.shape import Draft, RankPath, Shape, Steps, Topology


@dataclass(frozen=True)
class Level:
    """One expansion: the nodes of a level that have children, and the parent of each child.

    Attributes:
        nodes_F: Numbers of the frontier's nodes.
        parent_index_F: Index of each parent in the frontier of the level above.
        bits_FW: Words of 64 bits, set at the numbers of a frontier node's ancestors and its own.
        children: Numbers of the children: a slice, since nodes are numbered level by level.
        parents_C: Index in the frontier of each child's parent.
        ranks_C: Rank of each child among its parent's proposals.
        width: Number of proposals needed per node: 1 + the largest rank.
    """

    nodes_F: Tensor
    parent_index_F: Tensor
    bits_FW: Tensor
    children: slice
    parents_C: Tensor
    ranks_C: Tensor
    width: int

    def frontier(self, tokens_BF: Tensor, position_B: Tensor, depth: int, is_chain: bool) -> Frontier:
        """The frontier with these tokens, `depth` below a root at `position_B`."""
        B, positions_BF = tokens_BF.shape[0], (position_B + depth)[:, None].expand_as(tokens_BF)
        links = self.nodes_F, self.parent_index_F.expand(B, -1), None if is_chain else self.bits_FW[None]
        return Frontier(tokens_BF, positions_BF, *links, depth)


@dataclass(frozen=True)
class Tree(Shape):
    """A static draft tree on a device.

    Attributes:
        paths: Rank paths of the nodes after the root, parents before children, level by level.
        levels: Its expansions, the root's first.
        depth: Longest path.
        topology: How its nodes are connected.
        children_NW: Number of each node's child by rank, -1 where it has none.
    """

    paths: tuple[RankPath, ...]
    levels: tuple[Level, ...]
    depth: int
    topology: Topology
    children_NW: Tensor

    @property
    def size(self) -> int:
        return len(self.paths) + 1

    @property
    def widest(self) -> int:
        return max((len(level.nodes_F) for level in self.levels), default=0)

    @property
    def is_chain(self) -> bool:
        return self.depth == len(self.paths)

    @property
    def key(self) -> Hashable:
        return self.paths

    @cached_property
    def shortened(self) -> Tree:
        """The tree without its last level."""
        return build([path for path in self.paths if len(path) < self.depth], self.children_NW.device)

    def grow(self, steps: Steps) -> Draft:
        """Proposes on each level the tokens with the highest draft log-probability plus noise."""
        tokens_BN = steps.root_B[:, None].repeat(1, self.size)
        frontier_BF = steps.root_B[:, None]
        for depth, level in enumerate(self.levels):
            frontier = level.frontier(frontier_BF, steps.position_B, depth, self.is_chain)
            proposals = steps.expand(frontier, level.width)
            noisy = proposals.noisy_BFK
            columns = noisy.argmax(-1, keepdim=True) if level.width == 1 else noisy.topk(level.width, dim=-1).indices
            tokens_BFW = proposals.tokens(columns)
            children_BC = tokens_BFW[..., 0] if self.is_chain else tokens_BFW[:, level.parents_C, level.ranks_C]
            tokens_BN[:, level.children] = children_BC
            if depth + 1 < self.depth:
                frontier_BF = children_BC if self.is_chain else tokens_BN[:, self.levels[depth + 1].nodes_F]
        return Draft(self, tokens_BN, self.topology, self.depth, tuple(steps.logits), tuple(steps.signals))


def without_last_level(draft: Draft) -> Draft:
    """The draft of a static tree without its last level."""
    assert isinstance(draft.shape, Tree)
    tree = draft.shape.shortened
    return replace(draft, shape=tree, tokens_BN=draft.tokens_BN[:, : tree.size], topology=tree.topology)


def chain(depth: int) -> tuple[RankPath, ...]:
    """The rank paths of a chain; none at depth 0, which is plain decoding."""
    return tuple((0,) * level for level in range(1, depth + 1))


def build(paths: Sequence[RankPath], device: torch.device) -> Tree:
    """The tree of these rank paths.

    Raises:
        UserError: a path is repeated, or its parent or a sibling of lower rank is missing.
    """
    # Number the nodes level by level, and check that no parent or lower rank is missing.
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    number: dict[RankPath, int] = {(): 0} | {path: i + 1 for i, path in enumerate(ordered)}
    if len(number) != len(ordered) + 1:
        raise UserError("tree: a rank path is given twice or is empty")
    for path in ordered:
        if path[:-1] not in number or path[-1] < 0 or (path[-1] and (*path[:-1], path[-1] - 1) not in number):
            raise UserError(f"tree: path {list(path)} needs its parent and every lower rank beside it")
    nodes = [(), *ordered]

    def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    # Bits of every node: its own, and those of its parent.
    bits = node_bits(torch.arange(len(nodes)), len(nodes))
    for path in ordered:
        bits[number[path]] |= bits[number[path[:-1]]]
    bits = bits.to(device)

    # One expansion for each depth that has children.
    levels: list[Level] = []
    above: list[RankPath] = [()]
    for depth in range(max(map(len, nodes))):
        children = [path for path in nodes if len(path) == depth + 1]
        frontier = sorted({path[:-1] for path in children}, key=number.__getitem__)
        levels.append(
            Level(
                nodes_F=tensor([number[p] for p in frontier]),
                parent_index_F=tensor([above.index(p[:-1]) if p else 0 for p in frontier]),
                bits_FW=bits[tensor([number[p] for p in frontier])],
                children=slice(number[children[0]], number[children[-1]] + 1),
                parents_C=tensor([frontier.index(p[:-1]) for p in children]),
                ranks_C=tensor([p[-1] for p in children]),
                width=1 + max(p[-1] for p in children),
            )
        )
        above = frontier

    # Children by rank.
    children_NW = tensor([[-1] * (1 + max((p[-1] for p in ordered), default=0))] * len(nodes))
    for path in ordered:
        children_NW[number[path[:-1]], path[-1]] = number[path]
    topology = Topology(tensor([[len(p) for p in nodes]]), tensor([[number[p[:-1]] for p in nodes]]), bits[None])
    return Tree(tuple(ordered), tuple(levels), len(levels), topology, children_NW)
