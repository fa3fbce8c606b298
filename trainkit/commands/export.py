"""`trainkit export`: a training checkpoint becomes a folder that the runner and other programs load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from trainkit.bundle import Bundle, fingerprint
from trainkit.data.manifest import weights_digest
from trainkit.drafters.base import kind_name
from trainkit.errors import UserError
from trainkit.export.checks import export_report, layout_for
from trainkit.export.drafter import export_drafter
from trainkit.export.model import FORMATS, export_model
from trainkit.export.predictor import export_predictor
from trainkit.models.adapter import merge_adapter
from trainkit.models.target import target_shape
from trainkit.modules.checkpoint import Checkpoint, read_checkpoint
from trainkit.modules.compression.export import export_trained
from trainkit.modules.wandb_logger import attach, tracked_folder
from trainkit.rl.refresh import load_refreshed


def export(
    checkpoint: str,
    out: str,
    *,
    format: str = "native",
    tokenizer: str | None = None,
    target: str | None = None,
    verifier: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    track: bool = True,
) -> str:
    """Writes a checkpoint as a bundle: a draft model or heads that the runner loads, or a language model.

    The files are compared with their format, tensor by tensor, then reloaded to compare logits. Only after that anything exists
    at OUT; an older bundle there is replaced as a whole.

    Formats. Our runner loads all of them. Each kind has some; an unknown format lists those of the kind:
      native       the usual format of the kind; the same as one of those below if the kind has one
      hf           a plain Hugging Face checkpoint: language models and draft models (lm), also transformers' assistant_model
      vllm         what vLLM loads as a draft model; of medusa heads vLLM up to 0.32 (0.33 removed its support of Medusa)
      sglang       what SGLang loads as a draft model
      speculators  the layout of the speculators library, which vLLM reads too

    A run of JointModule tuned its target as well. That target, with the adapter merged, is written to OUT-target first, as a
    plain Hugging Face folder; the drafter at OUT then refuses any other target.

    A run of PolicyModule becomes a plain Hugging Face folder of the fine-tuned model; an adapter is merged in float32. If the
    run refreshed its drafter, the drafter is written to OUT-draft.

    A run of CompressModule becomes a model whose zeros are those of its masks, or whose quantised layers hold the very codes of
    the training forward pass, in the format of compressed-tensors.

    A run of PredictorModule trained an acceptance predictor for a drafter. OUT is then the bundle of that drafter, to which the
    predictor is added; an older predictor is replaced.

    Args:
        checkpoint: A .ckpt file of a fit run.
        out: Folder to write; for a predictor, the bundle of its drafter.
        format: native, hf, vllm, sglang or speculators, if the checkpoint's kind has it.
        tokenizer: Folder with the tokenizer files to copy; by default the one that the run used.
        target: Folder of the target, if it was moved since training: EAGLE-3's files contain its embedding, and runs of
            JointModule, and of PolicyModule with an adapter, tuned it. Of a CompressModule run, the folder of the model that it
            trained.
        verifier: Folder or hub name (owner/name) where readers of the speculators format find the target; by default the
            target's folder here, so name one if the files leave this machine.
        dtype: Dtype of the written weights, also those of a tuned target; by default float32, for quantised weights that of
            their scales.
        track: Whether to add the bundle, as an artifact with its card, to the W&B run of the checkpoint, if it has one.

    Examples:
        trainkit export runs/draft_tiny/2026-11-21_10-00-00/checkpoints/last.ckpt models/draft_tiny
        trainkit export last.ckpt models/draft --dtype bfloat16
        trainkit export last.ckpt models/heads --format vllm
        trainkit export last.ckpt models/eagle --format speculators --verifier meta-llama/Llama-3.1-8B-Instruct
        trainkit export runs/predictor/2026-11-21_10-00-00/checkpoints/best.ckpt models/heads
    """
    run_folder = tracked_folder(checkpoint) if track else None
    saved, options, notes = read_checkpoint(checkpoint), {"dtype": getattr(torch, dtype or "float32"), "format": format}, []
    if "predictor" in saved.description:
        changed = {"format": format != "native", "tokenizer": tokenizer, "target": target, "verifier": verifier}
        changed["dtype"] = dtype is not None
        if flag := next((name for name, value in changed.items() if value), None):
            raise UserError(f"--{flag}: a predictor is added to its drafter's bundle unchanged; leave it out")
        bundle = export_predictor(saved.predictor(), saved.description["drafter"], out)
    elif "compression" in saved.description:
        for name, value in (("tokenizer", tokenizer), ("verifier", verifier)):
            if value is not None:
                raise UserError(f"--{name}: a compressed model has that of the model it was trained from; leave it out")
        layout_for(format, FORMATS, "compressed model")
        bundle = export_trained(saved, out, target or saved.info["source"], dtype, **_card(saved))
    elif "model_config" in saved.description:
        for name, value in (("target", target), ("verifier", verifier)):
            if value is not None:
                raise UserError(f"--{name}: a language model has none; leave it out")
        source = tokenizer or saved.info["tokenizer"]
        bundle = export_model(saved.language_model(), out, tokenizer=source, **options, **_card(saved), policy=saved.policy())
    elif "kind" not in saved.description and "adapter" in saved.description:
        if verifier is not None:
            raise UserError("--verifier: a language model has none; leave it out")
        model, folder = _merged(saved, target)
        bundle = export_model(model, out, tokenizer=tokenizer or folder, **options, **_card(saved), policy=saved.policy())
    else:
        bundle, notes = _export_drafter(saved, out, tokenizer, target, options | {"verifier": verifier})
    if saved.refresh:
        notes = [_export_refreshed(saved, bundle.path, options["dtype"])]
    lines = [export_report(bundle), *notes]
    if run_folder is not None:
        lines.append(attach(bundle, run_folder, checkpoint))
    return "\n".join(lines)


def _export_drafter(
    saved: Checkpoint, out: str, tokenizer: str | None, target: str | None, options: dict[str, Any]
) -> tuple[Bundle, list[str]]:
    """The bundle of the checkpoint's drafter, and lines for the user.

    Raises:
        UserError: the folder of a tuned target does not hold the target that was tuned, or merging changed its logits.
    """
    drafter, notes = saved.drafter(), []
    if saved.adapter() is not None:
        # The run tuned the target too: write the merged target first, and bind the drafter to that target
        layout_for(options["format"], drafter.formats, f"drafter of kind {kind_name(drafter)!r}")  # before anything is written
        model, folder = _merged(saved, target)
        path = Path(out).resolve()
        tuned_path = path.with_name(f"{path.name}-target")
        tuned = export_model(model, tuned_path, tokenizer=folder, dtype=options["dtype"], **_card(saved))
        drafter.target = replace(drafter.target, fingerprint=fingerprint(tuned.path))
        target, notes = str(tuned.path), [f"target: {tuned.path}; this drafter works only with it"]
    else:
        target = target or saved.info.get("target")
    drafter.fill_untrained()
    source = tokenizer or saved.info["tokenizer"]
    return export_drafter(drafter, out, tokenizer=source, target=target, **options, **_card(saved)), notes


def _export_refreshed(saved: Checkpoint, policy: Path, dtype: torch.dtype) -> str:
    """Writes the drafter that an RL run refreshed beside its policy, as POLICY-draft; a line for the user."""
    drafter = load_refreshed(saved.refresh, target_shape(policy), policy)
    drafter.fill_untrained()
    card: dict[str, Any] = _card(saved) | {"metrics": {"step": saved.info["step"]}}
    if drafter.default_tree is not None:
        card["runner"] = {"tree": [list(path) for path in drafter.default_tree]}
    out = policy.with_name(f"{policy.name}-draft")
    made = export_drafter(drafter, out, tokenizer=policy, target=policy, dtype=dtype, **card)
    return f"drafter: {made.path}; refreshed together with this policy"


def _merged(saved: Checkpoint, target: str | None) -> tuple[Any, Path]:
    """The target that the run tuned, with the adapter merged, and the folder of its weights before.

    Raises:
        UserError: the folder does not hold the target that was tuned, or merging changed its logits.
    """
    folder, digest, adapter = (
        Path(target or saved.info.get("target") or ""),
        saved.description["target_weights"],
        saved.adapter(),
    )
    assert adapter is not None
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: does not hold the tuned target; give its folder with --target")
    if weights_digest(folder) != digest:
        raise UserError(f"{folder}: its weights are not those that were tuned; give the tuned target's folder with --target")
    return merge_adapter(folder, *adapter, digest), folder


def _card(saved: Checkpoint) -> dict[str, Any]:
    """The run's part of trainkit.json: metrics, recipe, seed and data."""
    metrics = {name: round(float(value), 5) for name, value in saved.info["metrics"].items()}
    return {
        "metrics": metrics | {"step": saved.info["step"]},
        **{name: saved.info[name] for name in ("recipe", "seed", "data")},
    }
