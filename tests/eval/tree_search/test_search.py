"""Tree search: the replay predicts decoding, the search finds the best tree, and the runner reads it from the bundle."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from tests.support.models import BUSHY, SIBLINGS, lm_draft, near, pair, ragged_prompts
from tests.support.served_acceptance import _batch
from trainkit import bundle
from trainkit.card import describe
from trainkit.cli import main
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.eval.tree_search.ranks import PAST_END, PRIOR, accuracies, rank_of, replay_ranks, shares, simulate_decoding
from trainkit.eval.tree_search.search import Costs, best_paths, expected_tau, full_tree, measure_costs, path_probability, search
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner, Stats
from trainkit.runner.policies.cost_model import isotonic
from trainkit.runner.trees.static import build, chain


def random_table(generator: np.random.Generator, depth: int, width: int) -> np.ndarray:
    table = generator.random((depth, width, width))
    return -np.sort(-table / table.sum(2, keepdims=True) * 0.9, axis=2)


def random_ranks(table: np.ndarray, count: int, length: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Ranks of random texts: from every position a path drawn from the table, cut at the end of the text."""
    depth, width = table.shape[:2]
    ranks = np.full((count, length, depth), width)
    for text, position in itertools.product(range(count), range(length)):
        rank = 0
        for d in range(depth):
            row = table[d, rank]
            rank = int(generator.choice(width + 1, p=[*row, 1 - row.sum()]))
            ranks[text, position, d] = rank if position + d < length else PAST_END
            if rank == width:
                break
    return list(ranks)


def medusa_runner(ends=()) -> Runner:
    runner = pair(noise=None, ends=ends)
    heads = Medusa(runner.shape, num_heads=3)
    heads.copy_head(runner.rounds.target.head_weight)
    with torch.no_grad():
        for parameter in heads.blocks.parameters():
            parameter.normal_(0.0, 0.05)
    return Runner(runner.rounds.target, heads, runner.shape, max_batch=8, max_len=96)


# ------------------------------------------------------------------------------------------------------------------ the replay


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kind", ["lm", "medusa"])
def test_simulated_rounds_equal_decoded_rounds(kind, temperature, seed):
    """Any tree, with end tokens inside texts: the same statistics of full and of cut rounds as in decoding."""
    ends = tuple(range(7))
    runner = pair(noise=0.05, ends=ends) if kind == "lm" else medusa_runner(ends)
    prompts = ragged_prompts(6)
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": seed}
    texts = [output.tokens for output in runner.generate(prompts, depth=0, **options)]
    ranks = replay_ranks(runner, prompts, texts, 3, 4, temperature, seed, batch=4)
    for paths in (chain(1), chain(3), SIBLINGS, tuple(path for path in BUSHY if len(path) < 4)):
        stats = Stats.merge(output.stats for output in runner.generate(prompts, tree=paths, **options))
        assert simulate_decoding(ranks, paths) == stats, paths


def test_text_of_one_token_has_no_round():
    """A text of one token has no round, and accuracies cannot be computed from it."""
    runner = pair(ends=())
    ranks = replay_ranks(runner, [[1, 2]], [[3]], 2, 3)
    assert ranks[0].shape == (0, 2) and simulate_decoding(ranks, chain(2)).rounds == 0
    with pytest.raises(UserError, match="no text is longer than 1 token"):
        accuracies(ranks, 3)


def test_head_shares_equal_a_direct_count(seed):
    """By hand: each head reads the target's state at each position; the rank of the text's token among its logits."""
    runner, width = medusa_runner(), 5
    prompts = ragged_prompts(4)
    texts = [output.tokens for output in runner.generate(prompts, 30, depth=0)]
    found = shares(replay_ranks(runner, prompts, texts, 3, width), width)
    counts, totals = np.zeros((3, width)), np.zeros(3)
    for prompt, text in zip(prompts, texts, strict=True):
        batch = _batch(runner, prompt, text)
        whole = [*prompt, *text]
        for d, block in enumerate(runner.drafter.blocks):
            with torch.no_grad():
                logits = runner.drafter.projection(d, batch.handle)(block(batch.hidden_BTD))[0]
            for place in range(len(prompt) - 1, len(whole) - d - 2):
                rank = int((logits[place] > logits[place, whole[place + d + 2]]).sum())
                totals[d] += 1
                if rank < width:
                    counts[d, rank] += 1
    assert np.allclose(found, counts / totals[:, None])
    assert totals.tolist() == [4 * (30 - 1 - d) for d in range(3)]


