"""`trainkit features`: what the target says of training data, kept on disk, for training without running the target."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainkit import __version__, bundle
from trainkit.data.chat import load_tokenizer
from trainkit.data.feature_set import FeatureLayout, Written, write_features
from trainkit.data.features import TargetReader
from trainkit.data.prepare import CACHE, prepare
from trainkit.data.provenance import weights_mark
from trainkit.data.sources import content_hash
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.models.load import device_of, read_config
from trainkit.models.shape import TargetShape
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
    device: str = "cpu",
    shard_rows: int | None = None,
    cache: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Runs the target once over training and validation rows and keeps its hidden states, or its likeliest tokens, on disk.

    `model.features: OUT` then trains from there: of the target only embedding, final norm and output head are loaded. Settings
    of the data must be those of the run (`seed` is its `seed_everything`). The size is printed first, and nothing is begun
    where the disk lacks the room. Killed or interrupted, the same command goes on where it stopped. Started under torchrun,
    each process makes its share of the shards on its own device.

    Examples:
        trainkit features --target models/target --data chats.jsonl --out features/chats --length 2048
        trainkit features --target DIR --data SET --out DIR --kind medusa --top_k 64
        torchrun --nproc-per-node 8 -m trainkit.cli features --target DIR --data SET --out DIR --device cuda

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        data: Training files, folders or hub names, as `data.train` takes them, [one,another].
        out: Folder of the features.
        validation: Validation files; by default a share of the training rows is held out.
        taps: Hidden states to keep beside the last one, as a drafter names them: i after i layers, -1 the last.
        kind: Drafter kind whose taps to keep, with its default settings.
        top_k: Keep this many likeliest tokens and their log-probabilities as the teacher, in place of the last hidden state
            (which stays where a tap names it).
        dtype: What is stored; float32 is exact.
        target_dtype: Precision of the target's weights, as `model.target_dtype`.
        length: Tokens in a packed row, as `data.length`.
        validation_share: Share of rows held out where no validation files are given.
        seed: Of the held-out rows.
        limit: First rows of the training files to take.
        limit_validation: First rows of the validation files to take.
        columns: Our column names -> the files'.
        on_bad_row: Stop at a bad row, or count it and go on.
        on_long_row: A row longer than `length` that is not plain text: keep its beginning, count and leave out, or stop.
        batch: Packed rows at once; with `data.batch_size` here, float32 features are training's own states to the bit.
        device: Torch device; `cuda` is each process's own under torchrun.
        shard_rows: Packed rows in a file; by default as many as make 256 MB.
        cache: Folder that keeps prepared sets, as `data.cache`.
        trust_remote_code: Whether to run model code that the target's folder carries.
    """
    for name, value in (("batch", batch), ("shard_rows", shard_rows)):
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")
    if taps is not None and kind is not None:
        raise UserError("--taps and --kind both say which states to keep; give one of them")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    where, train = device_of(device), [data] if isinstance(data, str) else data
    validation = [validation] if isinstance(validation, str) else validation
    read_config(target, trust_remote_code)  # a missing folder would be looked for on the hub, as a tokenizer's name
    tokenizer = load_tokenizer(target)
    policy = {
        "validation_share": None if validation else validation_share, "seed": None if validation else seed, "limit": limit,
        "limit_validation": limit_validation, "columns": columns, "on_bad_row": on_bad_row, "on_long_row": on_long_row,
    }  # fmt: skip
    made = prepare(
        train, validation, tokenizer, length, columns=columns, on_bad_row=on_bad_row, on_long_row=on_long_row, seed=seed,
        validation_share=validation_share, limit=limit, limit_validation=limit_validation, cache_dir=cache or CACHE,
    )  # fmt: skip
    teacher = FrozenTarget(target, getattr(torch, target_dtype), trust_remote_code)
    shape = teacher.shape()
    if length > (covered := shape.decoder.max_positions):
        raise UserError(f"--length: {length}, but the target covers {covered} positions")
    if (largest := int(made.train.tokens_N.max())) >= shape.decoder.vocab_size:
        raise UserError(f"--data: token id {largest} is outside the target's vocabulary of {shape.decoder.vocab_size}")
    if top_k is not None and not 1 <= top_k <= shape.decoder.vocab_size:
        raise UserError(f"--top_k: {top_k} must be between 1 and the target's vocabulary, {shape.decoder.vocab_size}")
    reader = TargetReader(teacher.to(where), top_k=top_k)
    named = list(taps or ()) if kind is None else _taps_of(kind, shape)
    states = sorted({teacher.layer(tap) for tap in [*named, *([-1] if top_k is None else [])]})
    sets = {name: packed for name, packed in (("train", made.train), ("validation", made.validation)) if len(packed)}
    layout = FeatureLayout(
        {name: len(packed) for name, packed in sets.items()}, length, tuple(states), teacher.hidden_size, top_k,
        getattr(torch, dtype), shard_rows,
    )  # fmt: skip

    @torch.inference_mode()
    def read(rows: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        first, states_BTAD = reader.read({name: value.to(where) for name, value in rows.items()}, states)
        return states_BTAD, None if top_k is None else first

    provenance = {
        "target": bundle.fingerprint(target), "weights": weights_mark(target), "precision": target_dtype,
        "data": {"train": _hashes(train), "validation": _hashes(validation), **policy, "fingerprint": made.fingerprint},
        "versions": {"trainkit": __version__, "torch": torch.__version__},
    }  # fmt: skip
    folder = Path(out)
    written = write_features(
        folder, layout, sets, read, provenance, batch=batch, rank=rank, world_size=world_size, progress=rank == 0
    )
    return _summary(folder, layout, written, rank, world_size)


def _taps_of(kind: str, shape: TargetShape) -> list[int]:
    with torch.device("meta"):  # its sizes are not needed
        return list(load_kind(kind)(shape).taps)


def _hashes(files: Sequence[str] | None) -> list[str] | None:
    """Each file's name and the beginning of its digest."""
    return None if files is None else [f"{Path(file).name}:{content_hash(file)[:12]}" for file in files]


def _summary(folder: Path, layout: FeatureLayout, written: Written, rank: int, world_size: int) -> str:
    speed = written.tokens / written.seconds if written.seconds else 0.0
    whose = f" (process {rank} of {world_size})" if world_size > 1 else ""
    return (
        f"{folder}: {written.shards:,} of {len(layout.shards()):,} shards made{whose}, {written.found:,} were there; "
        f"{written.bytes / 1e9:.2f} GB, {written.tokens:,} tokens in {written.seconds:.0f} s, {speed:,.0f} tokens/s"
    )
