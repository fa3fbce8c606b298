"""Typical acceptance: the rule against one written by hand, its limits, and that what it writes says that it is lossy."""

# B rows  N nodes  V vocabulary

import math

import numpy as np
import pytest
import torch

from tests.support import laws
from tests.support.distribution import laws_of, sample, tables
from tests.support.equality import assert_few, compare
from tests.support.models import BUSHY, SIBLINGS, pair, ragged_prompts
from trainkit import cli
from trainkit.errors import UserError
from trainkit.runner import DynamicTree, Stats
from trainkit.runner.sampling import Sampling
from trainkit.runner.trees.shape import Draft
from trainkit.runner.trees.static import build, chain
from trainkit.runner.verify import Coupled, Typical

CPU = torch.device("cpu")
UNREAD = torch.empty(0), torch.empty(0)  # keys and positions, which these rules do not read
SHAPED = {"chain": {"depth": 3}, "tree": {"tree": SIBLINGS}, "dynamic": {"tree": DynamicTree(4, 3, 8)}}


def by_hand(tree, tokens, scores, noise, epsilon, scale):
    """Tokens emitted: the first of the longest paths whose every token is plausible, then the target's choice."""
    kept = [[]]  # nodes of the path to each node, or None where one of them is not kept
    for node in range(1, tree.size):
        parent = int(tree.topology.parents_BN[0, node])
        p = scores[parent].double().softmax(-1)
        entropy = -sum(float(x) * math.log(x) for x in p.tolist() if x)
        plausible = float(p[tokens[node]]) > min(epsilon, scale * math.exp(-entropy))
        kept.append([*kept[parent], node] if plausible and kept[parent] is not None else None)
    best = max((path for path in kept if path is not None), key=len)  # the first of the longest
    last = best[-1] if best else 0
    return [int(tokens[node]) for node in best] + [int((scores[last] + noise[len(best)]).argmax())]


@pytest.mark.parametrize("paths", [chain(3), SIBLINGS, BUSHY], ids=["chain", "siblings", "bushy"])
@pytest.mark.parametrize("thresholds", [(0.09, 0.3), (0.3, 0.3), (0.5, 1.0), (0.05, 0.1)])
def test_longest_plausible_path_is_accepted(paths, thresholds, seed):
    """The first of the longest paths of plausible tokens is accepted."""
    tree, B, V = build(paths, CPU), 200, 6
    scores = torch.randn(B, tree.size, V) * torch.rand(B, 1, 1) * 4
    scores[torch.rand(B, tree.size, V) < 0.1] = float("-inf")
    scores[..., 0] = scores[..., 0].clamp(min=0)
    tokens, noise = torch.randint(V, (B, tree.size)), torch.randn(B, tree.depth + 1, V)
    verdict = Typical(*thresholds).verify(Draft(tree, tokens, tree.topology, tree.depth), scores, noise, *UNREAD)
    lengths = set()
    for row in range(B):
        emitted = verdict.emitted_BP[row, : int(verdict.counts_B[row])].tolist()
        assert emitted == by_hand(tree, tokens[row], scores[row], noise[row], *thresholds)
        lengths.add(len(emitted))
        if verdict.path_BP is not None:
            path = verdict.path_BP[row, : len(emitted)].tolist()
            assert tokens[row, path[1:]].tolist() == emitted[:-1]
    assert len(lengths) > 2


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED)
def test_typical_limits_are_none_and_all_of_the_draft(shaped, seed):
    """No probability is above 1, every one is above 0; at temperature 0 the rule is that of coupled verification."""
    runner = pair(ends=())
    prompts = ragged_prompts(6)
    options = {"max_new_tokens": 21, "seed": seed}
    for temperature, never in ((1.0, {"typical_epsilon": 1.0, "typical_scale": 1e30}), (0.0, {})):
        plain = runner.generate(prompts, depth=0, temperature=temperature, **options)
        ours = runner.generate(prompts, verify="typical", temperature=temperature, **never, **shaped, **options)
        texts = [out.tokens for out in ours], [out.tokens for out in plain]
        assert_few(compare(runner.rounds.target, prompts, *texts, Sampling(temperature), seed), 126)
        assert (Stats.merge(out.stats for out in ours).tau == 1) == (temperature > 0)
    always = runner.generate(prompts, verify="typical", temperature=1.0, typical_epsilon=0.0, **shaped, **options)
    stats = Stats.merge(out.stats for out in always)
    assert stats.tau > (2 if "tree" in shaped else 3.99)


