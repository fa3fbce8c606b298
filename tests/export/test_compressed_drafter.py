"""Compressed drafters of every kind that is no language model: they decode packed, lossless, and are what was rounded."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.drafters import VARIANTS
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.compress import compress
from trainkit.compress.quantise import Grid, quantise
from trainkit.drafters.base import Drafter, load_bundle, load_kind
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter, first_logits
from trainkit.layers.linear import Linear
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner

GRIDS = [{"bits": 8}, {"bits": 4, "group": 32}, {"bits": 8, "group": 32, "zero_points": True}, {"bits": 8, "kind": "float"}]
PRUNED = {"method": "magnitude", "sparsity": "2:4", "bits": 4, "group": 32}


def export_random(name: str, target: Path, out: Path) -> Drafter:
    """A drafter whose weights are all random, so that each of them matters."""
    kind, arguments = VARIANTS[name]
    drafter = load_kind(kind)(target_shape(target), **arguments)
    drafter.initialise(FrozenTarget(target))
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    export_drafter(drafter, out, tokenizer=target, runner={"depth": 2})
    return drafter


def linears(drafter: Drafter) -> dict[str, Linear]:
    return {name: part for name, part in drafter.named_modules() if isinstance(part, Linear)}


@pytest.mark.parametrize(("name", "options"), [*product(["medusa"], GRIDS), ("hydra++", GRIDS[1]), ("eagle", GRIDS[1])])
def test_quantised_drafter_holds_codes(
    name: str, options: dict[str, Any], tiny_target: Path, tmp_path: Path, seed: int
) -> None:
    """Each linear layer is the dense one rounded to its grid; packed or dense, the drafter computes the same."""
    torch.manual_seed(seed)
    drafter = export_random(name, tiny_target, tmp_path / "dense")
    report = compress(str(tmp_path / "dense"), str(tmp_path / "out"), method="rtn", device="cpu", **options)
    found = bundle.read(tmp_path / "out")
    grid = Grid(
        options["bits"], options.get("group"), not options.get("zero_points"), options.get("kind", "int"),
        search=options["bits"] == 4,
    )  # fmt: skip
    packed, dense = (load_bundle(found, drafter.target, packed=packed) for packed in (True, False))
    for part, linear in linears(drafter).items():
        wanted = quantise(linear.weight.detach(), grid).dense(torch.float32)
        assert torch.equal(linears(dense)[part].weight, wanted)
        assert torch.equal(linears(packed)[part].packed.dense(torch.float32), wanted)  # type: ignore[union-attr]
    torch.testing.assert_close(first_logits(packed), first_logits(dense), rtol=0, atol=1e-4)  # attention sums in another order
    assert (found.kind, found.config, found.target) == (VARIANTS[name][0], drafter.config(), drafter.target.to_dict())
    assert found.runner == {"depth": 2} and "weights on disk" in report
    made = found.extra["compression"]
    assert made["bytes"]["disk"] < 0.6 * made["bytes"]["dense"] and made["layers"].keys() == {
        f"{part}.weight" for part in linears(drafter)
    }
    # a step reads the packed bytes
    assert packed.step_bytes(0) < 0.6 * drafter.step_bytes(0)


@pytest.mark.parametrize(
    ("name", "options"), [("medusa", PRUNED), ("hydra++", {"method": "rtn", "bits": 8}), ("eagle", PRUNED)]
)
def test_compressed_drafter_is_lossless(
    name: str, options: dict[str, Any], tiny_target: Path, tmp_path: Path, seed: int
) -> None:
    """Texts drafted by it are those of plain decoding, also on several rows and with sampling."""
    torch.manual_seed(seed)
    export_random(name, tiny_target, tmp_path / "dense")
    compress(str(tmp_path / "dense"), str(tmp_path / "out"), device="cpu", **options)
    plain = Runner.load(str(tiny_target), device="cpu", max_len=64)
    ours = Runner.load(str(tiny_target), str(tmp_path / "out"), device="cpu", max_len=64)
    prompts = torch.randint(300, (3, 5)).tolist()
    for temperature in (0.0, 1.0):
        settings: dict[str, Any] = {"max_new_tokens": 24, "temperature": temperature, "seed": 1}
        texts = [[output.tokens for output in runner.generate(prompts, **settings)] for runner in (plain, ours)]
        assert texts[0] == texts[1]
    assert ours.last.drafted > 0


def test_pruned_drafter_keeps_its_format(tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Half of each matrix is zero in files of the same names and shapes; the weights that stay do not change."""
    torch.manual_seed(seed)
    export_random("medusa", tiny_target, tmp_path / "dense")
    compress(str(tmp_path / "dense"), str(tmp_path / "out"), method="magnitude", sparsity="0.5", device="cpu")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    assert before.keys() == after.keys()
    for name, value in after.items():
        kept = value != 0
        assert torch.equal(value[kept], before[name][kept])
        if value.ndim == 2:
            assert int((~kept).sum()) == value.numel() // 2
            assert before[name][~kept].abs().max() <= before[name][kept].abs().min()
    made = bundle.read(tmp_path / "out").extra["compression"]
    assert made["sparsity"]["matrices"] == 0.5 and made["pattern"] == "0.5" and made["grid"] is None


