"""An acceptance predictor into the bundle of the drafter that it was trained for."""

# B batch  D hidden  C signals

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainkit import bundle
from trainkit.data.sets.acceptance import drafter_fingerprint
from trainkit.errors import UserError
from trainkit.models.predictor import FILE, SIGNALS, AcceptancePredictor, load_predictor


def export_predictor(predictor: AcceptancePredictor, drafter: Mapping[str, Any], out: str | Path) -> bundle.Bundle:
    """Writes a predictor into the bundle at `out`, in place of an older one, and returns the bundle.

    The bundle is as it was unless the predictor, reloaded, gives equal logits.

    Args:
        predictor: Trained, in float32 on the CPU.
        drafter: `drafter_fingerprint` of the bundle that it was trained for.
        out: That bundle.

    Raises:
        UserError: another drafter's bundle, or none, or weights that are not finite.
    """
    for name, value in predictor.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"checkpoint: {name} holds values that are not finite; export an earlier checkpoint")
    found = bundle.read(out)
    if (files := drafter_fingerprint(found)["files"]) != drafter["files"]:
        name = next(name for name in sorted({**files, **drafter["files"]}) if files.get(name) != drafter["files"].get(name))
        raise UserError(
            f"{out}: not the drafter that the predictor was trained for, {drafter['name']} (its {name} is another); give that "
            "one's bundle, or train a predictor for this one"
        )

    def fill(folder: Path) -> None:
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in predictor.state_dict().items()}, folder / FILE)
        again = load_predictor(folder, predictor.config())
        difference = (first_probabilities(predictor) - first_probabilities(again)).abs().max().item()
        if not difference == 0:  # the same code on the same numbers
            raise UserError(f"{out}: the reloaded predictor's word differs by {difference:.3g}; nothing was written")

    return bundle.extend(out, fill, runner={**found.runner, "predictor": predictor.config()})


@torch.inference_mode()
def first_probabilities(predictor: AcceptancePredictor) -> Tensor:
    """Its word, as logits and recalibrated, on fixed random states at temperatures 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    hidden_BFD = torch.randn(2, 8, predictor.hidden_size, generator=generator)
    signals_BFWC = torch.randn(2, 8, 3, SIGNALS, generator=generator)
    signals_BFWC[0, ..., -1], signals_BFWC[1, ..., -1] = 0.0, 1.0
    depth_BF = torch.arange(8).expand(2, 8)
    given = hidden_BFD, signals_BFWC, depth_BF
    return torch.stack([predictor(*given), predictor.probability(*given)])
