"""Chains and static draft trees, given as rank paths: (0,) is the root's likeliest child, (0, 1) that child's second."""

# B batch  N nodes, root first  F frontier nodes  C children of one level  K draft vocabulary  V vocabulary  D levels

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from trainkit.drafters.base import Frontier
from trainkit.errors import UserError
from trainkit.runner.trees.shape import Draft, RankPath, Shape, Steps, Topology


@dataclass(frozen=True)
class Level:
    """One expansion: the nodes that have children, and where each child comes from.

    Attributes:
        nodes_F: The frontier's node numbers.
        parents_F: Their parents' numbers, -1 at the root.
        parent_places_F: Where each parent stood in the level above.
        ancestors_FN: True at a frontier node's ancestors and itself.
        children: Node numbers of the children; a slice, since nodes are numbered level by level.
        places_C: Which frontier node each is a child of.
        ranks_C: Which of its proposals each is.
        width: Proposals asked for: 1 + the largest rank.
        single: Every frontier node has one child, so that child i comes from node i.
    """

    nodes_F: Tensor
    parents_F: Tensor
    parent_places_F: Tensor
    ancestors_FN: Tensor
    children: slice
    places_C: Tensor
    ranks_C: Tensor
    width: int
    single: bool


@dataclass(frozen=True)
class Tree(Shape):
    """A static draft tree on a device.

    Attributes:
        paths: Rank paths of the nodes after the root, parents before children, level by level.
        levels: Its expansions, root's first.
        depth: Longest path; the most tokens a round can accept.
        topology: Where its nodes hang.
        children_NW: The number of each node's child by rank, -1 where there is none.
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
    def slots(self) -> int:
        return self.size

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
        """Without its last level."""
        return build([path for path in self.paths if len(path) < self.depth], self.children_NW.device)

    def grow(self, steps: Steps) -> Draft:
        """Each level's proposals are the best by draft log-probability plus noise."""
        B = steps.root_B.shape[0]
        tokens_BN = steps.root_B[:, None].repeat(1, self.size)
        frontier_BF = steps.root_B[:, None]
        for depth, level in enumerate(self.levels):
            frontier = Frontier(
                tokens_BF=frontier_BF,
                positions_BF=(steps.position_B + depth)[:, None].expand(B, len(level.nodes_F)),
                nodes_F=level.nodes_F,
                parents_BF=level.parents_F.expand(B, -1),
                parent_index_BF=level.parent_places_F.expand(B, -1),
                ancestors_BFM=level.ancestors_FN.expand(B, -1, -1),
                depth=depth,
                is_chain=self.is_chain,
            )
            made = steps.expand(frontier, level.width)
            noisy = made.noisy_BFK
            picked = noisy.argmax(-1, keepdim=True) if level.width == 1 else noisy.topk(level.width, dim=-1).indices
            if made.ids_K is not None:
                picked = made.ids_K[picked]
            children_BC = picked[..., 0] if level.single else picked[:, level.places_C, level.ranks_C]
            tokens_BN[:, level.children] = children_BC
            if depth + 1 < self.depth:
                frontier_BF = children_BC if self.is_chain else tokens_BN[:, self.levels[depth + 1].nodes_F]
        return Draft(tokens_BN, tuple(steps.scores), self.topology, said=tuple(steps.said))


def chain(depth: int) -> tuple[RankPath, ...]:
    """The rank paths of a chain; none at depth 0, which is plain decoding."""
    return tuple((0,) * level for level in range(1, depth + 1))


def build(paths: Sequence[RankPath], device: torch.device) -> Tree:
    """The tree of these rank paths.

    Raises:
        UserError: a path is given twice, or its parent or a lower rank beside it is missing.
    """
    ordered = sorted((tuple(path) for path in paths), key=lambda path: (len(path), path))
    number: dict[RankPath, int] = {(): 0} | {path: i + 1 for i, path in enumerate(ordered)}
    if len(number) != len(ordered) + 1:
        raise UserError("tree: a rank path is given twice or is empty")
    for path in ordered:
        elder = path[:-1] + (path[-1] - 1,)
        if path[:-1] not in number or (path[-1] > 0 and elder not in number) or path[-1] < 0:
            raise UserError(f"tree: path {list(path)} needs its parent and every lower rank beside it")
    nodes = [(), *ordered]

    def tensor(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    ancestors = torch.zeros(len(nodes), len(nodes), dtype=torch.bool, device=device)
    for path in nodes:
        for length in range(len(path) + 1):
            ancestors[number[path], number[path[:length]]] = True
    levels: list[Level] = []
    above: list[RankPath] = [()]
    for depth in range(max(map(len, nodes))):
        children = [path for path in nodes if len(path) == depth + 1]
        frontier = sorted({path[:-1] for path in children}, key=number.__getitem__)
        levels.append(
            Level(
                nodes_F=tensor([number[p] for p in frontier]),
                parents_F=tensor([number[p[:-1]] if p else -1 for p in frontier]),
                parent_places_F=tensor([above.index(p[:-1]) if p else 0 for p in frontier]),
                ancestors_FN=ancestors[tensor([number[p] for p in frontier])],
                children=slice(number[children[0]], number[children[-1]] + 1),
                places_C=tensor([frontier.index(p[:-1]) for p in children]),
                ranks_C=tensor([p[-1] for p in children]),
                width=1 + max(p[-1] for p in children),
                single=len(children) == len(frontier),
            )
        )
        above = frontier
    width = 1 + max((p[-1] for p in ordered), default=0)
    children_NW = torch.full((len(nodes), width), -1, dtype=torch.long, device=device)
    for path in nodes:
        if path:
            children_NW[number[path[:-1]], path[-1]] = number[path]
    return Tree(
        paths=tuple(ordered),
        levels=tuple(levels),
        depth=len(levels),
        children_NW=children_NW,
        topology=Topology(tensor([[len(p) for p in nodes]]), tensor([[number[p[:-1]] for p in nodes]]), ancestors[None]),
    )
