"""`trainkit alpha`: exact acceptance of drafters on given texts, and tau from decoding, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.commands.distill import check_sampling
from trainkit.data.sets.writer import check_positive
from trainkit.data.teacher.live import LiveTeacher
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.prepare import prepare
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.eval import bootstrap
from trainkit.eval.acceptance import Sums, decode_tau, measure
from trainkit.eval.bench.table import grid
from trainkit.eval.lengths import prompts_that_fit
from trainkit.files import write_json
from trainkit.models.load import find_device, read_config
from trainkit.models.target import FrozenTarget
from trainkit.runner.engine import load_drafter


def alpha(
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
    max_len: int | None = None,
    teacher_cache: str | None = None,
    device: str = "auto",
    json: str | None = None,
) -> str:
    """Exact acceptance of drafters on given texts: alpha (residual verification), alpha_coupled, and argmax agreement.

    Prints means over counted tokens with 95 % bootstrap intervals over questions, and each drafter's difference from the first
    one on the same questions. At temperature 0 both alphas equal argmax agreement. A drafter with several heads or steps has a
    line for each, which measures its prediction of the token that many positions ahead; a draft model has one line, because
    teacher-forced predictions do not depend on depth. With prompts, also tau: tokens per round when they are decoded with
    chains of `depth`, with both verification methods above temperature 0.

    Examples:
        trainkit distill --target models/target --prompts test.jsonl --out data/test_t1 --temperatures [1]
        trainkit alpha --target models/target --drafter models/a --drafter models/b --data data/test_t1 --json alpha.json

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        data: Texts with a loss mask, in the formats of `data.train`; preferably the target's own answers.
        drafter: Drafter bundles; repeat the flag for several.
        temperatures: Temperatures of target and draft distribution, as a JSON list.
        length: Tokens in a packed row; longer texts are cut.
        batch: Packed rows per forward pass.
        limit: Number of rows of the data to use, from the start.
        columns: Column mapping, from trainkit's names to the file's.
        prompts: File of prompts to decode for tau.
        questions: Number of prompts to decode, from the start of the file.
        depth: Number of tokens drafted per round, at most the drafter's number of heads.
        max_new_tokens: Maximum number of tokens of a decoded answer.
        max_len: Prompts to decode that need more positions, answer included, are left out; by default none may.
        teacher_cache: Folder that caches the target's hidden states for later runs on the same data.
        device: Torch device; `auto` uses a GPU if there is one.
        json: File for all figures, including those of each question.
    """
    # check the arguments
    temperatures = check_sampling(temperatures)
    if not drafter:
        raise UserError("--drafter: give at least one")
    check_positive(batch=batch, depth=depth, limit=limit, questions=questions, max_new_tokens=max_new_tokens)
    if json is not None and not Path(json).resolve().parent.is_dir():
        raise UserError(f"--json {json}: its folder does not exist; make it first")
    # load texts, target and drafters
    torch_device = find_device(device)
    read_config(target)  # otherwise a missing folder's name would be looked up on the hub as a tokenizer
    tokenizer = load_tokenizer(target)
    prepared = prepare([data], None, tokenizer, length, columns=columns, validation_share=0.0, limit=limit)
    prepared.report.warn()
    teacher = FrozenTarget(target).to(torch_device)
    if length > (covered := teacher.shape().decoder.max_positions):
        raise UserError(f"--length: {length}, but the target covers {covered} positions")
    reader = LiveTeacher(teacher, teacher_cache)
    shape, load = teacher.shape(), partial(load_drafter, packed=False)
    networks = [load(Path(folder), Path(target), shape).to(torch_device).eval() for folder in drafter]
    # measure
    note = ""
    measured = measure(reader, networks, prepared.train, temperatures, batch, prepared.fingerprint)
    if prompts is not None:
        rows = read_prompts(prompts, tokenizer, questions, columns)
        rows, longest, note = prompts_that_fit(rows, max_new_tokens, max_len, target, prompts)
        for (first_head, *_), network in zip(measured, networks, strict=True):
            first_head |= decode_tau(target, network, rows, temperatures, depth, max_new_tokens, longest)
    by_head = [
        (folder if number == 1 else f"{folder} head {number}", sums)
        for folder, heads in zip(drafter, measured, strict=True)
        for number, sums in enumerate(heads, start=1)
    ]
    values = {
        "target": target,
        "data": data,
        "temperatures": list(temperatures),
        "questions": len(prepared.train.documents_D) - 1,
        "tokens": int(prepared.train.labels_R.sum()),
        "fingerprint": prepared.fingerprint,
        "drafters": {
            name: {"means": _means(sums), "per_question": {key: value.round(5).tolist() for key, value in sums.items()}}
            for name, sums in by_head
        },
    }
    if json is not None:
        write_json(json, values)
    return "\n\n".join([_report(by_head, values), *([note] if note else [])])


def _ratio(sums: Sums, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A measure's sums by question, and their divisors: counted tokens, or rounds for tau."""
    return (sums[name][0], sums[name][1]) if name.startswith("tau") else (sums[name], sums["tokens"])


def _means(sums: Sums) -> dict[str, dict[str, float]]:
    intervals = {name: bootstrap.mean(*_ratio(sums, name)) for name in sums if name != "tokens"}
    return {name: {"mean": interval.value, "low": interval.low, "high": interval.high} for name, interval in intervals.items()}


def _report(by_head: Sequence[tuple[str, Sums]], values: dict[str, Any]) -> str:
    (first_name, first), *others = by_head
    measures = [name for name in first if name != "tokens"]

    def table(heads: Sequence[tuple[str, Sums]], cell: Callable[[str, Sums, str], str]) -> str:
        rows = [[name, *(cell(name, sums, measure) if measure in sums else "" for measure in measures)] for name, sums in heads]
        return grid([["", *measures], *rows])

    mean = lambda name, _, measure: "{mean:.4f} [{low:.4f}, {high:.4f}]".format(**values["drafters"][name]["means"][measure])
    lines = [
        f"{values['questions']:,} texts, {values['tokens']:,} tokens; mean [95 % interval over texts]",
        table(by_head, mean),
    ]
    if others:
        gap = lambda _, sums, measure: str(bootstrap.gap(_ratio(sums, measure), _ratio(first, measure)))
        lines += [f"difference from {first_name}, on the same texts:", table(others, gap)]
    return "\n\n".join(lines)
