"""Compressed folders: transformers computes exactly what trainkit's own dense weights give, and faults stop the export."""

# R outputs  K inputs

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainkit.export.compressed as module
from tests.support.compressed import export_tiny, file_tensors, is_linear
from trainkit.bundle import read
from trainkit.compress.masks import Pattern, mask_from_scores
from trainkit.compress.quantise import Grid, quantise
from trainkit.errors import UserError
from trainkit.export.readme import record_metrics
from trainkit.models.target import load_model

IDS = torch.arange(40)[None] * 7 % 320


def reference(source, dtype, grid=None, pattern=None):
    """Logits of the source with its linear layers pruned and rounded in memory."""
    model = load_model(source, dtype)
    for name, weight in load_model(source, torch.float32).named_parameters():
        if is_linear(name):
            if pattern is not None:
                weight = weight * mask_from_scores(weight.abs(), pattern)
            dense = weight.to(dtype) if grid is None else quantise(weight, grid).dense(dtype)
            model.get_parameter(name).data.copy_(dense)
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "grid",
    [Grid(4, 32), Grid(4, 16, symmetric=False), Grid(8), Grid(8, 32, symmetric=False), Grid(8, kind="float"), None],
    ids=str,
)
def test_transformers_computes_exactly_our_weights(tiny_target, tmp_path, grid, dtype):
    """Logits of the exported folder in transformers equal those of the weights in memory, bit for bit; so do ours nearly."""
    pattern = Pattern(0.5, 2, 4) if grid is None or grid.bits == 4 else None
    options = {"bits": None} if grid is None else {name: getattr(grid, name) for name in ("bits", "group", "symmetric", "kind")}
    out = export_tiny(tiny_target, tmp_path / "out", pattern=pattern, dtype=dtype, **options).path
    if grid is not None:
        grid = Grid(grid.bits, grid.group, grid.symmetric, grid.kind, scale_dtype=dtype)
    expected = reference(tiny_target, dtype, grid, pattern)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(out, dtype=dtype)(IDS).logits, expected)
        assert torch.equal(load_model(out, dtype)(IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(tiny_target).chat_template


def test_sparsity_and_bits_are_measured(tiny_target, tmp_path):
    """The bundle records zeros and bits of each matrix, over all matrices and over all parameters, and the bytes on disk."""
    found = read(export_tiny(tiny_target, tmp_path / "out", bits=None, pattern=Pattern(0.5, 2, 4)).path)
    compression = found.extra["compression"]
    assert {(layer["sparsity"], layer["bits"]) for layer in compression["layers"].values()} == {(0.5, 32)}
    linear = sum(t.numel() for n, t in load_model(tiny_target, torch.float32).named_parameters() if is_linear(n))
    assert compression["parameters"] == sum(p.numel() for p in load_model(tiny_target, torch.float32).parameters())
    assert compression["sparsity"] == {"matrices": 0.5, "parameters": linear / 2 / compression["parameters"]}
    assert compression["bytes"]["disk"] == compression["bytes"]["dense"] == 4 * compression["parameters"]
    packed = export_tiny(tiny_target, tmp_path / "packed", bits=4, group=32).extra["compression"]
    assert {layer["bits"] for layer in packed["layers"].values()} == {4}
    shapes = 4 * 7 * 16  # two int64 for each of the 28 layers
    assert packed["bytes"]["disk"] == 4 * (compression["parameters"] - linear) + linear // 2 + 4 * linear // 32 + shapes


def test_files_are_split_and_read_back(tiny_target, tmp_path, monkeypatch):
    """Tensors go to several files with an index when they exceed the size of a file, and load as from one file."""
    whole = export_tiny(tiny_target, tmp_path / "whole").path
    monkeypatch.setattr(module, "SHARD_BYTES", 30_000)
    split = export_tiny(tiny_target, tmp_path / "split").path
    files = sorted(path.name for path in split.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((split / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    with torch.no_grad():
        assert torch.equal(load_model(split, torch.float32)(IDS).logits, load_model(whole, torch.float32)(IDS).logits)


def test_faults_stop_the_export(tiny_target, tmp_path):
    """Too few zeros, a broken pattern, other bits, missing, double or unknown tensors and NaN leave nothing at the path."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = dict(file_tensors(tiny_target, torch.float32, None, None))
    layer = lambda **values: {"method": "wanda", "layers": {name: values}}
    dense = {"bits": None, "source": tiny_target}
    cases = [
        (dense | {"compression": layer(sparsity=0.5)}, f"{name} has 0.000000 of its weights at zero, not 0.500000"),
        (dense | {"compression": layer(bits=4)}, f"{name} has 32 bits, not 4"),
        (dense | {"compression": {"method": "x", "layers": {"absent": {}}}}, "absent is missing"),
        (
            dense | {"pattern": Pattern(0.5), "compression": layer(sparsity=0.5) | {"pattern": "2:4"}},
            "weights in a group of 4, not 2",
        ),
        (dense | {"tensors": [*tensors.items(), (name, tensors[name])]}, f"tensor '{name}' is written twice"),
        (dense | {"tensors": [*tensors.items(), ("extra", torch.zeros(1))]}, "tensor extra would not reload"),
        (dense | {"tensors": list(tensors.items())[1:]}, "would not reload"),
        (dense | {"tensors": [(n, t * float("nan")) for n, t in tensors.items()]}, "values that are not finite"),
        (dense | {"config": {"dtype": "bfloat16"}}, "is torch.float32, config.json says torch.bfloat16"),
    ]
    for options, message in cases:
        layers = options.pop("compression", {"method": "x", "layers": {}})
        with pytest.raises(UserError) as raised:
            export_tiny(out=tmp_path / "out", compression=layers, **options)
        assert message in str(raised.value), (message, str(raised.value))
        assert not any(tmp_path.iterdir())


def test_a_reader_that_disagrees_stops_the_export(tiny_target, tmp_path, monkeypatch):
    """If our dense weights are not what transformers decompresses, or our decoder differs, nothing is written."""
    for place in ("load_model", "load_decoder"):
        original = getattr(module, place)

        def broken(*args, original=original, **options):
            model = original(*args, **options)
            next(weight for name, weight in model.named_parameters() if "norm" in name).data.mul_(1.1)
            return model

        with monkeypatch.context() as patch:
            patch.setattr(module, place, broken)
            with pytest.raises(UserError, match="the logits of .* differ"):
                export_tiny(tiny_target, tmp_path / "out")
        assert not any(tmp_path.iterdir())


def test_readme_says_what_was_done_and_its_limits(tiny_target, tmp_path):
    """README.md has method, calibration, sparsity and bits by kind of layer, later measurements, and what not to expect."""
    compression = {
        "method": "wanda",
        "calibration": {"files": ["train.jsonl"], "seed": 3, "samples": 128, "length": 512},
        "layers": {"model.layers.0.mlp.up_proj.weight": {}, "model.layers.1.mlp.up_proj.weight": {}},
        "commands": ["trainkit compress a b --method wanda"],
    }
    out = export_tiny(
        tiny_target,
        tmp_path / "out",
        bits=None,
        pattern=Pattern(0.5, 2, 4),
        compression=compression,
        calibration_fingerprints=[1, 2],
    ).path
    text = (out / "README.md").read_text()
    for part in ("method wanda", "train.jsonl", "| Calibration: seed | 3 |", "| up_proj | 2 | 50.00% | 32 |", "are no smaller"):
        assert part in text, part
    assert json.loads((out / "calibration.json").read_text()) == {"fingerprints": [1, 2]}
    record_metrics(out, {"perplexity": 9.731, "kl": 0.113})
    assert read(out).metrics == {"perplexity": 9.731, "kl": 0.113}  # checksums agree
    assert "| Perplexity | 9.731 |" in (out / "README.md").read_text()
    packed = (export_tiny(tiny_target, tmp_path / "packed", symmetric=False).path / "README.md").read_text()
    assert "compressed-tensors" in packed and "has no product for this grid" in packed  # zero points: dense on a CPU