def test_accuracies_by_hand():
    """A parent of rank 0 occurs 8 times, 6 of them with a child of rank 0; after a parent of rank 1 that never occurs."""
    text = np.array([[0, 0]] * 6 + [[0, 2], [0, 1], [1, 1], [2, PAST_END]])
    table = accuracies([text], 2)
    assert table[0, 0] == pytest.approx([0.8, 0.1])
    after_any = np.array([6, 2]) / 9  # of nine positions whose parent has rank 0 or 1 and whose child is known
    assert table[1, 0] == pytest.approx((np.array([6, 1]) + PRIOR * after_any) / (8 + PRIOR))
    assert table[1, 1] == pytest.approx((np.array([0, 1]) + PRIOR * after_any) / (1 + PRIOR))
    assert shares([text], 2)[1] == pytest.approx([6 / 9, 2 / 9])


def test_falling_averages_rising_neighbours():
    """Values that rise are replaced by their average, so that the result never rises."""
    assert isotonic([0.2, 0.3, 0.1, 0.5]) == pytest.approx([0.2, 0.2, 0.2, 0.5])
    assert isotonic([0.6, 0.2, 0.1]) == pytest.approx([0.3, 0.3, 0.3])


def test_rank_breaks_ties_by_id_and_marks_misses():
    """Equal scores are ranked by id, and a token that is not proposed is a miss."""
    scores = torch.tensor([[1.0, 3.0, 1.0, float("-inf")]]).expand(4, -1)
    assert rank_of(torch.tensor([0, 1, 2, 3]), scores, None, 9).tolist() == [1, 0, 2, 9]
    assert rank_of(torch.tensor([4, 6, 8, 5]), scores, torch.tensor([4, 6, 8, 9]), 2).tolist() == [1, 0, 2, 2]


# ---------------------------------------------------------------------------------------------------------------- the search


def closed_trees(depth: int, width: int, nodes: int) -> set[frozenset]:
    """Every valid tree of `nodes` nodes, root included: it contains each node's parent and lower-ranked siblings."""
    trees = {frozenset([(0,)])}
    for _ in range(nodes - 2):
        grown = set()
        for tree in trees:
            for path in ((*parent, rank) for parent in [(), *tree] if len(parent) < depth for rank in range(width)):
                if path not in tree and (path[-1] == 0 or (*path[:-1], path[-1] - 1) in tree):
                    grown.add(tree | {path})
        trees = grown
    return trees


@pytest.mark.parametrize(("nodes", "depth", "width"), [(5, 3, 3), (7, 3, 3), (6, 2, 4), (6, 5, 1)])
def test_greedy_tree_is_the_best_of_all_trees(nodes, depth, width, seed):
    """The greedy search finds the tree with the highest expected tau of all trees."""
    for case in range(10):
        table = random_table(np.random.default_rng([seed, case]), depth, width)
        best = max(expected_tau(tree, table) for tree in closed_trees(depth, width, nodes))
        found = best_paths(table, nodes, depth)
        assert expected_tau(found, table) == pytest.approx(best) and len(found) == nodes - 1
        build(found, torch.device("cpu"))  # raises if it is not a tree


def test_expected_tau_equals_simulated_tau(seed):
    """20 texts of 500 positions; the standard error of tau is that of the rounds, and one run in 16,000 fails by chance."""
    generator = np.random.default_rng(seed)
    table = random_table(generator, 3, 3)
    paths = best_paths(table, 9, 3)
    stats = simulate_decoding(random_ranks(table, 20, 500, generator), paths)
    squares = sum(n * (k + 1 - stats.tau) ** 2 for k, n in enumerate(stats.accepted))
    error = (squares / stats.rounds / stats.rounds) ** 0.5
    assert abs(stats.tau - expected_tau(paths, table)) < 4 * error and error < 0.02


