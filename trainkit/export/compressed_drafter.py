"""Writes a compressed variant of a drafter of the kinds that are no language model: its linear layers pruned or quantised.

Pruned weights are zeros in the files of the drafter's own format. Quantised layers have the tensors of models/compressed.py in
place of their weights, in a file that only trainkit reads; the runner decodes with the weights as they are stored.
"""

# R outputs  K inputs

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainkit import bundle
from trainkit.compress.masks import Pattern, Scope, mask_from_scores
from trainkit.compress.quantise import Grid, quantise
from trainkit.compress.scores import magnitude
from trainkit.drafters.base import QUANTISED, load_bundle
from trainkit.errors import UserError
from trainkit.export.checks import check_finite, check_reload, check_weights, copy_tokenizer
from trainkit.export.drafter import export_drafter, first_logits
from trainkit.layers.linear import Linear, weight_bytes
from trainkit.models.compressed import WeightScheme, stored_tensors
from trainkit.models.packed import load_network
from trainkit.models.shape import TargetShape


@torch.no_grad()
def compress_drafter(
    source: bundle.Bundle,
    out: str | Path,
    *,
    pattern: Pattern | None,
    grid: Grid | None,
    scope: Scope = "matrix",
    device: torch.device | str = "cpu",
    **compression: Any,
) -> bundle.Bundle:
    """Prunes the linear layers of a drafter by magnitude, then rounds them, and writes a bundle.

    The layers are all of the drafter's own, its projections to the vocabulary among them: these hold most of its bytes.

    Args:
        source: Bundle of the drafter.
        out: Folder to write; a bundle there is replaced.
        pattern: What to prune; None prunes nothing.
        grid: What to round to; None keeps the dtype.
        scope: Whether a share is counted over a matrix or within each of its outputs.
        device: Device of the computation.
        compression: Further entries of `extra["compression"]`, such as `method` and `commands`.

    Raises:
        UserError: its weights are quantised already, not finite, or do not fit the pattern or grid.
        ReloadError: the written files do not compute what was exported.
    """
    if QUANTISED in source.extra:
        raise UserError(f"{source.path}: its weights are already quantised; give the drafter that it was made from")
    drafter = load_bundle(source, TargetShape.from_dict(source.target))
    check_finite(drafter.named_parameters())
    dtype = next(drafter.parameters()).dtype
    linears = {name: part for name, part in drafter.named_modules() if isinstance(part, Linear)}
    for name, linear in linears.items():
        for part in (pattern, grid):
            if part:
                part.check(linear.in_features, name)
    # Change each layer's weight
    tensors, layers = drafter.file_tensors(dtype), dict[str, dict[str, float]]()
    tensors.pop("token_map", None)
    for name, linear in linears.items():
        dense_RK = linear.weight.to(device, torch.float32)
        weight_RK = dense_RK * mask_from_scores(magnitude(dense_RK), pattern, scope) if pattern else dense_RK
        bits = dtype.itemsize * 8
        if grid:
            codes = quantise(weight_RK, replace(grid, scale_dtype=dtype))
            parts = stored_tensors(name, codes.codes_RK, codes.scale_RG, codes.zero_RG, grid.bits, grid.kind)
            tensors.pop(f"{name}.weight")
            tensors |= {key: value.cpu() for key, value in parts.items()}
            weight_RK, bits = codes.dense(torch.float32), grid.bits
        linear.weight.copy_(weight_RK)
        lost = float((dense_RK - weight_RK).square().sum() / dense_RK.square().sum().clamp(min=1e-30))
        zeros = int((weight_RK == 0).sum()) / weight_RK.numel()
        layers[f"{name}.weight"] = {"sparsity": zeros, "bits": bits, "weight_error": lost}
    # Describe what was done
    weights = WeightScheme(grid.bits, grid.group, grid.symmetric, grid.kind) if grid else None
    zeros = sum(
        round(values["sparsity"] * linears[name.removesuffix(".weight")].weight.numel()) for name, values in layers.items()
    )
    parameters = sum(weight.numel() for weight in drafter.parameters())
    sizes = {"dense": weight_bytes(drafter), "disk": sum(tensor.nbytes for tensor in tensors.values())}
    made = dict(compression) | {"pattern": str(pattern) if pattern else None, "grid": asdict(weights) if weights else None}
    made |= {"layers": layers, "parameters": parameters, "bytes": sizes | {"resident": sizes["disk"]}}
    made["sparsity"] = {
        "matrices": zeros / sum(part.weight.numel() for part in linears.values()),
        "parameters": zeros / parameters,
    }
    runner = {name: value for name, value in source.runner.items() if name != "predictor"}
    # Write the files: of the drafter's own format, or of ours
    if weights is None:
        format = source.extra.get("format", "native")
        extra = {"compression": made}
        return export_drafter(drafter, out, tokenizer=source.path, dtype=dtype, format=format, runner=runner, extra=extra)
    before = first_logits(drafter.float())

    def write_files(folder: Path) -> None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        copy_tokenizer(source.path, folder)
        dense, packed = (type(drafter)(drafter.target, **source.config).eval() for _ in range(2))
        load_network(dense, folder / "model.safetensors", weights, packed=False)
        check_reload(before, first_logits(dense.float()), out)
        load_network(packed, folder / "model.safetensors", weights, packed=True)
        check_weights(_weights(dense), _weights(packed), out)

    extra = {"taps": list(drafter.taps), "format": "native", "layout": "packed"}
    extra |= {QUANTISED: asdict(weights), "compression": made}
    about: dict[str, Any] = {"config": source.config, "target": source.target, "runner": runner, "extra": extra}
    return bundle.write(out, write_files, kind=source.kind, **about)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` in float32, packed weights made dense."""
    dense = {
        name: part.packed.dense(torch.float32)
        for name, part in network.named_modules()
        if isinstance(part, Linear) and part.packed
    }
    values = {name: value.float() for name, value in network.state_dict().items()}
    return values | {f"{name}.weight": value for name, value in dense.items()}
