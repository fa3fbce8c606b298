"""Trees that follow the draft's probabilities: which nodes are kept, with what topology, judged how, and at what mistakes."""

# B batch  N nodes kept  V vocabulary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.equality import assert_few, compare
from tests.support.models import SIBLINGS, TableDraft, pair, ragged_prompts, table_runner
from trainkit.errors import UserError
from trainkit.layers.visible import unpack_bits
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.runner import DynamicTree, Stats
from trainkit.runner.sampling import RESIDUAL, Sampling
from trainkit.runner.trees import dynamic
from trainkit.runner.trees.dynamic import parse_tree
from trainkit.runner.trees.shape import Steps
from trainkit.runner.trees.static import chain

GROWING = DynamicTree(4, 3, 8)
SHAPES = [(1, 3, 4), (2, 1, 3), (3, 2, 6), (4, 3, 8), (3, 5, 56), (5, 4, 16), (2, 6, 2)]


def tau(runner, prompts, length, **options):
    """Tokens a round over all outputs."""
    return Stats.merge(out.stats for out in runner.generate(prompts, length, **options)).tau


def grown(tree, logits_PVV, roots, positions, sampling, noise=None):
    """The draft of a table of logits, [position modulo P, last token, next token]."""
    target = table_runner(logits_PVV, logits_PVV, 1, 8).rounds.target
    draft, handle = Recorded(TargetShape(target.shape, ()), logits_PVV), TargetHandle(None, None, logits_PVV.shape[-1])
    steps = Steps(draft, {}, handle, torch.tensor(roots), torch.tensor(positions), sampling, noise, 99, keep_logits=True)
    return tree.grow(steps), draft.frontiers


class Recorded(TableDraft):
    """A table that remembers what it was asked to expand."""

    def step(self, state, frontier, handle, span):
        self.frontiers = [*getattr(self, "frontiers", []), frontier]
        return super().step(state, frontier, handle, span)


def by_hand(tree, log_q, root, position, noise_DV):
    """The kept nodes as {path of tokens: score}, and those expanded, level by level; by recursion over dictionaries."""
    found, frontier, frontiers = {(): 0.0}, [()], []
    for depth in range(tree.depth):
        frontiers.append(set(frontier))
        proposed = {}
        for path in frontier:
            noisy = log_q[(position + depth) % len(log_q), path[-1] if path else root] + noise_DV[depth]
            terms = noisy - noisy.logsumexp(-1)
            for token in terms.topk(tree.top_k).indices.tolist():
                proposed[*path, token] = found[path] + float(terms[token])
        found |= proposed
        frontier = sorted(proposed, key=lambda path: -proposed[path])[: tree.top_k]
    return dict(sorted(found.items(), key=lambda item: (-item[1], len(item[0])))[: tree.nodes]), frontiers


