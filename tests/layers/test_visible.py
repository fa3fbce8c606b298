"""What queries see: biases compared with loops over positions and ancestors, and bits with walks along parents."""

# B batch  T queries  S cache slots  N nodes  W words of 64 bits

import random

import pytest
import torch

from tests.support.models import BUSHY
from trainkit.layers.visible import Visible, node_bits, unpack_bits
from trainkit.runner.trees.dynamic import DynamicTree
from trainkit.runner.trees.static import build

CPU = torch.device("cpu")


def seen(visible, T, span):
    """[B][T] the visible slots, from the bias."""
    bias = visible.bias(T, span, torch.float32)
    assert bias.shape == (len(visible.first_B), T, span) and set(bias.unique().tolist()) <= {0.0, float("-inf")}
    return [[row.nonzero()[:, 0].tolist() for row in rows == 0] for rows in bias]


def random_parents(size):
    """A parent of each node, lower than the node's own number; the root has 0."""
    return [0, *(random.randrange(node) for node in range(1, size))]


def path_to(node, parents):
    """The node and its ancestors, ascending."""
    return [*path_to(parents[node], parents), node] if node else [0]


def paths_of(parents):
    """The rank paths of a tree given by parents, numbered level by level as `build` does."""
    paths, children = [()], [0] * len(parents)
    for node in range(1, len(parents)):
        parent = parents[node]
        paths.append((*paths[parent], children[parent]))
        children[parent] += 1
    return paths[1:]


@pytest.mark.parametrize("T", [1, 4, 70])
def test_causal_queries_see_slots_up_to_their_own(T, seed):
    """A query at position p sees the slots 0 to p; also the last query of a cache that is full."""
    starts = torch.cat([torch.randint(0, 131 - T, (3,)), torch.tensor([0, 130 - T])])
    positions = starts[:, None] + torch.arange(T)
    visible = Visible.causal(positions)
    assert visible.first_B.dtype == torch.int32 and visible.bits_BTW is None
    assert seen(visible, T, 130) == [[list(range(p + 1)) for p in row] for row in positions.tolist()]


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 130])
def test_tree_nodes_see_the_prefix_and_their_path(size, seed):
    """Random trees of one to three words, one for all rows or one for each, at positions that leave them just enough slots."""
    span = 200
    roots = torch.tensor([0, 1, 64, random.randrange(span - size), span - size])
    for rows in (1, len(roots)):
        trees = [random_parents(size) for _ in range(rows)]
        bits = torch.stack([sum(node_bits(torch.tensor(path_to(i, t)), size)) for t in trees for i in range(size)])
        visible = Visible(roots.int(), bits.view(rows, size, -1))
        expected = [
            [list(range(root)) + [root + i for i in path_to(node, trees[b % rows])] for node in range(size)]
            for b, root in enumerate(roots.tolist())
        ]
        assert seen(visible, size, span) == expected
        # the comparison notices a root, or a node's bit, that is one off
        assert seen(Visible((roots + 1).int(), visible.bits_BTW), size, span + 1) != expected
        assert seen(Visible(roots.int(), bits.view(rows, size, -1) << 1), size, span) != expected


@pytest.mark.parametrize("numbers", [[0], [5, 63, 64], [127, 128, 0]])
def test_node_bits_set_one_bit_each(numbers):
    """Each node has its own bit, in the word of its number."""
    bits = node_bits(torch.tensor(numbers), 129)
    assert bits.shape == (len(numbers), 3) and bits.dtype == torch.int64
    assert [row.nonzero()[:, 0].tolist() for row in unpack_bits(bits, 192)] == [[number] for number in numbers]


@pytest.mark.parametrize("size", [2, 10, 64, 100])
def test_static_tree_bits_are_the_ancestors(size, seed):
    """Bits of a static tree's nodes and of its levels' frontiers are those of a walk along parents."""
    tree = build(BUSHY if size == 10 else paths_of(random_parents(size)), CPU)
    parents = tree.topology.parents_BN[0].tolist()
    assert tree.topology.bits_BNW.shape == (1, size, -(-size // 64))
    found = [row.nonzero()[:, 0].tolist() for row in unpack_bits(tree.topology.bits_BNW[0], size)]
    assert found == [path_to(node, parents) for node in range(size)]
    for level in tree.levels:
        bits_FW = tree.topology.bits_BNW[0, level.nodes_F]
        assert torch.equal(level.bits_FW, bits_FW)


@pytest.mark.parametrize("shape", [(4, 3, 8), (3, 8, 130)])
def test_dynamic_tree_bits_are_the_ancestors(shape, seed):
    """Bits by OR along the parents of random kept nodes equal a walk, in one word and in several."""
    tree, B = DynamicTree(*shape), 3
    # nodes proposed: parents by number, kept ones closed under parents and in any order after the root
    parents = torch.tensor([[0, *[0] * tree.top_k, *(1 + i // tree.top_k for i in range(tree.proposed - 1 - tree.top_k))]])
    kept = []
    for _ in range(B):
        chosen = [0]
        while len(chosen) < tree.nodes:
            node = random.choice([n for n in range(tree.proposed) if n not in chosen and int(parents[0, n]) in chosen])
            if len(path_to(node, parents[0].tolist())) <= tree.depth + 1:
                chosen.append(node)
        kept.append(chosen)
    topology = tree._topology(torch.tensor(kept), parents.expand(B, -1))
    for b in range(B):
        above = topology.parents_BN[b].tolist()
        found = [row.nonzero()[:, 0].tolist() for row in unpack_bits(topology.bits_BNW[b], tree.nodes)]
        assert found == [path_to(node, above) for node in range(tree.nodes)]
        assert topology.depths_BN[b].tolist() == [len(path) - 1 for path in found]
