"""Acceptance sets whose labels depend on the hidden state in a way that the draft's own probability does not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.data.sets.acceptance import AcceptanceLayout, write_acceptance
from trainkit.data.sets.writer import SetJob, SetStats

LAYOUT = AcceptanceLayout(prompts=40, temperatures=(0.0, 1.0), part_prompts=8)
D = 12


def synthetic(numbers: Sequence[int], temperature: float, on_text: Callable[[int, bool], None]) -> dict[str, Tensor]:
    """20 to 26 records of each prompt, depending on its number; equal at each call. P(accept) = sigmoid(4 h_0 - 1).

    A second proposal is right in half of the cases where the first is wrong.
    """
    records = []
    for number in numbers:
        generator = torch.Generator().manual_seed(1000 * number + int(10 * temperature))
        n = 20 + number % 7
        hidden = torch.randn(n, D, generator=generator)
        signals = torch.rand(n, 2, 5, generator=generator)
        signals[..., -1] = temperature
        signals[..., 2] = torch.tensor([0.0, 1.0])  # the best other proposal's: it distinguishes a first from a second proposal
        first = (torch.rand(n, generator=generator) < (4 * hidden[:, 0] - 1).sigmoid()).float()
        label = torch.stack([first, (1 - first) * (torch.rand(n, generator=generator) < 0.5)], 1)
        records.append(
            {
                "hidden": hidden,
                "signals": signals,
                "depth": torch.arange(n).remainder(4).short(),
                "label": label,
                "max_q": torch.rand(n, generator=generator),
                "prompt": torch.full((n,), number, dtype=torch.int32),
            }
        )
        on_text(n, False)
    return {name: torch.cat([one[name] for one in records]) for name in records[0]}


def provenance(**changes: Any) -> dict[str, Any]:
    drafter = {"name": "draft", "kind": "lm", "files": {"model.safetensors": "0" * 64}}
    return {"drafter": drafter, "verify": "coupled", "depth": 4, "seed": 0, "versions": {"torch": "x"}} | changes


def write(folder: Path, record: Any = synthetic, rank: int = 0, world_size: int = 1, **changes: Any) -> SetStats:
    return write_acceptance(SetJob(folder, provenance(**changes), rank, world_size, progress=False), LAYOUT, record)


def make_set(folder: Path, **changes: Any) -> Path:
    write(folder, **changes)
    return folder
