"""AWQ (arXiv 2306.00978) by llmcompressor, which runs as a process of its own: its pins may not fit trainkit's environment.

AWQ scales the inputs of linear layers, and the weights before them inversely, so that rounding costs least on calibration text.
Norms change too; the model computes the same function before rounding. Only the folder that the process saved is used.
"""

# S sequences  T positions

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainkit.bundle import read_json, tensor_entries
from trainkit.compress.blocks import Sequences, origin
from trainkit.compress.layout import Layout
from trainkit.compress.quantise import Grid
from trainkit.compress.work import claimed, world
from trainkit.errors import UserError, note
from trainkit.files import remove, write_json
from trainkit.models.compressed import WeightScheme, quantization_config, read_scheme
from trainkit.models.weights import HEAD, read_tensors, weight_files

JOB = Path(__file__).with_name("awq_job.py")


def awq(
    layout: Layout,
    calibration: Sequences,
    grid: Grid,
    work: Path,
    *,
    python: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """The quantised model: tensors of its files, its fields of config.json that change, and what to report.

    The process writes its messages to llmcompressor.log in `work`. After a kill it starts again, unless it was done.

    Args:
        layout: The model.
        calibration: Calibration text.
        grid: What weights are rounded to.
        work: Folder for the state; remove it when the tensors have been read.
        python: Interpreter that has llmcompressor; by default this one.
        dtype: Precision of the computation.
        device: Device of the computation.

    Raises:
        UserError: no such interpreter, it has no llmcompressor, the process failed, or it saved something else.
    """
    if world() > 1:
        raise UserError("--method awq: llmcompressor runs in one process; start the command without torchrun")
    python = python or sys.executable
    version = _version(python)
    wanted = WeightScheme(grid.bits, grid.group, grid.symmetric)
    settings = {"method": "awq", "llmcompressor": version, "weights": str(wanted), "dtype": str(dtype)}
    out, log = work / "quantised", work / "llmcompressor.log"
    with claimed(work, origin(layout.folder, calibration) | settings):
        if not out.is_dir():
            note(f"llmcompressor {version} is running; its messages are in {log}")
            _run(python, layout, calibration, grid, work, {"dtype": str(dtype).removeprefix("torch."), "device": str(device)})
        scheme = read_scheme(read_json(out / "config.json"), str(out / "config.json"))
        if other := [name for name in layout.all_linears() if scheme is None or scheme.of(name) != wanted]:
            raise UserError(f"{out}: llmcompressor {version} stored {other[0]} in another way than asked; see {log}")
    has_head = any(HEAD in tensor_entries(file) for file in weight_files(layout.folder))
    tensors = ((name, value) for name, value in read_tensors(out) if name != HEAD or has_head)
    made = {"method": "awq", "program": f"llmcompressor {version}", "grid": asdict(wanted)}
    made["layers"] = {f"{name}.weight": {"bits": grid.bits} for name in layout.all_linears()}
    return tensors, {"quantization_config": quantization_config(grid.bits, grid.group, grid.symmetric)}, made


def _version(python: str) -> str:
    """The version of llmcompressor that an interpreter has."""
    code = "from importlib.metadata import version; print(version('llmcompressor'))"
    try:
        command = [python, "-P", "-c", code]
        found = subprocess.run(command, capture_output=True, text=True, env=_variables(python), check=False)
    except OSError as error:
        raise UserError(f"--python {python}: cannot be started ({error.strerror}); name a Python interpreter") from error
    if found.returncode:
        remedy = "pip install 'trainkit[llmc]' for it, or name an interpreter that has llmcompressor with --python"
        raise UserError(f"--method awq: {python} has no llmcompressor; {remedy}")
    return found.stdout.strip()


def _variables(python: str) -> dict[str, str]:
    """The environment of the process; another interpreter must not find this one's packages."""
    own = () if python == sys.executable else ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in own}


def _run(python: str, layout: Layout, calibration: Sequences, grid: Grid, work: Path, computed: dict[str, str]) -> None:
    """Runs the process; its result is moved to its place in `work` at the end."""
    tokens, partial, log = work / "tokens.safetensors", work / "quantised.partial", work / "llmcompressor.log"
    remove(partial)
    save_file({"tokens": calibration.tokens_ST.contiguous()}, tokens)
    weights: dict[str, Any] = {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "dynamic": False}
    weights |= {"strategy": "group", "group_size": grid.group} if grid.group else {"strategy": "channel"}
    job = {"model": str(layout.folder.resolve()), "tokens": str(tokens), "out": str(partial), "weights": weights} | computed
    write_json(work / "job.json", job)
    with log.open("w") as file:
        command = [python, "-P", str(JOB), str(work / "job.json")]
        ended = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=_variables(python), check=False).returncode
    if ended or not (partial / "config.json").is_file():
        lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        raise UserError(f"--method awq: {python} ended with {ended}: {lines[-1]}; the messages are in {log}")
    os.replace(partial, work / "quantised")
