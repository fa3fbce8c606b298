"""Traps of the configuration: what Lightning or jsonargparse silently ignores stops the run, or has the requested effect."""

import csv
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from trainkit.commands.fit import TrainingCLI, run
from trainkit.errors import UserError
from trainkit.losses.output import LossOutput
from trainkit.modules.base import TrainingModule
from trainkit.modules.training_data import TrainingData


class ToyModule(TrainingModule):
    """Fits a linear layer of `size` inputs to a constant."""

    def __init__(self, size: int = 2, **more) -> None:
        super().__init__(torch.optim.SGD, **more)
        self.size = size
        self.line: torch.nn.Linear | None = None

    def trained(self):
        return [(self.line, 1.0)]

    def configure_model(self):
        self.line = self.line or torch.nn.Linear(self.size, 1)

    def describe(self):
        return {"size": self.size}

    def loss(self, batch, micro):
        assert self.line is not None
        error = (self.line(torch.ones(2, self.size)) - 1).square().sum()
        return LossOutput(error, torch.tensor(2.0))


class ToyData(TrainingData):
    def __init__(self) -> None:
        super().__init__(batch_size=2)

    def train_dataloader(self):
        return DataLoader([{"document_BT": torch.zeros(2), "window_count": 2.0}] * 4, batch_size=None)

    val_dataloader = train_dataloader


TOY, DATA = f"{__name__}.ToyModule", f"{__name__}.ToyData"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


def write(folder: Path, **values) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": {"class_path": TOY}, "data": {"class_path": DATA}} | values))
    return str(path)


@pytest.fixture
def configured(monkeypatch):
    """A function from a command line to its configuration; nothing is run."""
    monkeypatch.setattr(TrainingCLI, "_run_subcommand", lambda self, subcommand: None)
    return lambda *args: TrainingCLI("fit", [*args, *QUIET])


def test_recipe_keeps_other_keys_of_base(configured, tmp_path):
    """Trap: `config: base.yaml` in a recipe with a `trainer:` block dropped the rest of base's trainer."""
    base = yaml.safe_load(Path("configs/base.yaml").read_text())
    for recipe in ({"trainer.max_steps": 9}, {"trainer": {"max_steps": 9}}):
        trainer = configured("--config", write(tmp_path, **recipe)).config.fit.trainer
        assert trainer.max_steps == 9
        assert trainer.strategy == base["trainer.strategy"] == "ddp"
        assert trainer.gradient_clip_val == base["trainer.gradient_clip_val"]
        assert trainer.use_distributed_sampler is False
        assert trainer.num_sanity_val_steps == 0


def test_flags_override_recipe_overrides_base(configured, tmp_path):
    """Flags override the recipe, and the recipe overrides base.yaml."""
    recipe = write(tmp_path, **{"trainer.max_steps": 9, "trainer.log_every_n_steps": 3})
    trainer = configured("--config", recipe, "--trainer.max_steps", "11").config.fit.trainer
    assert (trainer.max_steps, trainer.log_every_n_steps, trainer.val_check_interval) == (11, 3, 500)


@pytest.mark.parametrize(
    "recipe", [{"trainer.max_stepz": 9}, {"model": {"class_path": TOY, "init_args": {"syze": 1}}}, {"speed": 1}]
)
def test_unknown_key_gives_one_line(recipe, tmp_path):
    """An unknown key gives a one-line error that names it."""
    with pytest.raises(UserError) as caught:
        run("fit", ["--config", write(tmp_path, **recipe)])
    assert "\n" not in str(caught.value)
    assert any(key in str(caught.value) for key in ("max_stepz", "syze", "speed"))


def test_wandb_fragment_keeps_the_csv_log(configured, tmp_path):
    """Trap: naming another logger file replaces the list of loggers, and the CSV file was lost."""
    kinds = [logger["class_path"] for logger in yaml.safe_load(Path("configs/logger/wandb.yaml").read_text())]
    assert "trainkit.modules.csv_logger.CSVLog" in kinds and any("WandbLog" in kind for kind in kinds)
    cli = configured("--config", write(tmp_path), "--trainer.logger", "configs/logger/wandb.yaml")
    assert [entry.class_path.rsplit(".", 1)[1] for entry in cli.config.fit.trainer.logger] == ["CSVLog", "WandbLog"]


def test_checkpoint_never_overrides_flags(tmp_path):
    """Trap: with save_hyperparameters, --ckpt_path overrode YAML and flags. Here the difference is an error."""
    recipe = write(tmp_path, **{"trainer.max_steps": 2, "trainer.default_root_dir": str(tmp_path / "run")})
    run("fit", ["--config", recipe, *QUIET])
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert "hyper_parameters" not in torch.load(checkpoint, weights_only=True)
    with pytest.raises(UserError, match="size is 2 in the checkpoint, 3 in this run"):
        run("fit", ["--config", recipe, "--model.size", "3", "--ckpt_path", str(checkpoint), *QUIET])


