"""The promise of residual verification: sampled texts have the target's distribution, by a test on a reduced vocabulary.

Target and drafter may emit only a few token ids; all others have probability 0. So the joint distribution of a few consecutive
tokens can be enumerated: the target reads every possible prefix once, without draft or cache. Pearson's chi-square test
compares these probabilities with the counts of texts that the runner sampled with drafts.
"""

# T positions  V vocabulary  K draft vocabulary

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainkit.eval.bench.identity import logits
from trainkit.eval.promises.types import Check, Subject, VerifyArguments, dynamic_tree
from trainkit.runner import Runner
from trainkit.runner.round import Plan, Rounds
from trainkit.runner.sampling import Sampling, request_keys
from trainkit.runner.trees.dynamic import parse_tree
from trainkit.runner.trees.static import build, chain
from trainkit.runner.verify import Typical, build_verification

IDS, LENGTH, CONTEXT, ROWS = 3, 4, 16, 64
"""Token ids that may be emitted; tokens of a text; tokens of the prompt that are used; texts decoded together."""
LEVEL = 1e-5
"""P-value below which the promise counts as broken: the chance of a false alarm of each test."""


@dataclass(frozen=True)
class Restricted(Sampling):
    """Sampling from a few token ids.

    Attributes:
        ids: The ids.
        draft_ids: Ids of the drafter's columns, if its vocabulary is trimmed.
    """

    ids: tuple[int, ...] = ()
    draft_ids: tuple[int, ...] | None = None

    def process(self, logits: Tensor) -> Tensor:
        trimmed = self.draft_ids is not None and logits.shape[-1] == len(self.draft_ids)
        allowed = torch.tensor(self.ids, device=logits.device)
        columns = torch.tensor(self.draft_ids, device=logits.device) if trimmed else torch.arange(logits.shape[-1]).to(allowed)
        return super().process(logits).masked_fill(~(columns[:, None] == allowed).any(1), float("-inf"))


def check_distribution(subject: Subject) -> Check:
    """Tests chains, static trees and dynamic trees under residual verification."""
    promise = "With residual verification, texts have the distribution that sampling from the target alone gives."
    runner, prompt = subject.runner, subject.prompts[0][-CONTEXT:]
    prompt = prompt if len(prompt) > 1 else 2 * prompt
    sampling = _restricted(subject, prompt)
    expected = _exact_distribution(runner, prompt, sampling)
    deepest = min(subject.depth, LENGTH - 1)
    paths = tuple(path for path in subject.tree if len(path) <= deepest and max(path) < IDS - 1)
    shapes: dict[str, Any] = {"chain": build(chain(deepest), runner.device), "tree": build(paths, runner.device)}
    top_k = min(2, subject.drafter.draft_vocab_size)
    if subject.drafter.max_width is None or subject.drafter.max_width >= top_k:
        shapes["dynamic tree"] = parse_tree(dynamic_tree(min(2, deepest), top_k, 4))
    values, texts = {}, subject.arguments.samples
    for name, shape in shapes.items():
        rule = build_verification("residual", False, shape.ranked, Typical())
        counts = _sample(runner.rounds, prompt, Plan(sampling, shape, rule), subject.arguments, name)
        values[name] = p_value(counts, expected)
    figure = ", ".join(f"{name} p = {value:.2g}" for name, value in values.items()) + f"; limit {LEVEL:g}"
    details = [f"chi-square of {IDS**LENGTH} outcomes: {texts:,} texts of {LENGTH} tokens, each one of the ids {sampling.ids}"]
    status = "kept" if min(values.values()) >= LEVEL else "BROKEN"
    return Check("distribution", promise, status, figure, details, {"p_values": values, "samples": texts, "ids": sampling.ids})


def _restricted(subject: Subject, prompt: list[int]) -> Restricted:
    """Sampling from the `IDS` ids that the target finds likeliest after the prompt, with all but one from the draft vocabulary.

    The temperature flattens the distributions, so that no outcome has nearly all of the mass.
    """
    ids_K = subject.drafter.ids_K
    draft_ids = None if ids_K is None else tuple(ids_K.tolist())
    ranked = logits(subject.runner.rounds.target, prompt)[-1].argsort(descending=True).tolist()
    ids = ranked[:IDS]
    if draft_ids is not None:
        known = set(draft_ids)
        inside = [token for token in ranked if token in known]
        outside = [token for token in ranked[: 8 * IDS] if token not in known]
        ids = [*inside[: IDS - 1], *outside, *inside[IDS - 1 :]][:IDS]
    return Restricted(2.0, ids=tuple(sorted(ids)), draft_ids=draft_ids)