def test_mistakes_with_drafters_end_with_one_line(
    tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """Methods, options and files that such a drafter does not have."""
    torch.manual_seed(seed)
    export_random("medusa", tiny_target, tmp_path / "dense")
    source, out = str(tmp_path / "dense"), str(tmp_path / "out")
    compress(source, str(tmp_path / "int8"), method="rtn", bits=8, device="cpu")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    rtn = ["--method", "rtn", "--bits", "8"]
    cases = [
        ([source, out, "--method", "gptq", "--bits", "8"], "--method gptq: not for drafters of kind 'medusa'; give m"),
        ([source, out, "--method", "magnitude"], "--method magnitude: prunes, so give --sparsity"),
        ([source, out, *rtn, "--calibration", str(tmp_path / "text.jsonl")], "--calibration: drafters of kind 'medusa' are"),
        ([source, out, *rtn, "--dtype", "bfloat16"], "--dtype: drafters of kind 'medusa' are compressed without it"),
        ([source, out, *rtn, "--group", "48"], "--group 48: blocks.0.0.linear has 64 inputs, not a multiple"),
        ([source, out, *rtn, "--sparsity", "0.5"], "--sparsity: --method rtn has no such option"),
        ([source, out, "--method", "magnitude", "--sparsity", "0.5", "--group", "8"], "--group: only for quantised weights"),
        ([source, out, "--method", "magnitude", "--sparsity", "2:4", "--scope", "row"], "--scope: --sparsity 2:4 compares"),
        (
            [str(tmp_path / "int8"), out, *rtn],
            "int8: its weights are already quantised; give the drafter that it was made from",
        ),
        ([source, source, *rtn], "is the folder of the model, inside it or around it"),
    ]
    for arguments, message in cases:
        assert main(["compress", *arguments, "--device", "cpu"]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trainkit: error: ") and message in error, (arguments, error)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["another layer", "missing scale", "another size"])
def test_damaged_file_is_named(fault: str, tiny_target: Path, tmp_path: Path, seed: int) -> None:
    """Tensors that do not fit give one line with the file and the tensor."""
    torch.manual_seed(seed)
    drafter = export_random("medusa", tiny_target, tmp_path / "dense")
    compress(str(tmp_path / "dense"), str(tmp_path / "out"), method="rtn", bits=8, device="cpu")
    file, name = tmp_path / "out" / "model.safetensors", "lm_heads.1"
    tensors = load_file(file)
    if fault == "another layer":
        tensors = {key.replace(name, "lm_heads.9"): value for key, value in tensors.items()}
    elif fault == "missing scale":
        del tensors[f"{name}.weight_scale"]
    else:
        for part in ("weight_packed", "weight_scale"):
            tensors[f"{name}.{part}"] = tensors[f"{name}.{part}"][:-1].contiguous()
        tensors[f"{name}.weight_shape"] -= torch.tensor([1, 0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors: .*lm_heads"):
        load_bundle(bundle.read(tmp_path / "out", checksums=False), drafter.target, packed=True)
