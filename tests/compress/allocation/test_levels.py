"""Levels of compression: exact counts and bytes, the solver's own weights, and the same after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.compress.test_blocks import Text, random_text, whole_model
from tests.support.processes import ended, fork
from tests.support.targets import make_target
from trainkit.compress.allocation import levels as levels_file
from trainkit.compress.allocation.fitness import KLToDense
from trainkit.compress.allocation.levels import bit_levels, build, sparsity_levels
from trainkit.compress.layout import Layout, read_layout
from trainkit.compress.masks import Pattern
from trainkit.compress.solver import solve
from trainkit.errors import UserError
from trainkit.models.compressed import stored_tensors
from trainkit.models.target import FrozenTarget
from trainkit.models.weights import read_tensors


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Two blocks whose matrices have one, or two and a half, of SparseGPT's 128 inputs."""
    folder = tmp_path_factory.mktemp("levels") / "target"
    return read_layout(make_target(folder, num_hidden_layers=2, hidden_size=128, head_dim=32, intermediate_size=320))


@pytest.fixture(scope="module")
def text() -> Text:
    torch.manual_seed(int(os.environ["TRAINKIT_TEST_SEED"]))
    return random_text(sequences=8, length=40)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_level_prunes_exactly_its_number(layout: Layout, text: Text, tmp_path: Path, seed: int, method: str) -> None:
    """The solved weights have exactly the zeros of their level; levels are equally far apart in all layers."""
    share = float(torch.empty(1).uniform_(0.2, 0.8))
    levels, uniform = sparsity_levels(layout, share, method, around=2, step=700)
    steps = {costs[i + 1].cost - costs[i].cost for costs in levels.values() for i in range(len(costs) - 1)}
    assert len(steps) == 1 and 0 < steps.pop() <= 700
    database = build(layout, text, levels, method, work=tmp_path)
    for (name, several), middle in zip(levels.items(), uniform, strict=True):
        weights = [database.weight(name, number) for number in range(len(several))]
        assert [int((weight != 0).sum()) for weight in weights] == [level.cost for level in several]
        size, target = weights[0].numel(), int(share * weights[0].numel())
        assert 0 <= target - (size - several[middle].cost) < weights[0].shape[0]  # rounded down, at most one per output
        shares = [level.setting()["sparsity"] for level in several]
        assert shares == json.loads(json.dumps(shares)) and min(shares) >= 0 and max(shares) < 1


def test_build_gives_the_weights_of_the_solver(layout: Layout, text: Text, tmp_path: Path) -> None:
    """Each level is what the solver makes of the dense model's inputs, although levels share a factor."""
    levels, _ = sparsity_levels(layout, 0.5, around=1)
    database = build(layout, text, levels, "sparsegpt", work=tmp_path)
    inputs, _ = whole_model(layout.folder, text)
    tensors = dict(read_tensors(layout.folder))
    for name, several in levels.items():
        x_NK = inputs[name][text.counted_ST]
        weight_RK = tensors[f"{name}.weight"]
        for number, level in enumerate(several):
            expected_RK = solve(weight_RK, x_NK.T @ x_NK, pattern=level.goal.pattern).weight_RK
            lost = lambda new_RK, x_NK=x_NK, weight_RK=weight_RK: float((x_NK @ (new_RK - weight_RK).T).square().sum())
            # rounding of the Gram matrix may swap weights of nearly equal scores, which hardly changes the error
            assert lost(database.weight(name, number)) == pytest.approx(lost(expected_RK), rel=0.02)


def test_build_killed_and_resumed_is_the_same(layout: Layout, text: Text, tmp_path: Path) -> None:
    """A build killed within the second block and started again writes the files of one that ran through."""
    levels, _ = sparsity_levels(layout, 0.5, around=1)
    work = lambda name: build(layout, text, levels, "sparsegpt", work=tmp_path / name)
    written, write = [], levels_file.write_file

    def killing(path: Path, fill: object) -> None:
        write(path, fill)
        written.append(path)
        if len(written) == 10:
            os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        levels_file.write_file = killing
        work("killed")

    assert ended(fork(child)) == -signal.SIGKILL
    files = lambda name: {path.name: path.read_bytes() for path in (tmp_path / name / "layers").iterdir()}
    assert len(files("killed")) == 10
    work("killed")
    work("through")
    assert files("killed") == files("through") and len(files("through")) == 14


@pytest.mark.parametrize(("group", "method"), [(None, "gptq"), (32, "rtn")])
def test_bit_level_costs_its_bytes_in_a_file(
    layout: Layout, text: Text, tmp_path: Path, group: int | None, method: str
) -> None:
    """The cost of 4 and 8 bits is the size of the tensors that an export writes; 8 bits are closer to the dense weight."""
    layout = layout if group else read_layout(make_target(tmp_path / "even", num_hidden_layers=1, hidden_size=128, head_dim=32))
    levels = bit_levels(layout, group)
    database = build(layout, text, levels, method, work=tmp_path / "work")
    tensors = dict(read_tensors(layout.folder))
    for name, several in levels.items():
        dense_RK = tensors[f"{name}.weight"]
        errors = [float((database.weight(name, number) - dense_RK).square().sum()) for number in range(2)]
        assert errors[1] < errors[0] / 10
        for level in several:
            grid = level.goal.grid
            assert grid is not None and level.setting() == {"bits": grid.bits}
            scale_RG, _ = grid.scales(dense_RK)
            stored = stored_tensors(name, grid.codes(dense_RK, scale_RG).to(torch.int8), scale_RG, None, grid.bits, "int")
            assert level.cost == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def test_kl_is_that_of_two_whole_models(layout: Layout, text: Text, tmp_path: Path) -> None:
    """The fitness is KL between the logits of two transformers models, whatever candidates were measured before."""
    from transformers import AutoModelForCausalLM

    levels, uniform = sparsity_levels(layout, 0.5, around=1, step=500)
    database = build(layout, text, levels, "sparsegpt", work=tmp_path)
    fitness = KLToDense(FrozenTarget(layout.folder), database, text.tokens_ST)
    first = fitness(uniform, [1, 4, 6])
    other = tuple(level + (-1, 0, 1)[index % 3] for index, level in enumerate(uniform))
    found = fitness(other, range(8))
    assert fitness(uniform, [1, 4, 6]) == first != fitness(uniform, [0, 2, 3])
    dense, changed = (AutoModelForCausalLM.from_pretrained(layout.folder, dtype=torch.float32).eval() for _ in range(2))
    with torch.no_grad():
        for name, level in zip(levels, other, strict=True):
            changed.get_parameter(f"{name}.weight").copy_(database.weight(name, level))
        log_p, log_q = (model(text.tokens_ST).logits.double().log_softmax(-1) for model in (dense, changed))
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert expected > 0.01 and found == pytest.approx(expected, rel=1e-3)  # float32 against float64


def test_levels_refuse_what_a_layer_cannot_have(layout: Layout) -> None:
    """A step that not all layers can prune, and a group that does not divide a layer's inputs, are refused by name."""
    with pytest.raises(
        UserError, match=r"--step 3: sparsegpt prunes multiples of 5 weights alike in all layers; give at least"
    ):
        sparsity_levels(layout, 0.5, step=3)
    with pytest.raises(UserError, match=r"--group 128: model\.layers\.0\.mlp\.down_proj has 320 inputs"):
        bit_levels(layout)
    levels, _ = sparsity_levels(layout, 0.02, around=8, step=8000)
    assert all(level.goal.pattern != Pattern(0.0) or level.cost > 0 for several in levels.values() for level in several)
