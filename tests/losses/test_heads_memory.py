"""Memory of a training step of Medusa with several heads and a large vocabulary, compared with whole logits.

The heads share the target's projection, so that the weights are only one [V, D]; projections of their own would add four of
them, their gradients and the optimiser's moments, equally for both ways of computing the loss.
"""

from __future__ import annotations

import gc
import sys
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from tests.support.resident import alone, measured
from trainkit.drafters.base import DraftBatch
from trainkit.drafters.medusa import Medusa
from trainkit.layers.shape import DecoderShape
from trainkit.losses.divergence import ForwardKL
from trainkit.models.shape import TargetHandle, TargetShape
from trainkit.models.target import FrozenTarget

HEADS, VOCABULARY, WIDTH, TOKENS = 4, 131072, 1024, 2048


def shape(vocabulary: int, width: int) -> TargetShape:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width, "num_layers": 1, "num_heads": 8}
    return TargetShape(
        DecoderShape(
            **sizes,
            num_kv_heads=8,
            head_dim=width // 8,
            norm_eps=1e-5,
            rope=rope,
            max_positions=4096,
            qkv_bias=False,
            qk_norm=False,
            tied=False,
        )
    )


def batch_of(tokens: int, vocabulary: int, width: int, head: torch.nn.Linear) -> DraftBatch:
    """One document of random states, every token a label."""
    ids, places = torch.randint(vocabulary, (1, tokens)), torch.arange(tokens)[None]
    handle = TargetHandle(lambda ids: ids, head, vocabulary)
    hidden = torch.randn(1, tokens, width, dtype=head.weight.dtype)
    return DraftBatch(ids, places, torch.zeros_like(ids), places > 0, hidden[:, :, None], hidden, handle)


def naive(draft: Medusa, batch: DraftBatch) -> torch.Tensor:
    """KL(target || head) of all heads from whole logits by plain autograd, mean over tokens and heads."""
    assert batch.taps_BTAD is not None
    hidden_TD, head = batch.taps_BTAD[0, :, 0], batch.handle.head
    logits = [head(block(hidden_TD)) for block in draft.blocks]
    with torch.no_grad():
        teacher_TV = head(batch.hidden_BTD[0])
    losses = []
    for index, logits_TV in enumerate(logits):
        ahead = index + 2
        log_q, p = logits_TV[:-ahead].log_softmax(-1), teacher_TV[ahead - 1 : -1].softmax(-1)
        losses.append((p * (p.log() - log_q)).sum())
    tokens = hidden_TD.shape[0]
    return torch.stack(losses).sum() / sum(tokens - index - 2 for index in range(len(losses)))


def _step(variant: str, tokens: int, chunk: int, seed: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)
    draft = Medusa(shape(VOCABULARY, WIDTH), num_heads=HEADS, head="target")
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=1e-3)
    whole, small = (batch_of(size, VOCABULARY, WIDTH, head) for size in (tokens, 8))

    def loss(batch: DraftBatch) -> torch.Tensor:
        return naive(draft, batch) if variant == "naive" else draft(batch, ForwardKL(chunk=chunk)).mean

    loss(small).backward()  # allocates gradients, and what libraries allocate once
    optimizer.step()  # allocates the moments before the measured step
    optimizer.zero_grad(set_to_none=False)
    torch.manual_seed(seed)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    gc.collect()

    def step() -> tuple[float, dict[str, Any]]:
        value = loss(whole)
        value.backward()
        gradients = {name: p.grad.clone().numpy() for name, p in draft.named_parameters() if p.grad is not None}
        optimizer.step()
        return value.item(), gradients

    connection.send(measured(step))