def test_search_respects_the_widest_level(seed):
    """The search never expands more nodes of a level than the drafter can."""
    table = random_table(np.random.default_rng(seed), 4, 6)
    for paths in (best_paths(table, 40, 4, max_frontier=2), full_tree(40, 4, 6, max_frontier=2)):
        for depth in range(4):
            assert len({path[:-1] for path in paths if len(path) == depth + 1}) <= 2
        build(paths, torch.device("cpu"))
        assert len(paths) == 39


def test_full_tree_has_the_fewest_children_that_fit():
    """The full tree has the smallest number of children per node that gives enough nodes."""
    assert full_tree(7, 3, 4) == ((0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1))
    assert full_tree(9, 2, 4) == ((0,), (1,), (2,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert full_tree(3, 3, 1) == chain(2)
    with pytest.raises(UserError, match="hold 7; lower nodes"):
        full_tree(8, 2, 2)


def costs(row: float, level: float) -> Costs:
    """Verifying takes 1 second plus `row` for each further row, a draft level takes `level`."""
    return Costs(1.0, {1: 1.0, 100: 1.0 + 99 * row}, level, {1: level, 8: level})


def test_tree_size_follows_row_and_level_costs(seed):
    """Cheaper rows give a larger tree, and more expensive levels a flatter one."""
    table = random_table(np.random.default_rng(seed), 4, 4)
    ranks = random_ranks(table, 4, 200, np.random.default_rng(seed))
    by_row = [search(table, ranks, costs(row, 0.02), 60) for row in (0.0, 0.02, 0.5)]
    sizes = [max(candidates, key=lambda candidate: candidate.speedup).nodes for candidates in by_row]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[2], sizes
    depths = [search(table, ranks, costs(0.0, level), 5)[-1].depth for level in (0.0, 5.0)]
    assert depths[1] == 1 <= depths[0]


def test_costs_by_hand():
    """Costs and speed-ups of trees equal those computed by hand."""
    one = Costs(2.0, {1: 2.0, 3: 4.0, 5: 8.0}, 0.5, {1: 0.25, 2: 0.75})
    paths = ((0,), (1,), (0, 0), (1, 0), (0, 0, 0))  # levels of 1, 2 and 1 frontier nodes
    assert one.draft(paths) == 0.5 + 0.75 + 0.25
    assert (one.verify(2), one.verify(6)) == (3.0, 10.0)  # interpolated, and extrapolated from the last two
    assert one.speedup(3.0, paths) == pytest.approx(3.0 * 2.0 / (10.0 + 1.5))


def test_measured_costs_cover_all_sizes(seed):
    """Measured costs cover all sizes and never fall with size."""
    runner = pair(ends=())
    runner.generate([[1, 2]], 40)
    found = measure_costs(runner, 20, 1, nodes=12, depth=3, width=3)
    assert sorted(found.verify_seconds) == [1, 2, 3, 4, 6, 8, 12] and sorted(found.level_seconds) == [1, 2, 3]
    for seconds in (found.verify_seconds, found.level_seconds):
        assert list(seconds.values()) == sorted(seconds.values())
    assert found.plain_step_seconds > 0 and found.first_level_seconds > 0


# --------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def made(tiny_target, tmp_path, seed):
    """The tiny target, a bundle of Medusa heads for it, and a file of prompts."""
    heads = Medusa(target_shape(tiny_target), num_heads=3)
    heads.initialise(FrozenTarget(tiny_target))
    export_drafter(heads, tmp_path / "heads", tokenizer=tiny_target, metrics={"alpha": 0.5})
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"How many are {n}?"}) + "\n" for n in range(5)))
    return tiny_target, tmp_path / "heads", rows


