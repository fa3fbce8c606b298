"""Which drafted tokens stay: coupled verification (token-exact), residual (exact in distribution), and typical (lossy).

All judge a whole tree from one target forward, on the device, with static shapes. `coupled` is the default: the target
chooses by log p + noise at every node, the drafter proposed from log q + the SAME noise, and a child stays if it is the
target's choice. So the output is that of plain seeded decoding whatever the drafter does; at temperature 0 the noise is absent.
`residual` is the classical rule of Leviathan et al. 2023 (arXiv 2211.17192), over the siblings of a static tree one after the
other without replacement. Its three streams of noise are independent of each other. On a dynamic tree, where a node's children
are its likeliest and no draws, q is a point mass at each: x stays with probability p(x), otherwise p(x) = 0, p is renormalised,
and its next sibling is judged. One draw from p settles all of that: the child it names stays, and if it names none it is the
bonus token. So there `residual` is the rule of `coupled`, under a stream of noise that the draft has not seen.
`typical` accepts what the target finds plausible (Cai et al. 2024, arXiv 2401.10774): the text is no longer the target's.
`mixed` is no verification: it writes text that draft and target wrote together, to train a draft on (on-policy data).
"""

# B batch  N tree nodes, root first  V vocabulary  P path length, depth + 1  R noise rows, depth + 1  W siblings

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.runner.sampling import ACCEPT, CHOICE, RESIDUAL, gumbel, uniform
from trainkit.runner.trees.shape import Draft, Shape
from trainkit.runner.trees.static import Tree


@dataclass(frozen=True)
class Verdict:
    """What a round emits.

    Attributes:
        path_BP: Node numbers of the accepted path, root first; None for a chain, where they are 0..P-1.
        counts_B: Nodes on it, root included: also the number of tokens emitted.
        emitted_BP: The accepted tokens and then the bonus token; meaningless at and past `counts_B`.
    """

    path_BP: Tensor | None
    counts_B: Tensor
    emitted_BP: Tensor


def coupled(tree: Shape, draft: Draft, scores_BNV: Tensor, noise_BRV: Tensor | None) -> Verdict:
    """Keeps the children that equal the target's own choice.

    Args:
        tree: Shape of the draft.
        draft: Its tokens and topology.
        scores_BNV: The target's processed logits at every node.
        noise_BRV: The Gumbel noise the draft was made with and one row more, or None at temperature 0.
    """
    choice_BN = _choice(tree, draft, scores_BNV, noise_BRV)
    if tree.is_chain:
        agreed = draft.tokens_BN[:, 1:] == choice_BN[:, :-1]
        if draft.packing is not None:  # a pad is not judged: what stands there are its root's logits
            agreed &= torch.arange(1, tree.size, device=agreed.device) < draft.packing.lengths_B[:, None]
        return Verdict(None, 1 + agreed.cumprod(1).sum(1), choice_BN)
    parents_BN = draft.topology.parents_BN.expand_as(choice_BN)
    on_path = _reached(draft, draft.tokens_BN == choice_BN.gather(1, parents_BN))
    path = _path(tree, draft, on_path)
    return Verdict(path, on_path.sum(1), choice_BN.gather(1, path))


@dataclass(frozen=True)
class Typical:
    """Thresholds of typical acceptance: x stays where p(x) > min(epsilon, scale * exp(-H(p))), H in nats."""

    epsilon: float = 0.09
    scale: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"typical_epsilon {self.epsilon}: must be at least 0 and at most 1")
        if not 0 <= self.scale < float("inf"):
            raise UserError(f"typical_scale {self.scale}: must be a finite number of at least 0")


