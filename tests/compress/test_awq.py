"""AWQ by another program: what it saved is checked, and its failures give one line. The program is a stand-in here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from trainkit import bundle
from trainkit.cli import main

STAND_IN = """#!{python}
# An interpreter that claims to have llmcompressor: it rounds to nearest, as the script that it is given would ask for AWQ.
import json, sys
from pathlib import Path
sys.path[:0] = {path!r}
if "-c" in sys.argv:
    print("0.14.9") if {installed} else sys.exit(1)
    sys.exit()
job = json.loads(Path(sys.argv[-1]).read_text())
print("INFO started")
if {fails}:
    sys.exit("RuntimeError: no memory")
import torch
from safetensors.torch import load_file, save_file
from trainkit.compress.quantise import Grid, quantise
from trainkit.models.compressed import quantization_config, stored_tensors
assert load_file(job["tokens"])["tokens"].shape == (4, 64)
source, out, weights = Path(job["model"]), Path(job["out"]), job["weights"]
grid = Grid(weights["num_bits"], weights.get("group_size"), weights["symmetric"])
tensors = load_file(source / "model.safetensors")
for name in [name for name in tensors if name.endswith("_proj.weight")]:
    found, stem = quantise(tensors.pop(name), grid), name.removesuffix(".weight")
    tensors |= stored_tensors(stem, found.codes_RK, found.scale_RG, found.zero_RG, grid.bits)
tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
out.mkdir()
save_file(tensors, out / "model.safetensors", metadata={{"format": "pt"}})
config = json.loads((source / "config.json").read_text())
config["quantization_config"] = quantization_config({bits} or grid.bits, grid.group, grid.symmetric)
(out / "config.json").write_text(json.dumps(config))
"""


def stand_in(folder: Path, installed: bool = True, fails: bool = False, bits: int | None = None) -> str:
    """The path of a stand-in."""
    file = folder / f"python-{installed}-{fails}-{bits}"
    path = [entry for entry in sys.path if entry]
    file.write_text(STAND_IN.format(python=sys.executable, path=path, installed=installed, fails=fails, bits=bits))
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} clips. " * 30}) + "\n" for n in range(40)))
    return str(tmp_path / "text.jsonl")


def test_what_the_program_saved_becomes_a_bundle(
    tiny_target: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its codes and scales are in the files, the card names the program, and a tied head that it saved is left out."""
    out = tmp_path / "out"
    command = ["compress", str(tiny_target), str(out), "--method", "awq", "--bits", "4", "--group", "32", "--device", "cpu"]
    command += ["--calibration", text, "--samples", "4", "--length", "64", "--python", stand_in(tmp_path)]
    assert main(command) == 0, capsys.readouterr().err
    made = bundle.read(out).extra["compression"]
    assert made["program"] == "llmcompressor 0.14.9" and made["grid"]["bits"] == 4 and len(made["layers"]) == 28
    assert made["calibration"]["samples"] == 4 and (out / "calibration.json").is_file()
    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in tensors and "model.layers.0.mlp.down_proj.weight_packed" in tensors
    assert not (tmp_path / "out.work").exists() and "quantised by llmcompressor 0.14.9" in capsys.readouterr().out


def test_failures_of_the_program_end_with_one_line(
    tiny_target: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, not installed, failing, or saving other bits than asked; and options that AWQ does not have."""
    target, out = str(tiny_target), str(tmp_path / "out")
    awq = [target, out, "--method", "awq", "--bits", "4", "--group", "32"]
    data = ["--calibration", text, "--samples", "4", "--length", "64"]
    cases = [
        ([*awq, *data, "--python", "no-python"], "--python no-python: cannot be started (No such file or directory)"),
        ([*awq, *data, "--python", stand_in(tmp_path, installed=False)], "has no llmcompressor; pip install 'trainkit[llmc]'"),
        ([*awq, *data, "--python", stand_in(tmp_path, fails=True)], "ended with 1: RuntimeError: no memory; the messages are"),
        ([*awq, *data, "--python", stand_in(tmp_path, bits=8)], "llmcompressor 0.14.9 stored model.layers.0.self_attn.q_proj"),
        (awq, "--method awq: needs calibration text; give --calibration FILE"),
        ([target, out, "--method", "awq", *data], "--method awq: quantises, so give --bits 4 or 8"),
        ([*awq, *data, "--sparsity", "0.5"], "--sparsity: --method awq has no such option; prune by magnitude"),
        ([*awq, *data, "--kind", "float"], "--kind: --method awq has no such option"),
        ([target, out, "--method", "awq", "--bits", "4", *data], "--group 128: model.layers.0.self_attn.q_proj has 64 inputs"),
        ([target, out, "--method", "rtn", "--bits", "8", "--python", "x"], "--python: --method rtn has no such option"),
    ]
    for arguments, message in cases:
        assert main(["compress", *arguments, "--device", "cpu"]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trainkit: error: ") and message in error, (arguments, error)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.work", ignore_errors=True)
