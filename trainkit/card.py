"""A bundle's card: its content as Markdown, printed after an export and logged with it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from trainkit.bundle import CERTIFICATE, Bundle, read_json, tensor_entries
from trainkit.errors import UserError

_SIZES = {"vocab_size": "vocabulary", "hidden_size": "hidden", "num_layers": "layers"}


def describe(bundle: Bundle) -> str:
    """The card in Markdown: kind, size, target, measured values and recommended runner settings."""
    count, size = weight_count(bundle)
    compression = bundle.extra.get("compression") or {}
    decoder, fingerprint = bundle.target.get("decoder", {}), bundle.target.get("fingerprint") or {}
    sizes = [f"{label} {decoder[key]}" for key, label in _SIZES.items() if key in decoder]
    rows = {
        "weights": f"{compression.get('parameters', count):,} parameters, {size / 1e6:,.1f} MB",
        "compression": _compression(compression),
        "target": ", ".join([str(fingerprint["path"]), *sizes] if fingerprint.get("path") else sizes),
        "decoding": f"not by trainkit's runner: {reason}" if (reason := bundle.target.get("undecodable")) else None,
        "layout": bundle.extra.get("layout"),
        "config": _items(bundle.config),
        "policy": _items(bundle.extra.get("policy") or {}),
        "metrics": _items(bundle.metrics) or "none recorded",
        "runner": _items({name: value for name, value in bundle.runner.items() if name != "predictor"}),
        "predictor": _predictor(bundle.runner.get("predictor")),
        "certificate": _certificate(bundle),
        "recipe": _text(bundle.recipe),
        "seed": bundle.seed,
        "data": _text(bundle.data),
        "versions": _items(bundle.versions),
    }
    lines = [f"- **{name}**: {value}" for name, value in rows.items() if value not in (None, "")]
    return "\n".join([f"# {bundle.path.name}: {bundle.kind}", "", *lines, ""])


def weight_count(bundle: Bundle) -> tuple[int, int]:
    """Number and bytes of the parameters, from the headers of the safetensors files; excludes the acceptance predictor."""
    count = size = 0
    for name in bundle.files:
        if name.endswith(".safetensors") and not name.startswith("predictor/"):
            for entry in tensor_entries(bundle.path / name).values():
                count += math.prod(entry["shape"]) if entry["dtype"] not in ("BOOL", "I64") else 0  # those are index maps
                size += entry["data_offsets"][1] - entry["data_offsets"][0]
    return count, size


def certified_files(bundle: Bundle) -> dict[str, str]:
    """sha256 of each file that decides what a drafter computes: all but an acceptance predictor."""
    return {name: digest for name, digest in bundle.files.items() if not name.startswith("predictor/")}


def _certificate(bundle: Bundle) -> str:
    """Result of the last `trainkit verify`, with date, precision and ties; empty if it never ran."""
    if not (bundle.path / CERTIFICATE).is_file():
        return ""
    try:
        values = read_json(bundle.path / CERTIFICATE)
        if (values["files"], values["tree"]) != (certified_files(bundle), bundle.runner.get("tree")):
            return "outdated, files or recommended tree changed since; run trainkit verify again"
        checks = {check["name"]: check for check in values["checks"]}
        broken = [name for name, check in checks.items() if check["status"] == "BROKEN"]
        result = f"BROKEN: {', '.join(broken)}" if broken else f"all {len(checks)} promises kept"
        where = f"{values['dtype']} on {values['device']['type']}, {values['date']}, trainkit {values['versions']['trainkit']}"
        return f"{result} ({where}); {checks['texts']['figure']}"
    except (UserError, KeyError, TypeError):
        return "unreadable; run trainkit verify again"


def _compression(values: Mapping[str, Any]) -> str:
    """Method, zeros and bits of a compressed model; its README.md has more."""
    if not values:
        return ""
    bits = sorted({layer["bits"] for layer in values["layers"].values()})
    shares = values["sparsity"]
    zeros = f"{shares['matrices']:.2%} zeros in compressed matrices, {shares['parameters']:.2%} in all parameters"
    return f"{values['method']}, {zeros}, {' and '.join(map(str, bits))} bits"


def _predictor(values: Any) -> str:
    """Width of an acceptance predictor and the settings it was trained for."""
    if not isinstance(values, Mapping):
        return ""
    trained = values.get("seen") or {}
    names = ("verify", "temperatures", "depth", "records")
    return _items({"width": values.get("width")} | {name: trained[name] for name in names if name in trained})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value)


def _items(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) > 16:  # for example the ids of a trimmed vocabulary
        return f"[{len(value):,} entries]"
    if isinstance(value, Mapping) and len(str(value)) > 200:  # for example the settings of a tree search
        return f"{{{', '.join(value)}}}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