def paths_of(draft, row):
    """The tokens from the root to each node, found by walking up its parents."""
    parents, paths = draft.topology.parents_BN[row].tolist(), [()]
    for node, parent in list(enumerate(parents))[1:]:
        assert parent < node, "a parent stands behind its child"
        paths.append((*paths[parent], int(draft.tokens_BN[row, node])))
    return paths


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_tree_keeps_the_best_nodes(shape, temperature, seed):
    """Against the same selection by hand, at rows that differ; noise counts in the score where there is any."""
    tree, sampling, B = DynamicTree(*shape), Sampling(temperature), 6
    logits = 2 * torch.randn(5, 9, 9)
    noise = None if sampling.greedy else -torch.rand(B, tree.depth + 1, 9).log().neg().log()
    roots, positions = torch.randint(9, (B,)).tolist(), torch.randint(50, (B,)).tolist()
    draft, frontiers = grown(tree, logits, roots, positions, sampling, noise)
    for row in range(B):
        log_q, noise_DV = sampling.process(logits), torch.zeros(tree.depth, 9) if noise is None else noise[row]
        kept, expanded = by_hand(tree, log_q, roots[row], positions[row], noise_DV)
        assert set(paths_of(draft, row)) == set(kept)
        # what the drafter gets for each level: whose child a node is, in every way that a kind may look it up
        paths, seen, numbers = [()], [{0}], [0]
        for depth, frontier in enumerate(frontiers):
            assert frontier.depth == depth and set(frontier.positions_BF[row].tolist()) == {positions[row] + depth}
            places, tokens = frontier.parent_index_BF[row].tolist(), frontier.tokens_BF[row].tolist()
            own = frontier.nodes_F.tolist()
            if depth:
                paths = [(*paths[place], token) for place, token in zip(places, tokens, strict=True)]
                seen = [seen[place] | {number} for place, number in zip(places, own, strict=True)]
                assert own == list(range(numbers[-1] + 1, numbers[-1] + 1 + tree.top_k))
            else:
                assert (places, tokens, own) == ([0], [roots[row]], [0])
            numbers = own
            assert set(paths) == expanded[depth]
            assert [set(a.nonzero()[:, 0].tolist()) for a in unpack_bits(frontier.bits_BFW[row], 64)] == seen


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "all equal", "one-hot", "no mass", "far apart"])
def test_dynamic_tree_is_a_valid_tree_even_with_ties(shape, kind, seed):
    """Closed under parents, best first, ancestors those of the parents' walk, numbers those of the expanded nodes."""
    tree = DynamicTree(*shape)
    logits = torch.randn(7, 8, 8)
    if kind == "all equal":
        logits.zero_()
    elif kind == "one-hot":  # scores of exactly 0 beside ones of -inf
        logits = torch.full_like(logits, float("-inf")).scatter(2, torch.randint(8, (7, 8, 1)), 0.0)
    elif kind == "no mass":
        logits[torch.rand(7, 8, 8) < 0.7] = float("-inf")
        logits[..., 0] = 0.0
    elif kind == "far apart":
        logits *= 1e6
    draft, _ = grown(tree, logits, list(range(8)), list(range(8)), Sampling(1.0))
    topology, N = draft.topology, tree.nodes
    assert draft.drafter_numbers_BN is not None
    assert draft.tokens_BN.shape == topology.depths_BN.shape == topology.parents_BN.shape == (8, N)
    for row in range(8):
        paths = paths_of(draft, row)
        assert len(set(paths)) == N, "a node is kept twice"
        assert [len(path) for path in paths] == topology.depths_BN[row].tolist()
        above = [[paths[i][: len(paths[j])] == paths[j] for j in range(N)] for i in range(N)]
        assert unpack_bits(topology.bits_BNW[row], N).tolist() == above
        numbers = draft.drafter_numbers_BN[row].tolist()
        has_child = set(topology.parents_BN[row, 1:].tolist())
        assert all(numbers[node] > 0 for node in has_child - {0}), "a node with children was never expanded"
        expanded = [number for number in numbers if number]
        assert len(set(expanded)) == len(expanded) and max(expanded, default=0) < tree.slots
        assert all((number - 1) // tree.top_k + 1 == len(paths[i]) for i, number in enumerate(numbers) if number)


def test_child_never_ranks_before_its_parent(seed):
    """Terms are at most 0 whatever rounding does to log-sum-exp."""
    for scale in (1e-3, 1.0, 1e4):
        terms, _ = dynamic.likeliest(scale * torch.randn(64, 16, 33), 33)
        assert (terms <= 0).all()
    assert dynamic.best(torch.tensor([[0.0, -1.0, 0.0, -1.0, 0.0]]), 4).tolist() == [[0, 2, 4, 1]]


class NoHostReads(TorchDispatchMode):
    """Refuses what would copy a value to the host or make a shape depend on data: what a captured graph cannot do."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(word == name or (word == "unique" and word in name) for word in self.REFUSED), name
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), "an index by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("verify", ["coupled", "residual", "typical"])
@pytest.mark.parametrize("shaped", [{"depth": 3}, {"tree": SIBLINGS}, {"tree": GROWING}], ids=["chain", "tree", "dynamic"])
def test_round_has_no_host_sync(shaped, verify, seed):
    """A round reads nothing on the host."""
    runner = pair(ends=())
    for options in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}):
        rounds, seen = type(runner.rounds).__call__, []

        def guarded(self, *args, rounds=rounds, seen=seen):
            with NoHostReads():
                seen.append(rounds(self, *args))
            return seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(runner.rounds), "__call__", guarded)
            runner.generate(ragged_prompts(3), 12, seed=seed, verify=verify, **options, **shaped)
        assert seen


def test_dynamic_residual_equals_plain_with_its_own_noise(seed):
    """One draw from p at each node settles the judging of its children and the bonus: plain decoding would draw the same."""
    for options in ({"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}):
        runner = pair()
        prompts = ragged_prompts(12)
        plain = runner.generate(prompts, 24, seed=seed, verify="residual", depth=0, **options)
        ours = runner.generate(prompts, 24, seed=seed, verify="residual", tree=GROWING, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.support.equality.CHOICE", RESIDUAL)
            texts = [out.tokens for out in ours], [out.tokens for out in plain]
            assert_few(compare(runner.rounds.target, prompts, *texts, Sampling(**options), seed), 288)
        assert Stats.merge(out.stats for out in ours).tau > 1.2
        coupled = runner.generate(prompts, 24, seed=seed, tree=GROWING, **options)
        assert [out.tokens for out in ours] != [out.tokens for out in coupled], "residual drew from the proposals' stream"


def test_noise_in_node_scores_raises_tau(seed, monkeypatch):
    """Planted: the same children ranked by log q alone keep fewer of the nodes that the target takes."""
    runner = pair(noise=0.03, ends=(), max_batch=32)
    tree, prompts = DynamicTree(4, 4, 8), ragged_prompts(32)
    with_noise = tau(runner, prompts, 40, temperature=1.0, seed=seed, tree=tree)
    right, expand, noise = dynamic.likeliest, Steps.expand, {}

    def remember(self, frontier, width):
        noise["row"] = self.noise_BDV[:, frontier.depth : frontier.depth + 1]
        return expand(self, frontier, width)

    def by_log_q(noisy_BFV, width):
        _, picked = right(noisy_BFV, width)
        return (noisy_BFV - noise["row"]).log_softmax(-1).gather(2, picked), picked

    monkeypatch.setattr(Steps, "expand", remember)
    monkeypatch.setattr(dynamic, "likeliest", by_log_q)
    without = tau(runner, prompts, 40, temperature=1.0, seed=seed, tree=tree)
    print(f"tau {with_noise:.2f} with noise in the score, {without:.2f} by log q alone")
    assert with_noise > 1.1 * without


def test_dynamic_tree_beats_static_if_certainty_varies(seed):
    """Positions that are sure alternate with ones that are not: one shape for all wastes nodes."""
    p = torch.randn(2, 12, 12)
    p[0] *= 6
    runner = table_runner(p, p + 0.7 * torch.randn(p.shape), 64, 200)
    static = ((0,), (1,), (2,), (0, 0), (0, 1), (0, 0, 0))
    options = {"temperature": 1.0, "seed": seed}
    dynamic_, fixed = (tau(runner, [[0]] * 64, 100, tree=tree, **options) for tree in (DynamicTree(3, 3, 7), static))
    print(f"tau {dynamic_:.2f} dynamic, {fixed:.2f} static")
    assert dynamic_ > 1.05 * fixed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"depth": 0}, "depth 0"),
        ({"top_k": 0}, "top_k 0"),
        ({"nodes": 1}, "nodes 1"),
        ({"depth": 2, "top_k": 3, "nodes": 14}, r"nodes 14 must be at least 2 and at most 13"),
    ],
)
def test_invalid_dynamic_tree_is_refused(arguments, named):
    """A dynamic tree with an impossible depth, width or node count is refused."""
    with pytest.raises(UserError, match=named) as caught:
        DynamicTree(**arguments)
    assert "\n" not in str(caught.value)
    assert DynamicTree(2, 3, 13).size == 13


def test_tree_must_fit_the_drafter(seed):
    """A tree that is deeper or wider than the drafter allows is refused."""
    runner = pair()
    with pytest.raises(UserError, match="49 children of a node, but this drafter proposes among 48"):
        runner.generate([[1]], ignore_end=True, tree=DynamicTree(1, 49, 5))
    with pytest.raises(UserError, match="depth or tree, not both"):
        runner.generate([[1]], tree=DynamicTree(), depth=3)
    with pytest.raises(UserError, match="without a drafter"):
        pair(noise=None).generate([[1]], tree=DynamicTree())
    runner.drafter.max_depth, runner.drafter.max_width = 2, 3
    with pytest.raises(UserError, match="depth 3: this drafter has heads for 2"):
        runner.generate([[1]], tree=DynamicTree(3, 2, 4))
    for tree in (DynamicTree(2, 4, 5), [(0,), (1,), (2,), (3,), *((k, 0) for k in range(4))]):
        with pytest.raises(UserError, match="4 nodes on a level, this drafter expands at most 3"):
            runner.generate([[1]], tree=tree)
    assert runner.generate([[1]], 4, tree=DynamicTree(1, 9, 5)), "its nodes are proposed, not expanded"


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("dynamic:5,4,16", DynamicTree(5, 4, 16)),
        ("dynamic", DynamicTree()),
        ("dynamic: 2, 3, 7", DynamicTree(2, 3, 7)),
        ("[[0], [1], [0,0]]", [(0,), (1,), (0, 0)]),
        ("[]", []),
        ("[[10,2]]", [(10, 2)]),
    ],
)
def test_tree_option_is_parsed(text, tree):
    """The tree option is read as rank paths or as a dynamic tree."""
    assert parse_tree(text) == tree


@pytest.mark.parametrize("text", ["", "dynamic:5,4", "dynamic:-1,2,3", "[[0],[x]]", "[0,1]", "[[0],]", "static"])
def test_invalid_tree_option_is_refused(text):
    """An invalid tree option is refused, and the error shows the two forms."""
    with pytest.raises(UserError, match=r"give rank paths, as .* or dynamic:DEPTH,TOP_K,NODES"):
        parse_tree(text)


def test_cache_can_be_filled_with_a_wide_dynamic_tree(seed):
    """The drafter's scratch is the larger one here: 25 nodes expanded, 4 kept."""
    runner, tree = pair(max_len=64, ends=()), DynamicTree(5, 6, 4)
    assert tree.slots == 25
    for length in (1, 40, 62):
        out = runner.generate([[3] * length, [4] * 63], 1000, temperature=1.0, seed=seed, tree=tree)[0]
        assert len(out.tokens) == 64 - length and out.finish == "max_len"


def test_dynamic_tree_with_top_1_is_a_chain(seed):
    """A dynamic tree with one child per node decodes as the chain."""
    runner = pair(ends=())
    prompts = ragged_prompts(6)
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 20, "temperature": temperature, "seed": seed}
        chained = runner.generate(prompts, tree=chain(3), **options)
        grown_ = runner.generate(prompts, tree=DynamicTree(3, 1, 4), **options)
        assert [(o.tokens, o.stats.accepted) for o in grown_] == [(o.tokens, o.stats.accepted) for o in chained]


