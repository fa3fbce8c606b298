"""The schedule of captured rounds, without a GPU: graphs are stood in for by their first closure, called again at every replay.

What a real capture fixes is fixed here too: the views, the plan and the output's tensors. Batches are padded to
powers of two, warm-ups run over rows that are done, and the host reads a round behind.
"""

import weakref

import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.models import SIBLINGS, pair, ragged_prompts
from tests.support.replaying import replayed
from trainkit.runner import DynamicTree
from trainkit.runner.sampling import Sampling

GROWING = DynamicTree(4, 3, 8)


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize(
    "shaped", [{"depth": 0}, {"depth": 4}, {"tree": SIBLINGS}, {"tree": GROWING}], ids=["plain", "chain", "tree", "dynamic"]
)
def test_replayed_lagging_rounds_equal_eager(shaped, lag, seed):
    """Replayed rounds, read one or two rounds later, give the same output as eager ones."""
    runner = pair(max_batch=6)
    prompts = ragged_prompts(11)
    for sampling in (Sampling(0.0), Sampling(0.8, top_p=0.9)):
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_new_tokens": 20, "seed": seed}
        runner.scheduler.graphs, runner.scheduler.lag = None, 0
        eager = runner.generate(prompts, **settings, logprobs=True, **shaped)
        graphed = replayed(runner, lag).generate(prompts, **settings, logprobs=True, **shaped)
        runner.scheduler.fetch = None
        assert runner.scheduler.graphs.replays > 2  # 8 rounds at least, unless rows end early
        ties = compare(runner.rounds.target, prompts, [o.tokens for o in graphed], [o.tokens for o in eager], sampling, seed)
        assert_few(ties, 220)
        for one, other in zip(graphed, eager, strict=True):
            if one.tokens == other.tokens:
                assert (one.finish, one.stats) == (other.finish, other.stats)
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("shaped", [{"depth": 4}, {"tree": SIBLINGS}, {"tree": GROWING}], ids=["chain", "tree", "dynamic"])
@pytest.mark.parametrize("lag", [0, 1])
def test_padding_rows_far_into_the_cache_do_no_harm(shaped, lag, seed):
    """Long rows finish first; the graph of the short ones is padded with rows whose old position is near the cache's end."""
    runner = replayed(pair(ends=(), max_len=600), lag)
    prompts = ragged_prompts(3) + [torch.randint(0, 48, (n,)).tolist() for n in (590, 595, 585)]
    outs = runner.generate(prompts, max_new_tokens=40, temperature=1.0, seed=seed, **shaped)
    runner.scheduler.graphs, runner.scheduler.lag = None, 0
    plain = runner.generate(prompts, max_new_tokens=40, temperature=1.0, seed=seed, depth=0)
    ties = compare(runner.rounds.target, prompts, [o.tokens for o in outs], [o.tokens for o in plain], Sampling(1.0), seed)
    assert_few(ties, 160)


def test_one_graph_serves_every_length(seed):
    """Texts that cross 64, 128 and 256 tokens replay one graph, and read as eager ones."""
    runner = replayed(pair(ends=(), max_len=320), 1)
    prompts = [torch.randint(0, 48, (n,)).tolist() for n in (60, 120, 250)]
    texts = [runner.generate([prompt], max_new_tokens=20, depth=3)[0].tokens for prompt in prompts]
    assert len(runner.scheduler.graphs.closures) == 1
    runner.scheduler.graphs, runner.scheduler.lag = None, 0
    plain = [runner.generate([prompt], max_new_tokens=20, depth=0)[0].tokens for prompt in prompts]
    assert_few(compare(runner.rounds.target, prompts, texts, plain, Sampling(0.0), seed), 60)


