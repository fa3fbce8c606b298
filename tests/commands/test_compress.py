"""`trainkit compress`: exports that load, a kill that changes nothing, draft models, and mistakes that give one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.processes import ended, files_of, fork
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.compress import compress
from trainkit.compress import blocks
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import Runner

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "train.jsonl"
    rows = [{"question": f"How many of {n}?", "answer": f"In May she sold {n} / 2 = {n / 2} clips."} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def calibrated(text: str, **options: Any) -> dict[str, Any]:
    return {"calibration": [text], "samples": 4, "length": 64, "device": "cpu"} | options


def test_pruned_and_quantised_export_loads_and_reports(tiny_target: Path, tmp_path: Path, text: str) -> None:
    """The card has pattern, bits, calibration and measured figures by layer; the runner decodes the folder."""
    out = tmp_path / "out"
    report = compress(str(tiny_target), str(out), method="sparsegpt", sparsity="2:4", bits=4, group=32, **calibrated(text))
    found = bundle.read(out)
    made = found.extra["compression"]
    assert found.kind == "model" and found.seed == 0
    assert (made["method"], made["pattern"], made["grid"]["bits"], made["grid"]["group"]) == ("sparsegpt", "2:4", 4, 32)
    assert made["calibration"]["samples"] == 4 and made["calibration"]["tokens"] == 256
    assert len(made["layers"]) == 28 and all(values["sparsity"] >= 0.5 for values in made["layers"].values())
    assert made["commands"] == [
        f"trainkit compress {tiny_target} {out} --method sparsegpt --sparsity 2:4 --bits 4 --group 32 --calibration {text} "
        "--samples 4 --length 64 --seed 0 --device cpu --dtype float32"
    ]
    assert json.loads((out / "calibration.json").read_text())["fingerprints"] is not None
    assert "down_proj" in report and "peak memory" in report and not (tmp_path / "out.work").exists()
    runner = Runner.load(str(out), device="cpu", max_len=64)
    assert len(runner.generate([[1, 2, 3]], max_new_tokens=4)[0].tokens) > 0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_float8_export_loads_and_says_so(method: str, tiny_target: Path, tmp_path: Path, text: str) -> None:
    """Files hold float8 codes, which transformers and the runner read (the export's own check); the card names them."""
    out = tmp_path / "out"
    compress(str(tiny_target), str(out), method=method, bits=8, kind="float", **(calibrated(text) if method == "gptq" else {}))
    stored = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert stored.dtype == torch.float8_e4m3fn
    assert "| Stored weights | float8, a scale for each output |" in (out / "README.md").read_text()
    assert len(Runner.load(str(out), device="cpu", max_len=64).generate([[1, 2, 3]], max_new_tokens=4)[0].tokens) > 0


@pytest.mark.parametrize("options", [{"method": "magnitude", "sparsity": "0.5"}, {"method": "rtn", "bits": 8}])
def test_methods_without_calibration_read_no_text(options: dict[str, Any], tiny_target: Path, tmp_path: Path) -> None:
    """And their bundle names none."""
    report = compress(str(tiny_target), str(tmp_path / "out"), device="cpu", **options)
    assert "calibration" not in bundle.read(tmp_path / "out").extra["compression"] and "not measured" in report
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_structured_method_writes_a_smaller_model(tiny_target: Path, tmp_path: Path, text: str) -> None:
    """With fewer neurons and a new bias; transformers and the runner load it (the export's own check)."""
    out = tmp_path / "out"
    report = compress(str(tiny_target), str(out), method="flap", ratio=0.3, multiple=16, **calibrated(text))
    config, made = json.loads((out / "config.json").read_text()), bundle.read(out).extra["compression"]
    assert config["intermediate_size"] < 128 and config["mlp_bias"]
    assert made["method"] == "flap" and made["ratio"] == 0.3 and made["calibration"]["samples"] == 4
    assert made["bytes"]["disk"] < made["bytes"]["dense"] and "neurons of each block" in report
    assert not (tmp_path / "out.work").exists()


def test_killed_command_continues_with_identical_files(tiny_target: Path, tmp_path: Path, text: str, seed: int) -> None:
    """Killed when block 1 is complete; the folders differ in nothing but the name in the command."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"method": "wanda", "sparsity": "0.6", **calibrated(text)}

    def run(out: str) -> None:
        compress(str(tiny_target), str(tmp_path / out), **options)

    def run_killed() -> None:
        writer = blocks.write_block

        def write(work: Path, index: int, *rest: Any) -> None:
            writer(work, index, *rest)
            if index == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        blocks.write_block = write
        run("killed")

    assert ended(fork(run_killed)) == -signal.SIGKILL
    assert len(list((tmp_path / "killed.work").glob("block-*"))) == 2 and not (tmp_path / "killed").exists()
    assert ended(fork(lambda: run("killed"))) == ended(fork(lambda: run("once"))) == 0
    again, once = files_of(tmp_path / "killed"), files_of(tmp_path / "once")
    assert again.keys() == once.keys() and not (tmp_path / "killed.work").exists()
    for name in once.keys() - {"trainkit.json", "README.md"}:
        assert again[name] == once[name]
    ours, theirs = (json.loads(files["trainkit.json"])["extra"]["compression"] for files in (again, once))
    assert ours | {"commands": []} == theirs | {"commands": []}


def test_compressed_draft_model_stays_a_drafter(tiny_target: Path, tmp_path: Path, text: str, seed: int) -> None:
    """The runner drafts with it, and the text is that of plain decoding."""
    torch.manual_seed(seed)
    draft = LMDraft(target_shape(tiny_target), num_layers=2)
    draft.initialise(FrozenTarget(tiny_target))
    export_drafter(draft, tmp_path / "draft", tokenizer=tiny_target)
    sparse, quantised = {"method": "wanda", "sparsity": "2:4"}, {"method": "wanda", "sparsity": "0.5", "bits": 8}
    for name, options in (("sparse", sparse), ("int8", quantised), ("short", {"method": "depth", "ratio": 0.5})):
        out = str(tmp_path / name)
        compress(str(tmp_path / "draft"), out, **options, **calibrated(text))
        before, after = bundle.read(tmp_path / "draft"), bundle.read(out)
        layers = 1 if name == "short" else 2
        assert (after.kind, after.config, after.target) == (before.kind, {**before.config, "num_layers": layers}, before.target)
        plain = Runner.load(str(tiny_target), device="cpu", max_len=64).generate([[5, 6, 7]], max_new_tokens=24)[0]
        ours = Runner.load(str(tiny_target), out, device="cpu", max_len=64).generate([[5, 6, 7]], max_new_tokens=24)[0]
        assert ours.tokens == plain.tokens
        card = (Path(out) / "README.md").read_text()
        assert f"--target TARGET --drafter {name} " in card and "vllm serve" not in card
        assert ("| Stored weights | int8, a scale for each output |" in card) == (name == "int8")


def test_bad_commands_end_with_one_line(
    tiny_target: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every mistake names its option, file or layer, and a remedy; nothing is written."""
    target, out = str(tiny_target), str(tmp_path / "out")
    folders = {name: shutil.copytree(tiny_target, tmp_path / name) for name in ("gpt2", "quantised", "infinite")}
    for name, change in (("gpt2", {"model_type": "gpt2"}), ("quantised", {"quantization_config": {"quant_method": "fp8"}})):
        file = folders[name] / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    weights = load_file(folders["infinite"] / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1e30
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e30
    save_file(weights, folders["infinite"] / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    layer = "model.layers.0.mlp.down_proj"
    allocations = {
        "head": {"lm_head": {"sparsity": 0.5}},
        "odd": {layer: {"bits": 3}},
        "none": {},
        "zero": {layer: {"sparsity": 0}},
        "other": {"a.b": {"sparsity": 0.1}},
    }
    for name, layers in allocations.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"layers": layers}))
    (tmp_path / "moved.json").write_text(json.dumps({"target": "0" * 64, "layers": {layer: {"sparsity": 0.5}}}))
    data = ["--calibration", text, "--samples", "4", "--length", "64"]
    wanda, rtn, gptq = (["--method", name] for name in ("wanda", "rtn", "gptq"))
    allocated = lambda name: ["--allocation", str(tmp_path / f"{name}.json")]
    cases: list[tuple[list[str], str]] = [
        ([target, out, "--method", "best"], "--method best: unknown method; choose from magnitude, wanda"),
        ([target, out, *wanda, "--sparsity", "4:4", *data], "--sparsity 4:4: N:M keeps N of every M weights, so N must be"),
        ([target, out, *wanda, "--sparsity", "5:4", *data], "--sparsity 5:4: N:M keeps"),
        ([target, out, *wanda, "--sparsity", "1.5", *data], "--sparsity 1.5: give the share to prune"),
        ([target, out, *wanda, "--sparsity", "2:7", *data], "--sparsity 2:7: model.layers.0.self_attn.q_proj has 64 inputs"),
        ([target, out, *rtn, "--bits", "4", "--group", "48"], "--group 48: model.layers.0.self_attn.q_proj has 64 inputs"),
        ([target, out, *rtn, "--bits", "4"], "--group 128: model.layers.0.self_attn.q_proj has 64 inputs"),
        ([target, out, *rtn, "--bits", "3"], "--bits 3: weights are stored with 4 or 8 bits"),
        ([target, out, *rtn], "--method rtn: quantises, so give --bits"),
        ([target, out, *wanda, *data], "--method wanda: prunes, so give --sparsity"),
        ([target, out, *rtn, "--bits", "8", "--sparsity", "0.5"], "--sparsity: --method rtn has no such option; prune by"),
        ([target, out, *rtn, "--bits", "8", *data], "--calibration: --method rtn without --refine reads no text"),
        ([target, out, *wanda, "--sparsity", "0.5"], "--method wanda: needs calibration text; give --calibration FILE"),
        ([target, out, *gptq, "--bits", "8"], "--method gptq: needs calibration text"),
        ([target, out, "--method", "magnitude", "--sparsity", "0.5", "--refine", "swaps"], "--refine swaps: needs calibration"),
        ([target, out, *gptq, "--bits", "8", "--refine", "swaps", *data], "--refine: --method gptq has no such option"),
        ([target, out, *wanda, "--sparsity", "0.5", "--scope", "row", *data], "--scope: --method wanda has no such option"),
        (
            [target, out, *wanda, "--sparsity", "0.5", "--group", "32", *data],
            "--group: only for quantised weights; give --bits",
        ),
        (
            [target, out, *wanda, "--sparsity", "0.5", "--order", "stored", *data],
            "--order: only for a pass that changes weights",
        ),
        (
            [target, out, "--method", "sparsegpt", "--sparsity", "2:4", "--order", "activation", *data],
            "--order activation: N:M groups are pruned in stored order",
        ),
        (
            [target, out, "--method", "sparsegpt", "--sparsity", "3:16", "--bits", "4", "--group", "8", *data],
            "--group 8: not a multiple of 16, the M of --sparsity 3:16",
        ),
        (
            [target, out, "--method", "magnitude", "--sparsity", "2:4", "--scope", "row"],
            "--scope: --sparsity 2:4 compares the weights",
        ),
        (
            [target, out, *wanda, "--sparsity", "0.5", "--bits", "8", "--refine", "dsnot", "--order", "activation", *data],
            "--order: only for a pass that compensates rounding; take --refine swaps",
        ),
        (
            [target, out, "--method", "magnitude", "--sparsity", "0.5", "--bits", "8", "--static_scales", "true"],
            "--static_scales: only for a pass that compensates rounding",
        ),
        (
            [target, out, *gptq, "--bits", "8", "--order", "activation", "--static_scales", "false", *data],
            "--static_scales false: --order activation takes scales before",
        ),
        (
            [target, out, "--method", "magnitude", "--sparsity", "0.5", "--sequential", "true"],
            "--sequential: measures layers on calibration text",
        ),
        ([target, out, *rtn, "--bits", "8", "--length", "64"], "--length: is for calibration text; give --calibration"),
        ([target, out, *rtn, "--bits", "8", "--samples", "4"], "--samples: is for calibration text; give --calibration"),
        ([target, out, *rtn, "--bits", "8", "--seed", "1"], "--seed: is for calibration text"),
        ([target, out, *rtn, "--bits", "4", "--kind", "float"], "--kind float: stores float8, so give --bits 8"),
        (
            [target, out, *rtn, "--bits", "8", "--kind", "float", "--group", "32"],
            "--group: --kind float has one scale for each output",
        ),
        ([target, out, *wanda, "--sparsity", "0.5", "--kind", "int", *data], "--kind: only for quantised weights; give --bits"),
        ([target, out, *rtn, "--bits", "8", "--columns", '{"text": "x"}'], "--columns: is for calibration text"),
        ([target, out, *wanda, "--sparsity", "1e-9", *data], "--sparsity 1e-09: prunes none of the 4096 weights of"),
        ([target, out, *wanda, "--sparsity", "0.5", *data, "--seed", "-1"], "--seed -1: must be at least 0"),
        ([target, out, "--method", "width", "--ratio", "0.3", "--dimensions", "[]", *data], "--dimensions : give some of"),
        (
            [target, out, "--method", "width", "--ratio", "0.3", "--dimensions", '["nuerons"]', *data],
            "--dimensions nuerons: give some of neurons, heads, channels",
        ),
        ([target, out, *wanda, *data, *allocated("zero")], "zero.json: compresses no layer; allocate again"),
        ([target, out, "--method", "flap", *data], "--method flap: removes parts of the model, so give --ratio"),
        ([target, out, "--method", "flap", "--ratio", "1.5", *data], "--ratio 1.5: give the share to remove"),
        ([target, out, "--method", "flap", "--ratio", "0.2"], "--method flap: needs calibration text"),
        (
            [target, out, "--method", "flap", "--ratio", "0.2", "--sparsity", "0.5", *data],
            "--sparsity: --method flap has no such",
        ),
        ([target, out, *wanda, "--sparsity", "0.5", "--ratio", "0.5", *data], "--ratio: --method wanda has no such option"),
        ([target, out, *wanda, "--sparsity", "0.5", "--calibration", text], "windows of 512; lower --samples or --length"),
        ([target, out, *wanda, "--sparsity", "0.5", *data, "--length", "4096"], "--length 4096: "),
        ([target, out, *wanda, "--sparsity", "0.5", *data, "--samples", "0"], "samples: 0 must be at least 1"),
        ([target, out, *wanda, "--sparsity", "0.5", *data, "--dtype", "int8"], "--dtype int8: choose from float32"),
        ([target, out, *wanda, "--sparsity", "0.5", "--calibration", str(tmp_path / "no.jsonl")], "no.jsonl: there is no such"),
        (
            [target, out, *wanda, "--sparsity", "0.5", "--calibration", str(tmp_path / "broken.jsonl")],
            "broken.jsonl:1: not JSON",
        ),
        (
            [str(folders["infinite"]), out, *wanda, "--sparsity", "0.5", *data],
            "model.layers.1 computes values that are not fin",
        ),
        ([str(folders["gpt2"]), out, *rtn, "--bits", "8"], "model_type 'gpt2' cannot be compressed"),
        ([str(folders["quantised"]), out, *rtn, "--bits", "8"], "already quantised; give the folder of the dense model"),
        ([str(tmp_path / "none"), out, *rtn, "--bits", "8"], "none: no config.json there"),
        ([target, target, *rtn, "--bits", "8"], "is the folder of the model, inside it or around it; choose another OUT"),
        ([target, target + "/int8", *rtn, "--bits", "8"], "is the folder of the model, inside it or around it"),
        ([target, str(Path(target).parent), *rtn, "--bits", "8"], "is the folder of the model, inside it or around it"),
        ([target, str(tmp_path / "notes"), *rtn, "--bits", "8"], "notes: exists and is not a bundle"),
        (
            [target, out, *wanda, *data, *allocated("head")],
            "the output head lm_head is never compressed, and here it is the emb",
        ),
        ([target, out, *wanda, *data, *allocated("other")], "'a.b' is not a linear layer of"),
        ([target, out, *wanda, *data, *allocated("none")], "none.json: has no layers; give a file of trainkit allocate"),
        ([target, out, *wanda, *data, *allocated("moved")], "moved.json: is for a model with other weights; run trainkit allo"),
        ([target, out, *gptq, *data, *allocated("odd")], "has bits 3, which --method gptq cannot give"),
        (
            [target, out, *wanda, *data, *allocated("other"), "--sparsity", "0.5"],
            "--sparsity: is given for each layer by --alloc",
        ),
    ]
    for arguments, message in cases:
        assert main(["compress", *arguments, "--device", "cpu"]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trainkit: error: ") and message in error, (arguments, error)
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.work", ignore_errors=True)


def test_allocation_brings_its_group(tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --group the groups are those whose scales the budget counted; a wrong one in the file gives one line."""
    layers = {"model.layers.0.mlp.down_proj": {"bits": 4}}
    file, options = tmp_path / "bits.json", ["--method", "rtn", "--device", "cpu"]
    command = ["compress", str(tiny_target), str(tmp_path / "out"), *options, "--allocation", str(file)]
    file.write_text(json.dumps({"layers": layers, "group": "32"}))
    assert main(command) == 2 and "bits.json: group is '32'; allocate again" in capsys.readouterr().err
    file.write_text(json.dumps({"layers": layers, "group": 32}))
    assert main(command) == 0
    assert bundle.read(tmp_path / "out").extra["compression"]["grid"]["group"] == 32


def test_damaged_work_folder_is_named(tiny_target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A walk.json that is no JSON gives one line."""
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "walk.json").write_text("{")
    assert main(["compress", str(tiny_target), str(tmp_path / "out"), "--method", "rtn", "--bits", "8", "--device", "cpu"]) == 2
    assert "walk.json: not readable as JSON" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("case", ["no dtype in config.json", "norms in float32"])
@pytest.mark.parametrize(
    "options", [{"method": "rtn", "bits": 8}, {"method": "structured-random", "ratio": 0.3, "multiple": 16}]
)
def test_files_of_another_dtype_than_config(case: str, options: dict[str, Any], tiny_target: Path, tmp_path: Path) -> None:
    """The result has the dtype of most stored weights, in its files and its config.json."""
    source = shutil.copytree(tiny_target, tmp_path / "in")
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    if case == "no dtype in config.json":
        config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    weights = {name: value if "norm" in name and "dtype" not in case else value.bfloat16() for name, value in weights.items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    compress(str(source), str(tmp_path / "out"), device="cpu", **options)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in made.values() if value.is_floating_point()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_second_compression_keeps_the_fingerprints(tiny_target: Path, tmp_path: Path) -> None:
    """A model that was pruned by a text and then rounded without one still cannot be evaluated on it."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{n} clips. " * 30}) + "\n" for n in range(400, 430)))
    text = str(tmp_path / "text.jsonl")
    compress(str(tiny_target), str(tmp_path / "sparse"), method="wanda", sparsity="2:4", **calibrated(text, samples=16))
    compress(str(tmp_path / "sparse"), str(tmp_path / "both"), method="rtn", bits=8, device="cpu")
    first, second = (json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("sparse", "both"))
    assert first["fingerprints"] and second == first
    both = bundle.read(tmp_path / "both").extra["compression"]["commands"]
    assert [command.split("--method ")[1].split()[0] for command in both] == ["wanda", "rtn"]
    assert main(["evaluate", str(tmp_path / "both"), "--text", text, "--length", "64", "--device", "cpu"]) == 2
    (tmp_path / "both" / "calibration.json").write_text('{"fingerprints": ["a"]}')
    assert main(["evaluate", str(tmp_path / "both"), "--text", text, "--length", "64", "--device", "cpu"]) == 2


def test_allocation_gives_each_layer_its_share(tiny_target: Path, tmp_path: Path, text: str) -> None:
    """A layer of share 0 is left as it is."""
    shares = {f"model.layers.{index}.{name}": index / 4 for index in range(4) for name in NAMES}
    (tmp_path / "shares.json").write_text(json.dumps({"layers": {name: {"sparsity": share} for name, share in shares.items()}}))
    options = calibrated(text, allocation=str(tmp_path / "shares.json"))
    compress(str(tiny_target), str(tmp_path / "out"), method="wanda", **options)
    layers = bundle.read(tmp_path / "out").extra["compression"]["layers"]
    assert {name.removesuffix(".weight"): values["sparsity"] for name, values in layers.items()} == {
        name: share for name, share in shares.items() if share
    }
    with pytest.raises(UserError, match="another command"):
        shutil.copytree(tmp_path / "out", tmp_path / "other.work")
        (tmp_path / "other.work" / "walk.json").write_text("{}")
        compress(str(tiny_target), str(tmp_path / "other"), method="wanda", **options)
