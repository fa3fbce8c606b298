"""The model card of a compressed model: README.md, from what trainkit.json records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit import bundle
from trainkit.files import write_text
from trainkit.models.compressed import read_scheme

MEASURED = {
    "perplexity": "Perplexity",
    "perplexity_dense": "Perplexity of the dense model",
    "ratio": "Ratio of the two perplexities",
    "kl": "KL(dense, compressed), nats per token",
    "agreement": "Share of tokens at which both have the same likeliest token",
    "recovery": "Recovery: dense perplexity divided by this perplexity",
    "evaluated_on": "Text",
    "step": "Optimiser steps of the checkpoint",
    "own_text_perplexity": "Perplexity of what the model writes itself",
    "own_text_perplexity_dense": "The same of the dense model",
    "own_text_ratio": "Ratio of these two perplexities",
    "own_text_kl": "KL(dense, compressed) on what the model writes, nats per token",
    "own_text_agreement": "Agreement there: share of tokens with the same likeliest token",
    "own_text_recovery": "Dense perplexity divided by this perplexity, there",
}
"""Metric that `trainkit evaluate` records -> its row in the table; others have their own names there."""


def record_metrics(folder: str | Path, metrics: Mapping[str, Any]) -> bundle.Bundle:
    """Adds measured values to the bundle of a compressed model, writes its README.md again, and returns the bundle.

    A value of None removes an older one.

    Raises:
        UserError: no valid bundle there.
    """
    found = bundle.read(folder)
    metrics = {name: value for name, value in {**found.metrics, **metrics}.items() if value is not None}
    config = bundle.read_json(found.path / "config.json")
    text = model_card(found.path.resolve().name, found.extra["compression"], metrics, config, drafter=found.kind != "model")
    return bundle.amend(folder, lambda temporary: write_text(temporary / "README.md", text), metrics=metrics)


def model_card(
    name: str, compression: Mapping[str, Any], metrics: Mapping[str, Any], config: Mapping[str, Any], drafter: bool = False
) -> str:
    """The text of README.md.

    Args:
        name: Name of the folder.
        compression: `extra["compression"]` of the bundle.
        metrics: Measured values of the bundle.
        config: Content of config.json.
        drafter: Whether it is a draft model.
    """
    scheme = read_scheme(config)
    quantised = scheme is not None
    sparsity = compression["sparsity"]
    sparse = bool(compression.get("pattern")) or (not quantised and sparsity["matrices"] >= 0.01)
    tags = ["trainkit"] + ["compressed-tensors"] * quantised + ["sparse"] * sparse
    lines = [
        *("---", "library_name: transformers", f"tags: [{', '.join(tags)}]", "---", "", f"# {name}", ""),
        f"A compressed {'draft' if drafter else 'language'} model, made by trainkit with the method {compression['method']}.",
        *("", "| | |", "|---|---|"),
        *_row("Removed", compression.get("removed")),
        *_row("Pattern of zeros", compression.get("pattern")),
        *_row("Stored weights", _grid(compression.get("grid"))),
        *_row("Zeros in compressed matrices", f"{sparsity['matrices']:.2%}" if compression["layers"] else None),
        *_row("Zeros in all parameters", f"{sparsity['parameters']:.2%} of {compression['parameters']:,}"),
        *(row for key, value in (compression.get("calibration") or {}).items() for row in _row(f"Calibration: {key}", value)),
        *_row("Weights on disk", _megabytes(compression["bytes"]["disk"])),
        *_row("Weights of the dense model on disk", _megabytes(compression["bytes"]["dense"])),
        *_row("Weights in memory, trainkit's runner on a CPU", _megabytes(compression["bytes"]["resident"])),
        *_kinds(compression),
        *("", "## Measured", "", *(_measured(metrics) or ["Nothing yet: `trainkit evaluate` records it here."])),
        *("", "## Load it", "", *_loading(name, quantised, drafter)),
        *("", "## Limits", "", *(f"- {line}" for line in _limits(compression, config, quantised, sparse, drafter))),
    ]
    if commands := compression.get("commands"):
        lines += ["", "## Made by", "", "```bash", *([commands] if isinstance(commands, str) else commands), "```"]
    return "\n".join(lines) + "\n"


def _row(title: str, value: Any) -> list[str]:
    """A row of a table; none without a value."""
    return [] if value in (None, "", [], {}) else [f"| {title} | {_short(value)} |"]


def _short(value: Any) -> str:
    if isinstance(value, list):  # files, as names or with their digests
        return ", ".join(item["name"] if isinstance(item, Mapping) and "name" in item else _short(item) for item in value)
    if isinstance(value, str):
        return value
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)


def _grid(grid: Mapping[str, Any] | None) -> str | None:
    """A grid in words, such as `int4, a scale for each group of 128 weights`."""
    if grid is None:
        return None
    scales = "output" if grid["group"] is None else f"group of {grid['group']} weights"
    return f"{grid['kind']}{grid['bits']}, a scale{'' if grid['symmetric'] else ' and a zero point'} for each {scales}"


def _megabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e6:,.1f} MB"


def _kinds(compression: Mapping[str, Any]) -> list[str]:
    """Table of the sparsity and bits of each kind of layer, such as q_proj; a range if they differ. None without layers."""
    kinds = dict[str, list[Mapping[str, Any]]]()
    for name, layer in compression["layers"].items():
        kinds.setdefault(name.removesuffix(".weight").rpartition(".")[2], []).append(layer)

    def span(values: list[float], style: str) -> str:
        low, high = format(min(values), style), format(max(values), style)
        return low if low == high else f"{low} to {high}"

    rows = [
        f"| {kind} | {len(layers)} | {span([layer['sparsity'] for layer in layers], '.2%')} | "
        f"{span([layer['bits'] for layer in layers], 'g')} |"
        for kind, layers in kinds.items()
    ]
    head = ["", "## By kind of layer", "", "| layer | matrices | sparsity | bits |", "|---|---|---|---|"]
    return [*head, *rows] if rows else []


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    rows = [
        row
        for name, value in metrics.items()
        for row in _row(str(MEASURED.get(name) or name.replace("val/", "Validation during training: ")), value)
    ]
    return ["| | |", "|---|---|", *rows] if rows else []


def _loading(name: str, quantised: bool, drafter: bool) -> list[str]:
    role = "TARGET --drafter " if drafter else ""
    needs = " (with the package compressed-tensors)" if quantised else ""
    return [
        "```python",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer  # transformers{needs}",
        f'model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")',
        *("```", "", "```bash"),
        *([] if drafter else [f"vllm serve {name}"]),
        f'trainkit generate --target {role}{name} --prompt "Why is the sky blue?"',
        "```",
    ]


def _limits(
    compression: Mapping[str, Any], config: Mapping[str, Any], quantised: bool, sparse: bool, drafter: bool
) -> list[str]:
    """What a reader must not expect of this model."""
    lines = ["The output differs from the dense model's; the table above says by how much, if it was measured."]
    if drafter:
        lines = ["Decoding with it gives the same text as with the dense draft, but may accept fewer drafted tokens."]
    if quantised and not sparse:
        lines.append("Zeros in the tables are small weights that were rounded to zero; nothing was pruned.")
    if sparse and not quantised:
        lines.append(
            "Pruned weights are stored as zeros in a dense model: the files are not smaller, and no program named here is "
            "faster with them."
        )
    elif sparse:
        lines.append(
            "Pruned weights are stored as codes like other weights: they make neither the files smaller nor decoding faster."
        )
    if quantised:
        lines.append(
            "transformers makes the weights dense at the first forward pass. There they take as much memory as those of the "
            "dense model, and decoding is not faster."
        )
        sizes = compression["bytes"]
        if sizes["resident"] is not None and sizes["resident"] > 1.1 * sizes["disk"]:
            lines.append(
                "trainkit's runner on a CPU cannot compute with weights stored in this grid, and makes them dense too."
            )
        if sizes["resident"] is None:
            lines.append("trainkit's runner does not decode this architecture.")
        if len(config["quantization_config"]["config_groups"]) > 1:
            lines.append("Layers differ in bits. vLLM requires one scheme for q, k and v of a block, and for gate and up.")
    return lines