def _exact_distribution(runner: Runner, prompt: list[int], sampling: Restricted) -> np.ndarray:
    """[IDS, ..., IDS] probability of every text of `LENGTH` tokens under the target alone, in float64."""
    probabilities = np.ones(())
    for length in range(LENGTH):
        steps = [
            sampling.process(logits(runner.rounds.target, [*prompt, *text])[-1])[list(sampling.ids)].double().softmax(-1).cpu()
            for text in product(sampling.ids, repeat=length)
        ]
        probabilities = probabilities[..., None] * torch.stack(steps).numpy().reshape(*[IDS] * length, IDS)
    return probabilities


@torch.inference_mode()
def _sample(rounds: Rounds, prompt: list[int], plan: Plan, arguments: VerifyArguments, name: str) -> np.ndarray:
    """[IDS, ..., IDS] number of times that each text was sampled; the prompt is read once and shared by all texts."""
    # Read all but the last token of the prompt; the "sampled" first token is the last one, the only id that is allowed.
    ids, limit = plan.sampling.ids, len(prompt) + LENGTH  # type: ignore[attr-defined]
    slots = -(-(limit + plan.shape.slots + plan.shape.depth) // 64) * 64
    rounds.target.reserve_positions(slots)
    first = rounds.new_state(1, slots)
    first.limit_B.fill_(limit)
    first.ignore_end_B.fill_(True)
    forced = replace(plan, sampling=replace(plan.sampling, ids=(prompt[-1],)))  # type: ignore[call-arg]
    rounds.prefill(forced, first, [torch.tensor(prompt[:-1], device=rounds.device)], [0], [len(prompt) - 1])
    # Decode copies of that row, each with noise of its own
    counts, number = np.zeros((IDS,) * LENGTH), {token: index for index, token in enumerate(ids)}
    with tqdm(total=arguments.samples, desc=f"distribution, {name}", unit=" texts", disable=None, leave=False) as bar:
        for start in range(0, arguments.samples, ROWS):
            rows = range(start, min(start + ROWS, arguments.samples))
            state = first.map(partial(torch.repeat_interleave, repeats=len(rows), dim=0))
            state.keys_B2.copy_(torch.tensor([request_keys(arguments.seed, row, 1) for row in rows], dtype=torch.int32))
            texts: list[list[int]] = [[] for _ in rows]
            while not bool(state.done_B.all()):
                output = rounds(plan, state, slots)
                for text, emitted, count in zip(texts, output.emitted_BP.tolist(), output.counts_B.tolist(), strict=True):
                    text += emitted[:count]
            for text in texts:
                counts[tuple(number[token] for token in text[:LENGTH])] += 1
            bar.update(len(rows))
    return counts


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """P-value of Pearson's chi-square test; outcomes that are expected fewer than 5 times are pooled in groups of at least 5.

    0 if an outcome without probability occurred; 1 if fewer than two groups of outcomes remain.
    """
    expected, observed = probabilities.ravel() * counts.sum(), counts.ravel()
    if observed[expected < 1e-9].sum():
        return 0.0
    order, starts, total = np.argsort(-expected, kind="stable"), [0], 0.0
    for rank, index in enumerate(order.tolist()):
        if total >= 5:
            starts, total = [*starts, rank], 0.0
        total += expected[index]
    if total < 5 and len(starts) > 1:  # else one text in a rare last group would look like a fault
        starts.pop()
    observed, expected = np.add.reduceat(observed[order], starts), np.add.reduceat(expected[order], starts)
    degrees = len(expected) - 1
    if degrees < 1:
        return 1.0
    statistic = float(((observed - expected) ** 2 / np.maximum(expected, 1e-12)).sum())
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0).double(), torch.tensor(statistic / 2.0).double()))