def test_resume_uses_learning_rate_of_flags(tmp_path):
    """Trap: the optimiser state of a checkpoint holds hyper-parameters, which overrode YAML and flags."""
    recipe = write(tmp_path, **{"trainer.max_steps": 2, "trainer.default_root_dir": str(tmp_path / "run")})
    run("fit", ["--config", recipe, *QUIET, "--model.warmup_steps", "0"])
    seen = []

    class Spy(ToyModule):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            seen.append(self.trainer.optimizers[0].param_groups[0]["initial_lr"])

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    spy = Spy()
    spy._make_optimizer = lambda groups: torch.optim.SGD(groups, lr=0.5)
    trainer = Trainer(max_steps=3, logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(spy, datamodule=ToyData(), ckpt_path=checkpoint, weights_only=True)
    assert seen == [0.5]


def test_resume_appends_to_metrics_csv(tmp_path):
    """Trap: Lightning's CSVLogger deletes an existing metrics.csv when it starts."""
    recipe = write(tmp_path, **{"trainer.log_every_n_steps": 1, "trainer.val_check_interval": 2})
    root = ["--trainer.default_root_dir", str(tmp_path / "run")]
    run("fit", ["--config", recipe, "--trainer.max_steps", "3", *root, *QUIET])
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("9" + "," * 20 + "\n")  # a row after the checkpoint, as a killed run leaves it
    run(
        "fit", ["--config", recipe, "--trainer.max_steps", "5", "--ckpt_path", checkpoint, *QUIET]
    )  # without a run folder: the checkpoint's folder is found
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == [1, 2, 3, 4, 5]
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [2, 3, 4, 5]


def test_checkpoint_between_two_renames_is_found(tmp_path):
    """Where the system cannot swap two folders, a kill may leave the old checkpoint under another name."""
    recipe = write(tmp_path, **{"trainer.default_root_dir": str(tmp_path / "run")})
    run("fit", ["--config", recipe, "--trainer.max_steps", "2", *QUIET])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.rename(last.with_suffix(".old"))
    last.with_suffix(".partial").write_bytes(b"half")
    with pytest.raises(UserError, match="holds a run already"):
        run("fit", ["--config", recipe, "--trainer.max_steps", "3", *QUIET])
    last.rename(last.with_suffix(".old"))
    run("fit", ["--config", recipe, "--trainer.max_steps", "3", "--ckpt_path", str(last), *QUIET])
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "best.ckpt"}


def test_metrics_csv_has_no_duplicate_row(tmp_path):
    """Trap: Lightning writes the last logged values again when it stops between two logging steps."""
    recipe = write(tmp_path, **{"trainer.log_every_n_steps": 2, "trainer.max_steps": 5})
    run("fit", ["--config", recipe, "--trainer.default_root_dir", str(tmp_path / "run"), *QUIET])
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == ["2", "4", "5"]


def test_run_folder_holds_resolved_config(tmp_path, capsys):
    """The run folder holds the resolved configuration and the checkpoints."""
    recipe = write(tmp_path, **{"trainer.max_steps": 2, "trainer.val_check_interval": 1})
    assert run("fit", ["--config", recipe, "--trainer.default_root_dir", str(tmp_path / "run"), *QUIET]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 2 and saved["model"]["class_path"].endswith("ToyModule")
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    printed = capsys.readouterr().out
    assert "last.ckpt" in printed and "validation: loss" in printed


def test_validate_leaves_the_run_folder_unchanged(tmp_path, capsys):
    """`trainkit validate` gives the metrics of the fit and leaves the run folder unchanged."""
    recipe = write(tmp_path, **{"trainer.max_steps": 2})
    run("fit", ["--config", recipe, "--trainer.default_root_dir", str(tmp_path / "run"), *QUIET])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    fitted = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation:")]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    root = ["--trainer.default_root_dir", str(tmp_path / "other")]
    run("validate", ["--config", recipe, "--ckpt_path", checkpoint, *root, *QUIET])
    assert fitted == [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation:")]
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


def test_run_folder_is_named_after_the_recipe(configured, tmp_path):
    """Each run has a folder of its own under runs/RECIPE."""
    root = Path(configured("--config", write(tmp_path)).trainer.default_root_dir)
    assert root.parts[-3:-1] == ("runs", "recipe")


TORCHRUN = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}


def test_unconnected_processes_are_refused(configured, tmp_path, monkeypatch):
    """Trap: two processes with devices 1 and strategy auto trained two unconnected copies and exited with 0."""
    for name, value in (TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="apart|devices"):
        configured("--config", write(tmp_path), "--trainer.strategy", "auto", "--trainer.devices", "1")
    cli = configured("--config", write(tmp_path))
    assert cli.trainer.world_size == 2  # base.yaml sets ddp; the number of devices comes from torchrun


def test_missing_base_config_is_an_error(monkeypatch, tmp_path):
    """Trap: the parser silently ignores a missing default file and with it `ddp` and all its other settings."""
    monkeypatch.setattr("trainkit.commands.fit.BASE", tmp_path / "base.yaml")
    with pytest.raises(UserError, match="base.yaml"):
        run("fit", [])