def test_replays_follow_new_end_ids_and_weights(seed):
    """Replays use the end ids and weights of the present call."""
    runner = replayed(pair(), 1)
    prompts = ragged_prompts(5)
    settings = {"max_new_tokens": 16, "temperature": 1.0, "seed": seed, "depth": 3}
    for _ in range(2):
        for ignore_end in (False, True, False):
            outs = runner.generate(prompts, ignore_end=ignore_end, **settings)
            for out in outs:
                assert (7 in out.tokens[:-1]) <= ignore_end
                assert len(out.tokens) == 16 or out.tokens[-1] == 7
        before = [out.tokens for out in outs]
        runner.update([("model.embed_tokens.weight", 0.35 * torch.randn(48, 32))])
        assert [out.tokens for out in runner.generate(prompts, **settings)] != before


def test_stop_strings_seen_a_round_late_cut_in_place(tiny_target, seed):
    """Stop strings that are seen a round late cut the text at the same place."""

    from trainkit.runner import Runner

    runner = Runner.load(tiny_target, tiny_target, max_len=128, max_batch=3)
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": seed, "stop": ("e", "0", "th"), "depth": 3}
    prompts = ["Natalia sold", "How many", "In May", "She", "x"]
    eager = runner.generate(prompts, **settings)
    late = replayed(runner, 1).generate(prompts, **settings)
    assert [(o.tokens, o.text, o.finish, o.stats) for o in late] == [(o.tokens, o.text, o.finish, o.stats) for o in eager]


def test_graphs_keep_the_tables_they_read(seed):
    """A longer text makes new rotary tables; a captured round still reads the old ones, which must stay alive."""
    runner = replayed(pair(max_len=32, max_batch=1, ends=()), 1)
    runner.generate([[1, 2]], max_new_tokens=20, tree=GROWING)
    tables = [weakref.ref(runner.rounds.target.rope.table), weakref.ref(runner.drafter.decoder.rope.table)]
    for decoder in (runner.rounds.target, runner.drafter.decoder):
        decoder.reserve_positions(4096)
    assert runner.rounds.target.rope.table is not tables[0]()
    assert any(key[0] == GROWING for key in runner.scheduler.graphs.closures)
    assert all(table() is not None for table in tables)


@pytest.mark.parametrize("captured", [False, True])
def test_long_texts_are_decoded_apart(captured, seed, monkeypatch):
    """One long prompt does not make every row long, and no text changes; a row is as long as its own group needs."""
    runner = pair(ends=(), max_len=2000)
    if captured:
        replayed(runner, 1)
    prompts = ragged_prompts(9)
    prompts[3:3] = [torch.randint(0, 48, (n,)).tolist() for n in (1500, 300)]
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": seed, "depth": 2}
    whole = [out.tokens for out in runner.generate(prompts, **options)]
    runner.scheduler._state, runner.scheduler.grow, sizes = None, True, []
    monkeypatch.setattr("trainkit.runner.scheduler.SPLIT_CACHE_BYTES", 0)
    new_state = runner.rounds.new_state
    monkeypatch.setattr(runner.rounds, "new_state", lambda *args: sizes.append(args[:2]) or new_state(*args))
    for _ in range(2):
        apart = [out.tokens for out in runner.generate(prompts, **options)]
        assert_few(compare(runner.rounds.target, prompts, apart, whole, Sampling(1.0), seed), 132)
    assert runner.last.tokens == 12 * 11
    assert [rows for rows, _ in sizes] == [8, 1, 8, 1] and max(rows * slots for rows, slots in sizes) < 8 * 1500 / 3
    # a single long text, or texts of like lengths, are not divided
    limits = lambda *lengths: [type("Text", (), {"limit": n}) for n in lengths]
    assert [(len(g), b, n) for g, b, n in runner.scheduler._groups(limits(1500))] == [(1, 1, 1500)]
    assert [(len(g), b, n) for g, b, n in runner.scheduler._groups(limits(100, 150, 190))] == [(3, 3, 190)]
    groups = runner.scheduler._groups(limits(*[100] * 20, 1200, 400, 350, 300))
    assert [(len(g), b, n) for g, b, n in groups] == [(20, 8, 100), (3, 2, 400), (1, 1, 1200)]
