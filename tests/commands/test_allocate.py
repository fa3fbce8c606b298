"""`trainkit allocate`: the budget holds to the weight, the file serves `trainkit compress`, and a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.processes import ended, fork
from tests.support.targets import make_target
from trainkit import bundle, cli
from trainkit.compress.allocation.evolution import Search
from trainkit.compress.layout import read_layout
from trainkit.models.weights import tensors_in

SMALL = ["--samples", "4", "--length", "32", "--search", "8", "--heldout", "4", "--generations", "4", "--offspring", "6"]
SMALL += ["--survivors", "[2,1]", "--tokens", "[64,256]"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allocate") / "target"
    return make_target(folder, num_hidden_layers=2, hidden_size=128, head_dim=32, intermediate_size=256)


@pytest.fixture(scope="module")
def text(target: Path) -> Path:
    rows = [{"text": f"Natalia sold {n} clips in May, and in June {n // 2} more."} for n in range(64)]
    path = target.with_name("text.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def compressed(target: Path, text: Path, allocation: Path, method: str) -> bundle.Bundle:
    """The bundle that `trainkit compress` makes with an allocation."""
    out = allocation.with_suffix("")
    flags = [
        "--method",
        method,
        "--allocation",
        str(allocation),
        "--calibration",
        str(text),
        "--samples",
        "4",
        "--length",
        "32",
    ]
    assert cli.main(["compress", str(target), str(out), *flags]) == 0
    return bundle.read(out)


def test_sparse_allocation_prunes_as_much_as_uniform(
    target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An allocation differs from the uniform one, and `trainkit compress` prunes exactly as many weights by it."""
    out = tmp_path / "sparse.json"
    flags = ["--sparsity", "0.6", "--levels", "3", "--step", "700", "--calibration", str(text), *SMALL]
    assert cli.main(["allocate", str(target), str(out), *flags]) == 0
    assert "held-out windows, nats per token" in capsys.readouterr().out
    found, shapes = json.loads(out.read_text()), read_layout(target).shapes()
    shares = {name: values["sparsity"] for name, values in found["layers"].items()}
    assert len(set(shares.values())) > 2 and shares.keys() == shapes.keys()
    pruned = {name: int(share * rows * columns) for name, share in shares.items() for rows, columns in [shapes[name]]}
    kept = sum(rows * columns for rows, columns in shapes.values()) - sum(pruned.values())
    uniform = sum(
        rows * columns - int(0.6 * rows * columns) // (columns // 128) * (columns // 128) for rows, columns in shapes.values()
    )
    assert kept == uniform == found["budget"]["weights"] == found["budget"]["cost"]
    made = compressed(target, text, out, "sparsegpt").extra["compression"]["layers"]
    for name, (rows, columns) in shapes.items():
        assert round(made[f"{name}.weight"]["sparsity"] * rows * columns) == pruned[name]


