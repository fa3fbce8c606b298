"""The shape of a round's draft and its growth level by level: what chains, static trees and dynamic trees share."""

# B batch  N nodes, root first  F frontier nodes  C children of one level  K draft vocabulary  V vocabulary  D levels

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field

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