def typical(tree: Shape, draft: Draft, scores_BNV: Tensor, noise_BRV: Tensor | None, thresholds: Typical) -> Verdict:
    """LOSSY: keeps the longest path of tokens that the target finds plausible, then adds the target's own choice.

    A child x stays if p(x) > min(epsilon, scale exp(-H(p))), p the target's processed distribution at its parent: likelier than
    a fixed bound, which is lower where p is flat. Of equally long paths the one that ends in the lowest node number stays.
    Cai et al. 2024, arXiv 2401.10774. Proposals are those of `coupled`, noise included, so that temperature still
    means something where the draft is kept. At temperature 0, where p is one at the likeliest token, this is `coupled`.

    Args:
        tree: Shape of the draft.
        draft: Its tokens and topology.
        scores_BNV: The target's processed logits at every node.
        noise_BRV: As in `coupled`.
        thresholds: epsilon and scale.
    """
    choice_BN = _choice(tree, draft, scores_BNV, noise_BRV)
    p_BNV = scores_BNV.softmax(-1)
    bound_BN = (thresholds.scale * (-torch.special.entr(p_BNV).sum(-1)).exp()).clamp(max=thresholds.epsilon)
    if tree.is_chain:
        kept_BD = p_BNV[:, :-1].gather(2, draft.tokens_BN[:, 1:, None])[..., 0] > bound_BN[:, :-1]
        counts_B = 1 + kept_BD.cumprod(1).sum(1)
        last_B1 = (counts_B - 1)[:, None]
        shifted_BP = torch.cat([draft.tokens_BN[:, 1:], draft.tokens_BN[:, :1]], dim=1)
        return Verdict(None, counts_B, shifted_BP.scatter(1, last_B1, choice_BN.gather(1, last_B1)))
    B, N = choice_BN.shape
    rows_B1, nodes_N = torch.arange(B, device=p_BNV.device)[:, None], torch.arange(N, device=p_BNV.device)
    parents_BN = draft.topology.parents_BN.expand_as(choice_BN)
    kept_BN = p_BNV[rows_B1, parents_BN, draft.tokens_BN] > bound_BN.gather(1, parents_BN)
    # deepest first, then lowest number
    order_BN = torch.where(_reached(draft, kept_BN), draft.topology.depths_BN * N - nodes_N, -N)
    last_B1 = order_BN.argmax(1, keepdim=True)
    path_BP = _path(tree, draft, draft.topology.ancestors_BNN.expand(B, -1, -1)[rows_B1[:, 0], last_B1[:, 0]])
    counts_B = 1 + draft.topology.depths_BN.expand_as(choice_BN).gather(1, last_B1)[:, 0]
    tokens_BP = draft.tokens_BN.gather(1, path_BP)
    shifted_BP = torch.cat([tokens_BP[:, 1:], tokens_BP[:, :1]], dim=1)
    return Verdict(path_BP, counts_B, shifted_BP.scatter(1, (counts_B - 1)[:, None], choice_BN.gather(1, last_B1)))


def residual(tree: Tree, draft: Draft, scores_BNV: Tensor, keys_B2: Tensor, position_B: Tensor) -> Verdict:
    """Accepts x with probability min(1, p(x) / q(x)), goes on from norm(max(0, p - q)) after a rejection.

    Siblings are judged in drawing order; a rejected one leaves q as well, which is renormalised: it cannot be drawn again.

    Args:
        tree: Shape of the draft.
        draft: Its tokens and the processed logits that proposed them.
        scores_BNV: The target's processed logits at every node.
        keys_B2: Noise keys.
        position_B: Absolute position of the root.
    """
    B = scores_BNV.shape[0]
    rows = torch.arange(B, device=scores_BNV.device)
    node = torch.zeros_like(position_B)
    alive = torch.ones_like(position_B, dtype=torch.bool)
    on_path = torch.zeros_like(draft.tokens_BN, dtype=torch.bool)
    on_path[:, 0] = True
    p = scores_BNV[:, 0].softmax(-1)
    siblings_W = torch.arange(tree.children_NW.shape[1], device=node.device)
    for depth, level in enumerate(tree.levels):
        place = (level.nodes_F == node[:, None]).int().argmax(1)
        q = draft.scores[depth].softmax(-1)[rows, place]
        u_BW = uniform(keys_B2, (position_B + depth + 1)[:, None], siblings_W, ACCEPT)[:, 0]
        moved = torch.zeros_like(alive)
        next_node = node
        for rank in range(level.width):
            child = tree.children_NW[node, rank]
            # a proposal without mass was not drawn: there were fewer tokens in q than siblings asked for
            token = draft.tokens_BN[rows, child.clamp(min=0)]
            q_token = q[rows, token]
            judged = alive & ~moved & (child >= 0) & (q_token > 0)
            accepted = judged & (u_BW[:, rank] * q_token < p[rows, token])
            rejected = judged & ~accepted
            p_left, q_left = after_rejection(p, q, token)
            p, q = torch.where(rejected[:, None], p_left, p), torch.where(rejected[:, None], q_left, q)
            moved |= accepted
            on_path[rows, child.clamp(min=0)] |= accepted
            p = torch.where(accepted[:, None], scores_BNV[rows, child.clamp(min=0)].softmax(-1), p)
            next_node = torch.where(accepted, child, next_node)
        node = next_node
        alive = moved
    counts = on_path.sum(1)
    noise = gumbel(keys_B2, (position_B + counts)[:, None], torch.arange(p.shape[1], device=p.device), RESIDUAL)[:, 0]
    bonus = (p.log() + noise).argmax(-1)
    path = None if tree.is_chain else _path(tree, draft, on_path)
    tokens = draft.tokens_BN if path is None else draft.tokens_BN.gather(1, path)
    emitted = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1).scatter(1, (counts - 1)[:, None], bonus[:, None])
    return Verdict(path, counts, emitted)


