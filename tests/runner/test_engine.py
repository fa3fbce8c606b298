"""The runner as scripts use it: text, stop strings, streams, scores, new weights, counts, and mistakes named in one line."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.equality import assert_few, compare, exact_logits
from tests.support.models import pair, ragged_prompts, random_decoder
from tests.support.replaying import replayed
from tests.support.targets import make_target
from trainkit.errors import UserError
from trainkit.models.load import hf_views, load_decoder, save_decoder
from trainkit.runner import DynamicTree, Runner, Stats
from trainkit.runner.request import Request
from trainkit.runner.sampling import Sampling


@pytest.fixture(scope="module")
def runner(tiny_target):
    """A target that drafts for itself: every round is long, so stops fall inside blocks."""
    return Runner.load(tiny_target, tiny_target, max_len=128)


PROMPTS = ["Natalia sold", "How many clips", "In May she", "x"]


def test_output_has_decoded_text_and_new_tokens_only(runner):
    """The output's tokens are the new ones only, and its text is what the tokenizer decodes."""
    for prompt, out in zip(PROMPTS, runner.generate(PROMPTS, max_new_tokens=12, ignore_end=True), strict=True):
        ids = runner.tokenizer.encode(prompt, add_special_tokens=False)
        assert len(out.tokens) == 12 and out.finish == "length"
        assert out.text == runner.tokenizer.decode(out.tokens, skip_special_tokens=True)
        assert out.tokens == runner.generate([ids], max_new_tokens=12, ignore_end=True)[0].tokens


@pytest.mark.parametrize("depth", [0, 4])
def test_end_token_ends_inside_a_block_and_is_included(depth, seed):
    """The end id is whatever comes at each place of the text in turn, so it falls at every place of a block."""
    runner = pair(noise=0.0, ends=())
    prompt = [1, 2, 3]
    whole = runner.generate([prompt], max_new_tokens=14, depth=0, temperature=1.0, seed=seed)[0].tokens
    for end in set(whole):
        first = whole.index(end)
        again = type(runner.shape)(runner.shape.decoder, (end,))
        runner.shape = again
        out = runner.generate([prompt, [5], prompt], max_new_tokens=14, depth=depth, temperature=1.0, seed=seed)[0]
        assert out.tokens == whole[: first + 1]
        assert out.finish == "end"
        ignored = runner.generate([prompt], max_new_tokens=14, depth=depth, temperature=1.0, seed=seed, ignore_end=True)[0]
        assert ignored.tokens == whole and ignored.finish == "length"


@pytest.mark.parametrize("depth", [0, 3])
def test_stop_string_cuts_the_text_before_it(runner, depth):
    """A stop string cuts the text before it, also where it spans tokens."""
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "ignore_end": True}
    whole = runner.generate(["Natalia"], depth=0, **settings)[0]
    for start in range(0, len(whole.text) - 3, 3):
        for length in (1, 2, 5):  # longer ones span tokens
            stop = whole.text[start : start + length]
            if "\ufffd" in stop:
                continue
            out = runner.generate(["Natalia"], depth=depth, stop=(stop, "never seen"), **settings)[0]
            assert out.finish == "stop"
            assert out.text == whole.text[: whole.text.find(stop)]
            assert out.tokens == whole.tokens[: len(out.tokens)]
            assert stop in runner.tokenizer.decode(out.tokens, skip_special_tokens=True)
            assert stop not in runner.tokenizer.decode(out.tokens[:-1], skip_special_tokens=True)
    assert runner.generate(["Natalia"], depth=depth, stop=whole.text[:2], **settings)[0].text == ""  # a bare string is one stop


