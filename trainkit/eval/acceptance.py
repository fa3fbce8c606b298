"""Exact acceptance of drafters on given texts, and tau from decoding, as sums for each question.

The target and each drafter read the texts once, teacher-forced, so every token counts, including those that decoding would not
reach after a rejection. The target's own answers (`trainkit distill` on held-out prompts) measure acceptance as it is in
decoding; reference answers measure it on texts that the target would not write.
"""

# B batch rows  T positions  N counted tokens  Q questions (documents)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainkit.data.teacher.live import LiveTeacher
from trainkit.data.text.packing import PackedSet
from trainkit.drafters.base import DraftBatch, Drafter
from trainkit.errors import UserError
from trainkit.eval.bench.timing import Prompts
from trainkit.losses.divergence import ForwardKL
from trainkit.losses.output import LossOutput
from trainkit.models.load import load_decoder
from trainkit.runner import Runner

Sums = dict[str, np.ndarray]
"""For a drafter or one of its heads: `tokens`, the number of counted tokens of each question [Q]; sums by measure [Q]."""


def decode_tau(
    target: str,
    drafter: Drafter,
    prompts: Prompts,
    temperatures: Sequence[float],
    depth: int,
    max_new_tokens: int,
    max_len: int,
) -> Sums:
    """`tau_coupled@T` and `tau_residual@T` [2, Q]: tokens emitted and rounds of each question; tau is the ratio of their sums.

    As in `Stats.tau`, prefill's token and a last round cut by length or end token are not counted. `max_len` is the largest
    number of tokens of a prompt and its answer.
    """
    decoder = load_decoder(Path(target), next(drafter.parameters()).device, torch.float32, max_len)
    runner, depth = Runner(decoder, drafter, drafter.target, Path(target), 16, max_len), min(depth, drafter.max_depth or depth)
    sums: Sums = {}
    for temperature in temperatures:
        for verify in ("coupled", "residual") if temperature else ("coupled",):
            outputs = runner.generate(prompts, max_new_tokens, temperature, depth=depth, verify=verify, progress=True)
            counts = [(s.rounds * s.tau if s.rounds else 0.0, float(s.rounds)) for s in (output.stats for output in outputs)]
            sums[f"tau_{verify}@{temperature:g}"] = np.array(counts).T
    return sums


@torch.inference_mode()
def measure(
    reader: LiveTeacher, drafters: Sequence[Drafter], packed: PackedSet, temperatures: Sequence[float], batch: int, name: str
) -> list[list[Sums]]:
    """For each drafter the `Sums` of each of its heads: `tokens`, `alpha@T` and `alpha_coupled@T` for T > 0, `agreement@0`.

    A drafter that makes one prediction per position, whatever its depth, has a single entry. All drafters are measured in one
    pass over the texts. The documents of `packed` are the questions, in stored order; `batch` packed rows are read together. If
    the reader has a cache folder, it caches the target's hidden states under `name`.

    Raises:
        UserError: a drafter kind whose loss gives no values per token.
    """
    from tqdm import tqdm

    questions, device = len(packed.documents_D) - 1, reader.target.device
    sums: list[list[Sums]] = [[] for _ in drafters]
    starts = range(0, len(packed), batch)
    for start in tqdm(starts, desc="alpha", unit=" batches", disable=None, delay=2):
        # read the batch, and the target's states for it
        rows = list(range(start, min(start + batch, len(packed))))
        tensors = {key: value.to(device) for key, value in packed.batch(rows, len(rows)).items()}
        first_question_B = torch.as_tensor(packed.rows_R[rows], device=device)
        batches: dict[tuple[int, ...], DraftBatch] = {}  # by taps: drafters that read the same states share a batch
        for heads, drafter in zip(sums, drafters, strict=True):
            taps = tuple(drafter.taps)
            if taps not in batches:
                batches[taps] = DraftBatch.read(reader, tensors, taps, reader.open_store(f"{name} eval", packed, taps))
            question_BT = (batches[taps].document_BT + first_question_B[:, None]).cpu()
            # add the values of each head's counted tokens to the sums of their questions
            for number, (counted_BT, values) in enumerate(_values(drafter, batches[taps], temperatures)):
                if number == len(heads):
                    heads.append({})
                question_N = question_BT[counted_BT].numpy()
                for key, value_N in {"tokens": torch.ones(len(question_N)), **values}.items():
                    total_Q = np.bincount(question_N, value_N.double().numpy(), questions)
                    heads[number][key] = heads[number].get(key, 0) + total_Q
    return sums


def _values(drafter: Drafter, batch: DraftBatch, temperatures: Sequence[float]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """For each head the mask of its counted tokens [B, T], and the measures of those tokens [N]; on the CPU."""
    heads: list[tuple[Tensor, dict[str, Tensor]]] = []
    for temperature in sorted(set(temperatures), reverse=True):
        if temperature == 0 and heads:  # agreement was measured at the first temperature
            continue
        divergence = ForwardKL(temperature=temperature or 1.0, chunk=256)
        output = drafter(batch, divergence.measuring(coupled=True) if temperature else divergence)
        by_head = per_head(drafter, batch, output)
        heads = heads or [(counted_BT, {}) for counted_BT, _ in by_head]
        for (_, values), (_, measured) in zip(heads, by_head, strict=True):
            if temperature:
                values |= {f"{key}@{temperature:g}": measured[key] for key in ("alpha", "alpha_coupled")}
            if 0 in temperatures:
                values["agreement@0"] = measured["agreement"]
    return heads


def per_head(drafter: Drafter, batch: DraftBatch, output: LossOutput) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    """The per-token values of a loss, separated by head."""
    per_token = {name.removesuffix("_HBT"): value.cpu() for name, value in output.per_token.items()}
    if "counted" in per_token:
        heads = enumerate(per_token.pop("counted"))
        return [(mask_BT, {name: value[head][mask_BT] for name, value in per_token.items()}) for head, mask_BT in heads]
    counted_BT = batch.label_mask(1).cpu()
    if len(per_token.get("agreement", ())) != int(counted_BT.sum()):
        raise UserError(
            f"{type(drafter).__name__}: its loss gives no values per token; trainkit alpha needs them for each question"
        )
    return [(counted_BT, per_token)]
