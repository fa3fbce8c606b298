"""Verification on drafts worked by hand, and ties: the lowest token id wins."""

# B rows  N nodes  V vocabulary

import pytest
import torch

from tests.support.models import SIBLINGS
from trainkit.errors import UserError
from trainkit.layers.visible import unpack_bits
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.shape import Draft
from trainkit.runner.trees.static import build, chain
from trainkit.runner.verify import Coupled, after_rejection

CPU = torch.device("cpu")


def coupled(tree, tokens, scores):
    """The verdict on these tokens at temperature 0."""
    draft = Draft(tree, tokens, tree.topology, tree.depth)
    return Coupled().verify(draft, scores, None, torch.empty(0), torch.empty(0))  # keys and positions are not read


def certain(*tokens, vocabulary=6):
    """Scores [1, N, V] whose argmax at node i is tokens[i]."""
    return torch.nn.functional.one_hot(torch.tensor([tokens]), vocabulary).float()


@pytest.mark.parametrize(
    ("drafted", "choices", "emitted"),
    [
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [1, 2, 5, 4], [1, 2, 5]),
        ([1, 2, 3], [0, 2, 3, 4], [0]),
        ([1, 2, 3], [1, 0, 3, 4], [1, 0]),
    ],
)
def test_chain_accepts_the_targets_choices_by_hand(drafted, choices, emitted):
    """A chain accepts the drafted tokens that the target chose, and adds the target's next choice."""
    tree = build(chain(3), CPU)
    verdict = coupled(tree, torch.tensor([[9, *drafted]]), certain(*choices))
    assert verdict.emitted_BP[0, : int(verdict.counts_B)].tolist() == emitted


@pytest.mark.parametrize(
    ("choices", "path", "emitted"),
    [
        # nodes: 0 root, 1 = (0) token 1, 2 = (1) token 2, 3 = (0, 0) token 3, 4 = (0, 1) token 4
        ([1, 4, 0, 0, 5], [0, 1, 4], [1, 4, 5]),
        ([1, 3, 0, 2, 5], [0, 1, 3], [1, 3, 2]),
        ([2, 4, 0, 0, 5], [0, 2], [2, 0]),
        ([0, 4, 0, 0, 5], [0], [0]),
        ([1, 0, 0, 0, 5], [0, 1], [1, 0]),
    ],
)
def test_tree_accepts_the_targets_path_by_hand(choices, path, emitted):
    """A tree accepts the path of the target's choices."""
    tree = build(SIBLINGS, CPU)
    verdict = coupled(tree, torch.tensor([[0, 1, 2, 3, 4]]), certain(*choices))
    count = int(verdict.counts_B)
    assert verdict.path_BP is not None
    assert verdict.path_BP[0, :count].tolist() == path
    assert verdict.emitted_BP[0, :count].tolist() == emitted


@pytest.mark.parametrize("vocabulary", [5, 64, 4096, 32001])
def test_tied_logits_choose_the_lowest_id(vocabulary, seed):
    """Of tokens with equal logits the one with the lowest id is chosen."""
    logits = torch.randint(0, 3, (4, 3, vocabulary)).float()
    first = torch.tensor([[int(row.eq(row.max()).nonzero()[0]) for row in rows] for rows in logits])
    assert torch.equal(Sampling().process(logits).argmax(-1), first)
    tree = build(chain(2), CPU)
    verdict = coupled(tree, torch.full((4, 3), -1), logits)
    assert torch.equal(verdict.emitted_BP, first)


def test_rejection_renormalises_both_distributions():
    """After a rejection both distributions are renormalised."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    p_left, q_left = after_rejection(p, q, torch.tensor([1]))
    assert torch.allclose(p_left, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.allclose(q_left, torch.tensor([[0.4, 0.0, 0.6]]))
    same, none = after_rejection(p, p, torch.tensor([0]))  # no residual is left: keep p rather than divide by nothing
    assert torch.equal(same, p) and none.isfinite().all()
    hot = torch.tensor([[0.0, 1.0, 0.0]])
    assert torch.equal(after_rejection(p, hot, torch.tensor([1]))[1], torch.zeros(1, 3))


@pytest.mark.parametrize(
    "paths",
    [[(0, 0)], [(1,)], [(0,), (0,)], [()], [(0,), (-1,)], [(0,), (0, 1)]],
    ids=["no parent", "no elder", "twice", "root", "negative", "no elder below"],
)
def test_invalid_tree_is_refused(paths):
    """A list of paths that is no tree is refused."""
    with pytest.raises(UserError, match="tree"):
        build(paths, CPU)


def test_tree_topology_by_hand():
    """Parents, depths, children and ancestors of a tree equal those written by hand."""
    tree = build([(0, 1), (1,), (0,), (0, 0)], CPU)  # given in any order
    assert tree.paths == SIBLINGS and tree.size == 5 and tree.depth == 2 and not tree.is_chain
    assert tree.topology.parents_BN.tolist() == [[0, 0, 0, 1, 1]]
    assert tree.topology.depths_BN.tolist() == [[0, 1, 1, 2, 2]]
    assert tree.children_NW.tolist() == [[1, 2], [3, 4], [-1, -1], [-1, -1], [-1, -1]]
    ancestors = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4]]
    assert [row.nonzero()[:, 0].tolist() for row in unpack_bits(tree.topology.bits_BNW[0], 5)] == ancestors
    assert build(chain(3), CPU).is_chain and build((), CPU).size == 1