def test_bundle_tree_is_the_runner_default(made, capsys):
    """The tree stored in the bundle is what the runner uses unless a depth is given."""
    target, folder, rows = made
    before = bundle.read(folder)
    common = ["--target", str(target), "--prompts", str(rows), "--held_out", "2", "--max_new_tokens", "12", "--device", "cpu"]
    assert main(["tree", str(folder), *common, "--nodes", "5"]) == 0
    printed = capsys.readouterr().out
    found = bundle.read(folder)
    tree = tuple(tuple(path) for path in found.runner["tree"])
    assert len(tree) == 4 and build(tree, torch.device("cpu")).size == 5
    assert (found.files, found.config, found.metrics) == (before.files, before.config, before.metrics)
    assert "recommended: 5 nodes" in printed and "2 held-out prompts, searched (5 nodes" in printed
    record = found.runner["tree_search"]
    assert [row["nodes"] for row in record["by_nodes"]] == [2, 3, 4, 5] and record["prompts"] == 3
    assert record["costs"]["plain_step_seconds"] > 0 and record["machine"]["processor"] and len(record["shares"]) == 3
    assert record["expected_tau"] == pytest.approx(expected_tau(tree, np.array(record["accuracies"])), abs=1e-3)
    runner, seen = Runner.load(target, folder), []
    runner.observe = seen.append
    default = runner.generate([[1, 2, 3]], 16, ignore_end=True)[0].tokens
    assert {trace.draft.shape.paths for trace in seen} == {build(tree, torch.device("cpu")).paths}
    seen.clear()
    assert runner.generate([[1, 2, 3]], 16, depth=2, ignore_end=True)[0].tokens == default
    assert {trace.draft.shape.paths for trace in seen} == {chain(2)}, "a given depth overrides the recommended tree"
    assert len(describe(found)) < 3000


def test_node_count_is_chosen_by_expected_speedup(made):
    """Without a given number of nodes the tree with the highest expected speed-up is chosen."""
    target, folder, rows = made
    common = ["--target", str(target), "--prompts", str(rows), "--held_out", "0", "--max_new_tokens", "8", "--device", "cpu"]
    assert main(["tree", str(folder), *common, "--max_nodes", "6", "--width", "2"]) == 0
    record = bundle.read(folder).runner["tree_search"]
    best = max(record["by_nodes"], key=lambda row: row["expected_speedup"])
    assert record["nodes"] == best["nodes"] and record["held_out"]["trees"] == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nodes", "1"], ("nodes 1", "at least 2")),
        (["--depth", "0"], ("depth 0", "at least 1")),
        (["--nodes", "9", "--width", "1"], ("nodes 9", "hold 4", "lower nodes")),
        (["--held_out", "5"], ("5 are held out",)),
        (["--width", "321"], ("width 321", "320 ids")),
        (["--max_new_tokens", "600"], ("covers 512", "lower max_new_tokens")),
    ],
)
def test_bad_flag_gives_one_line_and_keeps_the_bundle(made, flags, words, capsys):
    """A wrong flag gives a one-line error and leaves the bundle unchanged."""
    target, folder, rows = made
    before = (folder / "trainkit.json").read_bytes()
    common = ["--target", str(target), "--prompts", str(rows), "--device", "cpu"]
    assert main(["tree", str(folder), *common, "--max_new_tokens", "8", "--held_out", "1", *flags]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in line for word in words), line
    assert (folder / "trainkit.json").read_bytes() == before


def test_invalid_tree_in_the_manifest_is_refused(made, capsys):
    """An invalid tree in trainkit.json is refused."""
    target, folder, _ = made
    for tree, word in (([[0], "x"], "must be a list of rank paths"), ([[1]], "needs its parent")):
        bundle.amend(folder, runner={"tree": tree})
        assert main(["generate", "--target", str(target), "--drafter", str(folder), "--prompt", "x", "--raw", "true"]) == 2
        assert word in capsys.readouterr().err


def test_path_chance_is_a_product_of_accuracies():
    """The probability of a path is the product of the accuracies along it."""
    table = np.zeros((2, 2, 2))
    table[0, 0] = [0.5, 0.25]
    table[1, 1] = [0.4, 0.1]
    assert path_probability((1, 0), table) == pytest.approx(0.1) and path_probability((0, 1), table) == 0
    assert expected_tau([(0,), (1,), (1, 0)], table) == pytest.approx(1.85)


def test_near_draft_is_less_accurate_than_the_target(seed):
    """The tests above rely on this: a draft equal to the target has rank 0 everywhere, a noisy draft does not."""
    runner = pair(noise=None, ends=())
    for noise, perfect in ((0.0, True), (0.3, False)):
        draft = lm_draft(runner.shape, near(runner.rounds.target, noise))
        other = Runner(runner.rounds.target, draft, runner.shape, max_len=96)
        texts = [output.tokens for output in other.generate([[1, 2]], 20, depth=0)]
        ranks = replay_ranks(other, [[1, 2]], texts, 2, 4)[0]
        assert bool((ranks[ranks != PAST_END] == 0).all()) == perfect