def test_bit_allocation_takes_its_bytes(target: Path, text: Path, tmp_path: Path) -> None:
    """Scales and packing are in the budget: the file's tensors take the cost that was reported, and no layer more would fit."""
    out = tmp_path / "bits.json"
    assert cli.main(["allocate", str(target), str(out), "--bits", "5", "--calibration", str(text), *SMALL]) == 0
    found, shapes = json.loads(out.read_text()), read_layout(target).shapes()
    budget, cost = found["budget"]["bytes"], found["budget"]["cost"]
    assert budget == int(5 / 8 * sum(rows * columns for rows, columns in shapes.values()))
    made = compressed(target, text, out, "gptq")
    tensors = {name: value for file in made.path.glob("*.safetensors") for name, value in tensors_in(file)}
    linears = [value for name, value in tensors.items() if "_proj" in name]
    assert sum(value.numel() * value.element_size() for value in linears) == cost <= budget
    low = [shapes[name] for name, values in found["layers"].items() if values["bits"] == 4]
    # 8 bits: twice the codes, and a scale per output in place of one per 128 inputs
    steps = [rows * columns // 2 + 4 * rows * (1 - columns // 128) for rows, columns in low]
    assert 0 < len(low) < len(shapes) and min(steps) > budget - cost


def test_allocation_killed_and_resumed_is_the_same(target: Path, text: Path, tmp_path: Path) -> None:
    """A search killed in its third generation and started again writes the file of one that ran through."""
    flags = ["--sparsity", "0.5", "--method", "magnitude", "--levels", "2", "--calibration", str(text), *SMALL]
    start = lambda name: cli.main(["allocate", str(target), str(tmp_path / name), *flags])
    measured, generation = [], Search._generation

    def killing(*arguments: object) -> object:
        measured.append(arguments[-1])
        if measured == [0, 1, 2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return generation(*arguments)

    def child() -> int:
        Search._generation = killing
        return start("killed.json")

    assert ended(fork(child)) == -signal.SIGKILL
    (state,) = (tmp_path / "killed.json.work").glob("search-*.json")
    assert len(json.loads(state.read_text())) == 2
    assert start("killed.json") == start("through.json") == 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "through.json").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--sparsity, --bits, --bytes: give exactly one of them, the budget"),
        (["--bits", "5", "--sparsity", "0.5"], "--sparsity, --bits, --bytes: give exactly one of them, the budget"),
        (["--sparsity", "1.5"], "--sparsity 1.5: give the share to prune, above 0 and below 1"),
        (["--sparsity", "2:4"], "--sparsity 2:4: N:M is the same in all layers, so give a share, such as 0.6"),
        (["--sparsity", "0.5", "--method", "gptq"], "--method gptq: cannot be used with this budget; choose from magnitude"),
        (["--bits", "5", "--method", "wanda"], "--method wanda: cannot be used with this budget; choose from rtn, gptq"),
        (["--sparsity", "0.5", "--group", "64"], "--group: only for quantised weights; give --bits or --bytes"),
        (["--sparsity", "0.5", "--step", "1"], "--step 1: sparsegpt prunes multiples of 2 weights alike in all layers"),
        (["--bits", "4"], "--bits 4: 4 bits everywhere take"),
        (["--bytes", "9000000"], "--bytes 9000000: 4 bits everywhere take"),
        (["--bits", "5", "--group", "48"], "--group 48: model.layers.0.self_attn.q_proj has 128 inputs"),
        (["--bits", "5", "--survivors", "[2,2]"], "--survivors [2, 2], --tokens [2048, 8192]: give two lists"),
        (["--bits", "5", "--tokens", "[64]"], "--survivors [4, 1], --tokens [64]: give two lists"),
        (["--bits", "5", "--search", "2"], "--tokens 8192: --search 2 windows of 32 have fewer; raise --search"),
        (["--bits", "5", "--offspring", "0"], "--offspring: 0 must be at least 1"),
        (["--bits", "5", "--search", "90"], "only 55 windows of 32; lower them or --length, or give more text"),
        (["--bits", "5", "--step", "3"], "--step: only for levels of --sparsity; leave it out"),
        (["--bits", "5", "--seed", "-1"], "--seed -1: must be at least 0"),
        (["--bits", "5", "--dtype", "int8"], "--dtype int8: choose from float32, bfloat16, float16"),
        (["--bits", "5", "--samples", "4000"], "--samples 4000, --search 64, --heldout 2: "),
    ],
)
def test_allocate_refuses(
    target: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    """A wrong option gives one line and exit code 2, and nothing is written."""
    short = [] if "--samples" in flags else ["--samples", "4"]
    flags = ["--calibration", str(text), "--length", "32", "--heldout", "2", *short, *flags]
    assert cli.main(["allocate", str(target), str(tmp_path / "out.json"), *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("trainkit: error: ") and message in line
    assert not list(tmp_path.iterdir())
