"""The reason for chunks: memory of one training step of the loss, measured on the process itself.

Each variant runs in its own process. A small step before the measured one allocates gradients and warms up libraries; weights
and inputs exist as well. resident.py tells how memory is measured.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

import pytest

from tests.support.resident import alone, measured

TOKENS, VOCABULARY, WIDTH = 4096, 131072, 256


def _step(variant: str, chunk: int, seed: int, connection: Connection) -> None:
    import torch

    from trainkit.losses.divergence import TV, TVDpp
    from trainkit.losses.selected import selected_logprobs

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    target_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    hidden, target = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)

    def loss(tokens: int) -> torch.Tensor:
        labels = torch.arange(tokens)
        if variant == "dense logprobs":
            return head(hidden[:tokens]).log_softmax(-1).gather(-1, labels[:, None]).sum() / tokens
        if variant == "logprobs":
            return selected_logprobs(hidden[:tokens], head, labels, chunk=chunk)[0].sum() / tokens
        if variant == "naive":
            q = head(hidden[:tokens]).softmax(-1)
            return (target_head(target[:tokens]).softmax(-1) - q).clamp(min=0).sum() / tokens
        form = TV(chunk=chunk) if variant == "tv" else TVDpp(normalise="position", chunk=chunk)
        return form(hidden[:tokens], head, target[:tokens], target_head).mean

    loss(4).backward()
    head.weight.grad.zero_()
    bytes_, seconds, _ = measured(lambda: loss(TOKENS).backward())
    connection.send((bytes_, seconds, float(head.weight.grad.norm())))


def measure(seed: int, variant: str, chunk: int = 0) -> tuple[int, float, float]:
    """Bytes that one forward and backward adds, CPU seconds, and norm of the head's gradient."""
    result = alone(_step, variant, chunk, seed)
    print(f"{variant} chunk {chunk or TOKENS}: {result[0] / 2**30:.2f} GiB activations, {result[1]:.1f} s")
    return result


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_chunked_loss_needs_a_third_of_the_memory(seed):
    """The chunked loss needs at most a third of the memory of whole logits."""
    naive, _, norm = measure(seed, "naive")
    for variant, chunk in (("tv", 1024), ("tv", 256), ("tvdpp", 1024)):
        bytes_, _, ours = measure(seed, variant, chunk)
        assert bytes_ <= naive / 3
        if variant == "tv":
            assert ours == pytest.approx(norm, rel=1e-3)  # the same gradient, in float32 over 131072 columns


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_chunked_logprobs_need_a_third_of_the_memory(seed):
    """Log-probabilities of given tokens need at most a third of the memory of whole logits, and give the same gradient."""
    dense, _, norm = measure(seed, "dense logprobs")
    bytes_, _, ours = measure(seed, "logprobs", 512)
    assert bytes_ <= dense / 3 and ours == pytest.approx(norm, rel=1e-3)  # float32 over 131072 columns
