"""Which drafted tokens are accepted: coupled verification (token-exact), residual (exact in distribution), typical (lossy).

All of them verify a whole tree from one target forward, on the device, with static shapes.

`Coupled` is the default. At every node the target chooses by log p + noise; the drafter proposed by log q + the SAME noise; a
child is accepted if it is the target's choice. So the text is that of plain seeded decoding, whatever the drafter does. At
temperature 0 there is no noise.

`Residual` is the classical rule of Leviathan et al. 2023 (arXiv 2211.17192), applied to the siblings of a static tree one after
the other without replacement. Its three streams of noise are independent of each other. In a dynamic tree a node's children are
its likeliest tokens and no draws, so q is a point mass at each of them: x is accepted with probability p(x); otherwise p(x) =
0, p is renormalised, and the next sibling is verified. One draw from p decides all of that: the child that it names is
accepted, and if it names none it is the bonus token. That is the rule of `Coupled` under a stream of noise that the draft has
not seen (`PointMassResidual`).

`Typical` accepts what the target finds plausible (Cai et al. 2024, arXiv 2401.10774): the text is no longer the target's.
"""

# B batch  N tree nodes, root first  V vocabulary  P path length, depth + 1  R noise rows, depth + 1  W siblings

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.layers.visible import unpack_bits
from trainkit.runner.sampling import ACCEPT, CHOICE, PROPOSAL, RESIDUAL, AnyNoise, gumbel, mix, uniform
from trainkit.runner.trees.shape import Draft
from trainkit.runner.trees.static import Tree


@dataclass(frozen=True)
class Verdict:
    """What a round accepts.

    Attributes:
        path_BP: Node numbers of the accepted path, root first; None for a chain, where they are 0..P-1.
        counts_B: Number of nodes on the path, root included; also the number of tokens emitted.
        emitted_BP: The accepted tokens, then the bonus token; meaningless from `counts_B` on.
    """

    path_BP: Tensor | None
    counts_B: Tensor
    emitted_BP: Tensor

    def along_path(self, values: Tensor) -> Tensor:
        """[B, P, ...]: the entries of `values` [B, N, ...] at the path's nodes."""
        if self.path_BP is None:
            return values
        index = self.path_BP.view(*self.path_BP.shape, *[1] * (values.dim() - 2))
        return values.gather(1, index.expand(-1, -1, *values.shape[2:]))


class Verification(ABC):
    """A rule that decides which drafted tokens are accepted. Instances are part of a captured round's key.

    Attributes:
        lossy: The text is neither the target's nor distributed like it.
        stream: Stream of the round's noise.
        draft_sees_noise: The draft proposes with that noise; otherwise it proposes its likeliest tokens.
        needs_logits: The rule reads the draft's logits.
        may_drop: Drafted tokens may stay unverified, whatever decides which.
        verifies_last_level: The target verifies every level of the draft.
        chooses_by_score: Every choice is the token of the best score, noise added, so that a row without noise is greedy.
    """

    lossy: ClassVar[bool] = False
    stream: ClassVar[int] = CHOICE
    draft_sees_noise: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    may_drop: ClassVar[bool] = True
    verifies_last_level: ClassVar[bool] = True
    chooses_by_score: ClassVar[bool] = False

    def noise_keys(self, keys_B2: Tensor, position_B: Tensor) -> Tensor:
        """Keys of the round's noise; the requests' own by default."""
        return keys_B2

    @abstractmethod
    def verify(self, draft: Draft, scores_BNV: Tensor, noise: AnyNoise, keys_B2: Tensor, position_B: Tensor) -> Verdict:
        """The accepted path of each row and its bonus token.

        Args:
            draft: The draft.
            scores_BNV: The target's processed logits at every verified node.
            noise: The round's Gumbel noise, one row for each depth and one more.
            keys_B2: Noise keys of the requests.
            position_B: Absolute position of the root.
        """


@dataclass(frozen=True)
class Coupled(Verification):
    """Accepts the longest path of children that equal the target's own choice under the noise that the draft proposed with.

    The target's choice at the path's end is the bonus token.
    """

    chooses_by_score = True

    def verify(self, draft: Draft, scores_BNV: Tensor, noise: AnyNoise, keys_B2: Tensor, position_B: Tensor) -> Verdict:
        choice_BN = _choice(draft, scores_BNV, noise)
        if draft.shape.is_chain:
            equal = draft.tokens_BN[:, 1:] == choice_BN[:, :-1]
            if draft.packing is not None:  # padding is not verified: it repeats its root's logits
                equal &= torch.arange(1, draft.shape.size, device=equal.device) < draft.packing.lengths_B[:, None]
            return Verdict(None, 1 + equal.cumprod(1).sum(1), choice_BN)
        parents_BN = draft.topology.parents_BN.expand_as(choice_BN)
        on_path_BN = _reached(draft, draft.tokens_BN == choice_BN.gather(1, parents_BN))
        path_BP = _path(draft, on_path_BN)
        return Verdict(path_BP, on_path_BN.sum(1), choice_BN.gather(1, path_BP))


