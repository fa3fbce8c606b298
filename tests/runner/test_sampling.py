"""Noise is a documented pure function with the right law and no visible dependence; processing is what its definition says."""

# B rows  R positions  V vocabulary

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.laws import processed
from tests.support.models import pair
from trainkit.errors import UserError
from trainkit.runner import sampling
from trainkit.runner.options import GenerateOptions
from trainkit.runner.sampling import ACCEPT, CHOICE, PROPOSAL, RESIDUAL, Noise, Sampling, gumbel, mix, request_keys, uniform

STREAMS = (CHOICE, PROPOSAL, ACCEPT, RESIDUAL)
WORD = 0xFFFFFFFF


def mix_in_python(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def uniform_in_python(keys: tuple[int, int], position: int, token: int, stream: int) -> float:
    first, second = keys[0] & WORD, keys[1] & WORD
    row = mix_in_python(mix_in_python(position ^ first) ^ ((stream * 0x9E3779B1 + 0x7F4A7C15) & 0x7FFFFFFF))
    h = mix_in_python(((mix_in_python(token ^ row) + second) & WORD) ^ (row * 0x27D4EB2F & WORD))
    return min((h + 0.5) / 2**32, 1 - 2.0**-24)


words = st.integers(-(2**31), 2**31 - 1)


@given(words, words, st.integers(0, 2**20), st.integers(0, 2**18), st.sampled_from(STREAMS))
def test_uniform_equals_its_definition_in_integers(first, second, position, token, stream):
    """The uniform noise equals its definition computed in Python integers."""
    keys = torch.tensor([[first, second]], dtype=torch.int32)
    ours = uniform(keys, torch.tensor([[position]]), torch.tensor([token]), stream).item()
    assert ours == pytest.approx(uniform_in_python((first, second), position, token, stream), rel=1e-6)


@given(words, words)
def test_mixer_is_a_bijection(one, other):
    """The mixing function maps different words to different words."""
    a, b = mix(torch.tensor([one, other], dtype=torch.int32)).tolist()
    assert (a == b) == (one == other)


def test_noise_is_finite_and_precise_at_its_extremes():
    """At the ends of the hash's range; -log(-log(u)) in float32 would give inf for the largest u."""
    for v in (2.0**-33, 2.0**-24, 0.5, 1 - 2.0**-24):
        noise = float(-(-torch.log1p(-torch.tensor(v))).log())
        assert math.isfinite(noise)
        assert noise == pytest.approx(-math.log(-math.log1p(-v)), rel=1e-6)


def drawn(seed: int, stream: int = CHOICE, rows: int = 8, positions: int = 64, vocabulary: int = 512) -> torch.Tensor:
    keys = torch.tensor([request_keys(seed, i) for i in range(rows)], dtype=torch.int32)
    return gumbel(keys, torch.arange(positions).expand(rows, -1), torch.arange(vocabulary), stream)


@pytest.mark.parametrize("stream", STREAMS)
def test_gumbel_noise_has_its_distribution(stream, seed):
    """Gumbel noise has the right mean, variance and quantiles."""

    from scipy import stats

    noise = drawn(seed, stream).double().flatten()
    n = noise.numel()
    assert noise.isfinite().all()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(noise.var() - math.pi**2 / 6) < 5 * math.sqrt((math.pi**4 * 3 / 20 + math.pi**4 / 36 * 2) / n)
    counts = torch.histc((-(-noise).exp()).exp(), 64, 0, 1)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-5


@pytest.mark.parametrize("axis", ["key", "position", "token", "stream", "seed"])
def test_noise_is_independent_along_each_axis(axis, seed):
    """Neighbours along an axis: no correlation, and a uniform joint law on a 16 x 16 grid."""
    from scipy import stats

    one = drawn(seed)
    other = {
        "key": lambda: one.roll(1, 0),
        "position": lambda: one.roll(1, 1),
        "token": lambda: one.roll(1, 2),
        "stream": lambda: drawn(seed, PROPOSAL),
        "seed": lambda: drawn(seed + 1),
    }[axis]()
    a, b = (-(-one.double()).exp()).exp().flatten(), (-(-other.double()).exp()).exp().flatten()
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / math.sqrt(len(a))
    cells = (a * 16).long().clamp(max=15) * 16 + (b * 16).long().clamp(max=15)
    assert stats.chisquare(torch.bincount(cells, minlength=256).numpy()).pvalue > 1e-5


def test_choice_follows_the_softmax(seed):
    """argmax(log p + G) has law p, over positions and over requests."""
    from scipy import stats

    logits = torch.randn(12)
    choices = (logits + drawn(seed, rows=256, positions=256, vocabulary=12)).argmax(-1)
    expected = logits.double().softmax(-1)
    for counts in (choices.flatten(), choices[:, 0].repeat(1), choices[0]):
        observed = torch.bincount(counts, minlength=12)
        assert stats.chisquare(observed.numpy(), (expected * len(counts)).numpy()).pvalue > 1e-5


def test_request_keys_are_all_distinct():
    """The keys of seeds, prompts and samples are all distinct."""
    keys = {request_keys(s, p, k) for s in range(20) for p in range(20) for k in range(20)}
    assert len(keys) == 8000
    assert request_keys(1, 11) != request_keys(11, 1)


@given(
    st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12),
    st.floats(0.2, 3),
    st.integers(0, 12),
    st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
)
def test_processing_equals_its_definition(logits, temperature, top_k, top_p):
    """Temperature, top-k and top-p give the probabilities of their definition."""

    import numpy as np

    values = torch.tensor(logits)
    if len({round(value, 6) for value in logits}) < len(logits):
        return  # ties have a test of their own, and subnormal differences are ties
    # a token at the very edge of the nucleus may fall on either side by rounding
    full = np.sort(processed(values.double().numpy(), temperature, 1.0, top_k))[::-1]
    if top_p < 1 and np.abs(np.cumsum(full) - top_p).min() < 1e-5:
        return
    ours = Sampling(temperature, top_k, top_p).process(values).double().softmax(-1).numpy()
    assert np.abs(ours - processed(values.double().numpy(), temperature, top_p, top_k)).max() < 1e-5


