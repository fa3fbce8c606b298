"""`trainkit export`: a training checkpoint becomes a folder that the runner and outside programs load."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from trainkit import bundle
from trainkit.card import describe
from trainkit.data.manifest import weights_digest
from trainkit.drafters.base import kind_name
from trainkit.errors import UserError
from trainkit.export.drafter import checked_format, export_drafter
from trainkit.export.model import export_model
from trainkit.export.predictor import export_predictor
from trainkit.models.adapter import merge_adapter
from trainkit.modules.checkpoint import (
    Adapter,
    holds_language_model,
    holds_predictor,
    load_adapter,
    load_drafter,
    load_language_model,
    load_predictor,
)
from trainkit.modules.wandb_logger import attach, tracked_folder


def export(
    checkpoint: str,
    out: str,
    *,
    format: str = "native",
    tokenizer: str | None = None,
    target: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    track: bool = True,
) -> str:
    """Writes a checkpoint as a bundle: a draft model or heads that the runner loads, or a language model.

    The bundle is held against its format tensor by tensor, reloaded, and its logits compared before anything stands at OUT; an
    older bundle there is replaced whole.

    Formats, all of which our runner loads as well; a kind has some of them, and lists those when asked for another:
      native       what the kind's drafters are usually served from; the same as one of those below where it has one
      hf           a plain Hugging Face checkpoint: language models and draft models (lm), also as transformers' assistant_model
      vllm         what vLLM loads as a draft model; of medusa heads vLLM up to 0.32 (0.33 removed its support of Medusa)
      sglang       what SGLang loads as a draft model
      speculators  the layout of the speculators library, which vLLM reads too

    A run of JointModule tuned its target as well: that target, its adapter merged, is written to OUT-target first, a plain
    Hugging Face folder, and the drafter at OUT is then refused with any other.

    A run of PredictorModule made no drafter but something for one: OUT is then the bundle of that drafter, into which the
    acceptance predictor goes, in place of an older one.

    Args:
        checkpoint: A .ckpt file of a fit run.
        out: Folder to write; of a predictor, its drafter's bundle.
        format: native, hf, vllm, sglang or speculators, as far as the checkpoint's kind has it.
        tokenizer: Folder to take the tokenizer files from; by default the one the run used.
        target: Folder of the target, if it lies elsewhere than it did in training: EAGLE-3's files hold its embedding, and a
            JointModule run tuned it.
        dtype: Of the weights written; of a tuned target too.
        track: Add the bundle, as an artifact with its card, to the W&B run that the checkpoint's run logged to, if it did.

    Examples:
        trainkit export runs/draft_tiny/2026-11-21_10-00-00/checkpoints/last.ckpt models/draft_tiny
        trainkit export last.ckpt models/draft --dtype bfloat16
        trainkit export last.ckpt models/heads --format vllm
        trainkit export runs/predictor/2026-11-21_10-00-00/checkpoints/best.ckpt models/heads
    """
    kind = getattr(torch, dtype)
    run_folder = tracked_folder(checkpoint) if track else None
    if holds_predictor(checkpoint):
        for name, value, default in (
            ("format", format, "native"),
            ("tokenizer", tokenizer, None),
            ("target", target, None),
            ("dtype", dtype, "float32"),
        ):
            if value != default:
                raise UserError(f"--{name}: a predictor goes into its drafter's bundle as it is; leave it out")
        predictor, mark, _ = load_predictor(checkpoint)
        made = export_predictor(predictor, mark, out)
        shown = describe(made)
        return shown if run_folder is None else "\n".join([shown, attach(made, run_folder, checkpoint)])
    if holds_language_model(checkpoint):
        model, folder, info = load_language_model(checkpoint)
        if target is not None:
            raise UserError("--target: a language model has none; leave it out")
        write, network, adapter = export_model, model, None
    else:
        network, _, info = load_drafter(checkpoint)
        folder, adapter = info["tokenizer"], load_adapter(checkpoint)
        write = partial(export_drafter, target=target or info.get("target"))
    metrics = {name: round(float(value), 5) for name, value in info["metrics"].items()}
    card = {"metrics": {**metrics, "step": info["step"]}, "recipe": info["recipe"], "seed": info["seed"], "data": info["data"]}
    said = []
    if adapter is not None:
        checked_format(format, network.formats, f"drafter of kind {kind_name(network)!r}")  # before anything is written
        beside = Path(out).resolve()
        tuned = export_target(adapter, Path(target or adapter.target), beside.with_name(f"{beside.name}-target"), kind, card)
        network.target = replace(network.target, fingerprint=bundle.fingerprint(tuned.path))
        write = partial(export_drafter, target=tuned.path)
        said = [f"target: {tuned.path}, with which alone this drafter decodes"]
    made = write(network, out, tokenizer=tokenizer or folder, dtype=kind, format=format, **card)
    said = [describe(made), *said]
    return "\n".join(said if run_folder is None else [*said, attach(made, run_folder, checkpoint)])


def export_target(adapter: Adapter, folder: Path, out: Path, dtype: torch.dtype, card: dict[str, Any]) -> bundle.Bundle:
    """Writes the target in `folder` with the adapter merged, as a plain Hugging Face folder.

    Raises:
        UserError: not the target that was tuned, or merging changed its logits.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: the target that was tuned is not there; say with --target where it is now")
    if weights_digest(folder) != adapter.target_weights:
        raise UserError(f"{folder}: its weights are not those that were tuned; say with --target where those are")
    model = merge_adapter(folder, adapter.shape, adapter.tensors, adapter.target_weights)
    return export_model(model, out, tokenizer=folder, dtype=dtype, own_ids=True, **card)
