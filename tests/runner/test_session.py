"""Sessions: whatever comes and goes over the rows, each text is the one that its request alone gets."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import torch
import torch.nn.functional as F

from tests.support.drafters import VARIANTS
from tests.support.equality import assert_few, compare
from tests.support.models import SIBLINGS, pair
from tests.support.pauses import Erratic
from tests.support.replaying import replayed
from tests.support.traffic import check_traffic, copied, draws_of_first_levels, finish, open_session
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.models.load import hf_views, load_decoder
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import DynamicTree, Runner
from trainkit.runner.options import GenerateOptions
from trainkit.runner.policies.chain import PolicyChain
from trainkit.runner.sampling import Mixed, RowSampling, Sampling
from trainkit.runner.session import Load, Row

SHAPES = {"chain": {"depth": 3}, "tree": {"tree": SIBLINGS}, "dynamic": {"tree": DynamicTree(4, 3, 8)}}
RESUMABLE = [kind for kind, (name, _) in VARIANTS.items() if load_kind(name).resumable]


@pytest.fixture(scope="module")
def runners(tiny_target):
    """A runner for each variant of the kinds, with an untrained drafter."""
    made = {}

    def get(variant):
        if variant not in made:
            name, options = VARIANTS[variant]
            drafter = load_kind(name)(target_shape(tiny_target), **options)
            drafter.initialise(FrozenTarget(tiny_target))
            for parameter in drafter.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            made[variant] = Runner(load_decoder(tiny_target), drafter, target_shape(tiny_target), max_len=400)
        return made[variant]

    return get


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lag", "captured"), [(0, False), (1, True), (2, True)])
def test_texts_equal_those_of_requests_alone(shape, lag, captured, seed):
    """With random arrivals, cancellations, lengths, rows, budgets and sampling, each text equals that of its request alone."""
    draw, tokens, ties = random.Random(seed), 0, []
    runner = pair(max_len=260)
    for _ in range(2):
        rows, prefill = draw.randint(1, 4), draw.choice([7, 64, 512, None])
        session = open_session(runner, rows, SHAPES[shape], lag, captured, prefill=prefill, together=draw.choice([1, 4]))
        more, found = check_traffic(runner, session, draw, seed, count=8, longest=25)
        tokens, ties = tokens + more, ties + found
    assert_few(ties, tokens)


def test_texts_under_a_policy_equal_those_alone(seed):
    """The same holds with a policy that pauses, cuts and drops drafts, and with prompts that the drafter reads later."""
    draw, runner = random.Random(seed), pair(max_len=260)
    session = open_session(runner, 3, {"tree": PolicyChain(Erratic(4), runner.device)}, prefill=64)
    tokens, ties = check_traffic(runner, session, draw, seed, count=12, longest=25)
    assert_few(ties, tokens)


@pytest.mark.parametrize(
    "samplings", [[(0.0, 0, 1.0), (0.7, 5, 0.8)], [(1.0, 0, 1.0), (0.5, 0, 0.3), (2.0, 40, 1.0), (0.0, 3, 0.5)]]
)
def test_rows_are_processed_as_each_alone(samplings, seed):
    """Rows with different parameters get, bit for bit, the scores of `Sampling` for each row, equal logits included."""
    alone = [Sampling(*sampling) for sampling in samplings]
    logits_BNV = torch.randn(len(alone), 3, 48).mul(3).round().div(2)  # many are equal
    temperature, top_k, top_p = (torch.tensor(column) for column in zip(*samplings, strict=True))
    rows = RowSampling(Mixed.from_requests(alone), temperature, top_k, top_p)
    together_BNV = rows.process(logits_BNV)
    for row, sampling in enumerate(alone):
        assert torch.equal(together_BNV[row], sampling.process(logits_BNV[row : row + 1])[0])
    assert rows.greedy == all(sampling.greedy for sampling in alone)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_chunks_equal_a_whole_prefill(variant, size, runners, seed):
    """For every chunk size, the target's cache and the first draft equal those of a whole prefill."""
    runner = runners(variant)
    plan = runner._plan(GenerateOptions(depth=2))
    tokens_T, found = torch.randint(0, 300, (100,)), []
    with torch.inference_mode():
        for step in (size, 100):
            state = runner.rounds.new_state(1, 192)
            state.limit_B.fill_(180)
            state.ignore_end_B.fill_(True)
            runner.rounds.target.reserve_positions(192)
            for begin in range(0, 100, step):
                output = runner.rounds.prefill(plan, state, [tokens_T], [begin], [min(begin + step, 100)])
                assert (output is None) == (begin + step < 100) == bool(state.done_B)
            draft = runner.rounds.draft(plan, state, None, 128)
            found.append((output.emitted_BP, draft.tokens_BN, state.cache[..., :100, :]))
    (token, draft, cache), (whole_token, whole_draft, whole_cache) = found
    torch.testing.assert_close(cache, whole_cache, atol=1e-4, rtol=0)
    assert token.tolist() == whole_token.tolist() and draft.tolist() == whole_draft.tolist()


