"""vLLM's speculators library 0.9 loads an EAGLE-3 export with its target, and unrolls it as our training does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import outside
from tests.support.targets import make_target
from trainkit.drafters.base import DraftBatch
from trainkit.drafters.eagle import Eagle
from trainkit.export.drafter import export_drafter
from trainkit.losses.divergence import ForwardKL
from trainkit.models.target import FrozenTarget

pytestmark = pytest.mark.outside
STEPS, T = 3, 126  # T + STEPS - 1 tokens: flex attention wants a multiple of 128
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full vocabulary": ({}, {}),
    "trimmed vocabulary": ({}, {"draft_vocab": list(range(3, 320, 3))}),
    "taps and rope": ({"rope_parameters": outside.ROPES["llama3"]}, {"taps": [1, 3, 6]}),
}
"""Name -> fields of the target's config, arguments of the draft."""


def unrolled(draft: Eagle, teacher: FrozenTarget, tokens: Tensor, taps: Tensor) -> Tensor:
    """[steps, T, K] logits of training's unrolled steps."""
    zeros, mask = torch.zeros_like(tokens), torch.ones_like(tokens, dtype=torch.bool)
    positions, hidden = torch.arange(tokens.shape[1])[None], torch.zeros(*tokens.shape, teacher.shape().decoder.hidden_size)
    features: list[Tensor] = []
    step = draft.layer.unrolled

    def recording(*arguments: Any) -> Any:
        feature, entry = step(*arguments)
        features.append(feature)
        return feature, entry

    draft.layer.unrolled = recording
    with torch.no_grad():
        draft.eval()(DraftBatch(tokens, positions, zeros, mask, taps, hidden, teacher.handle()), ForwardKL())
        return torch.stack([draft.lm_head(draft.norm(feature))[0] for feature in features])


@pytest.mark.parametrize("name", CASES)
def test_unrolled_forward_equals_ours(name, seed, tmp_path: Path):
    """`Eagle3DraftModel.from_pretrained` loads the folder; tap ids, token ids and logits of three unrolled steps are ours."""
    fields, options = CASES[name]
    target = make_target(tmp_path / "target", num_hidden_layers=8, **fields)
    teacher = FrozenTarget(target)
    draft = Eagle(teacher.shape(), steps=STEPS, **options)
    for weight in draft.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.1)
    out = export_drafter(draft, tmp_path / "out", tokenizer=target, format="speculators")
    tokens, taps = torch.randint(320, (1, T + STEPS)), torch.randn(1, T + STEPS, len(draft.taps), 64)
    request = {
        "folder": str(out.path),
        "tokens": tokens[0].tolist(),
        "steps": STEPS,
        "hidden": taps[0, :-1].flatten(1).tolist(),
    }
    theirs = outside.ask("speculators", "speculators_eagle", request)
    assert theirs["version"].startswith("0.9.") and theirs["taps"] == list(draft.taps)
    assert (theirs["verifier"], theirs["verifier_loaded"]) == (str(target), True)
    if draft.ids_K is not None:
        assert (torch.tensor(theirs["d2t"]) + torch.arange(len(draft.ids_K))).tolist() == draft.ids_K.tolist()
    ours = unrolled(draft, teacher, tokens, taps)[:, :T]
    assert ours.std() > 0.1
    torch.testing.assert_close(torch.tensor(theirs["logits"])[:, :T], ours, atol=1e-4, rtol=0)
