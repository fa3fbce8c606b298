"""Writes a compressed language model: pruned weights as a dense folder with zeros, quantised ones as compressed-tensors does.

A folder is moved to its destination only after it was reloaded. transformers must compute from it exactly what it computes from
the dense weights that trainkit reads there, and trainkit's decoder the same up to rounding; so no folder that loads but
computes something else can be written.
"""

# R outputs  K inputs

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainkit import bundle
from trainkit.bundle import read_json, tensor_entries
from trainkit.errors import UserError
from trainkit.export.checks import ReloadError, check_finite, check_reload, copy_tokenizer
from trainkit.export.readme import model_card
from trainkit.files import write_json, write_text
from trainkit.layers.linear import Linear, block_weights
from trainkit.layers.visible import Visible
from trainkit.models.compressed import read_scheme, stored_weights
from trainkit.models.load import SIZES, check_covered, load_decoder, read_config, transformers4_rope
from trainkit.models.target import load_model

SHARD_BYTES = 1 << 30
"""Largest size of a weight file, and so of the tensors held in memory while writing; a larger tensor has a file of its own."""
CALIBRATION = "calibration.json"
"""File with the fingerprints of the calibration text, by which an evaluation on the same text is recognised."""


@torch.no_grad()
def export_compressed(
    out: str | Path,
    *,
    source: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    compression: Mapping[str, Any],
    calibration_fingerprints: list[int] | None = None,
    **card: Any,
) -> bundle.Bundle:
    """Writes a compressed model with the tokenizer of its source as a bundle, and returns it.

    Args:
        out: Folder to write; a bundle there is replaced.
        source: Folder of the dense model. If it is a drafter's bundle, so is `out`.
        tensors: Names and values of all tensors of the files, one at a time; quantised layers as
            `models.compressed.stored_tensors` gives them. Floating-point tensors have the dtype of the config.
        config: Fields of config.json that differ from the source's, such as `quantization_config`, which None removes.
        compression: What was done, for trainkit.json and README.md: `method`, `pattern`, `grid`, `calibration`, `commands`, and
            `layers`, which has `sparsity` and `bits` of each compressed weight by its Hugging Face name. Sparsity is measured
            here, over each matrix, all compressed matrices and all parameters; a weight less sparse than `layers` says is an
            error.
        calibration_fingerprints: Fingerprints of the calibration text; None without one. Those that the source has, which was
            compressed before, are kept too.
        card: `metrics`, `recipe`, `seed`, `data` for trainkit.json.

    Raises:
        UserError: weights that are not finite, no tokenizer, or `out` is something other than a bundle.
        ReloadError: the written files do not compute what was exported.
    """
    made = bundle.read(source) if bundle.is_bundle(source) else None
    kind, drafter, target = ("model", {}, {}) if made is None else (made.kind, dict(made.config), dict(made.target))
    extra = {"format": "hf", "layout": "hf"} | (dict(made.extra) if made else {})
    drafter |= {ours: config[theirs] for theirs, ours in SIZES.items() if ours in drafter and theirs in config}
    values = read_json(source / "config.json") | dict(config)
    if values.get("quantization_config") is None:
        values.pop("quantization_config", None)
    if "rope_type" in (rope := values.get("rope_parameters") or {}):
        values |= transformers4_rope(rope)
    values.setdefault("dtype", values.pop("torch_dtype", None) or "float32")
    found = dict(compression)
    if made is not None and (earlier := (made.extra.get("compression") or {}).get("commands")):  # it was compressed before
        found["commands"] = [*earlier, *found.get("commands", [])]
    if (source / CALIBRATION).is_file():
        earlier = read_json(source / CALIBRATION).get("fingerprints") or []
        calibration_fingerprints = sorted({*earlier, *(calibration_fingerprints or ())})

    def write_files(folder: Path) -> None:
        copy_tokenizer(source, folder)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
        write_json(folder / "config.json", values)
        write_shards(folder, tensors, getattr(torch, values["dtype"]), out)
        found.update(measure(folder, compression, out))
        found["bytes"] |= {"dense": _weight_bytes(source), "resident": check_logits(folder, out)}
        if calibration_fingerprints is not None:
            write_json(folder / CALIBRATION, {"fingerprints": calibration_fingerprints})
        text = model_card(Path(out).name, found, card.get("metrics", {}), values, drafter=made is not None and kind != "model")
        write_text(folder / "README.md", text)

    extra["compression"] = found  # `write_files` completes it before the manifest is written
    return bundle.write(out, write_files, kind=kind, config=drafter, target=target, extra=extra, **card)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, out: str | Path) -> None:
    """Writes tensors to model.safetensors, or to several files with an index, as they arrive.

    Raises:
        UserError: a tensor is not finite.
        ReloadError: a tensor comes twice, or a floating-point tensor does not have `dtype`.
    """
    shards, held, size = list[list[str]](), dict[str, Tensor](), 0
    part = lambda index: folder / f"part-{index}.safetensors"

    def flush() -> None:
        nonlocal held, size
        save_file(held, part(len(shards)), metadata={"format": "pt"})
        shards.append(list(held))
        held, size = {}, 0

    total = 0
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        if name in held or any(name in names for names in shards):
            raise ReloadError(f"{out}: tensor {name!r} is written twice; nothing was written, report this as a bug")
        if tensor.is_floating_point() and tensor.dtype not in (dtype, torch.float8_e4m3fn):
            raise ReloadError(
                f"{out}: tensor {name!r} is {tensor.dtype}, config.json says {dtype}; nothing was written, report this as a bug"
            )
        if tensor.is_floating_point():
            check_finite([(name, tensor.float())])
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
        held[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        part(0).rename(folder / "model.safetensors")
        return
    files = [f"model-{index + 1:05}-of-{len(shards):05}.safetensors" for index in range(len(shards))]
    for index, file in enumerate(files):
        part(index).rename(folder / file)
    index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def measure(folder: Path, compression: Mapping[str, Any], out: str | Path) -> dict[str, Any]:
    """Measured values of a written folder: `layers`, `sparsity`, `parameters` and `bytes`, as a card has them.

    Raises:
        ReloadError: a compressed weight is missing, has fewer zeros than `compression` says, breaks its N:M pattern, or has
            another number of bits.
    """
    layers = {name: dict(values) for name, values in compression.get("layers", {}).items()}
    scheme = read_scheme(read_json(folder / "config.json"))
    groups = re.fullmatch(r"(\d+):(\d+)", str(compression.get("pattern") or ""))
    parameters = zeros = pruned = pruned_zeros = 0
    missing = dict(layers)
    for name, value in stored_weights(folder):
        parameters += (count := (value if isinstance(value, Tensor) else value[0]).numel())
        weight = value if isinstance(value, Tensor) else value[0].to(torch.float32)
        if not isinstance(value, Tensor) and value[2] is not None:
            R, K = weight.shape
            weight = (weight.view(R, value[2].shape[1], -1) - value[2].unsqueeze(2)).view(R, K)
        zeros += (none := int((weight == 0).sum()))
        if missing.pop(name, None) is None:
            continue
        layer, stored = layers[name], scheme.of(name.removesuffix(".weight")) if scheme else None
        bits = stored.bits if stored else weight.element_size() * 8
        kept = int((weight.view(-1, int(groups[2])) != 0).sum(1).max()) if groups and layer.get("sparsity") else 0
        fault = ""
        if none < (claimed := layer.get("sparsity") or 0) * count - 0.5:
            fault = f"has {none / count:.6f} of its weights at zero, not {claimed:.6f}"
        elif groups and kept > int(groups[1]):
            fault = f"has {kept} weights in a group of {groups[2]}, not {groups[1]}"
        elif bits != (layer.get("bits") or bits):
            fault = f"has {bits} bits, not {layer['bits']}"
        if fault:
            raise ReloadError(f"{out}: {name} {fault}; nothing was written, report this as a bug")
        layer |= {"sparsity": none / count, "bits": bits}
        pruned, pruned_zeros = pruned + count, pruned_zeros + none
    if missing:
        raise ReloadError(f"{out}: {next(iter(missing))} is missing; nothing was written, report this as a bug")
    return {
        "layers": layers,
        "sparsity": {"matrices": pruned_zeros / max(pruned, 1), "parameters": zeros / max(parameters, 1)},
        "parameters": parameters,
        "bytes": {"disk": _weight_bytes(folder)},
    }


def _weight_bytes(folder: Path) -> int:
    """Bytes of all tensors in the folder's safetensors files."""
    entries = [entry for path in folder.glob("*.safetensors") for entry in tensor_entries(path).values()]
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)


