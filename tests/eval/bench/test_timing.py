"""Speeds worked by hand, and the order and thread counts of timing."""

import time

import pytest
import torch

from tests.support.models import pair
from trainkit.eval.bench.timing import Generated, Method, measure, set_threads, trainkit_method, warm_up
from trainkit.runner.timing import round_costs
from trainkit.runner.trees.static import chain


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    set_threads(before)


def test_rates_are_medians():
    """The rate of a method is the median over its repeats."""
    one = Method("x", "trainkit", 0, lambda prompts, max_new_tokens, first: Generated([]))
    one.outputs = [Generated([[1] * 6, [2] * 2], split={"prefill": 0.5}, seconds=seconds) for seconds in (2.0, 1.0, 4.0)]
    assert one.rates == [4.0, 8.0, 2.0] and one.rate == 4.0


def test_repeats_are_interleaved_with_own_threads():
    """Repeats of the methods are interleaved, each with its own number of threads."""
    seen = []

    def method(name, threads):
        def run(prompts, max_new_tokens, first):
            seen.append((name, torch.get_num_threads()))
            return Generated([[1] * max_new_tokens])

        return Method(name, "trainkit", 0, run, threads=threads)

    measure([method("a", 1), method("b", 2)], [[1]], 4, 2)
    assert measure([method("a", 1)], [[1]], 4, 3, max_seconds=0.0) == 1, "at least one repeat, and none past the limit"
    del seen[4:]
    assert seen == [("a", 1), ("b", 2), ("a", 1), ("b", 2)]


def test_methods_alternate_by_prompt_and_pieces_add_up(seed):
    """One prompt at a time gives the same tokens and counts as one call, and the seconds of all turns are added."""
    prompts, seen = [[1, 2], [3], [4, 5, 6]], []
    runner = pair(ends=())
    whole, cut, other = (trainkit_method(runner, name, ((0,), (0, 0)), temperature=0.8) for name in ("whole", "cut", "other"))
    inner = cut.run
    cut.run = lambda *args: (seen.append(("cut", args[2])), time.sleep(0.02), inner(*args))[2]
    other.run = lambda *args: (seen.append(("other", args[2])), Generated([[0]] * len(args[0])))[1]
    measure([whole], prompts, 12, 1)
    measure([cut, other], prompts, 12, 1, turn_size=1)
    assert seen == [(name, first) for first in range(3) for name in ("cut", "other")]
    assert cut.last.tokens == whole.last.tokens and cut.last.stats == whole.last.stats and len(other.last.tokens) == 3
    assert cut.last.seconds > 0.06 and set(cut.last.split) == set(whole.last.split)


def test_each_method_gets_its_fastest_thread_count(monkeypatch):
    """By a clock of the test's own: 1 ms or 30 ms for 10 tokens."""
    clock = [0.0]
    monkeypatch.setattr("trainkit.eval.bench.timing.perf_counter", lambda: clock[0])

    def method(fast):
        def run(prompts, max_new_tokens, first):
            clock[0] += 0.001 if torch.get_num_threads() == fast else 0.03
            return Generated([[1] * max_new_tokens])

        return Method("x", "trainkit", 0, run)

    single, double = method(1), method(2)
    estimate = warm_up([single, double], [[1], [2]], 10, [1, 2])
    assert (single.threads, double.threads) == (1, 2)
    assert estimate == pytest.approx(0.004), "2 methods x 2 prompts at the faster setting"


def test_one_lucky_probe_does_not_choose_the_threads(monkeypatch):
    """Two threads that are fast once and slow twice lose against one thread of middling speed."""
    clock, probes = [0.0], []
    monkeypatch.setattr("trainkit.eval.bench.timing.perf_counter", lambda: clock[0])

    def run(prompts, max_new_tokens, first):
        threads = torch.get_num_threads()
        if max_new_tokens > 4:
            probes.append(threads)
            clock[0] += 0.01 if threads == 1 else (0.001, 0.06, 0.06)[probes.count(2) - 1]
        return Generated([[1] * max_new_tokens])

    method = Method("x", "trainkit", 0, run)
    estimate = warm_up([method], [[1]], 10, [1, 2])
    assert method.threads == 1 and probes == [1, 2] * 3 and estimate == pytest.approx(0.01)


def test_method_reports_rounds_of_the_whole_batch(seed):
    """trainkit's method reports the rounds of the whole batch."""
    runner = pair(ends=(), max_batch=4)
    output = trainkit_method(runner, "plain").run([[1, 2]] * 4, 9, 0)
    assert output.count == 36 and output.rounds == 8 and output.stats is not None and output.stats.rounds == 32
    assert set(output.split) >= {"prefill", "target", "host"}


def test_round_costs_grow_with_depth(seed):
    """Measured round costs grow with depth, and measuring leaves the runner as it was."""
    runner = pair(ends=())
    before = [out.tokens for out in runner.generate([[1, 2, 3]], max_new_tokens=10, depth=3)]
    costs = round_costs(runner.rounds, [chain(1), chain(6)], length=20, repeats=15)
    assert costs[()].draft < costs[chain(1)].draft < costs[chain(6)].draft
    assert all(cost.verify > 0 for cost in costs.values())
    assert [out.tokens for out in runner.generate([[1, 2, 3]], max_new_tokens=10, depth=3)] == before


def test_warm_up_starts_with_the_largest_cache():
    """The warm-up starts with the method that needs the most cache slots."""
    ran = []

    def made(name, depth, paths=()):
        return Method(name, "trainkit", depth, lambda *_: ran.append(name) or Generated([[1]]), paths)

    bush = tuple((rank,) for rank in range(12))
    chains = tuple((0,) * n for n in range(1, 5))
    warm_up([made("plain", 0), made("bush", 1, bush), made("cost", 10), made("chain", 4, chains)], [[1]], 4, [1])
    assert list(dict.fromkeys(ran)) == ["cost", "bush", "chain", "plain"]
