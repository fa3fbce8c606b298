"""The arithmetic of speeds, worked by hand, and the order and threads of measuring."""

import time

import pytest
import torch

from tests.support.models import pair
from trainkit.eval.bench.timing import Contender, Generated, mbsu, measure, ours, roof, set_threads, settle, warm_up
from trainkit.runner.timing import RoundCost, round_costs
from trainkit.runner.trees.static import chain


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    set_threads(before)


def test_mbsu_and_roof_by_hand():
    assert mbsu(3.0, 0.125, 4) == 2.0  # 3 tokens for a target call and half of one
    assert roof(3.0, 0.010, RoundCost(draft=0.005, verify=0.015)) == pytest.approx(1.5)  # 3 tokens in the time of 2 steps


def test_rates_are_medians_and_prefill_is_left_out_of_decoding():
    one = Contender("x", "trainkit", 0, lambda prompts, most, first: Generated([]))
    one.seconds = [2.0, 1.0, 4.0]
    one.outputs = [Generated([[1] * 6, [2] * 2], split={"prefill": 0.5})] * 3
    assert one.rates == [4.0, 8.0, 2.0] and one.rate == 4.0 and one.decode_seconds == 1.5


def test_repeats_are_interleaved_each_with_its_own_threads():
    seen = []

    def contender(name, threads):
        def run(prompts, most, first):
            seen.append((name, torch.get_num_threads()))
            return Generated([[1] * most])

        return Contender(name, "trainkit", 0, run, threads=threads)

    told = []
    measure([contender("a", 1), contender("b", 2)], [[1]], 4, 2, told.append)
    assert measure([contender("a", 1)], [[1]], 4, 3, max_seconds=0.0) == 1, "once at least, and no repeat past the limit"
    del seen[4:]
    assert seen == [("a", 1), ("b", 2), ("a", 1), ("b", 2)] and told == ["a", "b", "a", "b"]


def test_contenders_take_turns_prompt_by_prompt_and_their_pieces_add_up(seed):
    """As one call: the same tokens, by the same draws, the same counts; and the seconds are those of all turns."""
    prompts, seen = [[1, 2], [3], [4, 5, 6]], []
    runner = pair(ends=())
    whole, cut, other = (ours(runner, name, ((0,), (0, 0)), temperature=0.8) for name in ("whole", "cut", "other"))
    inner = cut.run
    cut.run = lambda *given: (seen.append(("cut", given[2])), time.sleep(0.02), inner(*given))[2]
    other.run = lambda *given: (seen.append(("other", given[2])), Generated([[0]] * len(given[0])))[1]
    measure([whole], prompts, 12, 1)
    measure([cut, other], prompts, 12, 1, piece=1)
    assert seen == [(name, place) for place in range(3) for name in ("cut", "other")]
    assert cut.last.tokens == whole.last.tokens and cut.last.stats == whole.last.stats and len(other.last.tokens) == 3
    assert cut.seconds[0] > 0.06 and set(cut.last.split) == set(whole.last.split)


def test_each_contender_gets_its_faster_number_of_threads(monkeypatch):
    """By a clock of the test's own: 1 ms or 30 ms for 10 tokens."""
    clock = [0.0]
    monkeypatch.setattr("trainkit.eval.bench.timing.perf_counter", lambda: clock[0])

    def contender(fast):
        def run(prompts, most, first):
            clock[0] += 0.001 if torch.get_num_threads() == fast else 0.03
            return Generated([[1] * most])

        return Contender("x", "trainkit", 0, run)

    single, double = contender(1), contender(2)
    estimate = warm_up([single, double], [[1], [2]], 10, [1, 2])
    assert (single.threads, double.threads) == (1, 2)
    assert estimate == pytest.approx(0.004), "2 methods x 2 prompts at the faster setting"


def test_our_contender_reports_rounds_of_the_whole_batch(seed):
    runner = pair(ends=(), max_batch=4)
    output = ours(runner, "plain", ()).run([[1, 2]] * 4, 9, 0)
    assert output.count == 36 and output.rounds == 8 and output.stats is not None and output.stats.rounds == 32
    assert set(output.split) >= {"prefill", "target", "host"}


def test_round_costs_grow_with_depth_and_leave_the_runner_as_it_was(seed):
    runner = pair(ends=())
    before = [out.tokens for out in runner.generate([[1, 2, 3]], max_new_tokens=10, depth=3)]
    settle(runner)
    costs = round_costs(runner.rounds, [chain(1), chain(6)], length=20, repeats=15)
    assert costs[()].draft < costs[chain(1)].draft < costs[chain(6)].draft
    assert all(cost.verify > 0 for cost in costs.values())
    assert [out.tokens for out in runner.generate([[1, 2, 3]], max_new_tokens=10, depth=3)] == before


def test_warm_up_begins_with_what_needs_most_slots():
    ran = []

    def made(name, depth, paths=()):
        return Contender(name, "trainkit", depth, lambda *_: ran.append(name) or Generated([[1]]), paths)

    bush = tuple((rank,) for rank in range(12))
    chains = tuple((0,) * n for n in range(1, 5))
    warm_up([made("plain", 0), made("bush", 1, bush), made("cost", 10), made("chain", 4, chains)], [[1]], 4, [1])
    assert list(dict.fromkeys(ran)) == ["cost", "bush", "chain", "plain"]