@pytest.mark.parametrize("depth", [0, 3])
def test_streamed_pieces_join_to_the_text(runner, depth):
    """Random byte-level text is full of broken and whole multi-byte characters; stop strings hold text back until sure."""
    for s in range(12):
        settings = {"max_new_tokens": 30, "temperature": 1.0, "seed": s, "depth": depth}
        whole = runner.generate(["é ü"], **settings)[0].text
        pieces = list(runner.stream("é ü", **settings))
        assert "".join(pieces) == whole
        assert len(pieces) > 2 or depth or len(whole) < 3
        stop = whole[len(whole) // 2 :][:3]
        if stop and "\ufffd" not in stop:
            cut = runner.generate(["é ü"], stop=(stop,), **settings)[0]
            assert "".join(runner.stream("é ü", stop=(stop,), **settings)) == cut.text == whole[: whole.find(stop)]


def test_multi_byte_character_is_streamed_whole(runner, monkeypatch):
    """A round that ends within a character shows nothing of it: no replacement character that later changes."""
    tokens = runner.tokenizer.encode("aé漢🙂b", add_special_tokens=False)
    assert len(tokens) > 6
    scripted = pair(runner.shape.decoder, noise=None, ends=(), max_len=64)
    scripted.folder = runner.folder
    emitted = iter(tokens)
    take = Request.take

    def forced(self, output, slot, end_ids, prefill=False):
        output.emitted_BP[slot, 0] = next(emitted)
        take(self, output, slot, end_ids, prefill)

    monkeypatch.setattr(Request, "take", forced)
    pieces = list(scripted.stream([1], max_new_tokens=len(tokens)))
    assert "".join(pieces) == "aé漢🙂b" and "\ufffd" not in "".join(pieces)
    assert [p for p in pieces if p] == ["a", "é", "漢", "🙂", "b"]


def test_stream_is_invalid_after_another_call(runner):
    """Two calls share the rows: going on would silently read the other's cache."""
    for other in (lambda: runner.generate(["x"]), lambda: runner.score(["x"], ["y"]), lambda: next(runner.stream("x"))):
        open_stream = runner.stream("Natalia", depth=0, ignore_end=True)
        next(open_stream)
        other()
        with pytest.raises(UserError, match="stream"):
            list(open_stream)
    assert runner.generate(["Natalia"], max_new_tokens=3, ignore_end=True)[0].tokens


def test_score_equals_transformers(runner, tiny_target, seed):
    """Scores equal transformers' log-softmax."""
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()
    prompts = ragged_prompts(6, 320)
    continuations = ragged_prompts(6, 320)
    for chunk in (256, 7, 1):
        for head, tail, ours in zip(prompts, continuations, runner.score(prompts, continuations, chunk=chunk), strict=True):
            with torch.no_grad():
                log_p = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            theirs = log_p[len(head) - 1 : -1].gather(1, torch.tensor(tail)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(ours), theirs, atol=1e-4)


def test_batched_scores_equal_single_ones(tiny_target, seed):
    """Texts of other lengths in the batch, and their order, change no score; the last token needs no position."""
    load = lambda rows: Runner.load(tiny_target, max_len=128, max_batch=rows, dtype="float64")  # rounding decides no token
    many, single = load(8), load(1)
    prompts, continuations = ragged_prompts(11, 320), ragged_prompts(11, 320)
    continuations[:5] = [out.tokens for out in many.generate(prompts[:5], max_new_tokens=6, ignore_end=True)]
    prompts.append([7] * 100)
    continuations.append([9] * 29)  # 129 tokens for a max_len of 128
    for chunk in (256, 16):
        together, alone = (dict(runner.score_each(prompts, continuations, chunk)) for runner in (many, single))
        assert together.keys() == alone.keys() == set(range(12))
        for index, continuation in enumerate(continuations):
            assert len(together[index].logprobs) == len(continuation)
            assert together[index].logprobs == pytest.approx(alone[index].logprobs, abs=1e-5)  # log-softmax is float32
            assert together[index].greedy == alone[index].greedy
        assert all(together[index].greedy for index in range(5)) and not together[11].greedy


@pytest.mark.parametrize("verify", ["coupled", "residual"])
def test_logprobs_equal_scores_at_temperature_1(runner, verify, seed):
    """The log-probabilities of an output are those of `score`, at temperature 1."""

    from tests.support.models import SIBLINGS

    prompts = ragged_prompts(5, 320)
    for shaped in ({"depth": 0}, {"depth": 3}, {"tree": SIBLINGS}):
        outs = runner.generate(prompts, max_new_tokens=11, temperature=0.8, seed=seed, verify=verify, logprobs=True, **shaped)
        for prompt, out, scored in zip(prompts, outs, runner.score(prompts, [out.tokens for out in outs]), strict=True):
            assert out.logprobs == pytest.approx(scored, abs=1e-4)
            assert len(out.logprobs) == len(out.tokens), prompt
    assert outs[0].logprobs is not None and runner.generate(prompts[:1], max_new_tokens=1)[0].logprobs is None


@pytest.mark.parametrize("captured", [False, True])
def test_processed_logprobs_are_those_of_the_draw(captured, seed):
    """On request they are under the distribution that tokens are drawn from, also where a graph without them was captured."""
    runner, prompts = pair(ends=()), ragged_prompts(4)
    if captured:
        replayed(runner, lag=1)
    for sampling in ({"temperature": 0.7}, {"temperature": 1.4, "top_k": 5, "top_p": 0.9}, {"temperature": 0.0}):
        options = {"max_new_tokens": 9, "seed": seed, "depth": 2, "logprobs": True, **sampling}
        plain = runner.generate(prompts, **options)
        for prompt, before, out in zip(
            prompts, plain, runner.generate(prompts, processed_logprobs=True, **options), strict=True
        ):
            assert out.tokens == before.tokens
            logits = exact_logits(runner.rounds.target, prompt + out.tokens[:-1])[len(prompt) - 1 :].float()
            for values, given in ((before.logprobs, logits), (out.logprobs, Sampling(**sampling).process(logits))):
                log_p = given.log_softmax(-1).gather(1, torch.tensor(out.tokens)[:, None])[:, 0]
                assert values == pytest.approx(log_p.tolist(), abs=1e-4)


def test_updated_weights_equal_a_fresh_load(tiny_target, tmp_path):
    """After an update the runner decodes as one that was loaded with the new weights."""
    other = make_target(tmp_path / "other", seed=5)
    ours = Runner.load(tiny_target, max_len=64)
    before = ours.generate(PROMPTS, max_new_tokens=10)
    address = ours.rounds.target.layers[0].attention.qkv.weight.data_ptr()
    ours.update(hf_views(load_decoder(other)).items())
    fresh = Runner.load(other, max_len=64).generate(PROMPTS, max_new_tokens=10)
    after = ours.generate(PROMPTS, max_new_tokens=10)
    assert [out.tokens for out in after] == [out.tokens for out in fresh] != [out.tokens for out in before]
    assert ours.rounds.target.layers[0].attention.qkv.weight.data_ptr() == address
    with pytest.raises(UserError, match="bogus"):
        ours.update([("bogus", torch.zeros(1))])
    with pytest.raises(UserError, match="model.norm.weight"):
        ours.update([("model.norm.weight", torch.zeros(1))])


def test_stats_by_hand():
    """A full block of 5, a block that ends in its middle, and the prefill's token, which belongs to no round."""
    stats = Stats()
    for accepted in (2, 0, 4, 2):
        stats.add_round(accepted, 4)
    stats.cut_rounds, stats.tokens = 1, 15
    assert stats.accepted == [1, 0, 2, 0, 1]
    assert stats.rounds == 4
    assert stats.tau == (3 + 1 + 5 + 3) / 4
    assert stats.alpha_k == [3 / 4, 3 / 3, 1 / 3, 1 / 1]
    total = Stats.merge([stats, Stats([0, 3], 2, 8)])
    assert total == Stats([1, 3, 2, 0, 1], 3, 23, offered=[0, 4, 3, 3, 1], drafted=16) and total.rounds == 7
    assert math.isnan(Stats().tau) and Stats().alpha_k == []
    assert Stats([5]).tau == 1 and Stats([5]).alpha_k == []


def test_stats_of_a_decoding_add_up(seed):
    """Tokens = 1 of the prefill + those of full rounds + what was kept of a cut one; all-accepting rounds make it exact."""
    runner = pair(noise=0.0, ends=())
    for limit, rounds, cut in ((1, 0, 0), (2, 0, 1), (5, 0, 1), (6, 1, 0), (7, 1, 1), (21, 4, 0)):
        stats = runner.generate([[1, 2, 3]], max_new_tokens=limit, depth=4)[0].stats
        assert (stats.tokens, stats.rounds, stats.cut_rounds) == (limit, rounds, cut)
    plain = runner.generate([[1, 2, 3]], max_new_tokens=9, depth=0)[0].stats
    assert (plain.tokens, plain.rounds, plain.tau, plain.cut_rounds) == (9, 8, 1.0, 0)


def test_cache_can_be_filled_completely(seed):
    """The cache can be filled to its last token; a longer prompt is refused."""
    runner = pair(max_len=64, ends=())
    for length in (1, 32, 62, 63):
        for depth in (0, 1, 8):
            out = runner.generate([[3] * length, [4] * 63], max_new_tokens=1000, depth=depth, temperature=1.0, seed=seed)[0]
            assert len(out.tokens) == 64 - length and out.finish == "max_len"
    with pytest.raises(UserError, match=r"prompt 1 has 64 tokens.*max_len 64"):
        runner.generate([[1], [3] * 64])


def test_no_prompts_give_no_outputs(runner):
    """An empty list of prompts gives no outputs."""
    assert runner.generate([]) == [] and runner.score([], []) == []
    assert len(runner.generate(["x"], max_new_tokens=1)) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"verify": "hopeful"}, "hopeful"),
        ({"depth": -1}, "depth -1"),
        ({"depth": 2, "tree": [(0,)]}, "depth or tree"),
        ({"tree": [(1,)]}, "tree"),
        ({"n": 0}, "n 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"stop": ["a", ""]}, "stop"),
        ({"plain": True, "verify": "residual"}, "plain"),
    ],
)
def test_options_out_of_range_are_named(runner, options, named):
    """An option out of range is named in a one-line error."""
    with pytest.raises(UserError, match=named) as caught:
        runner.generate(["x"], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompts", "named"),
    [([""], "prompt 0 is empty"), (["x", []], "prompt 1 is empty"), ([[320]], "token id 320"), ([[5, -1]], "token id -1")],
)
def test_invalid_prompts_are_named(runner, prompts, named):
    """An empty prompt or an unknown token id is named in the error."""
    with pytest.raises(UserError, match=named):
        runner.generate(prompts)


