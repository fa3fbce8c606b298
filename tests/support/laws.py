"""Exact distributions ("laws") of the text that rounds emit, by enumeration: of the right rules, and of rules with a fault.

A text is cut into blocks of four tokens. The distributions of target and draft depend on the position in the block and on the
token before, and at a block's first position on neither. So blocks are independent, and their joint distribution over 4^4
outcomes can be enumerated. A round may cross the border of blocks. It is modelled as a Markov chain whose state is the node
reached so far: a `Law` gives the probabilities of each token and of the next state at a node.
"""

# V vocabulary, 4  P positions in a block, 4  S states of a round

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, stats

Array = NDArray[np.float64]
V = PLACES = 4


def processed(logits: Array, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Array:
    """The distribution sampled from, by definition: temperature, then top-k, then the smallest set that reaches top_p."""
    p = np.exp((logits - logits.max()) / temperature)
    ranked = sorted(range(len(p)), key=lambda v: (-p[v], v))
    kept = ranked[: top_k or None]
    total = sum(p[v] for v in kept)
    mass, nucleus = 0.0, []
    for v in kept:
        if mass >= top_p:
            break
        nucleus.append(v)
        mass += p[v] / total
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus]
    return out / out.sum()


@dataclass(frozen=True)
class Step:
    """Probabilities at one node: `accepted[rank, v]` of v as the child of that rank, `rejected[v]` of v as the round's end."""

    accepted: Array
    rejected: Array


Law = Callable[[Array, Array, int], Step]


def right(p: Array, q: Array, width: int) -> Step:
    """The right law: over all orders in which siblings can be drawn without replacement."""
    return siblings(p, q, width)


def siblings(
    p: Array,
    q: Array,
    width: int,
    judged_as: Array | None = None,
    after: Callable[[Array, Array, int], tuple[Array, Array]] | None = None,
) -> Step:
    """The law of siblings drawn from `q` without replacement and verified as if drawn from `judged_as`.

    `after` returns target and draft distribution after a rejection.
    """
    accepted, rejected = np.zeros((width, V)), np.zeros(V)
    after = after or residue

    def go(rank: int, p_now: Array, drawn_from: Array, judged: Array, weight: float) -> None:
        if weight == 0:
            return
        if rank == width or drawn_from.sum() == 0:
            rejected[:] += weight * p_now / p_now.sum()
            return
        for x in np.flatnonzero(drawn_from):
            share = weight * drawn_from[x] / drawn_from.sum()
            if judged[x] <= 0:
                go(rank + 1, p_now, _without(drawn_from, x), judged, share)
                continue
            accept = min(1.0, p_now[x] / judged[x])
            accepted[rank, x] += share * accept
            if accept < 1:
                go(rank + 1, *_insert(after(p_now, judged, x), _without(drawn_from, x)), share * (1 - accept))

    go(0, p, q, q if judged_as is None else judged_as, 1.0)
    return Step(accepted, rejected)


def _without(q: Array, x: int) -> Array:
    left = q.copy()
    left[x] = 0
    return left


def _insert(pair: tuple[Array, Array], drawn_from: Array) -> tuple[Array, Array, Array]:
    return pair[0], drawn_from, pair[1]


def residue(p: Array, q: Array, x: int) -> tuple[Array, Array]:
    """norm(max(0, p - q)), and q without x, renormalised."""
    left = np.maximum(p - q, 0)
    rest = _without(q, x)
    return left / left.sum(), rest / max(rest.sum(), 1e-300)


def residue_keeping_the_rejected(p: Array, q: Array, x: int) -> tuple[Array, Array]:
    """Fault: the rejected token stays in q, which therefore is not renormalised either."""
    return residue(p, q, x)[0], q