def mixed(draft: Draft, scores_BDV: Tensor, keys_B2: Tensor, position_B: Tensor, share: float, greedy: bool) -> Verdict:
    """Text of both: each token is the draft's with probability `share`, otherwise the target's, whatever either thinks of it.

    So every token comes from share q + (1 - share) p given what stands before it, as on-policy distillation wants it (Agarwal
    et al. 2023, arXiv 2306.13649, mixes by sequence; here by token). A round ends with the first token of the target's own, or
    with the last drafted one: a bonus token would be the target's more often than it should.

    Args:
        draft: A chain of D tokens after the root.
        scores_BDV: The target's processed logits at every node but the last.
        keys_B2: Noise keys.
        position_B: Absolute position of the root.
        share: Probability of the draft's token.
        greedy: The target takes its likeliest token.
    """
    D = scores_BDV.shape[1]
    steps_D = torch.arange(D, device=position_B.device)
    coins_BD = uniform(keys_B2, position_B[:, None] + 1 + steps_D, steps_D[:1], ACCEPT)[..., 0]
    kept_B = (coins_BD < share).long().cumprod(1).sum(1)
    if not greedy:
        vocabulary = torch.arange(scores_BDV.shape[-1], device=position_B.device)
        scores_BDV = scores_BDV + gumbel(keys_B2, position_B[:, None] + 1 + steps_D, vocabulary, CHOICE)
    own_BD, drafted_BD = scores_BDV.argmax(-1), draft.tokens_BN[:, 1:]
    emitted_BD = torch.where(steps_D < kept_B[:, None], drafted_BD, own_BD)
    return Verdict(None, (kept_B + 1).clamp(max=D), emitted_BD)


def after_rejection(p_BV: Tensor, q_BV: Tensor, token_B: Tensor) -> tuple[Tensor, Tensor]:
    """Target and draft distribution once `token_B`, drawn from q, is rejected: norm(max(0, p - q)), and q without it."""
    p = (p_BV - q_BV).clamp(min=0)
    mass = p.sum(-1, keepdim=True)
    # no mass is left only by rounding, where p equals q and nothing is rejected but by rounding: keep p
    p = torch.where(mass > 0, p / mass, p_BV)
    q = q_BV.scatter(1, token_B[:, None], 0.0)
    return p, q / q.sum(-1, keepdim=True).clamp(min=1e-30)


def _choice(tree: Shape, draft: Draft, scores_BNV: Tensor, noise_BRV: Tensor | None) -> Tensor:
    """[B, N] the token the target itself takes after each node: its best score, with the noise of the next position."""
    if noise_BRV is None:
        return scores_BNV.argmax(-1)
    if not tree.is_chain:
        rows_B1 = torch.arange(scores_BNV.shape[0], device=scores_BNV.device)[:, None]
        noise_BRV = noise_BRV[rows_B1, draft.topology.depths_BN]
    return (scores_BNV + noise_BRV).argmax(-1)


def _reached(draft: Draft, kept_BN: Tensor) -> Tensor:
    """[B, N] True at the nodes that are kept with all their ancestors; the root is kept whatever `kept_BN` says of it."""
    kept_BN[:, 0] = True
    return (kept_BN[:, None] | ~draft.topology.ancestors_BNN).all(-1)


def _path(tree: Shape, draft: Draft, on_path_BN: Tensor) -> Tensor:
    """[B, P] node numbers by depth; 0 past the path's end."""
    places = torch.where(on_path_BN, draft.topology.depths_BN, tree.depth + 1)
    nodes = torch.arange(tree.size, device=on_path_BN.device).expand_as(places)
    path = torch.zeros(places.shape[0], tree.depth + 2, dtype=torch.long, device=places.device)
    return path.scatter(1, places, nodes)[:, :-1]
