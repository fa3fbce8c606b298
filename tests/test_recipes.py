"""Every recipe and configuration in the repository, found by glob, parses and runs."""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from torch.distributed.fsdp import FullyShardedDataParallel

from tests.support.processes import code_of, start
from tests.support.recipes import tiny_flags
from tests.support.runs import arguments, log
from trainkit.commands.fit import TrainingCLI, run
from trainkit.layers.blocks import DecoderLayer
from trainkit.modules.checkpoint import read_checkpoint

RECIPES = sorted(Path("recipes").rglob("*.yaml"))
STRATEGIES = sorted(Path("configs/strategy").glob("*.yaml"))
LOGGERS = sorted(Path("configs/logger").glob("*.yaml"))
DRAFTERS = sorted(Path("configs/drafter").glob("*.yaml"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"It is {n + 1}."}) + "\n" for n in range(24)))
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_runs(recipe, tiny_target, rows, tmp_path):
    """Every recipe runs on a tiny target."""
    assert run("fit", [*tiny_flags(recipe, tiny_target, rows, tmp_path), "--trainer.fast_dev_run", "true"]) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_sets_dotted_keys_over_base(recipe):
    """A recipe sets only what differs; a `trainer:` block or a base named in it would drop the other settings of base.yaml."""
    keys = set(yaml.safe_load(recipe.read_text()))
    assert not keys & {"trainer", "config", "checkpoint"}, f"{recipe}: write dotted keys"


@pytest.mark.parametrize("file", DRAFTERS, ids=str)
def test_every_drafter_fragment_trains(file, tiny_target, rows, tmp_path):
    """Every drafter fragment trains in the recipe for heads."""
    flags = ["--model.drafter", str(file.resolve()), "--trainer.fast_dev_run", "true"]
    assert run("fit", [*tiny_flags(Path("recipes/heads.yaml"), tiny_target, rows, tmp_path), *flags]) == 0


@pytest.mark.parametrize("file", [*STRATEGIES, *LOGGERS], ids=str)
def test_fragment_parses(file, tiny_target, rows, tmp_path, monkeypatch):
    """The fragment is parsed but not built, so DeepSpeed and a second process are not needed."""
    monkeypatch.setattr(TrainingCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    key = {"strategy": "trainer.strategy", "logger": "trainer.logger"}[file.parent.name]
    cli = TrainingCLI("fit", [*tiny_flags(RECIPES[0], tiny_target, rows, tmp_path), f"--{key}", str(file)])
    given, parsed = yaml.safe_load(file.read_text()), cli.config.fit.trainer[key.removeprefix("trainer.")]
    for wanted, found in zip(
        given if isinstance(given, list) else [given], parsed if isinstance(parsed, list) else [parsed], strict=True
    ):
        assert found.class_path.rsplit(".", 1)[1] == wanted["class_path"].rsplit(".", 1)[1]


@pytest.mark.parametrize("file", STRATEGIES, ids=str)
def test_strategy_fragment_is_built(file, monkeypatch):
    """Each strategy is built from its fragment; DeepSpeed, an optional extra, is not run."""
    if not importlib.util.find_spec("deepspeed"):  # an optional extra; the strategy only checks that it is installed
        stand_in = ModuleType("deepspeed")
        stand_in.utils = SimpleNamespace(logging=SimpleNamespace(logger=logging.getLogger("deepspeed")))
        monkeypatch.setitem(sys.modules, "deepspeed", stand_in)
        for name in ("_DEEPSPEED_AVAILABLE", "_DEEPSPEED_GREATER_EQUAL_0_16"):
            monkeypatch.setattr(f"lightning.pytorch.strategies.deepspeed.{name}", True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--strategy", type=Strategy)
    given = yaml.safe_load(file.read_text())
    strategy = parser.instantiate(parser.parse_object({"strategy": given})).strategy
    assert type(strategy).__name__ == given["class_path"].rsplit(".", 1)[1]
    if isinstance(strategy, DeepSpeedStrategy):
        assert strategy.config and strategy.config["zero_optimization"]["stage"] == given["init_args"]["stage"]
    if isinstance(strategy, FSDPStrategy):
        assert strategy.sharding_strategy.name == given["init_args"]["sharding_strategy"]
        assert strategy.kwargs["auto_wrap_policy"]._module_classes == {DecoderLayer}


class FSDPOnCPU(FSDPStrategy):
    """FSDP on a CPU, which torch allows if the device is given as such; Lightning gives a number."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


def test_fsdp_fragment_trains_and_clips(tiny_target, chats, tmp_path):
    """Under the FSDP fragment, clipped steps give the losses and gradient norms of DDP; the run resumes and exports."""
    given = yaml.safe_load(Path("configs/strategy/fsdp.yaml").read_text()) | {"class_path": f"{__name__}.FSDPOnCPU"}
    (tmp_path / "fsdp.yaml").write_text(yaml.safe_dump(given))
    more = {
        "trainer.max_steps": 8,
        "trainer.log_every_n_steps": 1,
        "trainer.gradient_clip_val": 0.1,
        "model.divergence": "ForwardKL",
    }
    more |= dict.fromkeys(f"model.divergence.{name}" for name in ("estimator", "samples", "normalise"))
    sharded, last = {"trainer.strategy": tmp_path / "fsdp.yaml"}, tmp_path / "fsdp" / "checkpoints" / "last.ckpt"
    flags = lambda name, **others: arguments("draft", tiny_target, chats, tmp_path / name, **(more | others))
    assert code_of(start(run, "fit", flags("ddp"))) == 0
    assert code_of(start(run, "fit", flags("fsdp", **sharded, **{"trainer.max_steps": 4}))) == 0
    assert code_of(start(run, "fit", flags("fsdp", **sharded, ckpt_path=last))) == 0
    names = ("step", "train/loss", "optim/grad_norm")
    values = [
        [float(row[name]) for row in log(tmp_path / run) if row["train/loss"] for name in names] for run in ("ddp", "fsdp")
    ]
    assert len(values[0]) == 24 and min(values[0][2::3]) > 0.1, "nothing was clipped"
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert read_checkpoint(last).drafter()


def test_every_config_names_a_class():
    """Every configuration file is tested above, or at least names a class."""
    known = {*STRATEGIES, *LOGGERS, *DRAFTERS, Path("configs/base.yaml")}
    others = [path for path in Path("configs").rglob("*.yaml") if path not in known]
    assert RECIPES and STRATEGIES and LOGGERS
    for path in others:  # other fragments must at least be YAML that names a class
        assert "class_path" in yaml.safe_load(path.read_text()), path