def test_observer_sees_topology_and_draft_logits(seed):
    """An observer sees the tree's topology and the draft logits of every level."""
    runner, tree = pair(ends=()), DynamicTree(3, 2, 5)
    seen = []
    runner.observe = seen.append
    for verify in ("coupled", "residual"):
        runner.generate(ragged_prompts(3), 8, temperature=1.0, seed=seed, tree=tree, verify=verify)
    likeliest_B = seen[-1].draft.logits[0][:, 0].argmax(-1)
    assert (seen[-1].draft.tokens_BN == likeliest_B[:, None]).any(1).all(), "under residual children are picked without noise"
    for trace in seen:
        assert [tuple(scores.shape[1:]) for scores in trace.draft.logits] == [(1, 48), (2, 48), (2, 48)]
        assert trace.draft.shape is tree and trace.draft.topology.parents_BN.shape == trace.draft.tokens_BN.shape


@pytest.mark.parametrize("tree", [DynamicTree(3, 2, 4), DynamicTree(4, 3, 6)])
def test_nan_draft_logits_do_not_change_the_text(tree):
    """Draft logits of NaN do not change the text."""
    for seed in range(10):
        torch.manual_seed(seed)
        p = 2 * torch.randn(1, 8, 8)
        q = p + 0.3 * torch.randn(1, 8, 8)
        q[0, seed % 8] = float("nan")
        runner, options = table_runner(p, q, 3, 64), {"max_new_tokens": 30, "temperature": 0.7, "seed": seed}
        ways = ({"depth": 0}, {"tree": tree})
        plain, texts = ([out.tokens for out in runner.generate([[1], [2, 3], [4]], **way, **options)] for way in ways)
        assert texts == plain
