"""What the loss reads of a generation: micro-batches with log-probabilities, advantages and corrections, before any update."""

# R responses  L response tokens, padded  N response tokens  D hidden  G responses of a prompt

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from trainkit.models.target import FrozenTarget
from trainkit.rl.algorithms import Algorithm
from trainkit.rl.batches import Micro, Sample, pack_responses, policy_logprobs
from trainkit.rl.collect import Collected, together
from trainkit.rl.correction import Kind, choose, correction, mismatch
from trainkit.rl.thr import THR
from trainkit.rl.types import Group


@dataclass
class Prepared:
    """A generation, ready to train on.

    Attributes:
        micros: The micro-batches of each minibatch, on the CPU: tensors of `pack_responses`, and `old_RL`; `ref_RL` and
            `correction_RL` if the loss reads them.
        counts: The loss's denominator of each minibatch, over all ranks.
        mismatch: Metrics of the mismatch between runner and trainer, over all ranks.
    """

    micros: list[list[Micro]]
    counts: list[float]
    mismatch: dict[str, float]


@dataclass(frozen=True)
class Preparation:
    """Prepares generations.

    Attributes:
        policy: The model that is trained.
        reference: Opens the model that the loss compares the policy with; None if it reads none.
        algorithm: Gives counts, and whether truncated responses are left out.
        temperature: Sampling temperature.
        minibatches: Optimiser steps that share a generation.
        accumulate: Micro-batches of a minibatch.
        size: Responses of a micro-batch, if no group was dropped.
        correction: Kind of correction for the mismatch.
        cap: Its largest factor.
        reweight: Changes advantages by token; None leaves them.
        gather: Gives the objects of all ranks, by rank.
        context: Opened around all forward passes, as in training; for example autocast.
    """

    policy: FrozenTarget
    reference: Callable[[], AbstractContextManager[FrozenTarget]] | None
    algorithm: Algorithm
    temperature: float
    minibatches: int
    accumulate: int
    size: int
    correction: Kind
    cap: float
    reweight: THR | None
    gather: Callable[[Any], list[Any]]
    context: Callable[[], AbstractContextManager[Any]]

    @torch.no_grad()
    def prepare(self, collected: Collected) -> Prepared:
        """The generation's micro-batches; every rank must call it, also one without groups.

        Raises:
            UserError: graded rewards, which `reweight` does not take; on all ranks.
        """
        thr = self.reweight
        correct = together(self.gather, lambda: {} if thr is None else _correct(collected, thr))
        micros: list[list[Micro]] = []
        for minibatch in range(self.minibatches):
            groups = {n: pair for n, pair in sorted(collected.groups.items()) if n % self.minibatches == minibatch}
            samples = [sample for group, advantage_G in groups.values() for sample in self._samples(group, advantage_G)]
            parts = [samples[n * self.size : (n + 1) * self.size] for n in range(self.accumulate)]
            with self.context():
                scored = [self._scored(pack_responses(part)) for part in parts]
                if thr is not None:
                    self._reweight(
                        thr, [m for m, part in zip(scored, parts, strict=True) if part], [correct[n] for n in groups]
                    )
            micros.append([{name: value.cpu() for name, value in micro.items() if name != "hidden_ND"} for micro in scored])
        values = self._correct_mismatch([micro for part in micros for micro in part])
        counts = [sum(float(self.algorithm.count(micro["mask_RL"])) for micro in part) for part in micros]
        totals = [float(sum(ranks)) for ranks in zip(*self.gather(counts), strict=True)]
        return Prepared(micros, totals, values)

    def _samples(self, group: Group, advantage_G: Tensor) -> Iterator[Sample]:
        for response, advantage in zip(group.responses, advantage_G.tolist(), strict=True):
            missing = self.algorithm.needs_rewards and isnan(response.reward)
            cut = self.algorithm.mask_truncated and response.finish in ("length", "max_len")
            yield Sample(group.task.tokens, response, advantage, counts=not (missing or cut))

    def _scored(self, micro: Micro) -> Micro:
        """The micro-batch on the policy's device with log-probabilities, and for `reweight` the hidden states `hidden_ND`."""
        micro = {name: value.to(self.policy.device) for name, value in micro.items()}
        micro["old_RL"], _, hidden_ND = policy_logprobs(self.policy, micro, self.temperature)
        if self.reweight is not None:
            micro["hidden_ND"] = hidden_ND
        if self.reference is not None:
            with self.reference() as reference:
                micro["ref_RL"], _, _ = policy_logprobs(reference, micro, self.temperature)
        return micro

    def _reweight(self, thr: THR, micros: list[Micro], correct: list[list[bool]]) -> None:
        """Replaces the advantages of a minibatch, whose responses are those of whole groups in order."""
        rows = [(micro, row) for micro in micros for row in range(len(micro["mask_RL"]))]
        hidden = [part for micro in micros for part in micro["hidden_ND"].split(micro["exists_RL"].sum(1).tolist())]
        head, start = self.policy.handle().head, 0
        for right in correct:
            group_rows = rows[start : start + len(right)]
            counted = [micro["mask_RL"][row].bool() for micro, row in group_rows]
            states = [
                hidden_nD[counted_L[micro["exists_RL"][row]]]
                for hidden_nD, counted_L, (micro, row) in zip(
                    hidden[start : start + len(right)], counted, group_rows, strict=True
                )
            ]
            tokens, advantages = (
                [micro[name][row][counted_L] for counted_L, (micro, row) in zip(counted, group_rows, strict=True)]
                for name in ("labels_RL", "advantage_RL")
            )
            new = thr.reweight(states, tokens, head, right, advantages, self.temperature)
            for advantage_n, counted_L, (micro, row) in zip(new, counted, group_rows, strict=True):
                micro["advantage_RL"][row, counted_L] = advantage_n.to(micro["advantage_RL"])
            start += len(right)

    def _correct_mismatch(self, micros: list[Micro]) -> dict[str, float]:
        """Adds `correction_RL` where it is not 1; metrics of the mismatch."""
        tensors = [(micro["old_RL"], micro["sampler_RL"], micro["mask_RL"]) for micro in micros]
        found = [{name: float(value) for name, value in mismatch(*three, self.cap).items()} for three in tensors]
        largest = max(float(((old_RL - sampler_RL) * mask_RL).abs().max()) for old_RL, sampler_RL, mask_RL in tensors)
        ranks = self.gather((found, largest))
        total = {name: sum(part[name] for parts, _ in ranks for part in parts) for name in found[0]}
        tokens = max(total["tokens"], 1.0)
        kind = choose(self.correction, total["k3"] / tokens)
        for micro, three in zip(micros, tensors, strict=True):
            if (factor_RL := correction(kind, self.cap, *three)) is not None:
                micro["correction_RL"] = factor_RL
        capped = total["sequence_capped" if kind.startswith("sequence") else "token_capped"] / tokens
        values = {"mismatch": total["abs"] / tokens, "mismatch_k3": total["k3"] / tokens, "mismatch_capped": capped}
        return values | {"mismatch_max": max(value for _, value in ranks), "corrected": float(kind != "none")}


def _correct(collected: Collected, thr: THR) -> dict[int, list[bool]]:
    """Which responses of each group are correct."""
    return {n: thr.correct([response.reward for response in group.responses]) for n, (group, _) in collected.groups.items()}