@pytest.mark.parametrize("variant", RESUMABLE)
@pytest.mark.parametrize("prefill", [None, 24])
def test_prompts_read_together_equal_each_alone(variant, prefill, runners, seed, monkeypatch):
    """If one call reads the padded prompts of several rows, texts and draft logits equal those of one call per row."""
    runner, found, calls = runners(variant), [], []
    prompts = [torch.randint(0, 300, (n,)).tolist() for n in (5, 30, 1, 17)]
    options = GenerateOptions(max_new_tokens=12, seed=seed, ignore_end=True, temperature=1.0)
    read = runner.rounds.prefill
    for together in (4, 1):
        logits, rows = {}, []
        runner.observe = lambda trace, into=logits: draws_of_first_levels(trace, into)
        session = open_session(runner, 4, {"depth": 2}, prefill=prefill, together=together)
        runner.observe = None
        monkeypatch.setattr(runner.rounds, "prefill", lambda *args, to=rows: to.append(len(args[2])) or read(*args))
        for index, prompt in enumerate(prompts):
            session.submit(runner.request(prompt, options, index, (index, 0)))
        texts = finish(session)
        found.append((logits, [texts[index] for index in range(4)]))
        calls.append(rows)
    assert max(calls[0]) > 1 and len(calls[0]) < len(calls[1]) and set(calls[1]) == {1}
    (together, ours), (alone, theirs) = found
    assert_few(compare(runner.rounds.target, prompts, ours, theirs, Sampling(1.0), seed), 48)
    both = together.keys() & alone.keys()
    assert len(both) > 12
    for position in both:
        torch.testing.assert_close(together[position], alone[position], atol=1e-3, rtol=0)


@pytest.mark.parametrize("donor", ["live", "filling", "free", "turn"])
@pytest.mark.parametrize("variant", RESUMABLE)
def test_resumed_rows_equal_fresh_ones(variant, donor, runners, seed):
    """A prompt that reuses another row's prefix gets the same text and draft logits as in a new row.

    The other row is decoding, reading its prompt, or free; in `turn` the prompt continues what that row has written.
    """
    runner, logits = runners(variant), [{}, {}]
    shaped = {"tree": SIBLINGS} if runner.drafter.max_width is None or runner.drafter.max_width > 1 else {"depth": 2}
    base = torch.randint(0, 300, (131,)).tolist()
    options = GenerateOptions(max_new_tokens=70, seed=seed, ignore_end=True, temperature=1.0)
    first = runner.request(base, options, 0, (0, 0))
    texts = []
    for sharing in (True, False):
        runner.observe = lambda trace, into=logits[not sharing]: draws_of_first_levels(trace, into)
        session = open_session(runner, 2, shaped, prefill=16 if donor == "filling" else 512, sharing=sharing)
        runner.observe = None
        first.tokens, first.finish = [], ""
        session.submit(first)
        for _ in range(3 if donor == "live" else 1):
            session.step()
        if donor in ("free", "turn"):
            finish(session)
        prompt = (base + first.tokens if donor == "turn" else base[:-1]) + [5, 6]
        second = runner.request(prompt, options, 1, (1, 0))
        session.submit(second)
        finish(session)
        texts.append(second.tokens)
        shared = (192 if donor == "turn" else 128) if sharing else 0
        assert (second.stats.shared, second.stats.prefilled) == (shared, len(prompt) - shared)
    assert_few(compare(runner.rounds.target, [[], prompt], [[], texts[0]], [[], texts[1]], Sampling(1.0), seed), 70)
    both = logits[0].keys() & logits[1].keys()
    assert len(both) > 40 and max(position for *_, position in both) > len(prompt)
    for position in both:
        torch.testing.assert_close(logits[0][position], logits[1][position], atol=1e-3, rtol=0)


