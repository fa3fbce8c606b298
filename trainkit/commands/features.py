"""`trainkit features`: stores a target's hidden states or top-k probabilities, so that training runs without its layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from trainkit import __version__, bundle
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.features import FeatureLayout, write_features
from trainkit.data.sets.writer import SetJob, check_positive, local_device, quiet_libraries
from trainkit.data.teacher.live import LiveTeacher
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.prepare import CACHE, prepare
from trainkit.data.text.sources import content_hash
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.models.load import find_device, read_config
from trainkit.models.target import FrozenTarget


def features(
    *,
    target: str,
    data: str | list[str],
    out: str,
    validation: str | list[str] | None = None,
    taps: list[int] | None = None,
    kind: str | None = None,
    top_k: int | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    target_dtype: Literal["float32", "bfloat16"] = "float32",
    length: int = 1024,
    validation_share: float = 0.05,
    seed: int = 0,
    limit: int | None = None,
    limit_validation: int | None = None,
    columns: dict[str, str] | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    on_long_row: Literal["truncate", "skip", "error"] = "truncate",
    batch: int = 8,
    device: str = "auto",
    shard_rows: int | None = None,
    cache: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Runs the target once over training and validation rows, and stores its hidden states or its most probable tokens on disk.

    With `model.features: OUT`, training then loads only the target's embedding, final norm and output head. The data options
    must be those of the training run (`seed` is its `seed_everything`). The size is printed first, and nothing is written if
    the disk has too little space. After a kill or an interrupt, the same command continues where it stopped. Under torchrun,
    each process writes its share of the shards on its own device.

    Examples:
        trainkit features --target models/target --data chats.jsonl --out features/chats --length 2048
        trainkit features --target DIR --data SET --out DIR --kind medusa --top_k 64
        torchrun --nproc-per-node 8 -m trainkit.cli features --target DIR --data SET --out DIR --device cuda

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        data: Training files, folders or hub names, as in `data.train`: one, or the flag repeated.
        out: Folder of the features.
        validation: Validation files, folders or hub names; by default a share of the training rows is held out.
        taps: Hidden states to store in addition to the last one, named as in a drafter: i after i layers, -1 the last.
        kind: Drafter kind whose taps to store, with its default settings; instead of --taps.
        top_k: Store this number of most probable tokens and their log-probabilities as the teacher, instead of the last hidden
            state (which is stored only if it is a tap).
        dtype: Dtype of the stored values; float32 is exact.
        target_dtype: Precision of the target's weights, as in `model.target_dtype`.
        length: Tokens in a packed row, as in `data.length`.
        validation_share: Share of rows held out if no validation files are given; the rows of a prompt stay together.
        seed: Seed for drawing the held-out rows.
        limit: Number of training rows to read, from the beginning; all by default.
        limit_validation: Number of validation rows to read; all by default.
        columns: Column mapping, from trainkit's names to the files'.
        on_bad_row: Stop at a bad row, or skip and count it.
        on_long_row: A row longer than `length` that is not plain text: truncate it, skip and count it, or stop.
        batch: Packed rows in each forward pass; with the value of `data.batch_size`, float32 features are bit-identical to
            the hidden states of training with a live target.
        device: Torch device; `auto` uses a GPU if there is one, under torchrun each process its own.
        shard_rows: Packed rows in a file; by default as many as make 256 MB.
        cache: Folder of prepared sets, as in `data.cache`.
        trust_remote_code: Whether to run model code from the target's folder.
    """
    # Check the options that need no data.
    check_positive(batch=batch, shard_rows=shard_rows, limit=limit, limit_validation=limit_validation)
    if taps is not None and kind is not None:
        raise UserError("--taps and --kind: both select the states to store; give only one of them")
    quiet_libraries()
    on = find_device(local_device(device))
    read_config(target, trust_remote_code)  # first, since a missing folder would be taken for a tokenizer's name on the hub
    # Prepare the rows exactly as training does.
    train = [data] if isinstance(data, str) else data
    validation = [validation] if isinstance(validation, str) else validation
    options: dict[str, Any] = {"columns": columns, "on_bad_row": on_bad_row, "on_long_row": on_long_row}
    options |= {"limit": limit, "limit_validation": limit_validation}
    split = {"validation_share": validation_share, "seed": seed}
    prepared = prepare(train, validation, load_tokenizer(target), length, **options, **split, cache_dir=cache or CACHE)
    # Load the target and check the options against it.
    model = FrozenTarget(target, getattr(torch, target_dtype), trust_remote_code)
    shape = model.shape()
    vocabulary = shape.decoder.vocab_size
    if length > (covered := shape.decoder.max_positions):
        raise UserError(f"--length: {length}, but the target covers {covered} positions; give a smaller length")
    if top_k is not None and not 1 <= top_k <= vocabulary:
        raise UserError(f"--top_k: {top_k} must be between 1 and the target's vocabulary size, {vocabulary}")
    # Decide what to store.
    if kind is not None:
        with torch.device("meta"):  # only its taps are needed, no weights
            taps = list(load_kind(kind)(shape).taps)
    states = sorted({model.layer(tap) for tap in [*(taps or ()), *([-1] if top_k is None else [])]})
    sets = {name: packed for name in ("train", "validation") if len(packed := getattr(prepared, name))}
    rows = {name: len(packed) for name, packed in sets.items()}
    layout = FeatureLayout(rows, length, tuple(states), model.hidden_size, top_k, getattr(torch, dtype), shard_rows)
    # Write the set.
    hashes = {"train": _hashes(train), "validation": None if validation is None else _hashes(validation)}
    provenance = {
        "target": bundle.fingerprint(target),
        "weights": weights_digest(target),
        "precision": target_dtype,
        "data": hashes | (dict.fromkeys(split) if validation else split) | options | {"fingerprint": prepared.fingerprint},
        "versions": {"trainkit": __version__, "torch": torch.__version__},
    }
    job = SetJob.from_environment(out, provenance)
    if job.progress:
        prepared.report.warn()
    stats = write_features(job, layout, sets, LiveTeacher(model.to(on), top_k=top_k), batch)
    return stats.summary(job, len(layout.shards()), "shards", f"{stats.bytes / 1e9:.2f} GB, ")


def _hashes(files: Sequence[str]) -> list[str]:
    """Name and first digits of the digest of each file."""
    return [f"{Path(file).name}:{content_hash(file)[:12]}" for file in files]