def check_logits(folder: Path, out: str | Path) -> int | None:
    """Compares logits of the written folder; returns the bytes of its weights in trainkit's runner on a CPU, or None.

    transformers, which decompresses by compressed-tensors, must give exactly the logits of a transformers model with the dense
    weights that trainkit reads. The decoder sums in another order: float32 logits must agree to 1e-3 of the largest, which is a
    hundred times their rounding, while a wrong code, scale or layer changes them by far more.

    Raises:
        ReloadError: they differ, or tensors are missing or unexpected.
    """
    from transformers import AutoModelForCausalLM

    # transformers, in the stored dtype
    dtype = getattr(torch, read_json(folder / "config.json")["dtype"])
    with redirect_stderr(StringIO()):  # its bars and its report of missing tensors
        result: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, report = result[0].eval(), result[1]
    if faults := sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]})):
        raise ReloadError(f"{out}: tensor {faults[0]} would not reload; nothing was written, report this as a bug")
    tokens = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with redirect_stderr(StringIO()):  # weights are decompressed here
        theirs = model(tokens).logits
    del model, result
    check_reload(load_model(folder, dtype)(tokens).logits, theirs, out)
    # Our decoder, in float32
    try:
        check_covered(read_config(folder), folder, 0)
    except UserError:
        return None
    decoder = load_decoder(folder, dtype=torch.float32, max_len=tokens.shape[1])
    decoder.reserve_positions(tokens.shape[1])
    positions = torch.arange(tokens.shape[1]).unsqueeze(0)
    ours = decoder.head(decoder(tokens, positions, Visible.causal(positions))[0])
    dense = load_model(folder, torch.float32)(tokens).logits
    difference, largest = (ours - dense).abs().max().item(), dense.abs().max().item()
    if not difference <= 1e-3 * largest:
        raise ReloadError(
            f"{out}: the logits of trainkit's decoder differ by {difference:.3g} (the largest is {largest:.3g}); nothing was "
            "written, report this as a bug"
        )
    block_weights(decoder)  # as the runner does, which unpacks weights that no product reads as stored
    stored = [part.packed for part in decoder.modules() if isinstance(part, Linear)]
    dense = sum(weight.numel() for weight in decoder.parameters()) * dtype.itemsize
    return dense + sum(part.nbytes for part in stored if part is not None)