def test_kinds_that_cannot_resume_share_nothing(runners):
    """A kind that does not declare itself resumable reads every prompt whole, except where nothing is drafted."""
    runner = runners("twig")
    assert not runner.drafter.resumable
    for depth, shared in ((2, 0), (0, 138)):
        outs = runner.generate([list(range(2, 140))], max_new_tokens=3, n=2, depth=depth)
        assert [out.stats.shared for out in outs] == [0, shared]


@pytest.mark.parametrize(("max_batch", "captured"), [(1, False), (2, True), (8, False)])
@pytest.mark.parametrize("shaped", [{"depth": 0}, {"depth": 3}, {"policy": "ema"}])
def test_samples_of_a_prompt_read_it_once(shaped, max_batch, captured, seed):
    """Whatever its length, each prompt is read once for all its samples, whose texts are those of single requests."""
    runner = pair(max_len=260, max_batch=max_batch)
    if captured:
        replayed(runner, lag=1)
    prompts = [torch.randint(0, 48, (length,)).tolist() for length in (1, 2, 64, 150)]
    options = {"max_new_tokens": 8, "temperature": 1.0, "seed": seed, **shaped}
    outs = runner.generate(prompts, n=3, **options)
    total = sum(map(len, prompts))
    assert (runner.last.prefilled, runner.last.shared) == (total, 2 * total)
    pairs = [(index, sample) for index in range(len(prompts)) for sample in range(3)]
    alone = [next(runner.generate_each([prompts[index]], [(index, n)], **options))[1].tokens for index, n in pairs]
    texts = [out.tokens for out in outs]
    assert_few(compare(runner.rounds.target, prompts, texts, alone, Sampling(1.0), seed, n=3), 96)


@pytest.mark.parametrize("length", [1, 2, 70])
@pytest.mark.parametrize("variant", RESUMABLE)
def test_copied_prompt_equals_a_read_one_bit_by_bit(variant, length, runners, seed):
    """In one row, samples of a prompt that is copied have exactly the log-probabilities of those that read it themselves."""
    runner, found = runners(variant), []
    prompt = torch.randint(0, 300, (length,)).tolist()
    options = GenerateOptions(max_new_tokens=9, seed=seed, temperature=1.0, logprobs=True)
    for sharing in ("prompts", False):
        session = open_session(runner, 1, {"depth": 2}, prefill=None, sharing=sharing)
        requests = [runner.request(prompt, options, 0, (0, sample)) for sample in range(3)]
        for request in requests:
            session.submit(request)
        finish(session)
        assert [request.stats.shared for request in requests] == [0] + [length if sharing else 0] * 2
        found.append([(request.tokens, request.logprobs, request.stats.accepted) for request in requests])
    assert found[0] == found[1]


def test_paused_drafter_reads_a_prompt_that_others_wait_for(seed):
    """Drafting that pauses leaves prompts unread, but not those of which further samples wait: they could not be copied."""
    runner = pair(max_len=260)
    policy = Erratic(4)
    policy.is_paused = lambda rows: True
    session = open_session(runner, 2, {"tree": PolicyChain(policy, runner.device)}, prefill=None)
    prompts, options = [*[[1] * 20] * 3, *[[2] * 30] * 2, [3] * 10], {"max_new_tokens": 12, "seed": seed, "temperature": 1.0}
    requests = [runner.request(prompt, GenerateOptions(**options), i, (i, 0)) for i, prompt in enumerate(prompts)]
    for request in requests:
        session.submit(request)
    texts = finish(session)
    assert [request.stats.shared for request in requests] == [0, 20, 20, 0, 30, 0]
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    assert_few(compare(runner.rounds.target, prompts, [texts[i] for i in range(6)], plain, Sampling(1.0), seed), 72)


