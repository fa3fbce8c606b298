"""`trainkit eval`: exact acceptance of drafters on given texts, and tau as served, question by question, with intervals.

The texts are read once by the target and once by each drafter (teacher-forced), so every token counts, also those that a
runner would not reach after a rejection. Give the target's own answers (`trainkit distill` on held-out prompts) to measure
what is served; reference answers measure how the draft follows a text that the target would not write.
"""

# B batch rows  T positions  N counted tokens  Q questions (documents)

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.data.teacher.live import FeatureStore, TargetReader
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.packing import PackedSet
from trainkit.data.text.prepare import prepare
from trainkit.data.text.prompts import read_prompts
from trainkit.drafters.base import DraftBatch, Drafter
from trainkit.errors import UserError
from trainkit.eval import bootstrap
from trainkit.losses.divergence import ForwardKL
from trainkit.losses.output import LossOutput
from trainkit.models.load import device_of, load_decoder, read_config
from trainkit.models.target import FrozenTarget
from trainkit.runner import Runner
from trainkit.runner.engine import load_drafter

Sums = dict[str, np.ndarray]
"""`tokens`, and by name the sum over each question's tokens [Q]; of one drafter, or of one of its heads."""


def evaluate(
    *,
    target: str,
    data: str,
    drafter: list[str],
    temperatures: tuple[float, ...] = (0.0, 1.0),
    length: int = 1024,
    batch: int = 8,
    limit: int | None = None,
    columns: dict[str, str] | None = None,
    prompts: str | None = None,
    questions: int = 100,
    depth: int = 4,
    max_new_tokens: int = 256,
    teacher_cache: str | None = None,
    device: str = "cpu",
    json: str | None = None,
) -> str:
    """Exact acceptance of one or more drafters on given texts: alpha (residual verification), alpha_coupled, agreement.

    Prints the mean over counted tokens with a 95 % bootstrap interval over questions, and each drafter's difference to the
    first one, questions paired. At temperature 0 both alphas are argmax agreement. A drafter of several heads, or steps, has a
    line for each: how well it says the token so many places on; teacher-forced, a draft model says all of them alike. With
    prompts also tau, tokens per round of a chain of `depth`, by decoding them: with both verifications where the temperature
    is above 0.

    Examples:
        trainkit distill --target models/target --prompts test.jsonl --out data/test_t1 --temperatures [1]
        trainkit eval --target models/target --drafter [models/a,models/b] --data data/test_t1 --json eval.json

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        data: Texts with the tokens that count marked, as `data.train` takes them; best the target's own answers.
        drafter: Drafter bundles, [one,another].
        temperatures: Of both distributions.
        length: Tokens in a packed row; longer texts are cut.
        batch: Packed rows at once.
        limit: First rows of the data to take.
        columns: Our column names -> the file's.
        prompts: Rows to decode for tau.
        questions: First prompts to take.
        depth: Tokens drafted a round; fewer where a drafter has fewer heads.
        max_new_tokens: Most tokens of a decoded answer.
        teacher_cache: Folder that keeps the target's states, for the next call on the same data.
        device: Torch device.
        json: File for all figures, per question too.
    """
    for temperature in temperatures:
        if temperature < 0:
            raise UserError(f"--temperatures: {temperature} must be at least 0")
    if not temperatures or not drafter:
        raise UserError("give at least one of --temperatures and of --drafter")
    if batch < 1:
        raise UserError(f"--batch: {batch} must be at least 1")
    if depth < 1:
        raise UserError(f"--depth: {depth} must be at least 1")
    if json is not None and not Path(json).resolve().parent.is_dir():
        raise UserError(f"--json {json}: there is no such folder to write to; make it first")
    where = device_of(device)
    read_config(target)  # a missing folder would be looked for on the hub, as a tokenizer's name
    tokenizer = load_tokenizer(target)
    made = prepare([data], None, tokenizer, length, columns=columns, validation_share=0.0, limit=limit)
    teacher = FrozenTarget(target).to(where)
    if length > (covered := teacher.shape().decoder.max_positions):
        raise UserError(f"--length: {length}, but the target covers {covered} positions")
    reader = TargetReader(teacher, teacher_cache)
    networks = [load_drafter(Path(folder), Path(target), teacher.shape()).to(device).eval() for folder in drafter]
    found = measure(reader, networks, made.train, temperatures, batch, made.fingerprint)
    if prompts is not None:
        given = read_prompts(prompts, tokenizer, questions, columns)
        for (first, *_), network in zip(found, networks, strict=True):
            first |= served(target, network, given, temperatures, depth, max_new_tokens, device)
    rows = [
        (folder if number == 1 else f"{folder} head {number}", sums)
        for folder, heads in zip(drafter, found, strict=True)
        for number, sums in enumerate(heads, start=1)
    ]
    values = {
        "target": target,
        "data": data,
        "temperatures": list(temperatures),
        "questions": len(made.train.documents_D) - 1,
        "tokens": int(made.train.labels_R.sum()),
        "fingerprint": made.fingerprint,
        "drafters": {
            name: {"means": _means(sums), "per_question": {key: value.round(5).tolist() for key, value in sums.items()}}
            for name, sums in rows
        },
    }
    if json is not None:
        Path(json).write_text(json_module.dumps(values) + "\n", encoding="utf-8")
    return _table(rows, values)


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
    runner, depth = Runner.of(decoder, drafter, shape, Path(target), 16, room), min(depth, drafter.max_depth or depth)
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
    hidden_BTD, taps_BTAD = reader.read(tensors, taps, store)
    return DraftBatch(
        tensors["tokens_BT"],
        tensors["positions_BT"],
        tensors["document_BT"],
        tensors["mask_BT"],
        taps_BTAD,
        hidden_BTD,
        reader.handle(),
    )


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


def _over(sums: Sums, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A measure's sums by question, and what they are divided by: tokens, or rounds for tau."""
    return (sums[name][0], sums[name][1]) if name.startswith("tau") else (sums[name], sums["tokens"])


def _means(sums: Sums) -> dict[str, dict[str, float]]:
    means = {}
    for name in sums:
        if name != "tokens":
            interval = bootstrap.mean(*_over(sums, name))
            means[name] = {"mean": interval.value, "low": interval.low, "high": interval.high}
    return means


def _table(rows: Sequence[tuple[str, Sums]], values: dict[str, Any]) -> str:
    (first_name, first), *others = rows
    measures = [name for name in first if name != "tokens"]
    wide = max(len(name) for name, _ in rows)
    lines = [f"{values['questions']:,} texts, {values['tokens']:,} tokens; mean [95 % interval over texts]", ""]
    lines.append(" " * wide + "".join(f"  {name:>26}" for name in measures))
    for name, sums in rows:
        means = values["drafters"][name]["means"]
        cells = ["{mean:.4f} [{low:.4f}, {high:.4f}]".format(**means[m]) if m in sums else "" for m in measures]
        lines.append(f"{name:<{wide}}" + "".join(f"  {cell:>26}" for cell in cells).rstrip())
    if others:
        lines += ["", f"difference to {first_name}, paired:"]
        for name, sums in others:
            cells = [str(bootstrap.gap(_over(sums, m), _over(first, m))) if m in sums else "" for m in measures]
            lines.append(f"{name:<{wide}}" + "".join(f"  {cell:>26}" for cell in cells).rstrip())
    return "\n".join(lines)