@dataclass(frozen=True)
class PointMassResidual(Coupled):
    """`residual` for shapes whose children are the likeliest tokens: a draw from p that the draft has not seen decides."""

    stream = RESIDUAL
    draft_sees_noise = False
    may_drop = False


@dataclass(frozen=True)
class Residual(Verification):
    """Accepts x with probability min(1, p(x) / q(x)); continues from norm(max(0, p - q)) after a rejection.

    Siblings are verified in the order they were drawn. A rejected one leaves q as well, which is renormalised, since it cannot
    be drawn again. Child counts never depend on drawn identities: that would bias the text. Needs a static tree.
    """

    stream = PROPOSAL
    needs_logits = True
    may_drop = False

    def noise_keys(self, keys_B2: Tensor, position_B: Tensor) -> Tensor:
        # A policy may have read proposals that no round verified, so each round draws others.
        return keys_B2 ^ mix(position_B.int())[:, None]

    def verify(self, draft: Draft, scores_BNV: Tensor, noise: AnyNoise, keys_B2: Tensor, position_B: Tensor) -> Verdict:
        # Start at the root, with nothing accepted.
        tree = draft.shape
        assert isinstance(tree, Tree)
        rows = torch.arange(scores_BNV.shape[0], device=scores_BNV.device)
        node = torch.zeros_like(position_B)
        alive = torch.ones_like(position_B, dtype=torch.bool)
        on_path = torch.zeros_like(draft.tokens_BN, dtype=torch.bool)
        on_path[:, 0] = True
        p = scores_BNV[:, 0].softmax(-1)
        siblings_W = torch.arange(tree.children_NW.shape[1], device=node.device)
        for depth, level in enumerate(tree.levels):
            # q: the draft distribution that the children of the path's last node were drawn from.
            index = (level.nodes_F == node[:, None]).int().argmax(1)
            q = draft.logits[depth].softmax(-1)[rows, index]
            u_BW = uniform(keys_B2, (position_B + depth + 1)[:, None], siblings_W, ACCEPT)[:, 0]
            moved = torch.zeros_like(alive)
            next_node = node
            for rank in range(level.width):
                child = tree.children_NW[node, rank]
                # A proposal without mass was not drawn: q had fewer tokens than siblings were wanted.
                token = draft.tokens_BN[rows, child.clamp(min=0)]
                q_token = q[rows, token]
                verified = alive & ~moved & (child >= 0) & (q_token > 0)
                accepted = verified & (u_BW[:, rank] * q_token < p[rows, token])
                rejected = verified & ~accepted
                p_left, q_left = after_rejection(p, q, token)
                p, q = torch.where(rejected[:, None], p_left, p), torch.where(rejected[:, None], q_left, q)
                moved |= accepted
                on_path[rows, child.clamp(min=0)] |= accepted
                p = torch.where(accepted[:, None], scores_BNV[rows, child.clamp(min=0)].softmax(-1), p)
                next_node = torch.where(accepted, child, next_node)
            node = next_node
            alive = moved
        # The bonus token comes from what is left of p at the path's end.
        counts_B = on_path.sum(1)
        vocabulary = torch.arange(p.shape[1], device=p.device)
        noise_B1V = gumbel(keys_B2, (position_B + counts_B)[:, None], vocabulary, RESIDUAL)
        bonus_B1 = (p.log()[:, None] + noise_B1V).argmax(-1)
        return _verdict(draft, None if tree.is_chain else _path(draft, on_path), counts_B, bonus_B1)