@pytest.mark.parametrize("depth", [0, 2])
def test_new_weights_share_no_prefix_of_old_ones(depth, seed):
    """After an update an open session reads again what the old weights have read, whole prompts and prefixes."""
    runner, other = pair(max_len=260), pair(max_len=260)
    prompt, options = torch.randint(0, 48, (150,)).tolist(), GenerateOptions(max_new_tokens=20, seed=seed, logprobs=True)
    session = open_session(runner, 2, {"depth": depth})
    old, again, longer = (runner.request(tokens, options) for tokens in (prompt, prompt, prompt + [5]))
    session.submit(old)
    finish(session)
    runner.update(hf_views(other.rounds.target).items())
    for request in (again, longer):
        session.submit(request)
        finish(session)
    assert (again.stats.shared, longer.stats.shared) == (0, 128)
    for request in (again, longer):
        (fresh,) = other.generate([request.prompt], max_new_tokens=20, seed=seed, depth=0, logprobs=True)
        assert request.logprobs[:1] == pytest.approx((fresh.logprobs or [])[:1], abs=1e-4)


def test_cancelled_row_is_free_in_the_next_step(seed):
    """A cancelled text leaves its row to the next one in the next step; one that waits is never admitted."""
    runner = pair(ends=())
    session = open_session(runner, 1, {"depth": 2})
    options = GenerateOptions(max_new_tokens=30, seed=seed)
    first, second, third = (runner.request([1 + index, 2], options, index) for index in range(3))
    for request in (first, second, third):
        session.submit(request)
    session.step()
    assert session.load == Load(live=1, filling=0, waiting=2, prefill_tokens=0, cached_tokens=2 + len(first.tokens))
    session.cancel(first)
    session.cancel(second)
    assert (session.load.live, session.load.waiting) == (0, 1)
    known = list(first.tokens)
    assert {event.request.index for event in session.step()} == {2}
    finish(session)
    assert (first.finish, second.finish, third.finish) == ("cancelled", "cancelled", "length")
    assert first.tokens == known and not second.tokens and len(third.tokens) == 30
    session.cancel(third)
    assert third.finish == "length" and session.idle and session.step() == []


def test_requests_are_admitted_in_order(seed):
    """Requests get rows in the order of arrival, whatever their lengths; each step reads a bounded number of tokens."""
    runner, draw = pair(ends=(), max_len=300), random.Random(seed)
    session, order = open_session(runner, 2, {"depth": 2}, prefill=32, sharing=False), []
    start = session._start
    session._start = lambda request, *rest: order.append(request.index) or start(request, *rest)
    requests = []
    for index in range(8):
        options = GenerateOptions(max_new_tokens=draw.randint(1, 20))
        requests.append(runner.request([index + 1] * draw.randint(1, 200), options, index))
        session.submit(requests[-1])
    while not session.idle:
        before, live = sum(request.stats.prefilled for request in requests), session.load.live
        session.step()
        assert sum(request.stats.prefilled for request in requests) - before <= (32 if live else 128)
    assert order == list(range(8)) and all(request.finish == "length" for request in requests)


def test_long_prompts_do_not_stop_others(seed):
    """While a long prompt is read in chunks, the other text continues in every step."""
    runner = pair(ends=(), max_len=600)
    session = open_session(runner, 2, {"depth": 0}, prefill=16)
    short, long = runner.request([1, 2], GenerateOptions(max_new_tokens=60)), runner.request([3] * 400, GenerateOptions(), 1)
    session.submit(short)
    session.step()
    session.submit(long)
    for step in range(20):
        assert [event.request.index for event in session.step()] == [0]
        assert session.load.filling == 1 and session.load.prefill_tokens == 400 - 16 * (step + 1)


