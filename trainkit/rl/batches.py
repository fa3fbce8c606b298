"""Responses as micro-batches: prompts and responses packed into rows for the network, and the index of each response token.

The log-probabilities that a loss compares are computed by the same function on the same tensors, before the update (old) and
during it (new), so their ratio is exactly 1 at the first minibatch.
"""

# R responses  L response tokens, padded  N response tokens  B packed rows  T positions  D hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainkit.losses.selected import selected_logprobs
from trainkit.models.target import FrozenTarget
from trainkit.rl.types import Response

Micro = dict[str, Tensor]
"""Tensors of a micro-batch, from `pack_responses`."""


@dataclass
class Sample:
    """A response to train on.

    Attributes:
        prompt: Token ids of the prompt.
        response: The response.
        advantage: Advantage of all its tokens.
        counts: Whether its tokens count in the loss.
    """

    prompt: list[int]
    response: Response
    advantage: float
    counts: bool = field(default=True)


def pack_responses(samples: Sequence[Sample]) -> Micro:
    """The tensors of a micro-batch; without samples, those of one response that does not count.

    `tokens_BT`, `positions_BT`, `document_BT`: the texts, packed into rows as long as the longest, first-fit by falling length;
    padding is at the end of a row, with document -1. `labels_RL`: the response tokens. `index_RL`: the index, in the flattened
    rows, of the position that predicts each. `exists_RL`: True where a response has a token. `mask_RL`: 1 where it counts.
    `advantage_RL`, `sampler_RL`: advantage, and log-probability that the runner reported. All are 0 where no token exists.
    """
    samples = samples or [Sample([0], Response([0], "", "length", [0.0]), 0.0, counts=False)]
    texts = [sample.prompt + sample.response.tokens for sample in samples]
    width, longest = max(map(len, texts)), max(len(sample.response.tokens) for sample in samples)
    # Choose a row and a start in it for each text.
    used, placed = [], {}
    for index in sorted(range(len(texts)), key=lambda index: -len(texts[index])):
        row = next((row for row, taken in enumerate(used) if taken + len(texts[index]) <= width), len(used))
        used += [0] * (row == len(used))
        placed[index] = (row, used[row])
        used[row] += len(texts[index])
    # Fill the tensors.
    micro = {name: torch.zeros(len(used), width, dtype=torch.long) for name in ("tokens_BT", "positions_BT")}
    micro["document_BT"] = torch.full((len(used), width), -1)
    shape = (len(samples), longest)
    micro |= {name: torch.zeros(shape, dtype=torch.long) for name in ("labels_RL", "index_RL")}
    micro |= {name: torch.zeros(shape) for name in ("mask_RL", "advantage_RL", "sampler_RL")}
    micro["exists_RL"] = torch.zeros(shape, dtype=torch.bool)
    for index, (sample, text) in enumerate(zip(samples, texts, strict=True)):
        (row, start), count = placed[index], len(sample.response.tokens)
        cells = (row, slice(start, start + len(text)))
        micro["tokens_BT"][cells], micro["positions_BT"][cells] = torch.tensor(text), torch.arange(len(text))
        micro["document_BT"][cells] = index
        first = row * width + start + len(sample.prompt) - 1
        micro["labels_RL"][index, :count] = torch.tensor(sample.response.tokens)
        micro["index_RL"][index, :count] = torch.arange(first, first + count)
        micro["exists_RL"][index, :count] = True
        micro["mask_RL"][index, :count] = float(sample.counts)
        micro["advantage_RL"][index, :count] = sample.advantage
        micro["sampler_RL"][index, :count] = torch.tensor(sample.response.logprobs)
    # Number the documents of each row in ascending order of their starts.
    order = sorted(placed, key=lambda index: placed[index])
    numbers = torch.tensor([-1, *(order.index(index) for index in range(len(texts)))])
    micro["document_BT"] = numbers[micro["document_BT"] + 1]
    return micro


def policy_logprobs(policy: FrozenTarget, micro: Micro, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [R, L] of the response tokens (0 where none exists), their entropies [R, L], hidden states [N, D].

    In nats, under softmax(logits / temperature), in float32; the entropies have no gradient. The hidden states are those that
    predict the tokens, in the order of `exists_RL`.
    """
    exists_RL = micro["exists_RL"]
    hidden_BTD, _ = policy.forward(micro["tokens_BT"], micro["positions_BT"], micro["document_BT"])
    hidden_ND = hidden_BTD.flatten(0, 1)[micro["index_RL"][exists_RL]]
    values = selected_logprobs(hidden_ND, policy.handle().head, micro["labels_RL"][exists_RL], temperature)
    logp_RL, entropy_RL = (value_N.new_zeros(exists_RL.shape).masked_scatter(exists_RL, value_N) for value_N in values)
    return logp_RL, entropy_RL, hidden_ND