def sharing_noise(p: Array, q: Array, width: int) -> Step:
    """Fault, for a chain: the draw from the residual uses the Gumbel noise that the proposal was drawn with.

    With E = exp(-G), x = argmin E/q and y = argmin E/r: P(x, y) = integral over t = E_y / E_x of dt / S(t)^2,
    S(t) = 1 + t + sum over other v of max(q_v / q_x, r_v t / r_y).
    """
    assert width == 1
    step = siblings(p, q, 1)
    rejected = np.zeros(V)
    r = np.maximum(p - q, 0)
    for x in np.flatnonzero(q > p):
        for y in np.flatnonzero(r):
            others = [v for v in range(V) if v not in (x, y)]

            def density(t: float, x: int = x, y: int = y, others: list[int] = others) -> float:
                return (1 + t + sum(max(q[v] / q[x], r[v] * t / r[y]) for v in others)) ** -2

            rejected[y] += integrate.quad(density, q[y] / q[x], np.inf, limit=200)[0] * (1 - p[x] / q[x])
    return Step(step.accepted, rejected)


def block_law(p: Array, q: Array, paths: tuple[tuple[int, ...], ...], law: Law, blocks: int) -> Array:
    """[4, 4, 4, 4] law of a block drawn at random from the first `blocks`, when decoding starts with one token from p.

    Args:
        p: Target probabilities [position, last token, V]; position 0 must not depend on the last token.
        q: Draft probabilities, likewise.
        paths: Rank paths of the tree.
        law: Law of a node.
        blocks: Number of blocks in a text.
    """
    nodes = [(), *sorted(paths, key=lambda path: (len(path), path))]
    children = {node: [path for path in nodes if path and path[:-1] == node] for node in nodes}
    leaf = next(i for i, node in enumerate(nodes) if not children[node])
    # move[place, state, last, v, state after]
    move = np.zeros((PLACES, len(nodes), V, V, len(nodes)))
    for place in range(PLACES):
        for last in range(V):
            for s, node in enumerate(nodes):
                if not children[node]:
                    move[place, s, last, :, 0] = p[place, last]
                    continue
                step = law(p[place, last], q[place, last], len(children[node]))
                move[place, s, last, :, 0] += step.rejected
                for rank, child in enumerate(children[node]):
                    move[place, s, last, :, nodes.index(child)] += step.accepted[rank]
    state = np.zeros(len(nodes))
    state[leaf] = 1  # the first token after the prompt is drawn like a bonus token
    total = np.zeros((V,) * PLACES)
    for _ in range(blocks):
        joint = np.einsum("s,sat->at", state, move[0, :, 0])
        joint = np.einsum("at,tabu->abu", joint, move[1])
        joint = np.einsum("abu,ubcw->abcw", joint, move[2])
        joint = np.einsum("abcw,wcdx->abcdx", joint, move[3])
        total += joint.sum(-1)
        state = joint.sum((0, 1, 2, 3))
    return total / blocks


def plain_law(p: Array) -> Array:
    """[4, 4, 4, 4] law of a block under plain sampling."""
    return np.einsum("a,ab,bc,cd->abcd", p[0, 0], p[1], p[2], p[3])


def noncentrality(wrong: Array, truth: Array, samples: int) -> float:
    """Noncentrality of chi-square against `truth` for `samples` from `wrong`; inf where only wrong has mass."""
    inside = truth > 1e-15
    if wrong[~inside].sum() > 1e-12:
        return float("inf")
    return float(samples * ((wrong[inside] - truth[inside]) ** 2 / truth[inside]).sum())


def p_value(counts: Array, truth: Array) -> float:
    """P-value of Pearson's chi-square test; cells expected fewer than 5 times are pooled; 0 after an impossible outcome."""
    expected = truth.ravel() * counts.sum()
    observed = counts.ravel()
    if observed[expected < 1e-9].sum():
        return 0.0
    large = expected >= 5
    observed = np.append(observed[large], observed[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    if expected[-1] < 5:
        order = int(expected[:-1].argmin())
        observed[order] += observed[-1]
        expected[order] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    if len(expected) < 2:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, len(expected) - 1))