def test_requests_that_cannot_fit_are_refused_at_once(seed):
    """A request longer than a row, or of another temperature where verification does not allow it, is refused by submit."""
    runner = pair(max_len=96)
    session = open_session(runner, 1, {"depth": 2, "temperature": 1.0, "verify": "residual"})
    warm = GenerateOptions(max_new_tokens=10, temperature=0.5)
    fits = runner.request([1] * 86, warm)
    session.submit(fits)
    session.max_len = 95
    with pytest.raises(UserError, match="together more than max_len 95; shorten the prompt"):
        session.submit(runner.request([1] * 86, warm))
    with pytest.raises(UserError, match="prompt 3: temperature 0 and others cannot be mixed under Residual"):
        session.submit(runner.request([1], GenerateOptions(max_new_tokens=4), 3))
    assert session.load.waiting == 1


@pytest.mark.parametrize(("lag", "captured"), [(0, False), (1, True)])
def test_overflow_ends_only_its_own_request(lag, captured, seed):
    """If the target's logits are NaN the request ends with an error; others, also later ones in the same row, are unchanged."""
    runner = pair(max_len=96, ends=())
    options = GenerateOptions(max_new_tokens=8, seed=seed)
    good = [torch.randint(10, 40, (n,)).tolist() for n in (5, 9, 3, 7)]
    head = runner.rounds.target.head  # never chooses the token whose embedding is NaN
    runner.rounds.target.head = lambda hidden: F.pad(head(hidden)[..., :47], (0, 1), value=-99.0)
    alone = [out.tokens for out in runner.generate(good, max_new_tokens=8, depth=0)]
    runner.rounds.target.embed.weight.data[47] = float("nan")
    session = open_session(runner, 2, {"depth": 0}, lag, captured)
    prompts = [good[0], [3] * 20 + [47], *good[1:]]
    requests = [runner.request(prompt, options, index) for index, prompt in enumerate(prompts)]
    for request in requests:
        session.submit(request)
    finish(session)
    assert requests[1].finish == "error" and "prompt 1: the target's logits are NaN or infinite" in requests[1].error
    rest = [requests[0], *requests[2:]]
    ours = [request.tokens for request in rest]
    assert all(request.finish == "length" for request in rest)
    assert sum(one != other for one, other in zip(ours, alone, strict=True)) <= 1  # a tie


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lag", "captured"), [(0, False), (1, True)])
def test_overflow_while_decoding_is_an_error(shape, lag, captured, seed):
    """A text whose logits become NaN ends with an error, not with arbitrary tokens; the next text in its row is untouched."""
    runner = pair(max_len=96, ends=())
    runner.rounds.target.embed.weight.data = runner.rounds.target.embed.weight.clone()
    options = GenerateOptions(max_new_tokens=12, seed=seed)
    bad, good = (runner.request(torch.randint(10, 40, (n,)).tolist(), options, n) for n in (20, 3))
    head, draft_head = runner.rounds.target.head, runner.drafter.decoder.head
    runner.rounds.target.head = lambda hidden: F.pad(head(hidden)[..., :47], (0, 1), value=chance)
    runner.drafter.decoder.head = lambda hidden: F.pad(draft_head(hidden)[..., :47], (0, 1), value=-99.0)
    chance = -99.0
    alone = runner.generate([good.prompt], max_new_tokens=12, depth=0)[0].tokens
    runner.rounds.target.embed.weight.data[47] = float("nan")
    session = open_session(runner, 1, SHAPES[shape], lag, captured)
    session.submit(bad)
    session.step()
    chance = 99.0  # the token whose embedding is NaN is chosen now
    while not bad.finish:
        session.step()
    chance = -99.0
    assert bad.finish == "error" and "logits are NaN or infinite" in bad.error and set(bad.tokens[-2:]) != {0}
    assert not session._state.cache.isnan().any()
    session.submit(good)
    finish(session)
    ties = compare(runner.rounds.target, [good.prompt], [good.tokens], [alone], Sampling(), seed)
    assert good.finish == "length"
    assert_few(ties, 12)


