"""Writes an acceptance predictor into the bundle of the drafter that it was trained for."""

# B batch  F frontier nodes  D hidden  W children  C signals

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
from trainkit.export.checks import check_finite, check_reload
from trainkit.models.predictor import FILE, SIGNALS, AcceptancePredictor, load_predictor


def export_predictor(predictor: AcceptancePredictor, drafter: Mapping[str, Any], out: str | Path) -> bundle.Bundle:
    """Writes a predictor into the bundle at `out`, replacing an older predictor, and returns the bundle.

    The bundle changes only after the reloaded predictor returned equal logits.

    Args:
        predictor: Trained predictor, float32, on the CPU.
        drafter: `drafter_fingerprint` of the bundle that the predictor was trained for.
        out: Folder of that bundle.

    Raises:
        UserError: `out` is not the bundle of that drafter, or the weights are not finite.
    """
    # Refuse weights that are not finite, and other drafters
    check_finite(predictor.state_dict().items())
    existing = bundle.read(out)
    if (files := drafter_fingerprint(existing)["files"]) != drafter["files"]:
        name = next(name for name in sorted({**files, **drafter["files"]}) if files.get(name) != drafter["files"].get(name))
        raise UserError(
            f"{out}: not the drafter that the predictor was trained for, {drafter['name']} ({name} differs); give that "
            "drafter's bundle, or train a predictor for this one"
        )

    # Write to a temporary folder, check it, and only then replace the bundle
    def write_files(folder: Path) -> None:
        (folder / FILE).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in predictor.state_dict().items()}, folder / FILE)
        reloaded = load_predictor(folder, predictor.config())
        check_reload(_first_outputs(predictor), _first_outputs(reloaded), out, "predictor")

    return bundle.amend(out, write_files, runner={**existing.runner, "predictor": predictor.config()})


@torch.inference_mode()
def _first_outputs(predictor: AcceptancePredictor) -> Tensor:
    """Its logits and recalibrated probabilities for fixed random states at temperatures 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    hidden_BFD = torch.randn(2, 8, predictor.hidden_size, generator=generator)
    signals_BFWC = torch.randn(2, 8, 3, SIGNALS, generator=generator)
    signals_BFWC[0, ..., -1], signals_BFWC[1, ..., -1] = 0.0, 1.0
    inputs = hidden_BFD, signals_BFWC, torch.arange(8).expand(2, 8)
    return torch.stack([predictor(*inputs), predictor.probability(*inputs)])
