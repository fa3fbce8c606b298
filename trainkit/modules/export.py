"""`trainkit export`: a training checkpoint becomes a folder that the runner and outside programs load."""

from __future__ import annotations

from typing import Literal

import torch

from trainkit import bundle
from trainkit.export.drafter import export_drafter
from trainkit.export.model import export_model
from trainkit.modules.checkpoint import holds_language_model, load_drafter, load_language_model
from trainkit.modules.tracking import attach, tracked_folder


def export(
    checkpoint: str,
    out: str,
    *,
    format: str = "native",
    tokenizer: str | None = None,
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

    Args:
        checkpoint: A .ckpt file of a fit run.
        out: Folder to write.
        format: native, hf, vllm, sglang or speculators, as far as the checkpoint's kind has it.
        tokenizer: Folder to take the tokenizer files from; by default the one the run used.
        dtype: Of the weights written.
        track: Add the bundle, as an artifact with its card, to the W&B run that the checkpoint's run logged to, if it did.

    Examples:
        trainkit export runs/draft_tiny/2026-11-21_10-00-00/checkpoints/last.ckpt models/draft_tiny
        trainkit export last.ckpt models/draft --dtype bfloat16
        trainkit export last.ckpt models/heads --format vllm
    """
    kind = getattr(torch, dtype)
    run_folder = tracked_folder(checkpoint) if track else None
    if holds_language_model(checkpoint):
        model, folder, info = load_language_model(checkpoint)
        write, network = export_model, model
    else:
        network, _, info = load_drafter(checkpoint)
        write, folder = export_drafter, info["tokenizer"]
    metrics = {name: round(float(value), 5) for name, value in info["metrics"].items()}
    made = write(
        network, out, tokenizer=tokenizer or folder, dtype=kind, format=format, metrics={**metrics, "step": info["step"]},
        recipe=info["recipe"], seed=info["seed"], data=info["data"],
    )  # fmt: skip
    if run_folder is None:
        return bundle.card(made)
    return f"{bundle.card(made)}\n{attach(made, run_folder, checkpoint)}"
