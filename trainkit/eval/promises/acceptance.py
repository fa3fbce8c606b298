"""The promise that the drafter trains like it serves: acceptance in training equals acceptance in decoding, node by node.

Decoding drafts with caches that were filled round by round. Training reads the whole text in one forward pass, with hidden
states that transformers computed. Both predict the same tokens of the same texts, so the acceptance must be the same. It is not
if one of them uses a head or mask of another position, a stale cache, or other rotary positions.
"""

# B rows  F frontier nodes  T positions  V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trainkit.data.teacher.live import LiveTeacher
from trainkit.drafters.base import DraftBatch
from trainkit.eval.acceptance import per_head
from trainkit.eval.promises.types import Check, Subject
from trainkit.losses.divergence import ForwardKL
from trainkit.losses.measures import acceptance
from trainkit.runner.round import Trace
from trainkit.runner.sampling import request_keys

TOLERANCE = {"float32": (2e-2, 1e-3), "bfloat16": (1.0, 3e-2), "float16": (1.0, 1e-2)}
"""Limits of the largest and the mean difference between the acceptance of a node in training and in decoding."""


@dataclass
class DecodedAcceptance:
    """Collects the acceptance at the nodes that the runner verified, from its traces; chains only.

    Attributes:
        numbers: Noise keys -> index of the prompt.
        alpha: (prompt, position of the predicted token, depth) -> probability that the drafted token is accepted.
        accepted: Number of accepted nodes.
    """

    numbers: dict[tuple[int, int], int]
    alpha: dict[tuple[int, int, int], float] = field(default_factory=dict)
    accepted: int = 0

    def __call__(self, trace: Trace) -> None:
        counts_B = trace.verdict.counts_B
        texts = [self.numbers[tuple(keys)] for keys in trace.keys_B2.tolist()]
        for depth, draft_BFV in enumerate(trace.draft.logits):
            p_BV, q_BV = trace.scores_BNV[:, depth].double().softmax(-1), draft_BFV[:, 0].double().softmax(-1)
            alphas, positions, counts = acceptance(p_BV, q_BV).tolist(), trace.position_B.tolist(), counts_B.tolist()
            for text, root, count, alpha in zip(texts, positions, counts, alphas, strict=True):
                if count > depth:
                    self.alpha[text, root + depth + 1, depth] = alpha
                    self.accepted += count > depth + 1


def check_acceptance(subject: Subject) -> Check:
    """Samples texts with residual verification at temperature 1, and reads them again in the drafter's training forward pass.

    Two comparisons: the acceptance of each node in decoding with that in training; and the share of accepted nodes with the
    mean acceptance, within four standard errors. Given everything before it, a node is accepted with a known probability a,
    so the variance of that share is the mean of a (1 - a), divided by the number of nodes.
    """
    promise = "The acceptance that training measures is the acceptance that decoding shows."
    arguments, runner = subject.arguments, subject.runner
    # Decode
    numbers = {request_keys(arguments.seed, index): index for index in range(len(subject.prompts))}
    decoded, before = DecodedAcceptance(numbers), runner.observe
    runner.observe = decoded
    try:
        outputs = runner.generate(
            subject.prompts, arguments.max_new_tokens, 1.0, depth=subject.depth, verify="residual", seed=arguments.seed
        )
    finally:
        runner.observe = before
    # Read the same texts as training does
    trained: dict[tuple[int, int, int], float] = {}
    single = False
    for index, (prompt, output) in enumerate(zip(subject.prompts, outputs, strict=True)):
        heads = _training_acceptance(subject, prompt, output.tokens)
        single = single or len(heads) == 1
        trained |= {(index, position, head): alpha for head, values in enumerate(heads) for position, alpha in values.items()}
    # Pair the nodes; a kind with one prediction per position makes the same one at every depth
    lookup = {node: trained.get((*node[:2], 0 if single else node[2])) for node in decoded.alpha}
    pairs = np.array([(decoded.alpha[node], value) for node, value in lookup.items() if value is not None]).reshape(-1, 2)
    if not len(pairs):
        return Check("acceptance", promise, "BROKEN", "decoding and training have no predicted token in common")
    # Compare the acceptance of each node, and the share of accepted nodes with the mean acceptance
    difference, exact = np.abs(pairs[:, 0] - pairs[:, 1]), np.array(list(decoded.alpha.values()))
    error = float(np.sqrt((exact * (1 - exact)).sum())) / len(exact)
    share, expected = decoded.accepted / len(exact), float(exact.mean())
    deviation = abs(share - expected) / error if error else (0.0 if share == expected else np.inf)
    largest, mean = TOLERANCE[arguments.dtype]
    same, fair = difference.max() <= largest and difference.mean() <= mean, deviation <= 4
    # Report
    figure = (
        f"alpha {pairs[:, 1].mean():.4f} in training, {pairs[:, 0].mean():.4f} in decoding, at the same {len(pairs):,} nodes"
    )
    details = [
        f"at a node the two differ by {difference.mean():.1e} on average, {difference.max():.1e} at most",
        f"{share:.4f} of {len(exact):,} nodes accepted, {deviation:.1f} standard errors from the expected {expected:.4f}",
    ]
    counts: dict[str, Any] = {"nodes": len(pairs), "evaluated": len(exact), "accepted": decoded.accepted, "error": error}
    counts |= {"training": float(pairs[:, 1].mean()), "decoding": float(pairs[:, 0].mean()), "expected": expected}
    counts |= {"mean_difference": float(difference.mean()), "largest_difference": float(difference.max())}
    return Check("acceptance", promise, "kept" if same and fair else "BROKEN", figure, details, counts)


@torch.inference_mode()
def _training_acceptance(subject: Subject, prompt: list[int], continuation: list[int]) -> list[dict[int, float]]:
    """For each head: position of a predicted token -> its acceptance, from the training forward pass over one text."""
    tokens_BT = torch.tensor([[*prompt, *continuation]], device=subject.runner.device)
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
    rows = {"tokens_BT": tokens_BT, "positions_BT": positions_BT, "document_BT": torch.zeros_like(tokens_BT)}
    batch = DraftBatch.read(
        LiveTeacher(subject.reference), rows | {"mask_BT": positions_BT >= len(prompt)}, subject.drafter.taps
    )
    output = subject.drafter(batch, ForwardKL(chunk=256).measuring(coupled=False))
    heads, shift = per_head(subject.drafter, batch, output), "counted_HBT" not in output.per_token
    return [
        dict(zip((counted_BT[0].nonzero()[:, 0] + shift).tolist(), values["alpha"].tolist(), strict=True))
        for counted_BT, values in heads
    ]
