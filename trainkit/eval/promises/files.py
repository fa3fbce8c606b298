"""The promises about files: a bundle is intact and fits its target, and each export format reloads to the same drafter."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from trainkit import bundle as bundles
from trainkit.drafters.base import kind_name, load_outside
from trainkit.errors import UserError
from trainkit.eval.bench.identity import logits
from trainkit.eval.bench.transformers import load_model
from trainkit.eval.promises.types import Check, Subject
from trainkit.export.checks import ReloadError
from trainkit.export.drafter import export_drafter, first_logits
from trainkit.runner.engine import load_drafter


def check_files(subject: Subject) -> Check:
    """Reads every file again and compares its checksum; compares the target with the one that the bundle was made for.

    A bundle does not record the weights of its target, so another target of the same configuration is not recognised.
    """
    promise = "Every file is as it was written, and the drafter was made for a target of this vocabulary and tokenizer."
    if subject.bundle is None:
        return Check("files", promise, "measured", "not a trainkit bundle, so it has no checksums")
    bundle, shape = bundles.read(subject.folder), subject.runner.shape
    notes = bundles.check_fit(bundle, shape.fingerprint or {}, shape.decoder.to_dict()) if bundle.target else []
    fit = "; ".join(notes) or "made for a target of this configuration and tokenizer"
    figure = f"{len(bundle.files)} files, all checksums agree; {fit}"
    return Check("files", promise, "kept", figure, counts={"files": len(bundle.files), "notes": notes})


@torch.inference_mode()
def check_formats(subject: Subject) -> Check:
    """Exports the drafter in each of its formats to a temporary folder, and reloads it.

    The exporter compares names and shapes with the format, and the logits of the reloaded drafter with those before. A format
    that a kind also recognises without trainkit.json is loaded once more without it, as another program's folder. A draft
    model is loaded by transformers too, and its logits on the prompts are compared with those of our own decoder.
    """
    promise = "Each export format reloads to the same logits, in trainkit and in transformers where it can load the format."
    # A copy in float32 on the CPU: exporting casts and moves it
    shape = subject.runner.shape
    drafter = load_drafter(subject.folder, subject.target_folder, shape, packed=False).float()
    by_layout: dict[str, list[str]] = {}
    # Formats by layout: formats with the same layout write the same files
    for format, layout in drafter.formats.items():
        by_layout.setdefault(layout, []).append(format)
    details, broken, before = [], 0, first_logits(drafter)
    with tempfile.TemporaryDirectory() as temporary:
        for formats in by_layout.values():
            name, folder = ", ".join(formats), Path(temporary) / formats[0]
            # Export, which reloads the files and compares the logits
            try:
                export_drafter(
                    drafter, folder, tokenizer=subject.target_folder, target=subject.target_folder, format=formats[-1]
                )
            except ReloadError as error:
                details.append(f"{name}: BROKEN, {error}")
                broken += 1
                continue
            except UserError as error:
                details.append(f"{name}: not available for this drafter, {error}")
                continue
            results = ["reloads to equal logits"]
            # Load without trainkit.json, and with transformers
            (folder / bundles.MANIFEST).unlink()
            if type(drafter).claims(folder) and drafter.ids_K is None:
                same = bool((first_logits(load_outside(folder, shape, subject.target_folder).float()) == before).all())
                results.append("also without trainkit.json" if same else "BROKEN: other logits without trainkit.json")
                broken += not same
            decoder = drafter.standalone_decoder()
            if decoder is not None:
                difference = _transformers_difference(folder, subject, decoder)
                results.append(f"{'' if difference < 1e-3 else 'BROKEN: '}transformers' logits differ by {difference:.1e}")
                broken += not difference < 1e-3
            details.append(f"{name}: {', '.join(results)}")
    figure = f"{len(details)} layouts of kind {kind_name(drafter)}" + (f", {broken} of them wrong" if broken else "")
    return Check("formats", promise, "BROKEN" if broken else "kept", figure, details)


def _transformers_difference(folder: Path, subject: Subject, decoder: torch.nn.Module) -> float:
    """Largest difference between transformers' logits of an exported draft model and our decoder's, relative to the largest."""
    model, worst = load_model(folder, torch.device("cpu"), torch.float32), 0.0
    for prompt in subject.prompts[:4]:
        theirs = model(torch.tensor([prompt]), use_cache=False).logits[0]
        worst = max(worst, float((theirs - logits(decoder, prompt)).abs().max() / theirs.abs().max()))  # type: ignore[arg-type]
    return worst