def measure(seed: int, variant: str, tokens: int, chunk: int = 0) -> tuple[int, float, dict[str, torch.Tensor]]:
    """Bytes of one step on top of weights, gradients and optimiser state; its loss; its gradients."""
    bytes_, seconds, (loss, gradients) = alone(_step, variant, tokens, chunk, seed)
    named = f"{variant}, {tokens} tokens" + (f", chunk {chunk}" if chunk else "")
    print(f"{named}: {bytes_ / 2**30:.2f} GiB activations, {seconds:.1f} s of one core", flush=True)
    return bytes_, loss, {name: torch.from_numpy(value) for name, value in gradients.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_four_heads_need_a_quarter_of_whole_logits_memory(seed):
    """With the default chunk. Whole logits of 2048 tokens exceed the memory of many machines, so 1024 tokens are measured;
    memory grows linearly with tokens, so twice that is taken for 2048.

    Gradients of 1024 tokens agree within 1e-3 of the largest: float32 sums over 131072 columns run in another order.
    """
    chunk = ForwardKL().chunk
    whole, loss, gradients = measure(seed, "naive", TOKENS // 2)
    half, same_loss, same_gradients = measure(seed, "lean", TOKENS // 2, chunk)
    lean, *_ = measure(seed, "lean", TOKENS, chunk)
    print(f"lean / naive: {lean / (2 * whole):.3f} at {TOKENS} tokens, {half / whole:.3f} at {TOKENS // 2}")
    assert lean <= 2 * whole / 4
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - same_gradients[name]).abs().max() <= 1e-3 * gradient.abs().max(), name


def test_heads_have_the_gradients_of_whole_logits(seed):
    """The comparison above in float64, almost without rounding: chunks of 5 tokens, 4 heads, equal to 1e-10."""
    head = torch.nn.Linear(16, 50, bias=False).double().requires_grad_(False)
    draft = Medusa(shape(50, 16), num_heads=HEADS, head="target").double()
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch, results = batch_of(23, 50, 16, head), []
    for loss in (naive(draft, batch), draft(batch, ForwardKL(chunk=5)).mean):
        draft.zero_grad()
        loss.backward()
        results.append([loss.item(), *(parameter.grad.clone() for parameter in draft.parameters())])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", ["own", "target"])
def test_only_counted_positions_reach_the_vocabulary(head, tiny_target, seed):
    """Each projection sees the rows with a counted label, the target's once for all heads; NaN elsewhere has no effect."""
    teacher, seen = FrozenTarget(tiny_target), {"target": 0, "own": 0}
    draft = Medusa(teacher.shape(), num_heads=HEADS, head=head)
    draft.initialise(FrozenTarget(tiny_target))

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        seen["target"] += hidden.shape[0]
        return teacher.handle().head(hidden)

    for projection in draft.lm_heads:
        projection.register_forward_hook(lambda module, given, out: seen.update(own=seen["own"] + given[0].shape[0]))
    tokens = torch.randint(320, (2, 30))
    positions, document = torch.arange(30).expand(2, -1), torch.tensor([[0] * 17 + [1] * 9 + [-1] * 4, [0] * 30])
    mask = (torch.rand(2, 30) < 0.4) & (document >= 0)
    hidden, _ = teacher.forward(tokens, positions, document)
    handle: Any = TargetHandle(teacher.handle().embed, counting, 320)
    batch = DraftBatch(tokens, positions, document, mask, hidden[:, :, None].clone(), hidden.clone(), handle)
    counted = [batch.label_mask(index + 2) for index in range(HEADS)]
    total = sum(int(counted_BT.sum()) for counted_BT in counted)
    used_BT = torch.stack(counted).any(0)
    predicted_BT = torch.stack([counted_BT.roll(index + 1, 1) for index, counted_BT in enumerate(counted)]).any(0)
    assert batch.taps_BTAD is not None and bool((~used_BT).any()) and bool((~predicted_BT).any())
    batch.taps_BTAD[~used_BT] = float("nan")
    batch.hidden_BTD[~predicted_BT] = float("nan")
    output = draft(batch, ForwardKL(chunk=7))
    assert float(output.count) == total and output.sum.isfinite()
    output.mean.backward()
    # in forward and again in backward: each counted row of the draft, and each target row once for all heads
    shared = int(predicted_BT.sum())
    assert seen == {"target": 2 * shared + (2 * total if head == "target" else 0), "own": 2 * total if head == "own" else 0}
    assert all(bool(parameter.grad.isfinite().all()) for parameter in draft.parameters() if parameter.grad is not None)
