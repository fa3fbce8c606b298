"""Exact acceptance of drafters on given texts, and tau as served, question by question, with intervals.

The texts are read once by the target and once by each drafter (teacher-forced), so every token counts, also those that a
runner would not reach after a rejection. Give the target's own answers (`trainkit distill` on held-out prompts) to measure
what is served; reference answers measure how the draft follows a text that the target would not write.
"""

# B batch rows  T positions  N counted tokens  Q questions (documents)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainkit.data.teacher.live import FeatureStore, TargetReader
from trainkit.data.text.packing import PackedSet
from trainkit.drafters.base import DraftBatch, Drafter
from trainkit.errors import UserError
from trainkit.losses.divergence import ForwardKL
from trainkit.losses.output import LossOutput
from trainkit.models.load import load_decoder
from trainkit.runner import Runner

Sums = dict[str, np.ndarray]


"""`tokens`, and by name the sum over each question's tokens [Q]; of one drafter, or of one of its heads."""


def served(
    target: str,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    depth: int,
    max_new_tokens: int,
    device: str = "cpu",
) -> Sums:
    """Emitted tokens and rounds of each question, `tau_coupled@T` and `tau_residual@T` [2, Q]; tau is their sums' ratio.

    Counted as `Stats.tau` does: without prefill's token and without a last round that length or end cut.
    """
    shape = drafter.target
    decoder = load_decoder(Path(target), torch.device(device), torch.float32)
    room = max(map(len, prompts)) + max_new_tokens
    runner, depth = Runner.from_modules(decoder, drafter, shape, Path(target), 16, room), min(depth, drafter.max_depth or depth)
    sums: Sums = {}
    for temperature in temperatures:
        for verify in ("coupled", "residual") if temperature else ("coupled",):
            outputs = runner.generate(prompts, max_new_tokens, temperature, depth=depth, verify=verify, progress=True)
            emitted = [output.stats.rounds * output.stats.tau if output.stats.rounds else 0.0 for output in outputs]
            sums[f"tau_{verify}@{temperature:g}"] = np.array([emitted, [float(o.stats.rounds) for o in outputs]])
    return sums


@torch.inference_mode()
def measure(
    reader: TargetReader,
    drafters: Sequence[Drafter],
    packed: PackedSet,
    temperatures: Sequence[float],
    batch: int = 8,
    name: str = "",
    progress: bool = True,
) -> list[list[Sums]]:
    """Sums by question of each drafter's heads: `alpha@T` and `alpha_coupled@T` for T above 0, `agreement@0`; and `tokens`.

    Of a drafter with one prediction a position, whatever the depth, that is one entry.

    Args:
        reader: The target; what it says is kept under `name` where it has a folder.
        drafters: All for this target; read in one pass.
        packed: Questions are its documents, in stored order.
        temperatures: Of both distributions.
        batch: Packed rows at once.
        name: Of the packed set.
        progress: Show a bar.

    Raises:
        UserError: a kind whose loss does not tell its tokens apart.
    """
    from tqdm import tqdm

    questions, device = len(packed.documents_D) - 1, reader.target.device
    found: list[list[Sums]] = [[] for _ in drafters]
    starts = range(0, len(packed), batch)
    for start in tqdm(starts, desc="eval", unit=" batches", disable=not progress or None, delay=2):
        rows = list(range(start, min(start + batch, len(packed))))
        tensors = {key: value.to(device) for key, value in packed.batch(rows, len(rows)).items()}
        firsts_B = torch.as_tensor(packed.rows_R[rows], device=device)
        said: dict[tuple[int, ...], DraftBatch] = {}
        for heads, drafter in zip(found, drafters, strict=True):
            taps = tuple(drafter.taps)
            if taps not in said:
                said[taps] = _seen(reader, tensors, taps, packed, name)
            numbers_BT = (said[taps].document_BT + firsts_B[:, None]).cpu()
            for number, (counted_BT, values) in enumerate(_values(drafter, said[taps], temperatures)):
                if number == len(heads):
                    heads.append({})
                question_N = numbers_BT[counted_BT].numpy()
                for key, value_N in {"tokens": torch.ones(len(question_N)), **values}.items():
                    total = np.bincount(question_N, value_N.double().numpy(), questions)
                    heads[number][key] = heads[number][key] + total if key in heads[number] else total
    return found


def _seen(reader: TargetReader, tensors: Mapping[str, Tensor], taps: Sequence[int], packed: PackedSet, name: str) -> DraftBatch:
    store: FeatureStore | None = reader.store(f"{name} eval", packed, taps)
    return DraftBatch.read(reader, tensors, taps, store)


def _values(drafter: Drafter, seen: DraftBatch, temperatures: Sequence[float]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Of each head where its tokens count [B, T], and their measures [N]; on the CPU."""
    heads: list[tuple[Tensor, dict[str, Tensor]]] = []
    for temperature in sorted(set(temperatures), reverse=True):
        if temperature == 0 and heads:
            continue
        divergence = ForwardKL(temperature=temperature or 1.0, chunk=256)
        output = drafter(seen, divergence.measuring(coupled=True) if temperature else divergence)
        told = _by_head(drafter, seen, output)
        heads = heads or [(counted_BT, {}) for counted_BT, _ in told]
        for (_, values), (_, given) in zip(heads, told, strict=True):
            if temperature:
                values |= {f"{key}@{temperature:g}": given[key] for key in ("alpha", "alpha_coupled")}
            if 0 in temperatures:
                values["agreement@0"] = given["agreement"]
    return heads


def _by_head(drafter: Drafter, seen: DraftBatch, output: LossOutput) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    given = {name.removesuffix("_HBT"): value.cpu() for name, value in output.per_token.items()}
    if "counted" in given:
        counted_HBT = given.pop("counted")
        return [
            (counted_BT, {name: value[head][counted_BT] for name, value in given.items()})
            for head, counted_BT in enumerate(counted_HBT)
        ]
    counted_BT = seen.label_mask(1).cpu()
    if len(given.get("agreement", ())) != int(counted_BT.sum()):
        raise UserError(f"{type(drafter).__name__}: its loss does not tell its tokens apart; eval cannot sort them by question")
    return [(counted_BT, given)]
