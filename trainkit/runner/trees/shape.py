"""The base of all draft shapes; the draft, its topology, and the drafter's steps that grow it level by level."""

# B batch  N nodes, root first  F frontier nodes  K draft vocabulary  V vocabulary  D levels  W proposals of a node

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from trainkit.drafters.base import Drafter, Frontier, State, TargetHandle
from trainkit.errors import UserError
from trainkit.layers.attention import Packing
from trainkit.models.predictor import RANKS, signals
from trainkit.runner.policy import Policy
from trainkit.runner.sampling import AnyNoise, RowSampling, Sampling

RankPath = tuple[int, ...]
"""A node of a tree: (0,) is the root's likeliest child, (0, 1) the second child of that one."""


@dataclass(frozen=True)
class Topology:
    """How the nodes that the target verifies are connected; one row serves the whole batch where all rows are alike.

    Attributes:
        depths_BN: Depth of each node; the root has 0.
        parents_BN: Number of each node's parent, lower than the node's own; 0 for the root.
        bits_BNW: Words of 64 bits, set at the numbers of a node's ancestors and its own (layers/visible.py).
    """

    depths_BN: Tensor
    parents_BN: Tensor
    bits_BNW: Tensor


@dataclass(frozen=True)
class LevelSignals:
    """What an acceptance predictor reads of one draft level.

    Attributes:
        hidden_BFD: Hidden state of each node that was expanded.
        tokens_BFW: Token ids of its best proposals, best first.
        signals_BFWC: Their `signals` (models/predictor.py).
    """

    hidden_BFD: Tensor
    tokens_BFW: Tensor
    signals_BFWC: Tensor


@dataclass(frozen=True)
class Draft:
    """The drafted tree of a round.

    Attributes:
        shape: Its shape. A shape that is decided while drafting (by a policy) puts the final one here.
        tokens_BN: Token ids, root first.
        topology: How the nodes are connected.
        levels: Draft levels that were run; more than the depth where a policy dropped some.
        logits: For each level the processed draft logits [B, F, V] over the whole vocabulary, -inf where the drafter proposes
            nothing; empty unless `Steps.keep_logits`.
        signals: For each level what an acceptance predictor reads; empty unless `Steps.keep_signals`.
        drafter_numbers_BN: The drafter's number of each node, 0 for one that it never expanded; None if equal to ours.
        packing: The nodes of a chain to verify, where rows verify different numbers of them; the rest is padding.
        chances_BD: Predicted probability that each token is accepted, from captured rounds of a policy; otherwise None.
        features_BD: The features of the online logistic model, if the policy uses it; a column for each level that was run.
    """

    shape: Shape
    tokens_BN: Tensor
    topology: Topology
    levels: int
    logits: tuple[Tensor, ...] = ()
    signals: tuple[LevelSignals, ...] = ()
    drafter_numbers_BN: Tensor | None = None
    packing: Packing | None = None
    chances_BD: Tensor | None = None
    features_BD: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """What the drafter proposes on one level.

    Attributes:
        noisy_BFK: Processed draft logits of each node's children, noise added.
        ids_K: Token ids of the columns, or None if they are the whole vocabulary.
        hidden_BFD: Hidden state of each node.
    """

    noisy_BFK: Tensor
    ids_K: Tensor | None
    hidden_BFD: Tensor

    def tokens(self, columns: Tensor) -> Tensor:
        """The token ids of these columns."""
        return columns if self.ids_K is None else self.ids_K[columns]


@dataclass(frozen=True)
class Steps:
    """The drafter's steps in one round, with what all of them share.

    Attributes:
        drafter: The drafter.
        state: Its static tensors.
        handle: The target's shared parts.
        root_B: Token id of the root.
        position_B: Absolute position of the root.
        sampling: Temperature, top-k and top-p, the same as the target's.
        noise_BDV: Gumbel noise for each level, or None to propose the likeliest tokens.
        span: Upper bound of the cache slots in use, for attention with a bias.
        levels: Largest number of levels to draft in this round; None for the shape's depth.
        keep_logits: Keep each level's processed logits, for `residual` verification and for observers.
        keep_signals: Keep what an acceptance predictor reads.
        done_B: Rows whose text has ended.
        logits: The logits kept so far.
        signals: The signals kept so far.
    """

    drafter: Drafter
    state: State
    handle: TargetHandle
    root_B: Tensor
    position_B: Tensor
    sampling: Sampling | RowSampling
    noise_BDV: AnyNoise
    span: int
    levels: int | None = None
    keep_logits: bool = False
    keep_signals: bool = False
    done_B: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    signals: list[LevelSignals] = field(default_factory=list)

    def expand(self, frontier: Frontier, width: int) -> Proposals:
        """Runs one level.

        Raises:
            UserError: a node needs `width` children, but the drafter proposes among fewer tokens.
        """
        out = self.drafter.step(self.state, frontier, self.handle, self.span)
        if width > (known := out.logits_BFK.shape[-1]):
            raise UserError(f"tree: {width} children of a node, but this drafter proposes among {known} tokens only")
        logits_BFK = self.sampling.process(out.logits_BFK)
        if self.keep_logits:
            whole_BFV = logits_BFK
            if out.ids_K is not None:  # a trimmed vocabulary
                whole_BFV = logits_BFK.new_full((*logits_BFK.shape[:2], self.handle.vocab_size), float("-inf"))
                whole_BFV = whole_BFV.index_copy(2, out.ids_K, logits_BFK)
            self.logits.append(whole_BFV)
        if self.noise_BDV is not None:
            row = self.noise_BDV[:, frontier.depth : frontier.depth + 1]
            logits_BFK = logits_BFK + (row if out.ids_K is None else row[:, :, out.ids_K])
        proposals = Proposals(logits_BFK, out.ids_K, out.hidden_BFD)
        if self.keep_signals:
            width = min(RANKS, known)
            tokens_BFW = proposals.tokens(logits_BFK.topk(width, dim=-1).indices)
            self.signals.append(LevelSignals(out.hidden_BFD, tokens_BFW, signals(logits_BFK, width, self.sampling.temperature)))
        return proposals


class Shape(ABC):
    """What a round drafts; unless a subclass overrides its properties, a chain of `depth` tokens.

    Attributes:
        depth: Longest path: the largest number of drafted tokens that a round can accept.
        ranked: Under every verification a node's children are the likeliest tokens, never draws from the draft's distribution.
        policy: Decides in each round how much of the shape is drafted; None where that is fixed.
    """

    depth: int
    ranked = False
    policy: Policy | None = None

    @property
    def size(self) -> int:
        """Number of nodes, root included: rows that the target verifies."""
        return self.depth + 1

    @property
    def slots(self) -> int:
        """Scratch cache slots, the larger of what target and drafter need."""
        return self.size

    @property
    def widest(self) -> int:
        """Number of nodes of the widest frontier."""
        return 1

    @property
    def is_chain(self) -> bool:
        """Whether each node has at most one child."""
        return True

    @property
    def key(self) -> Hashable:
        """What distinguishes it from other shapes in a captured round; None for a shape that cannot be captured."""
        return self

    @abstractmethod
    def grow(self, steps: Steps) -> Draft:
        """Drafts, with one step for each level."""

    def captured(self, levels: int, per_row: int) -> Shape:
        """For a shape with a policy, the shape of a round that is decided beforehand, as a captured graph needs it.

        Args:
            levels: Draft levels; 0 for plain decoding.
            per_row: Mean number of tokens verified in a row, where that may be fewer than are drafted.
        """
        raise NotImplementedError(f"{type(self).__name__} has no policy")
