"""Acceptance in two places: as the runner shows it, beside its exact value there; and teacher-forced on given texts.

The runner never evaluates what follows a rejection, so the two are means over different positions. Training and serving agree
where `served_acceptance` finds the exact value and the observed share equal within its standard error.
"""

# B rows  T positions  V vocabulary  A taps

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainkit.drafters.base import DraftBatch
from trainkit.errors import UserError
from trainkit.layers.attention import document_bias
from trainkit.losses.divergence import ForwardKL
from trainkit.losses.measures import acceptance, agreement, coupled_acceptance
from trainkit.runner import Runner
from trainkit.runner.round import Trace


@dataclass(frozen=True)
class ServedAcceptance:
    """Acceptance at the nodes that the runner judged.

    Attributes:
        evaluated: Drafted tokens judged: those after a rejection are not.
        accepted: How many of them were accepted.
        alpha: Mean over them of 1 - TVD(p, q); argmax agreement at temperature 0.
        alpha_coupled: Mean over them of coupled acceptance; argmax agreement at temperature 0.
        expected: The one of the two that the verification in use should show.
        standard_error: Of `observed - expected`; 0 at temperature 0, where they are equal.
    """

    evaluated: int
    accepted: int
    alpha: float
    alpha_coupled: float
    expected: float
    standard_error: float

    @property
    def observed(self) -> float:
        """Share of the judged tokens that were accepted."""
        return self.accepted / self.evaluated if self.evaluated else float("nan")

    @property
    def deviation(self) -> float:
        """`observed - expected` in standard errors; parity is within three."""
        difference = self.observed - self.expected
        return difference / self.standard_error if self.standard_error else (0.0 if abs(difference) < 1e-9 else float("inf"))


class _Nodes:
    """Gathers the exact acceptance of every judged node from a runner's traces."""

    def __init__(self, greedy: bool) -> None:
        self.greedy = greedy
        self.alpha: list[Tensor] = []
        self.coupled: list[Tensor] = []
        self.accepted = 0

    def __call__(self, trace: Trace) -> None:
        if not trace.draft.shape.is_chain:
            raise UserError("served acceptance is defined for chains; give depth instead of a tree")
        counts_B = trace.verdict.counts_B
        for depth, draft_BFV in enumerate(trace.draft.logits):
            judged_B = counts_B > depth
            p_BV, q_BV = trace.scores_BNV[judged_B, depth], draft_BFV[judged_B, 0]
            if self.greedy:
                same = agreement(p_BV, q_BV).double()
                self.alpha.append(same)
                self.coupled.append(same)
            else:
                p_BV, q_BV = p_BV.double().softmax(-1), q_BV.double().softmax(-1)
                self.alpha.append(acceptance(p_BV, q_BV))
                self.coupled.append(coupled_acceptance(p_BV, q_BV))
            self.accepted += int((counts_B > depth + 1).sum())


def served_acceptance(runner: Runner, prompts: Sequence[Sequence[int]], **options: Any) -> ServedAcceptance:
    """Decodes `prompts` and returns the observed acceptance beside its exact value at the same nodes.

    Whether a judged token is accepted is, given all that came before, a coin of known probability a (its noise is fresh), and
    which nodes are judged depends on the past alone. So the differences (accepted - a) are uncorrelated whatever text and draft
    have in common, and the variance of their mean is exactly sum a (1 - a) / n^2: no clustering by prompt or round is needed.

    Args:
        runner: With a drafter.
        prompts: Token ids.
        **options: As in `Runner.generate`; `depth`, not `tree`.

    Raises:
        UserError: the runner has no drafter, or drafts a tree.
    """
    if runner.drafter is None:
        raise UserError("served acceptance needs a runner that was loaded with a drafter")
    nodes = _Nodes(greedy=not options.get("temperature", 0.0))
    before, runner.observe = runner.observe, nodes
    try:
        runner.generate(prompts, **options)
    finally:
        runner.observe = before
    alpha, coupled = torch.cat(nodes.alpha or [torch.zeros(0)]), torch.cat(nodes.coupled or [torch.zeros(0)])
    exact = alpha if options.get("verify", "coupled") == "residual" else coupled
    n = max(1, len(exact))
    return ServedAcceptance(
        evaluated=len(exact),
        accepted=nodes.accepted,
        alpha=float(alpha.sum() / n),
        alpha_coupled=float(coupled.sum() / n),
        expected=float(exact.sum() / n),
        standard_error=float((exact * (1 - exact)).sum().sqrt() / n),
    )


@torch.no_grad()
def teacher_forced_acceptance(
    runner: Runner, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], temperature: float = 1.0
) -> dict[str, float]:
    """Means of `alpha`, `alpha_coupled` and `agreement` over given continuations, as training measures them; and their `count`.

    The drafter's own training forward says what is a prediction, so any kind is measured; heads and unrolled steps that look
    further ahead are averaged in as that forward counts them.

    Args:
        runner: With a drafter; its target is read once over each text.
        prompts: Token ids, not counted.
        continuations: Token ids, counted as labels; such as the target's own outputs.
        temperature: Of both distributions; above 0.

    Raises:
        UserError: the runner has no drafter, or the lists differ in length.
    """
    if runner.drafter is None:
        raise UserError("teacher-forced acceptance needs a runner that was loaded with a drafter")
    if len(prompts) != len(continuations):
        raise UserError(f"teacher-forced acceptance: {len(prompts)} prompts but {len(continuations)} continuations")
    divergence = ForwardKL(temperature=temperature).measuring(coupled=True)
    sums: dict[str, float] = {}
    count = 0.0
    for prompt, continuation in zip(prompts, continuations, strict=True):
        output = runner.drafter(_batch(runner, prompt, continuation), divergence)
        count += float(output.count)
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / max(count, 1.0) for name, value in sums.items()} | {"count": count}


def _batch(runner: Runner, prompt: Sequence[int], continuation: Sequence[int]) -> DraftBatch:
    """One text as a training batch, with what the runner's target says of it."""
    rounds, device = runner.rounds, runner.device
    tokens_BT = torch.tensor([[*prompt, *continuation]], device=device)
    T = tokens_BT.shape[1]
    rounds.target.reserve_positions(T)
    positions_BT = torch.arange(T, device=device)[None]
    document_BT = torch.zeros_like(tokens_BT)
    bias = document_bias(document_BT, rounds.target.embed.weight.dtype)
    hidden_BTD, taps_BTAD = rounds.target(tokens_BT, positions_BT, bias, taps=rounds.taps)
    return DraftBatch(tokens_BT, positions_BT, document_BT, positions_BT >= len(prompt), taps_BTAD, hidden_BTD, rounds.handle)