@dataclass(frozen=True)
class Typical(Verification):
    """LOSSY: accepts the longest path of tokens that the target finds plausible; its own choice is the bonus token.

    A child x is accepted if p(x) > min(epsilon, scale exp(-H(p))), p the target's processed distribution at its parent, H in
    nats: the bound is lower where p is flat. Of equally long paths the one that ends in the lowest node number is taken. Cai et
    al. 2024, arXiv 2401.10774. Proposals are those of `coupled`, noise included, so temperature still has a meaning where the
    draft is accepted. At temperature 0, where p is one at the likeliest token, this is `coupled`.

    Args:
        epsilon: Upper bound of the threshold.
        scale: Factor of exp(-entropy).
    """

    epsilon: float = 0.09
    scale: float = 0.3
    lossy = True

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"typical_epsilon {self.epsilon}: must be at least 0 and at most 1")
        if not 0 <= self.scale < float("inf"):
            raise UserError(f"typical_scale {self.scale}: must be a finite number of at least 0")

    def verify(self, draft: Draft, scores_BNV: Tensor, noise: AnyNoise, keys_B2: Tensor, position_B: Tensor) -> Verdict:
        choice_BN = _choice(draft, scores_BNV, noise)
        p_BNV = scores_BNV.softmax(-1)
        bound_BN = (self.scale * (-torch.special.entr(p_BNV).sum(-1)).exp()).clamp(max=self.epsilon)
        if draft.shape.is_chain:
            plausible_BD = p_BNV[:, :-1].gather(2, draft.tokens_BN[:, 1:, None])[..., 0] > bound_BN[:, :-1]
            counts_B = 1 + plausible_BD.cumprod(1).sum(1)
            return _verdict(draft, None, counts_B, choice_BN.gather(1, (counts_B - 1)[:, None]))
        # The deepest node that is reached; among equals the lowest number.
        B, N = choice_BN.shape
        rows_B1, nodes_N = torch.arange(B, device=p_BNV.device)[:, None], torch.arange(N, device=p_BNV.device)
        parents_BN = draft.topology.parents_BN.expand_as(choice_BN)
        plausible_BN = p_BNV[rows_B1, parents_BN, draft.tokens_BN] > bound_BN.gather(1, parents_BN)
        order_BN = torch.where(_reached(draft, plausible_BN), draft.topology.depths_BN * N - nodes_N, -N)
        last_B1 = order_BN.argmax(1, keepdim=True)
        path_BP = _path(draft, unpack_bits(draft.topology.bits_BNW.expand(B, -1, -1)[rows_B1[:, 0], last_B1[:, 0]], N))
        counts_B = 1 + draft.topology.depths_BN.expand_as(choice_BN).gather(1, last_B1)[:, 0]
        return _verdict(draft, path_BP, counts_B, choice_BN.gather(1, last_B1))


def build_verification(name: str, greedy: bool, ranked: bool, typical: Typical) -> Verification:
    """The rule of this name; `greedy` at temperature 0, where every rule is `coupled`, `ranked` as in `Shape`.

    Raises:
        UserError: unknown name.
    """
    rules = {"coupled": Coupled(), "residual": PointMassResidual() if ranked else Residual(), "typical": typical}
    if name not in rules:
        raise UserError(f"unknown verify {name!r}; choose from {', '.join(rules)}")
    return Coupled() if greedy else rules[name]


def after_rejection(p_BV: Tensor, q_BV: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
    """Target and draft distribution once `token_B`, drawn from q, is rejected: norm(max(0, p - q)), and q without it."""
    p = (p_BV - q_BV).clamp(min=0)
    mass = p.sum(-1, keepdim=True)
    # Only rounding can leave no mass, since a token is rejected only if q > p there; then p equals q, and p is kept.
    p = torch.where(mass > 0, p / mass, p_BV)
    q = q_BV.scatter(1, token_B[:, None], 0.0)
    return p, q / q.sum(-1, keepdim=True).clamp(min=1e-30)


def _verdict(draft: Draft, path_BP: Tensor | None, counts_B: Tensor, bonus_B1: Tensor) -> Verdict:
    """The verdict that emits the path's tokens after the root, then the bonus token."""
    tokens_BP = draft.tokens_BN if path_BP is None else draft.tokens_BN.gather(1, path_BP)
    shifted_BP = torch.cat([tokens_BP[:, 1:], tokens_BP[:, :1]], dim=1)
    return Verdict(path_BP, counts_B, shifted_BP.scatter(1, (counts_B - 1)[:, None], bonus_B1))


def _choice(draft: Draft, scores_BNV: Tensor, noise: AnyNoise) -> Tensor:
    """[B, N] the target's own choice after each node: the best score, with the noise of the next position."""
    if noise is None:
        return scores_BNV.argmax(-1)
    noise_BNV = noise[:, : draft.shape.depth + 1]
    if not draft.shape.is_chain:
        rows_B1 = torch.arange(scores_BNV.shape[0], device=scores_BNV.device)[:, None]
        noise_BNV = noise_BNV[rows_B1, draft.topology.depths_BN]
    return (scores_BNV + noise_BNV).argmax(-1)


def _reached(draft: Draft, accepted_BN: Tensor) -> Tensor:
    """[B, N] True at nodes that are accepted with all their ancestors; the root always is."""
    accepted_BN[:, 0] = True
    return (accepted_BN[:, None] | ~unpack_bits(draft.topology.bits_BNW, accepted_BN.shape[1])).all(-1)


def _path(draft: Draft, on_path_BN: Tensor) -> Tensor:
    """[B, P] node numbers by depth; 0 past the path's end."""
    depth = draft.shape.depth
    columns = torch.where(on_path_BN, draft.topology.depths_BN, depth + 1)
    nodes = torch.arange(draft.shape.size, device=on_path_BN.device).expand_as(columns)
    path = torch.zeros(columns.shape[0], depth + 2, dtype=torch.long, device=columns.device)
    return path.scatter(1, columns, nodes)[:, :-1]
