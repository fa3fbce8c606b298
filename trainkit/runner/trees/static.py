"""The shape of a round's draft, and its growth level by level: what every shape shares, chains and static trees.

A static tree is a list of rank paths: (0,) is the root's likeliest child, (0, 1) that child's second. Trees whose shape follows
the draft's own probabilities are in dynamic.py. Topology lives in index tensors.
"""

# B batch  N nodes, root first  F frontier nodes  C children of one level  K draft vocabulary  V vocabulary  D levels

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from trainkit.drafters.base import Drafter, Frontier, State, TargetHandle
from trainkit.errors import UserError
from trainkit.layers.attention import Packing
from trainkit.models.predictor import RANKS, signals
from trainkit.runner.sampling import Noise, Sampling

RankPath = tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Where the nodes that the target judges hang; one row stands for all where their shape is the same.

    Attributes:
        depths_BN: Depth of each node.
        parents_BN: Parent's number, 0 for the root itself; a parent's number is lower than its children's.
        ancestors_BNN: True at [b, i, j] where j is an ancestor of i, or i.
    """

    depths_BN: Tensor
    parents_BN: Tensor
    ancestors_BNN: Tensor


@dataclass(frozen=True)
class Draft:
    """A drafted tree.

    Attributes:
        tokens_BN: Tokens, root first.
        scores: Per level, the processed draft logits [B, F, V] over the whole vocabulary (-inf where it proposes nothing);
            kept only when asked for.
        topology: Where the nodes hang.
        numbers_BN: What the drafter calls each node, 0 for one it never expanded; None where it calls them as they are here.
        said: Per level, what an acceptance predictor reads; kept only when asked for.
        shape: What it came to, where the shape asked for decides that while it drafts; it grows nothing itself.
        levels: Draft levels run for it, if more than it has.
        packing: Nodes of a chain that are verified, where some rows have more than others; the rest are pads.
        chances_BD: How likely each token is to be kept, where that was asked of a draft that no host followed.
    """

    tokens_BN: Tensor
    scores: tuple[Tensor, ...]
    topology: Topology
    numbers_BN: Tensor | None = None
    said: tuple[Said, ...] = ()
    shape: Shape | None = None
    levels: int | None = None
    packing: Packing | None = None
    chances_BD: Tensor | None = None


@dataclass(frozen=True)
class Said:
    """What a level says: the states that propose, and of each node's best proposals, best first, tokens and `signals`."""

    hidden_BFD: Tensor
    tokens_BFW: Tensor
    signals_BFWC: Tensor


@dataclass(frozen=True)
class Proposals:
    """A level's processed draft logits, noise added, the ids of their columns as in `StepOutput`, and the nodes' states."""

    noisy_BFK: Tensor
    ids_K: Tensor | None
    hidden_BFD: Tensor


@dataclass(frozen=True)
class Steps:
    """The drafter's steps of one round, and what all of them share.

    Attributes:
        drafter: Whose steps they are.
        state: Its tensors.
        handle: The target's shared parts.
        root_B: The root's token.
        position_B: Its absolute position.
        sampling: Processing, the same as the target's.
        noise_BDV: A row of Gumbel noise for each level, or None to take the likeliest.
        span: No cache slot at or past it is in use.
        keep_scores: Keep each level's processed logits, for `residual`,
        keep_said: and what a predictor reads, for measuring.
        done_B: Rows whose text has ended.
        scores: Those kept so far.
        said: Likewise.
    """

    drafter: Drafter
    state: State
    handle: TargetHandle
    root_B: Tensor
    position_B: Tensor
    sampling: Sampling
    noise_BDV: Tensor | Noise | None
    span: int
    keep_scores: bool
    keep_said: bool = False
    done_B: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)

    def expand(self, frontier: Frontier, width: int) -> Proposals:
        """What a level proposes.

        Raises:
            UserError: `width` children are wanted of a node, and the drafter proposes among fewer tokens.
        """
        out = self.drafter.step(self.state, frontier, self.handle, self.span)
        if width > (known := out.logits_BFK.shape[-1]):
            raise UserError(f"tree: {width} children of a node, but this drafter proposes among {known} tokens only")
        logits_BFK = self.sampling.process(out.logits_BFK)
        if self.keep_scores:
            whole = logits_BFK if out.ids_K is None else _widen(logits_BFK, out.ids_K, self.handle.vocab_size)
            self.scores.append(whole)
        if self.noise_BDV is not None:
            row = self.noise_BDV[:, frontier.depth : frontier.depth + 1]
            logits_BFK = logits_BFK + (row if out.ids_K is None else row[:, :, out.ids_K])
        if self.keep_said:
            width = min(RANKS, known)
            best_BFW = logits_BFK.topk(width, dim=-1).indices
            tokens_BFW = best_BFW if out.ids_K is None else out.ids_K[best_BFW]
            self.said.append(Said(out.hidden_BFD, tokens_BFW, signals(logits_BFK, width, self.sampling.temperature)))
        return Proposals(logits_BFK, out.ids_K, out.hidden_BFD)


class Shape(ABC):
    """What a round drafts.

    Attributes:
        depth: Longest path; the most tokens a round can accept.
        ranked: A node's children are the likeliest, not draws from the draft's distribution, whatever the verification.
    """

    depth: int
    ranked = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Nodes, root included: rows the target verifies."""

    @property
    @abstractmethod
    def slots(self) -> int:
        """Scratch cache slots, the larger of what target and drafter need."""

    @property
    @abstractmethod
    def widest(self) -> int:
        """Nodes of its widest frontier."""

    @property
    @abstractmethod
    def is_chain(self) -> bool:
        """Each node has at most one child."""

    @property
    @abstractmethod
    def key(self) -> Hashable:
        """All that tells it from other shapes."""

    @abstractmethod
    def grow(self, steps: Steps) -> Draft:
        """Drafts, with one step for each level."""


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
                parent_places_BF=level.parent_places_F.expand(B, -1),
                ancestors_BFM=level.ancestors_FN.expand(B, -1, -1),
                depth=depth,
                chain=self.is_chain,
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


def grow(
    tree: Shape,
    drafter: Drafter,
    state: State,
    handle: TargetHandle,
    root_B: Tensor,
    position_B: Tensor,
    sampling: Sampling,
    noise_BDV: Tensor | Noise | None,
    span: int,
    keep_scores: bool,
    keep_said: bool = False,
    done_B: Tensor | None = None,
) -> Draft:
    """Drafts a tree of this shape; the other arguments as in `Steps`."""
    steps = Steps(drafter, state, handle, root_B, position_B, sampling, noise_BDV, span, keep_scores, keep_said, done_B)
    return tree.grow(steps)


def _widen(logits_BFK: Tensor, ids_K: Tensor, vocab_size: int) -> Tensor:
    """Logits of a trimmed vocabulary over the whole one, -inf elsewhere."""
    full = logits_BFK.new_full((*logits_BFK.shape[:2], vocab_size), float("-inf"))
    return full.index_copy(2, ids_K, logits_BFK)
