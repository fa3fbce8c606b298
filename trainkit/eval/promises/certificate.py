"""The certificate in a bundle: what `trainkit verify` checked, in which precision, with which result, and for which files."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainkit import __version__
from trainkit.card import certified_files
from trainkit.data.manifest import weights_digest
from trainkit.eval.promises.types import Check, Subject
from trainkit.runner.timing import processor


def certificate(subject: Subject, checks: Sequence[Check]) -> dict[str, Any]:
    """The certificate, JSON-able: result, files, target, precision, machine, versions, settings and every check.

    The target is identified by its fingerprint and the digest of its weights, the drafter by the sha256 of each file.
    """
    libraries = ("torch", "transformers", "safetensors", "tokenizers")
    runner = subject.runner
    return {
        "passed": all(check.status != "BROKEN" for check in checks),
        "date": date.today().isoformat(),
        "dtype": subject.arguments.dtype,
        "device": {"type": runner.device.type, "processor": processor(runner.device)},
        "versions": {"trainkit": __version__, "python": platform.python_version()}
        | {name: version(name) for name in libraries},
        "settings": {name: value for name, value in asdict(subject.arguments).items() if name not in ("target", "prompts")},
        "prompts": {"count": len(subject.prompts), "file": subject.arguments.prompts and Path(subject.arguments.prompts).name},
        "target": {**(runner.shape.fingerprint or {}), "weights": weights_digest(subject.target_folder)},
        "files": {} if subject.bundle is None else certified_files(subject.bundle),
        "tree": None if subject.bundle is None else subject.bundle.runner.get("tree"),
        "checks": [check.to_dict() for check in checks],
    }