# Dynamic trees under residual verification: a node's children are fixed by the text before it, and verified as point masses.

PointLaw = Callable[[Array, Array, list[int]], Step]


def points(p: Array, q: Array, children: list[int]) -> Step:
    """The right law: x is accepted with probability p(x); else p(x) = 0, renormalised, and the next sibling is verified."""
    return _one_by_one(p, q, children, lambda p, q, x: p[x], lambda p, q, x: (_renormalised(_without(p, x)), q))


def points_kept(p: Array, q: Array, children: list[int]) -> Step:
    """Fault: a rejected token stays in p."""
    return _one_by_one(p, q, children, lambda p, q, x: p[x], lambda p, q, x: (p, q))


def points_as_draws(p: Array, q: Array, children: list[int]) -> Step:
    """Fault: children are accepted with min(1, p / q), as if they had been drawn from q."""
    return _one_by_one(p, q, children, lambda p, q, x: min(1.0, p[x] / q[x]) if q[x] > 0 else 0.0, residue)


def _renormalised(p: Array) -> Array:
    return p / p.sum() if p.sum() > 0 else p


def _one_by_one(p: Array, q: Array, children: list[int], accept: Callable, after: Callable) -> Step:
    accepted, reached = np.zeros((len(children), V)), 1.0
    for rank, x in enumerate(children):
        share = accept(p, q, x)
        accepted[rank, x] = reached * share
        reached *= 1 - share
        if reached < 1e-15:
            return Step(accepted, np.zeros(V))
        p, q = after(p, q, x)
    return Step(accepted, reached * p)


def likeliest_tree(q: Array, place: int, last: int, depth: int, top_k: int, nodes: int) -> dict[tuple[int, ...], list[int]]:
    """Children, best first, of every kept node of the tree that q grows after `last`, by path of tokens."""
    scores, frontier = {(): 0.0}, [()]
    for level in range(depth):
        proposed = {}
        for path in frontier:
            row = q[(place + level) % PLACES, path[-1] if path else last]
            for v in sorted(range(V), key=lambda v: -row[v])[:top_k]:
                proposed[*path, v] = scores[path] + (np.log(row[v]) if row[v] else -np.inf)
        scores |= proposed
        frontier = sorted(proposed, key=lambda path: -proposed[path])[:top_k]
    kept = sorted(scores, key=lambda path: (-scores[path], len(path)))[:nodes]
    return {node: [path[-1] for path in kept if path and path[:-1] == node] for node in kept}


def grown_law(p: Array, q: Array, depth: int, top_k: int, nodes: int, law: PointLaw, blocks: int) -> Array:
    """[4, 4, 4, 4] law of a block drawn at random from the first `blocks`, as `block_law`, for a dynamic tree."""
    trees = {(r, x): likeliest_tree(q, r, x, depth, top_k, nodes) for r in range(PLACES) for x in range(V)}
    names = [(r, x, path) for (r, x), tree in trees.items() for path in tree] + ["prompt"]
    number = {name: i for i, name in enumerate(names)}
    move = np.zeros((len(names), V, len(names)))
    for r, x, path in names[:-1]:
        place, last = (r + len(path)) % PLACES, path[-1] if path else x
        children, s = trees[r, x][path], number[r, x, path]
        step = law(p[place, last], q[place, last], children)
        for v in range(V):
            move[s, v, number[(place + 1) % PLACES, v, ()]] += step.rejected[v]
        for rank, v in enumerate(children):
            move[s, v, number[r, x, (*path, v)]] += step.accepted[rank, v]
    for v in range(V):
        move[number["prompt"], v, number[1, v, ()]] = p[0, 0, v]
    state, total = np.eye(len(names))[number["prompt"]], np.zeros((V,) * PLACES)
    for _ in range(blocks):
        joint = state
        for _ in range(PLACES):
            joint = np.einsum("...s,svt->...vt", joint, move)
        total += joint.sum(-1)
        state = joint.sum((0, 1, 2, 3))
    return total / blocks