def test_invalid_calls_and_folders_are_named(runner, tiny_target, tmp_path):
    """Invalid calls and folders give a one-line error that names the cause."""
    with pytest.raises(UserError, match="2 prompts but 1"):
        runner.score(["a", "b"], ["c"])
    with pytest.raises(UserError, match="max_len is 128"):
        runner.score([[1] * 100], [[1] * 30])
    with pytest.raises(UserError, match="'n'"):
        list(runner.stream("x", n=2))
    plain = Runner.load(tiny_target, max_len=64)
    for options in ({"depth": 1}, {"tree": [(0,)]}):
        with pytest.raises(UserError, match="without a drafter"):
            plain.generate(["x"], **options)
    assert plain.generate(["x"], depth=0, max_new_tokens=1)
    with pytest.raises(UserError, match="without a folder"):
        pair().generate(["x"])
    for options, named in (
        ({"dtype": "int8"}, "int8"),
        ({"max_batch": 0}, "max_batch 0"),
        ({"max_len": 513}, "max_position_embeddings 512"),
        ({"drafter": tmp_path / "none"}, "no such folder"),
        ({"drafter": tmp_path}, "neither a trainkit bundle"),
    ):
        with pytest.raises(UserError, match=named) as caught:
            Runner.load(tiny_target, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no config.json"):
        Runner.load(tmp_path)
    with pytest.raises(UserError, match=r"vocabulary of 300 ids.*320"):
        Runner.load(tiny_target, make_target(tmp_path / "small", vocab_size=300))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA"):
            Runner.load(tiny_target, device="cuda")


def test_logits_that_are_not_finite_are_refused(tmp_path):
    """A target that overflows float16 is refused with the remedy; it would otherwise write token 0 for ever."""
    folder = make_target(tmp_path / "loud", std=6.0)
    prompts = [[5], [6, 7, 8]]
    with pytest.raises(UserError, match="prompt 0: the target's logits are NaN or infinite in float16; .*bfloat16"):
        Runner.load(folder, dtype="float16").generate(prompts, max_new_tokens=4)
    assert all(len(out.tokens) for out in Runner.load(folder, dtype="bfloat16").generate(prompts, max_new_tokens=4))


def test_float64_weights_decode_the_exact_argmax(seed, tmp_path):
    """In float64 the decoder's rounding is far below any gap, so each token is the argmax of an uncached forward."""
    decoder = random_decoder()
    save_decoder(decoder, tmp_path, torch.float32, (7,))
    runner = Runner.load(tmp_path, tmp_path, dtype="float64", max_len=64)
    prompts = ragged_prompts(4)
    for prompt, out in zip(prompts, runner.generate(prompts, max_new_tokens=12, depth=2), strict=True):
        logits = exact_logits(decoder, prompt + out.tokens[:-1])[len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == out.tokens


def test_by_default_a_text_may_fill_all_positions(tiny_target, tmp_path):
    """Without `max_len` a text ends at `max_new_tokens`, or where the target's positions end, and its finish says which."""
    default = Runner.load(tiny_target)
    assert default.max_len == 512
    (long,) = default.generate([[5] * 500], max_new_tokens=40, ignore_end=True)
    assert (len(long.tokens), long.finish, long.stats.cut_texts) == (12, "max_len", 1)
    (short,) = default.generate([[5]], max_new_tokens=40, ignore_end=True)
    assert (len(short.tokens), short.finish, default.last.cut_texts) == (40, "length", 0)
    capped = Runner.load(tiny_target, max_len=30).generate([[5]], max_new_tokens=40, ignore_end=True)[0]
    assert (capped.tokens, capped.finish) == (short.tokens[:29], "max_len")
    with pytest.raises(UserError, match="covers; shorten it"):
        default.generate([[5] * 512])
    with pytest.raises(UserError, match="max_len 1"):
        Runner.load(tiny_target, max_len=1)
    window = make_target(tmp_path / "window", "mistral", sliding_window=64)
    assert Runner.load(window).max_len == 64


def test_rows_grow_with_the_texts_of_a_call(tiny_target):
    """A cache row is as long as the longest text so far; scores and texts are those of a row of full length."""
    grown, full = Runner.load(tiny_target, tiny_target), Runner.load(tiny_target, tiny_target, max_len=512)
    for length, new in ((3, 10), (200, 20), (5, 300), (4, 4)):
        for options in ({"depth": 0}, {"depth": 3}):
            ours, theirs = (r.generate([[7] * length] * 2, new, ignore_end=True, **options)[1] for r in (grown, full))
            assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)
        assert grown.score([[7] * length], [[9]]) == full.score([[7] * length], [[9]])
    assert grown.scheduler.state(1, 1).cache.shape[3] < 400 < full.scheduler.state(1, 1).cache.shape[3]


@pytest.mark.parametrize("shaped", [{"depth": 3}, {"tree": ((0,), (1,), (0, 0))}, {"tree": DynamicTree(2, 2, 4)}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_plain_computes_as_many_rows_as_verifying(shaped, temperature, seed):
    """`plain` gives the text of plain decoding, one token a round, over the rows that the draft would take."""
    runner, rows = pair(noise=0.02, ends=(), max_batch=1), set()
    prompts, options = ragged_prompts(3), {"max_new_tokens": 20, "temperature": temperature, "seed": seed}
    runner.rounds.target.layers[0].register_forward_pre_hook(lambda _, given: rows.add(given[0].shape[1]))
    padded = runner.generate(prompts, plain=True, **shaped, **options)
    assert 4 in rows <= {4, *map(len, prompts)}
    assert runner.last.tau == 1.0 and runner.last.drafted == 0 and runner.last.alpha_k == []
    texts = [[out.tokens for out in outs] for outs in (padded, runner.generate(prompts, depth=0, **options))]
    assert_few(compare(runner.rounds.target, prompts, *texts, Sampling(temperature), seed), 60)
    alone = Runner(runner.rounds.target, None, runner.shape, max_batch=1, max_len=96)
    assert [out.tokens for out in alone.generate(prompts, plain=True, **shaped, **options)] == texts[0]
    assert replayed(runner, 1).generate(prompts, plain=True, **shaped, **options)[0].tokens == texts[0][0]
