"""`trainkit eval`: exact acceptance of drafters on given texts, and tau as served, with bootstrap intervals."""

# B batch rows  T positions  N counted tokens  Q questions (documents)

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.teacher.live import TargetReader
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.prepare import prepare
from trainkit.data.text.prompts import read_prompts
from trainkit.errors import UserError
from trainkit.eval import bootstrap
from trainkit.eval.acceptance import Sums, measure, served
from trainkit.files import write_json
from trainkit.models.load import find_device, read_config
from trainkit.models.target import FrozenTarget
from trainkit.runner.engine import load_drafter


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
        trainkit eval --target models/target --drafter models/a --drafter models/b --data data/test_t1 --json eval.json

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        data: Texts with the tokens that count marked, as `data.train` takes them; best the target's own answers.
        drafter: Drafter bundles; repeat the flag for several.
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
    where = find_device(device)
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
        write_json(json, values)
    return _table(rows, values)


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
