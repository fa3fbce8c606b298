"""The choosing kernel, compared with the runner's own sampling."""

# B batch  R rows of a text  V vocabulary

import pytest
import torch

pytest.importorskip("triton")

from trainkit.layers.kernels.choose import BLOCK, choose
from trainkit.runner.sampling import ACCEPT, CHOICE, RESIDUAL, Sampling, gumbel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(B, R, V):
    """Strided logits, keys of any bits, and strided positions."""
    logits = 3 * torch.randn(B, R, V + 3, device=DEVICE)[:, :, :V]
    keys = torch.randint(-(2**31), 2**31, (B, 2), device=DEVICE, dtype=torch.int32)
    return logits, keys, torch.randint(0, 2**20, (B, 2 * R), device=DEVICE)[:, ::2]


def scores(logits, temperatures, keys, positions, stream):
    """Processed logits with noise, text by text."""
    rows, vocabulary = [], torch.arange(logits.shape[2], device=DEVICE)
    for b, temperature in enumerate(temperatures):
        processed = Sampling(temperature).process(logits[b : b + 1])
        noise = gumbel(keys[b : b + 1], positions[b : b + 1], vocabulary, stream) if temperature else 0
        rows.append(processed + noise)
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("B, R, V, stream", [(4, 5, 5000, CHOICE), (1, 1, BLOCK, RESIDUAL), (2, 3, 70, ACCEPT)])
def test_choose_equals_the_runners_sampling(B, R, V, stream, dtype, seed):
    """Texts of different temperatures, 0 among them, choose what processed logits plus noise choose; 10^5 draws at a time."""
    logits, keys, positions = inputs(B, R, V)
    logits, temperatures = logits.to(dtype), [0.7, 0.0, 1.0, 1e-3][:B]
    options = logits, torch.tensor(temperatures, device=DEVICE), keys, positions, stream
    chosen, logprobs = choose(*options, logprobs=True)
    expected = scores(logits, temperatures, keys, positions, stream)
    # Another choice is right only where the two best differ by less than the logarithms' last bits.
    best, ours = expected.amax(-1), expected.gather(2, chosen[..., None])[..., 0]
    assert ((chosen == expected.argmax(-1)) | (best - ours <= 2**-21 * best.abs().clamp(min=1))).all()
    assert logprobs is not None
    assert torch.allclose(logprobs, logits.float().log_softmax(-1).gather(2, chosen[..., None])[..., 0], atol=1e-5)
    again, warm = choose(*options, logprobs=True, processed=True)
    assert torch.equal(again, chosen) and warm is not None
    for b, temperature in enumerate(temperatures):
        log_p = Sampling(temperature).process(logits[b]).log_softmax(-1).gather(1, chosen[b, :, None])[:, 0]
        assert torch.allclose(warm[b], log_p, atol=1e-5 if temperature != 1e-3 else 1e-2)  # logits of 10^4 round by 10^-3


def test_choose_draws_the_runners_noise(seed):
    """With equal logits only the noise decides, in almost 100,000 draws of a row."""
    _, keys, positions = inputs(3, 2, 1)
    vocabulary = torch.arange(30_000, device=DEVICE)
    logits, temperature = torch.zeros(3, 2, 30_000, device=DEVICE), torch.ones(3, device=DEVICE)
    for stream in (CHOICE, RESIDUAL):
        noise = gumbel(keys, positions, vocabulary, stream)
        chosen, _ = choose(logits, temperature, keys, positions, stream)
        assert torch.equal(chosen, noise.argmax(-1))


def test_choose_adds_noise_that_is_precise_at_both_ends(seed):
    """Between the largest or smallest noise of a row and any other, a logit of 10^-5 beside a tie decides, to both sides."""
    _, keys, positions = inputs(1, 1, 1)
    noise = gumbel(keys, positions, torch.arange(BLOCK, device=DEVICE), CHOICE)[0, 0]
    other = int(torch.randint(BLOCK, (1,)))
    logits = torch.full((1, 4, BLOCK), float("-inf"), device=DEVICE)
    for row, (end, margin) in enumerate(
        [(noise.argmax(), 1e-5), (noise.argmax(), -1e-5), (noise.argmin(), 1e-5), (noise.argmin(), -1e-5)]
    ):
        if end != other:
            logits[0, row, end] = noise[other] - noise[end] + margin
        logits[0, row, other] = 0.0
        expected = end if margin > 0 else other
        chosen, _ = choose(logits[:, row : row + 1], torch.ones(1, device=DEVICE), keys, positions, CHOICE)
        assert int(chosen) == int(expected)


def test_choose_takes_the_lowest_of_equal_tokens():
    """Of equal logits the lowest id wins, within a block and across blocks."""
    logits = torch.zeros(1, 3, 3 * BLOCK, device=DEVICE)
    logits[0, 1, [BLOCK + 7, BLOCK + 9, 2 * BLOCK]] = 1.0
    logits[0, 2, [2 * BLOCK + 1, 3 * BLOCK - 1]] = 1.0
    zero = torch.zeros(1, device=DEVICE)
    chosen, _ = choose(logits, zero, zero.int()[:, None].expand(1, 2).contiguous(), zero.long().expand(1, 3), CHOICE)
    assert chosen.tolist() == [[0, BLOCK + 7, 2 * BLOCK + 1]]


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter subtracts infinities
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_choose_reports_rows_without_a_finite_maximum(temperature, seed):
    """NaN, +inf, or only -inf gives token -1; a few -inf do not, and their tokens are never chosen."""
    logits, keys, positions = inputs(1, 5, 2 * BLOCK)
    logits[0, 0, 3] = float("nan")
    logits[0, 1, -1] = float("inf")
    logits[0, 2] = float("-inf")
    logits[0, 3, :-1] = float("-inf")
    chosen, _ = choose(logits, torch.full((1,), temperature, device=DEVICE), keys, positions, CHOICE, logprobs=True)
    assert chosen[0, :4].tolist() == [-1, -1, -1, 2 * BLOCK - 1] and chosen[0, 4] >= 0
