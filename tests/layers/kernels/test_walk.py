"""The kernels that end a round, compared with the rule and the round that they stand for."""

# B batch  N nodes  P path length

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from tests.support.models import BUSHY, SIBLINGS
from trainkit.layers.attention import Packing
from trainkit.layers.kernels.walk import move_root, walk
from trainkit.runner.round import Rounds
from trainkit.runner.trees.dynamic import DynamicTree
from trainkit.runner.trees.shape import Draft
from trainkit.runner.trees.static import build, chain
from trainkit.runner.verify import Coupled, Verdict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
B, VOCABULARY = 24, 6


def coupled(draft, choices, done):
    """The rule's own verdict on these choices, with nothing accepted in rows whose text has ended."""
    scores = F.one_hot(choices, VOCABULARY).float()
    verdict = Coupled().verify(draft, scores, None, torch.empty(0), torch.empty(0))  # keys and positions are not read
    return verdict.path_BP, verdict.counts_B.masked_fill(done, 0), verdict.emitted_BP


def assert_same(ours, theirs):
    for mine, its in zip(ours, theirs, strict=True):
        assert mine is its is None or (mine.dtype == its.dtype and torch.equal(mine, its))


def follow(choices, tokens, parents):
    """Choices that are mostly a child's token, so that paths get long."""
    children = torch.randint(1, tokens.shape[1], tokens.shape, device=DEVICE)
    for b in range(B):
        for child in children[b].tolist():
            choices[b, parents[b, child]] = tokens[b, child]
    return choices


@pytest.mark.parametrize("depth", [0, 1, 4, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_walk_of_a_chain_equals_coupled(depth, packed, seed):
    """Counts equal those of `Coupled`, whether rows verify all nodes or different numbers of them."""
    tree = build(chain(depth), DEVICE)
    tokens, done = torch.randint(0, VOCABULARY, (B, tree.size), device=DEVICE), torch.rand(B, device=DEVICE) < 0.2
    choices = tokens.roll(-1, 1)
    wrong = torch.rand(B, tree.size, device=DEVICE) < 0.2
    choices[wrong] = torch.randint(0, VOCABULARY, (int(wrong.sum()),), device=DEVICE)
    lengths = torch.randint(1, tree.size + 1, (B,), device=DEVICE)
    packing = Packing.from_lengths(lengths, tree.size, int(lengths.sum())) if packed else None
    draft = Draft(tree, tokens, tree.topology, tree.depth, packing=packing)
    ours = walk(choices, tokens, None, done, depth, lengths if packed else None)
    assert_same(ours, coupled(draft, choices, done))


def test_walk_of_a_plain_round_emits_one_token(seed):
    """A plain round's equal nodes would be accepted if they were its own choice; it emits one token, or none."""
    tokens, done = torch.full((B, 1), 3, device=DEVICE).expand(B, 5), torch.rand(B, device=DEVICE) < 0.5
    choices = torch.full((B, 5), 3, device=DEVICE)
    path, counts, emitted = walk(choices, tokens, None, done, 4, plain=True)
    assert path is None and torch.equal(counts, (~done).long()) and torch.equal(emitted, choices)


@pytest.mark.parametrize("paths", [((0,),), SIBLINGS, BUSHY])
def test_walk_of_a_static_tree_equals_coupled(paths, seed):
    """Path, count and emitted tokens equal those of `Coupled`, also past the path's end."""
    tree = build(paths, DEVICE)
    # siblings differ: ranks are distinct below one parent
    tokens = torch.tensor([[0, *(1 + path[-1] for path in tree.paths)]], device=DEVICE).repeat(B, 1)
    parents = tree.topology.parents_BN
    choices = follow(torch.randint(0, VOCABULARY, tokens.shape, device=DEVICE), tokens, parents.expand(B, -1))
    done = torch.rand(B, device=DEVICE) < 0.2
    draft = Draft(tree, tokens, tree.topology, tree.depth)
    if tree.is_chain:
        ours = walk(choices, tokens, None, done, tree.depth)
    else:
        ours = walk(choices, tokens, parents, done, tree.depth)
        assert (ours[1] > 2).any()
    assert_same(ours, coupled(draft, choices, done))


@pytest.mark.parametrize("depth, top_k, nodes", [(3, 3, 10), (5, 4, 40)])
def test_walk_of_a_dynamic_tree_equals_coupled(depth, top_k, nodes, seed):
    """As for static trees, with other connections in each row."""
    shape = DynamicTree(depth, top_k, nodes)
    # what a drafter would propose: each expanded node's children hold tokens 0..top_k-1 and random scores
    proposed = shape.proposed
    parents = torch.zeros(B, proposed, dtype=torch.long, device=DEVICE)
    scores = torch.zeros(B, proposed, device=DEVICE)
    for level in range(depth):
        first, above = 1 + top_k + (level - 1) * top_k**2, 1 + top_k + (level - 2) * top_k**2
        if level == 0:
            first, frontier = 1, torch.zeros(B, 1, dtype=torch.long, device=DEVICE)
        else:
            above = 1 if level == 1 else above
            frontier = above + torch.stack([torch.randperm(first - above, device=DEVICE)[:top_k] for _ in range(B)])
        children = frontier.repeat_interleave(top_k, 1)
        parents[:, first : first + children.shape[1]] = children
        terms = -torch.rand(children.shape, device=DEVICE)
        scores[:, first : first + children.shape[1]] = scores.gather(1, children) + terms
    kept = torch.cat([torch.zeros_like(parents[:, :1]), 1 + scores[:, 1:].sort(1, descending=True).indices[:, : nodes - 1]], 1)
    topology = shape._topology(kept, parents)
    tokens = (kept - 1) % top_k
    choices = follow(torch.randint(0, VOCABULARY, tokens.shape, device=DEVICE), tokens, topology.parents_BN)
    done = torch.rand(B, device=DEVICE) < 0.2
    ours = walk(choices, tokens, topology.parents_BN, done, depth)
    assert_same(ours, coupled(Draft(shape, tokens, topology, depth), choices, done))
    assert len(set(ours[1].tolist())) > 2


@pytest.mark.parametrize("ends", [(), (2,), (5, 1, 3), tuple(range(100, 111)) + (4,)])
def test_move_root_equals_the_rounds_own(ends, seed):
    """Root, position and end of each text equal those of the eager round, for counts from 0 to all, and no or many end ids."""
    P = 5
    emitted = torch.randint(0, 12, (B, P), device=DEVICE)
    counts = torch.randint(0, P + 1, (B,), device=DEVICE)
    position, end_ids = torch.randint(0, 50, (B,), device=DEVICE), torch.tensor(ends, dtype=torch.long, device=DEVICE)
    state = {
        "token_B": torch.randint(0, 12, (B,), device=DEVICE),
        "position_B": position,
        "limit_B": position + torch.randint(1, 2 * P, (B,), device=DEVICE),
        "ignore_end_B": torch.rand(B, device=DEVICE) < 0.3,
        "done_B": torch.rand(B, device=DEVICE) < 0.2,
    }
    ours = {name: value.clone() for name, value in state.items()}
    Rounds._move_root(SimpleNamespace(end_ids=end_ids), SimpleNamespace(cache=emitted, **state), Verdict(None, counts, emitted))
    move_root(emitted, counts, end_ids, **ours)
    assert_same(ours.values(), state.values())