def test_processing_equals_transformers_warpers(seed):
    """Temperature, top-k and top-p give the logits of transformers' warpers."""

    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(200, 96)
    for temperature, top_k, top_p in [(0.7, 0, 1.0), (1.0, 10, 1.0), (1.3, 0, 0.8), (0.8, 20, 0.9)]:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        theirs = warpers(torch.zeros(200, 1, dtype=torch.long), logits)
        ours = Sampling(temperature, top_k, top_p).process(logits)
        same = (ours.isinf() == theirs.isinf()).all(1)
        assert same.sum() >= 199  # a sum at the very edge of top_p may round to either side
        assert torch.equal(ours[same], theirs[same])


def test_processing_always_keeps_a_token():
    """Processing always keeps at least one token, and greedy decoding changes nothing."""
    logits = torch.tensor([[0.0, 5.0, 5.0, -3.0]])
    assert torch.equal(Sampling(0.0, top_k=1, top_p=0.1).process(logits), logits)
    assert Sampling(1.0, top_p=1e-6).process(logits).isfinite().sum() == 1
    assert Sampling(1.0, top_p=1e-6).process(logits).argmax() == 1  # of equal tokens the lowest id
    assert Sampling(1.0, top_k=100).process(logits).isfinite().all()


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_values_out_of_range_are_named(values):
    """A sampling value out of range is named in the error."""
    with pytest.raises(UserError, match=next(iter(values))):
        Sampling(**values)


def test_lazy_noise_equals_noise_made_at_once():
    """Noise made on demand equals noise made at once."""
    keys, roots, tokens = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.tensor([5, 9]), torch.arange(6)
    whole = gumbel(keys, roots[:, None] + 1 + torch.arange(6), tokens, CHOICE)
    noise = Noise(keys, roots, tokens, CHOICE)
    assert torch.equal(Noise(keys, roots, tokens, CHOICE, rows=3)[:, :3], whole[:, :3])
    assert torch.equal(noise[:, 1:2], whole[:, 1:2]) and noise._noise_BRV.shape[1] == 4
    assert torch.equal(noise[:, :6], whole) and torch.equal(noise[:, 0:1], whole[:, :1]) and noise._noise_BRV.shape[1] == 8


@given(st.lists(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), min_size=1, max_size=12), st.integers(1, 12))
def test_top_k_keeps_k_tokens_the_lowest_of_equal_ones(logits, top_k):
    """Of equal logits those of the lowest ids are kept, and never more than k."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    kept = Sampling(1.0, top_k=top_k).process(torch.tensor([logits, logits])).isfinite()
    assert kept.tolist() == [[token in ranked for token in range(len(logits))]] * 2


@pytest.mark.parametrize("temperature", [1e-39, 5e-324, 9e-7])
def test_temperature_near_0_is_greedy(temperature):
    """Below 1e-6 the likeliest token is taken, without dividing by the temperature."""
    assert Sampling(temperature) == Sampling(0.0) and Sampling(temperature).greedy and not Sampling(1e-6).greedy
    assert GenerateOptions(temperature=temperature).temperature == 0.0
    greedy = pair(ends=())
    texts = [greedy.generate([[3, 4]], 12, value)[0].tokens for value in (temperature, 0.0)]
    assert texts[0] == texts[1]
    cold = Sampling(1e-6).process(torch.tensor([8.0, 8.001, -9.0]))
    assert cold.softmax(-1).isfinite().all() and cold.argmax() == 1


def test_noise_in_parts_equals_noise_at_once(monkeypatch):
    """Large noise is computed some rows at a time and is the same."""
    keys, positions, tokens = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), torch.arange(10).view(2, 5), torch.arange(40)
    whole = gumbel(keys, positions, tokens, CHOICE)
    for limit in (1, 80, 170, 300):
        monkeypatch.setattr(sampling, "CHUNK", limit)
        assert torch.equal(gumbel(keys, positions, tokens, CHOICE), whole)


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-9])
def test_smallest_top_p_keeps_the_likeliest_token(top_p, seed):
    """The likeliest token stays, however small top_p is, even if it is 0 in float32."""
    logits = torch.randn(3, 50)
    kept = Sampling(temperature=1.0, top_p=top_p).process(logits).isfinite()
    assert kept.sum(-1).tolist() == [1, 1, 1] and torch.equal(kept.int().argmax(-1), logits.argmax(-1))
