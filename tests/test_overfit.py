"""Each kind, trained on eight short dialogues that the target wrote greedily, then drafts nearly all of them in the runner.

This is the strongest single check that training and serving agree: with a mask shifted by one position, another tap or another
position, a drafter is right in training and wrong in the runner.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainkit.drafters.base import DraftBatch, load_kind
from trainkit.export.drafter import export_drafter
from trainkit.losses.divergence import CrossEntropy
from trainkit.models.target import FrozenTarget
from trainkit.runner import Runner, Stats

DEPTH = 3
QUESTIONS = [
    "How many clips did she sell?",
    "Natalia sold 48",
    "What is half of 12?",
    "In May, how many?",
    "Add 7 and 5.",
    "Friends?",
    "She sold half as many.",
    "Altogether, how many clips in April and May?",
]
KINDS = {
    "lm": ("lm", {"num_layers": 2}),
    "medusa": ("medusa", {"num_heads": DEPTH}),
    "hydra": ("hydra", {"num_heads": DEPTH}),
    "hydra++": ("hydra", {"num_heads": DEPTH, "prefix": True, "num_layers": 2}),
    "eagle": ("eagle", {"steps": DEPTH}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_overfitted_tau_is_near_its_bound(name: str, tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Overfitted to a few dialogues, a drafter's tau is within a tenth of its bound."""
    teacher = FrozenTarget(tiny_target)
    plain = Runner.load(tiny_target, max_len=128)
    prompts = [f"<|user|>{question}<|assistant|>" for question in QUESTIONS]
    answers = [output.tokens for output in plain.generate(prompts, max_new_tokens=24, ignore_end=True)]
    read = [plain.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(read, answers, strict=True))
    tokens, document = torch.zeros(8, length, dtype=torch.long), torch.full((8, length), -1)
    mask = torch.zeros(8, length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(read, answers, strict=True)):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        document[row, : len(prompt) + len(answer)] = 0
        mask[row, len(prompt) : len(prompt) + len(answer)] = True
    positions = torch.arange(length).expand(8, -1)

    kind, options = KINDS[name]
    drafter = load_kind(kind)(teacher.shape(), **options)
    drafter.initialise(FrozenTarget(tiny_target))
    hidden, taps = teacher.forward(tokens, positions, document, drafter.taps)
    batch = DraftBatch(tokens, positions, document, mask, taps, hidden, teacher.handle())
    steps = 1200
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        output = drafter(batch, CrossEntropy())
        output.mean.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    export_drafter(drafter, tmp_path / "out", tokenizer=tiny_target)
    runner = Runner.load(tiny_target, tmp_path / "out", max_len=128)
    outputs = runner.generate(prompts, max_new_tokens=24, ignore_end=True, depth=DEPTH)
    assert [output.tokens for output in outputs] == answers
    tau = Stats.merge(output.stats for output in outputs).tau
    print(f"{name}: tau {tau:.3f} at depth {DEPTH}, last loss {float(output.mean):.4f}")
    assert tau >= 0.9 * (DEPTH + 1), tau
