"""`trainkit features`: what the target says of training data, kept on disk, for training without running the target."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trainkit import __version__, bundle
from trainkit.commands.acceptance import write_set
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.features import FeatureLayout, Written, write_features
from trainkit.data.teacher.live import TargetReader
from trainkit.data.text.chat_template import load_tokenizer
from trainkit.data.text.prepare import CACHE, prepare
from trainkit.data.text.sources import content_hash
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.models.load import find_device, read_config
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
    acceptance: str | None = None,
    temperatures: tuple[float, ...] = (0.0, 1.0),
    verify: Literal["coupled", "residual"] = "coupled",
    depth: int = 8,
    max_new_tokens: int = 128,
    part_prompts: int = 64,
) -> str:
    """Runs the target once over training and validation rows and keeps its hidden states, or its likeliest tokens, on disk.

    `model.features: OUT` then trains from there: of the target only embedding, final norm and output head are loaded. Settings
    of the data must be those of the run (`seed` is its `seed_everything`). The size is printed first, and nothing is begun
    where the disk lacks the room. Killed or interrupted, the same command goes on where it stopped. Started under torchrun,
    each process makes its share of the shards on its own device.

    With --acceptance it decodes prompts with that drafter instead, and keeps of each draft position what an acceptance
    predictor (PredictorModule) is trained on.

    Examples:
        trainkit features --target models/target --data chats.jsonl --out features/chats --length 2048
        trainkit features --target DIR --data SET --out DIR --kind medusa --top_k 64
        torchrun --nproc-per-node 8 -m trainkit.cli features --target DIR --data SET --out DIR --device cuda
        trainkit features --target DIR --data prompts.jsonl --out DIR --acceptance models/draft --temperatures [0,0.7,1]

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        data: Training files, folders or hub names, as `data.train` takes them, the flag repeated; with --acceptance one file or
            folder of prompts.
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
        seed: Of the held-out rows; with --acceptance, with a prompt's place it fixes its draws.
        limit: First rows of the training files to take.
        limit_validation: First rows of the validation files to take.
        columns: Our column names -> the files'.
        on_bad_row: Stop at a bad row, or count it and go on.
        on_long_row: A row longer than `length` that is not plain text: keep its beginning, count and leave out, or stop.
        batch: Packed rows at once; with `data.batch_size` here, float32 features are training's own states to the bit. With
            --acceptance texts decoded together.
        device: Torch device; `cuda` is each process's own under torchrun.
        shard_rows: Packed rows in a file; by default as many as make 256 MB.
        cache: Folder that keeps prepared sets, as `data.cache`.
        trust_remote_code: Whether to run model code that the target's folder carries.
        acceptance: Bundle of the drafter whose acceptance is recorded. Of the flags above only --target, --data, --out,
            --dtype, --target_dtype, --seed, --limit, --columns, --batch and --device go with it; those below only with it.
        temperatures: Every prompt is decoded at each.
        verify: Verification that the predictor shall serve.
        depth: Tokens drafted a round, a chain; no more than the drafter can.
        max_new_tokens: Most tokens of a text.
        part_prompts: Prompts in a file at one temperature, the unit that processes share out, and what a kill costs at most.
    """
    given = dict(locals())
    _check_together(given, acceptance is not None)
    for name, value in (("batch", batch), ("shard_rows", shard_rows)):
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} must be at least 1")
    if taps is not None and kind is not None:
        raise UserError("--taps and --kind both say which states to keep; give one of them")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    where, train = find_device(device), [data] if isinstance(data, str) else data
    if acceptance is not None:
        if len(train) > 1:
            raise UserError("--data: with --acceptance give one file or folder of prompts")
        return write_set(
            target=target,
            drafter=acceptance,
            prompts=train[0],
            out=out,
            temperatures=temperatures,
            verify=verify,
            depth=depth,
            max_new_tokens=max_new_tokens,
            part_prompts=part_prompts,
            dtype=dtype,
            target_dtype=target_dtype,
            seed=seed,
            limit=limit,
            columns=columns,
            batch=batch,
            device=device,
            rank=rank,
            world_size=world_size,
        )
    validation = [validation] if isinstance(validation, str) else validation
    read_config(target, trust_remote_code)  # a missing folder would be looked for on the hub, as a tokenizer's name
    tokenizer = load_tokenizer(target)
    policy = {
        "validation_share": None if validation else validation_share,
        "seed": None if validation else seed,
        "limit": limit,
        "limit_validation": limit_validation,
        "columns": columns,
        "on_bad_row": on_bad_row,
        "on_long_row": on_long_row,
    }
    made = prepare(
        train,
        validation,
        tokenizer,
        length,
        columns=columns,
        on_bad_row=on_bad_row,
        on_long_row=on_long_row,
        seed=seed,
        validation_share=validation_share,
        limit=limit,
        limit_validation=limit_validation,
        cache_dir=cache or CACHE,
    )
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
        {name: len(packed) for name, packed in sets.items()},
        length,
        tuple(states),
        teacher.hidden_size,
        top_k,
        getattr(torch, dtype),
        shard_rows,
    )

    @torch.inference_mode()
    def read(rows: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        first, states_BTAD = reader.read({name: value.to(where) for name, value in rows.items()}, states)
        return states_BTAD, None if top_k is None else first

    provenance = {
        "target": bundle.fingerprint(target),
        "weights": weights_digest(target),
        "precision": target_dtype,
        "data": {"train": _hashes(train), "validation": _hashes(validation), **policy, "fingerprint": made.fingerprint},
        "versions": {"trainkit": __version__, "torch": torch.__version__},
    }
    folder = Path(out)
    written = write_features(
        folder, layout, sets, read, provenance, batch=batch, rank=rank, world_size=world_size, progress=rank == 0
    )
    return _summary(folder, layout, written, rank, world_size)


_DECODING = ("temperatures", "verify", "depth", "max_new_tokens", "part_prompts")
_READING = (
    "validation",
    "taps",
    "kind",
    "top_k",
    "length",
    "validation_share",
    "limit_validation",
    "on_bad_row",
    "on_long_row",
    "shard_rows",
    "cache",
    "trust_remote_code",
)


def _check_together(given: Mapping[str, Any], decodes: bool) -> None:
    """Refuses flags that would do nothing."""
    for name in _READING if decodes else _DECODING:
        if given[name] != inspect.signature(features).parameters[name].default:
            raise UserError(f"--{name}: goes {'not' if decodes else 'only'} with --acceptance; leave it out")


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
