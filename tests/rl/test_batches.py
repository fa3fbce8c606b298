"""Packed micro-batches give the log-probabilities of texts that run alone."""

import random

import torch

from trainkit.models.target import FrozenTarget
from trainkit.rl.batches import Sample, pack_responses, policy_logprobs
from trainkit.rl.types import Response

# R responses  L response tokens


def sample(prompt: int, length: int, **more) -> Sample:
    tokens = [random.randrange(320) for _ in range(prompt + length)]
    logprobs = [-random.random() for _ in range(length)]
    return Sample(tokens[:prompt], Response(tokens[prompt:], "", "end", logprobs), random.random(), **more)


def test_packed_logprobs_equal_those_of_texts_alone(tiny_target, seed):
    """Log-probability and entropy of each token, with a temperature, against the whole model on each text alone."""
    policy = FrozenTarget(tiny_target)
    for _ in range(4):
        samples = [sample(random.randint(1, 9), random.randint(1, 12)) for _ in range(random.randint(1, 9))]
        micro, temperature = pack_responses(samples), random.uniform(0.5, 1.5)
        rows, width = micro["tokens_BT"].shape
        longest = max(len(part.prompt) + len(part.response.tokens) for part in samples)
        assert width == longest and rows <= len(samples)
        logp_RL, entropy_RL, _ = policy_logprobs(policy, micro, temperature)
        for row, part in enumerate(samples):
            text, count = torch.tensor([part.prompt + part.response.tokens]), len(part.response.tokens)
            with torch.no_grad():
                logits = policy.model(text).logits[0, -count - 1 : -1] / temperature
            logp = logits.log_softmax(-1)
            wanted = logp.gather(1, torch.tensor(part.response.tokens)[:, None])[:, 0]
            torch.testing.assert_close(logp_RL[row, :count], wanted, rtol=1e-4, atol=1e-4)  # float32, another mask
            torch.testing.assert_close(entropy_RL[row, :count], -(logp.exp() * logp).sum(-1), rtol=1e-4, atol=1e-4)
            assert not logp_RL[row, count:].any() and not micro["exists_RL"][row, count:].any()


def test_tensors_hold_each_response(seed):
    """Labels, advantage, sampler's log-probabilities and mask of each response, 0 after its end."""
    samples = [sample(1, 4), sample(4, 6, counts=False), sample(4, 1)]
    micro = pack_responses(samples)
    assert micro["tokens_BT"].shape == (2, 10), "the first and the last text fit into one row"
    for row, part in enumerate(samples):
        count = len(part.response.tokens)
        assert micro["labels_RL"][row].tolist() == part.response.tokens + [0] * (6 - count)
        assert micro["mask_RL"][row].tolist() == [float(part.counts)] * count + [0.0] * (6 - count)
        for name, value in (("advantage_RL", [part.advantage] * count), ("sampler_RL", part.response.logprobs)):
            torch.testing.assert_close(micro[name][row], torch.tensor(value + [0.0] * (6 - count)))
    assert micro["document_BT"].max() > 0
    for row in micro["document_BT"]:  # ascending, padding at the end
        real = row[row >= 0]
        assert torch.equal(real, real.sort().values) and (row[len(real) :] == -1).all()


def test_batch_without_responses_still_has_a_gradient(tiny_target):
    """All its weights, the output head included, get a gradient of exactly 0, so that no other rank waits."""
    policy = FrozenTarget(tiny_target)
    policy.frozen = False
    policy.model.requires_grad_(True)
    micro = pack_responses([])
    logp_RL, _, _ = policy_logprobs(policy, micro, 1.0)
    (logp_RL * micro["mask_RL"]).sum().backward()
    assert not micro["mask_RL"].any()
    assert all(weight.grad is not None and not weight.grad.any() for weight in policy.model.parameters())
