"""A bundle in words: the card printed when it is made and logged with it; its size is read from the files' headers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from trainkit.bundle import Bundle, tensor_entries


def describe(bundle: Bundle) -> str:
    """The bundle in words (Markdown): kind, size, target, what was measured and how to run it."""
    count, size = weight_count(bundle)
    decoder, made = bundle.target.get("decoder", {}), bundle.target.get("fingerprint") or {}
    sizes = [f"{label} {decoder[key]}" for key, label in _SIZES.items() if key in decoder]
    rows = {
        "weights": f"{count:,} parameters, {size / 1e6:,.1f} MB",
        "target": ", ".join([str(made["path"]), *sizes] if made.get("path") else sizes),
        "layout": bundle.extra.get("layout"),
        "config": _items(bundle.config),
        "metrics": _items(bundle.metrics) or "none recorded",
        "runner": _items({name: value for name, value in bundle.runner.items() if name != "predictor"}),
        "predictor": _predictor(bundle.runner.get("predictor")),
        "recipe": bundle.recipe if isinstance(bundle.recipe, str) or bundle.recipe is None else json.dumps(bundle.recipe),
        "seed": bundle.seed,
        "data": bundle.data if isinstance(bundle.data, str) or bundle.data is None else json.dumps(bundle.data),
        "versions": _items(bundle.versions),
    }
    lines = [f"- **{name}**: {value}" for name, value in rows.items() if value not in (None, "")]
    return "\n".join([f"# {bundle.path.name}: {bundle.kind}", "", *lines, ""])


def _predictor(values: Any) -> str:
    """Of an acceptance predictor its sizes and what it was trained for."""
    if not isinstance(values, Mapping):
        return ""
    seen = values.get("seen") or {}
    shown = {"width": values.get("width")}
    shown |= {name: seen[name] for name in ("verify", "temperatures", "depth", "records") if name in seen}
    return _items(shown)


_SIZES = {"vocab_size": "vocabulary", "hidden_size": "hidden", "num_layers": "layers"}


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 16:  # such as the ids of a trimmed vocabulary
        return f"[{len(value):,} entries]"
    if isinstance(value, Mapping) and len(str(value)) > 200:  # such as what a tree was searched with
        return f"{{{', '.join(value)}}}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def weight_count(bundle: Bundle) -> tuple[int, int]:
    """Parameters and bytes in the bundle's safetensors files, from their headers; without its acceptance predictor's."""
    count = size = 0
    for name in bundle.files:
        if name.endswith(".safetensors") and not name.startswith("predictor/"):
            for entry in tensor_entries(bundle.path / name).values():
                count += math.prod(entry["shape"]) if entry["dtype"] not in ("BOOL", "I64") else 0  # those are index maps
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return count, size
