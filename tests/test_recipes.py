"""Every recipe and configuration in the repository, found by glob, parses and runs."""

import importlib.util
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jsonargparse
import pytest
import yaml
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy

from tests.support.recipes import tiny_flags
from trainkit.commands.fit import TrainingCLI, run
from trainkit.layers.blocks import DecoderLayer

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
    """Without GPUs Lightning runs DDP only, so the test only builds each strategy from its fragment."""
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


def test_every_config_names_a_class():
    """Every configuration file is tested above, or at least names a class."""
    known = {*STRATEGIES, *LOGGERS, *DRAFTERS, Path("configs/base.yaml")}
    others = [path for path in Path("configs").rglob("*.yaml") if path not in known]
    assert RECIPES and STRATEGIES and LOGGERS
    for path in others:  # other fragments must at least be YAML that names a class
        assert "class_path" in yaml.safe_load(path.read_text()), path
