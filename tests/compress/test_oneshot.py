"""One-shot methods over all blocks: the files are those of a straightforward implementation on the whole transformers model."""

# S sequences  T positions  R outputs  K inputs

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.targets import make_target
from trainkit.compress.layout import read_layout
from trainkit.compress.masks import Pattern, mask_from_scores, parse_pattern
from trainkit.compress.oneshot import METHODS, Goal, Plan, oneshot
from trainkit.compress.quantise import Grid, quantise
from trainkit.compress.refine import dsnot, swaps
from trainkit.compress.solver import solve
from trainkit.compress.statistics import Statistics
from trainkit.models.compressed import codes_of, read_scheme


@dataclass
class Text:
    tokens_ST: Tensor
    counted_ST: Tensor


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"), num_hidden_layers=2)


def plan(folder: Path, method: str, sparsity: str | None = None, grid: Grid | None = None, **options: Any) -> Plan:
    pattern = parse_pattern(sparsity) if sparsity else None
    return Plan(method, {name: Goal(pattern, grid) for name in read_layout(folder).all_linears()}, **options)


def straightforward(weight_RK: Tensor, x_STK: Tensor, counted_ST: Tensor, method: str, goal: Goal, refine: str) -> Tensor:
    """The new weight of one matrix from all its inputs."""
    sums = Statistics(weight_RK.shape[1], gram=True)
    sums.add(x_STK, counted_ST)
    assert sums.gram_KK is not None
    gram_KK = sums.gram_KK.float()
    if method in ("sparsegpt", "gptq"):
        solved = solve(weight_RK, gram_KK, pattern=goal.pattern, grid=goal.grid)
        return solved.quantised.dense(torch.float32) if solved.quantised else solved.weight_RK
    if method == "rtn":
        assert goal.grid
        return quantise(weight_RK, goal.grid).dense(torch.float32)
    assert goal.pattern
    x_NK = x_STK[counted_ST]
    score_RK = weight_RK.abs() if method == "magnitude" else weight_RK.abs() * x_NK.norm(dim=0).float()
    mask_RK = mask_from_scores(score_RK, goal.pattern, "matrix" if method == "magnitude" else "row")
    if refine == "swaps":
        mask_RK = swaps(weight_RK, mask_RK, gram_KK, goal.pattern)
    elif refine == "dsnot":
        mask_RK = dsnot(weight_RK, mask_RK, sums, goal.pattern)
    return weight_RK * mask_RK