@pytest.mark.parametrize("lag", [0, 1])
def test_failed_call_leaves_no_nan_to_the_next(lag, seed):
    """Rows are kept from call to call: the NaN of a text that ended a call with an error is gone when the next one begins."""
    runner = pair(noise=None)
    runner.scheduler.lag, runner.scheduler.fetch = lag, copied
    runner.rounds.target.embed.weight.data[47] = float("nan")
    with pytest.raises(UserError, match="the target's logits are NaN or infinite in float32"):
        runner.generate([[3, 47, 5]], max_new_tokens=8)
    assert runner.scheduler._state.cache.isfinite().all()


def test_load_may_be_read_during_a_step(seed):
    """The server reads the load while its engine thread steps: also where a text leaves its row between two reads."""

    class Leaving(Row):
        reads, moment = 0, 0

        def __getattribute__(self, name):
            if name in ("request", "prompt_T"):
                Leaving.reads += 1
                if Leaving.reads == Leaving.moment:
                    self.request = self.prompt_T = None
            return super().__getattribute__(name)

    runner = pair(noise=None, ends=())
    for Leaving.moment in range(1, 8):
        session = open_session(runner, 1, {"depth": 0}, prefill=1)
        session.submit(runner.request([1] * 9, GenerateOptions(max_new_tokens=1)))
        session.step()
        Leaving.reads, session._rows[0] = 0, Leaving(**vars(session._rows[0]))
        assert session.load.filling <= 1


def test_nothing_is_allocated_per_step(seed):
    """Memory does not grow: after many steps it is the same as after a few, except for the tokens."""
    runner = pair(ends=(), max_len=500)
    session = open_session(runner, 2, {"depth": 2})
    for index in range(2):
        session.submit(runner.request([1, 2, index], GenerateOptions(max_new_tokens=450), index))
    sizes = []
    tracemalloc.start()
    for step in range(120):
        session.step()
        if step in (40, 119):
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert not session.idle and sizes[1] - sizes[0] < 40_000


def test_rows_move_down_only_when_nobody_waits(seed):
    """When texts leave, the last row moves into the gap so that rounds compute fewer rows; texts do not change."""
    runner = pair(ends=(), max_len=200)
    session, batches = open_session(runner, 4, {"depth": 2}), []
    round_ = session._run
    session._run = lambda plan, batch, *rest: batches.append(batch) or round_(plan, batch, *rest)
    lengths = [6, 60, 8, 60, 60]
    for index, length in enumerate(lengths):
        session.submit(runner.request([index + 1] * 5, GenerateOptions(max_new_tokens=length, seed=seed), index, (index, 0)))
    texts = finish(session)
    assert [len(texts[index]) for index in range(5)] == lengths
    assert batches[0] == 4 and batches[-1] < 4 and batches == sorted(batches, reverse=True)
    outs = runner.generate([[index + 1] * 5 for index in range(5)], max_new_tokens=60, seed=seed, depth=0)
    for index, length in enumerate(lengths):
        assert outs[index].tokens[:length] == texts[index]


def test_row_that_was_moved_away_is_no_donor(seed):
    """After a text moves to a lower row, its old row's cache lacks the later tokens, so no prompt may reuse it."""
    runner = pair(ends=(), max_len=300)
    session = open_session(runner, 2, {"depth": 2})
    options = GenerateOptions(max_new_tokens=100, seed=seed)
    short = runner.request([1] * 5, GenerateOptions(max_new_tokens=2), 0)
    moved = runner.request(torch.randint(0, 48, (40,)).tolist(), options, 1, (1, 0))
    for request in (short, moved):
        session.submit(request)
    finish(session)
    other = runner.request([2] * 5, options, 2, (2, 0))  # takes the row where the moved text ended
    again = runner.request(moved.prompt + moved.tokens + [3], options, 3, (3, 0))
    for request in (other, again):
        session.submit(request)
    finish(session)
    fresh = open_session(runner, 1, {"depth": 2})
    alone = runner.request(again.prompt, options, 3, (3, 0))
    fresh.submit(alone)
    finish(fresh)
    empty = [[]] * 3
    prompts = [*empty, again.prompt]
    assert_few(compare(runner.rounds.target, prompts, [*empty, again.tokens], [*empty, alone.tokens], Sampling(), seed), 100)
