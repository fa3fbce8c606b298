"""A checkpoint of CompressModule becomes a folder: dense weights with zeros, or codes in compressed-tensors' format."""

# R outputs  K inputs

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.bundle import Bundle, read_json
from trainkit.errors import UserError
from trainkit.export.compressed import export_compressed
from trainkit.models.compressed import quantization_config, stored_tensors
from trainkit.modules.checkpoint import Checkpoint
from trainkit.modules.compression.base import Compression, Masks, check_zeros, merge
from trainkit.modules.compression.flow import SRSTE, MaskDecay, StructureDecay
from trainkit.modules.compression.masks import FixedMask, GradualMagnitude, HardMask
from trainkit.modules.compression.quantised import QuantAware

METHODS = (FixedMask, GradualMagnitude, HardMask, SRSTE, MaskDecay, StructureDecay, QuantAware)


def rebuild(saved: Checkpoint) -> Compression:
    """The compression of a run, with its state, and without layers."""
    options = dict(saved.description["compression"])
    compression = {method.__name__: method for method in METHODS}[options.pop("method")](**options)
    compression.restore(saved.compression)
    return compression


def export_trained(saved: Checkpoint, out: str | Path, source: str | Path, dtype: str | None, **card: Any) -> Bundle:
    """Writes the model of a run of CompressModule as a bundle; low-rank additions are merged before compression.

    Args:
        saved: Its checkpoint.
        out: Folder to write.
        source: Folder of the model that was trained, for its tokenizer.
        dtype: Dtype of the written weights; by default float32, or that of the scales.
        card: `metrics`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: pruned weights still take part in the forward pass, nothing is pruned, or another dtype than the scales'.
    """
    compression = rebuild(saved)
    # Refuse a run that would become another model than the one it trained
    if isinstance(compression, Masks):
        if (beta := saved.compression.get("beta", 0.0)) > 0.01 and not saved.compression["holds"]:
            raise UserError(
                f"{saved.path}: pruned weights still contribute, times {beta:.3g}; export a checkpoint of the last phase"
            )
        if all(bool(mask.all()) for mask in compression.masks.values()):
            raise UserError(f"{saved.path}: no weight is pruned yet; export a later checkpoint")
        if saved.compression.get("holds", True) and not saved.description["lora"]["rank"]:
            check_zeros(str(saved.path), compression.masks, {name: saved.weights[f"lm.{name}"] for name in compression.masks})
        chosen = dtype or "float32"
    else:
        assert isinstance(compression, QuantAware)
        chosen = str(compression.options["scale_dtype"])
        if dtype not in (None, chosen):
            raise UserError(f"--dtype {dtype}: the scales were trained in {chosen}, and codes are chosen by them; leave it out")
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"{source}: does not hold the model that was trained; give its folder with --target")
    values, names = read_json(Path(source) / "config.json"), saved.compression["names"]
    config: dict[str, Any] = {"dtype": chosen, "quantization_config": None}  # a quantised folder was trained unpacked
    if isinstance(compression, QuantAware):
        modules, grid = [name.removesuffix(".weight") for name in names], compression.grid
        config["quantization_config"] = quantization_config(
            dict.fromkeys(modules, grid.bits), dict.fromkeys(modules, grid.group), ignore=("lm_head",)
        )
    tied = bool(saved.description["model_config"].get("tie_word_embeddings", values.get("tie_word_embeddings", False)))
    return export_compressed(
        out,
        source=Path(source),
        tensors=_tensors(saved, compression, getattr(torch, chosen), tied),
        config=config,
        compression=_description(saved, compression, out),
        calibration_fingerprints=None,
        **card,
    )


def _tensors(saved: Checkpoint, compression: Compression, dtype: torch.dtype, tied: bool) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the files, one at a time."""
    weights = {name.removeprefix("lm."): value for name, value in saved.weights.items()}
    lora, names = saved.description["lora"], set(saved.compression["names"])
    for name, value in weights.items():
        if name.rpartition(".")[2] in ("lora_A", "lora_B", "scale") or (tied and name == "lm_head.weight"):
            continue
        if name not in names:
            yield name, value.to(dtype)
            continue
        layer = name.removesuffix(".weight")
        a_rK, b_Rr = weights.get(f"{layer}.lora_A"), weights.get(f"{layer}.lora_B")
        merged_RK = merge(value, a_rK, b_Rr, lora["alpha"] / max(1, lora["rank"]))
        if isinstance(compression, QuantAware):
            rounded = compression.finished(name, merged_RK, weights.get(f"{layer}.scale"))
            yield from stored_tensors(layer, rounded.codes_RK, rounded.scale_RG, None, compression.grid.bits).items()
        else:
            yield name, compression.finished(name, merged_RK).to(dtype)


def _description(saved: Checkpoint, compression: Compression, out: str | Path) -> dict[str, Any]:
    """What was done, for the card."""
    names = saved.compression["names"]
    described: dict[str, Any] = {
        "method": f"training ({type(compression).__name__})",
        "pattern": None,
        "grid": None,
        "teacher": saved.info["teacher"],
        "options": compression.options,
        "commands": [shlex.join(["trainkit", "export", str(saved.path), str(out)])],
    }
    if isinstance(compression, QuantAware):
        grid = compression.grid
        described["grid"] = {"bits": grid.bits, "group": grid.group, "symmetric": True, "kind": grid.kind}
        described["layers"] = {name: {"bits": grid.bits} for name in names}
    else:
        assert isinstance(compression, Masks)
        pattern = compression.options.get("sparsity")
        described["pattern"] = None if pattern is None else str(pattern)
        described["layers"] = {name: {"sparsity": float((~mask).double().mean())} for name, mask in compression.masks.items()}
    return described