CASES: dict[str, tuple[str, str | None, Grid | None, str]] = {
    "magnitude 0.5": ("magnitude", "0.5", None, "none"),
    "wanda 2:4": ("wanda", "2:4", None, "none"),
    "wanda 0.6 swaps": ("wanda", "0.6", None, "swaps"),
    "magnitude 0.5 dsnot": ("magnitude", "0.5", None, "dsnot"),
    "sparsegpt 2:4": ("sparsegpt", "2:4", None, "none"),
    "rtn 8": ("rtn", None, Grid(8), "none"),
    "gptq 4": ("gptq", None, Grid(4, 32), "none"),
    "sparsegpt 0.5 and 4": ("sparsegpt", "0.5", Grid(4, 32, symmetric=False), "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_files_are_those_of_a_whole_model_method(case: str, target: Path, tmp_path: Path, seed: int) -> None:
    """Block by block, behind the changed blocks, in float64; padding is left out."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    method, sparsity, grid, refine = CASES[case]
    counted_ST = torch.ones(4, 48, dtype=torch.bool)
    counted_ST[3, 30:] = False
    text = Text(torch.randint(320, (4, 48)), counted_ST)
    ours = plan(target, method, sparsity, grid, refine=refine)
    given = None if method in ("rtn", "magnitude") and refine == "none" else text
    walked = oneshot(target, given, ours, work=tmp_path / "work", dtype=torch.float64)
    files = dict(walked.tensors())

    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64).eval()
    inputs = dict[str, Tensor]()
    for name in ours.goals:
        record = lambda _, args, name=name: inputs.__setitem__(name, args[0])
        model.get_submodule(name).register_forward_pre_hook(record)
    for index in range(2):
        with torch.no_grad():
            model(text.tokens_ST)
        for name, goal in ours.goals.items():
            if not name.startswith(f"model.layers.{index}."):
                continue
            weight = model.get_submodule(name).weight.data
            expected_RK = straightforward(weight.float(), inputs[name], counted_ST, method, goal, refine)
            if grid:
                scheme = read_scheme({"quantization_config": config_of(grid)})
                assert scheme
                codes_RK, scale_RG, zero_RG = codes_of(files, name, scheme)
                dense = replace(quantise(weight.float(), grid), codes_RK=codes_RK, scale_RG=scale_RG, zero_RG=zero_RG)
                found_RK = dense.dense(torch.float32)
            else:
                found_RK = files[f"{name}.weight"]
            # both round the same float64 sums to float32; the states before them differ by 1e-15
            torch.testing.assert_close(found_RK, expected_RK, rtol=1e-4, atol=1e-5)
            assert torch.equal(found_RK == 0, expected_RK == 0)
            check_report(walked.reports[index][name], weight, found_RK, inputs[name][counted_ST], grid, given is not None)
            weight.copy_(found_RK)


def config_of(grid: Grid) -> dict[str, Any]:
    from trainkit.models.compressed import quantization_config

    return quantization_config(grid.bits, grid.group, grid.symmetric)


def check_report(
    report: dict[str, Any], dense_RK: Tensor, new_RK: Tensor, x_NK: Tensor, grid: Grid | None, measured: bool
) -> None:
    """The reported figures of a layer are those of its inputs."""
    lost_RK = dense_RK - new_RK
    assert report["sparsity"] == pytest.approx((new_RK == 0).double().mean().item(), abs=1e-6)
    assert report["bits"] == (grid.bits if grid else 32)
    assert report["weight_error"] == pytest.approx((lost_RK.norm() / dense_RK.norm()).item() ** 2, rel=1e-3)
    if measured and report["error"] is not None:
        error = ((x_NK @ lost_RK.T).norm() / (x_NK @ dense_RK.T).norm()).item() ** 2
        assert report["error"] == pytest.approx(error, rel=1e-2, abs=1e-6)


def test_layers_have_goals_of_their_own(target: Path, tmp_path: Path, seed: int) -> None:
    """One pruned, one quantised, one both; the others are copied."""
    torch.manual_seed(seed)
    names = read_layout(target).all_linears()
    goals = {names[0]: Goal(Pattern(0.25)), names[5]: Goal(None, Grid(8)), names[9]: Goal(Pattern(0.5, 2, 4), Grid(4, 32))}
    text = Text(torch.randint(320, (2, 40)), torch.ones(2, 40, dtype=torch.bool))
    walked = oneshot(target, text, Plan("wanda", goals, "swaps"), work=tmp_path / "work")
    found = {name: values for report in walked.reports for name, values in report.items()}
    assert {name: values["bits"] for name, values in found.items()} == {names[0]: 32, names[5]: 8, names[9]: 4}
    assert found[names[0]]["sparsity"] == 0.25 and found[names[9]]["sparsity"] >= 0.5
    files = dict(walked.tensors())
    assert {name for name in files if name.endswith("packed")} == {f"{names[5]}.weight_packed", f"{names[9]}.weight_packed"}
    assert {f"{name}.weight" in files for name in (set(names) - {names[5], names[9]})} == {True}


def test_gptq_keeps_the_zeros_of_a_pruned_model(target: Path, tmp_path: Path, seed: int) -> None:
    """Also with zero points, where zero is a code like another."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    first = oneshot(target, None, plan(target, "magnitude", "2:4"), work=tmp_path / "first")
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    (pruned / "config.json").write_text((target / "config.json").read_text())
    save_file(dict(first.tensors()), pruned / "model.safetensors")
    text = Text(torch.randint(320, (2, 40)), torch.ones(2, 40, dtype=torch.bool))
    grid = Grid(4, 32, symmetric=False)
    walked = oneshot(pruned, text, plan(pruned, "gptq", grid=grid), work=tmp_path / "second")
    assert all(values["sparsity"] >= 0.5 for report in walked.reports for values in report.values())


def test_every_method_is_compared_above() -> None:
    """A new method must be added to the cases."""
    assert {method for method, *_ in CASES.values()} == set(METHODS)