@pytest.mark.parametrize("shaped", SHAPED.values(), ids=SHAPED)
def test_typical_output_is_marked_lossy(shaped, seed):
    """Outputs and statistics of typical verification above temperature 0 are marked as lossy."""
    runner = pair(noise=0.3, ends=())
    options = {"max_new_tokens": 16, "seed": seed}
    for verify, temperature, lossy in (("typical", 1.0, True), ("typical", 0.0, False), ("coupled", 1.0, False)):
        outs = runner.generate(ragged_prompts(3), verify=verify, temperature=temperature, **shaped, **options)
        assert [out.stats.lossy for out in outs] == [lossy] * 3
        assert runner.last.lossy == Stats.merge(out.stats for out in outs).lossy == lossy


@pytest.mark.parametrize(("verify", "lossy"), [("typical", True), ("coupled", False)])
@pytest.mark.parametrize("tree", ["[[0],[1],[0,0]]", "dynamic:3,2,5"])
def test_generate_takes_trees_and_warns_if_lossy(tree, verify, lossy, tiny_target, capsys):
    """`trainkit generate` takes trees, and warns if the verification is lossy."""
    arguments = ["generate", "--target", tiny_target, "--drafter", tiny_target, "--prompt", "How many", "--tree", tree]
    arguments += ["--verify", verify, "--temperature", "0.8", "--max-new-tokens", "8"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert ("LOSSY: typical verification" in capsys.readouterr().err) == lossy


def test_typical_verification_is_lossy(seed):
    """It deserves the name: the joint law of four tokens is far from the target's."""
    p, q = tables("generic", np.random.default_rng(seed))
    counts, _ = sample(p, q, 10_000, chain(3), seed, verify="typical", temperature=1.0)
    assert laws.p_value(counts, laws.plain_law(laws_of(p, q, {"temperature": 1.0})[0])) < 1e-6


@pytest.mark.parametrize(
    ("thresholds", "named"),
    [
        ({"typical_epsilon": -0.1}, "typical_epsilon -0.1"),
        ({"typical_epsilon": 1.5}, "typical_epsilon 1.5"),
        ({"typical_scale": -1.0}, "typical_scale -1.0"),
        ({"typical_scale": float("nan")}, "typical_scale nan"),
    ],
)
def test_thresholds_out_of_range_are_named(thresholds, named):
    """A threshold out of range is named in the error."""
    with pytest.raises(UserError, match=named):
        pair().generate([[1]], verify="typical", **thresholds)


def test_typical_equals_coupled_on_one_hot_targets():
    """Where p is one-hot, plausible and chosen are the same."""
    tree = build(SIBLINGS, CPU)
    tokens = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 1, 4, 3], [0, 5, 4, 3, 2]])
    scores = torch.full((3, 5, 6), float("-inf")).scatter(2, torch.tensor([1, 4, 0, 0, 5]).expand(3, 5)[..., None], 0.0)
    draft = Draft(tree, tokens, tree.topology, tree.depth)
    one, other = (rule.verify(draft, scores, None, *UNREAD) for rule in (Coupled(), Typical()))
    assert torch.equal(one.counts_B, other.counts_B) and one.counts_B.tolist() == [3, 2, 1]
    for row, count in enumerate(one.counts_B.tolist()):
        assert torch.equal(one.emitted_BP[row, :count], other.emitted_BP[row, :count])
