"""Traps of the configuration: what Lightning or jsonargparse silently ignores stops the run, or has the requested effect."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

from trainkit.cli import main
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


class ScriptedModule(ToyModule):
    """A toy whose loss or gradient is not finite at some steps, and whose training or validation may crash at one.

    Args:
        loss_at: Steps whose loss is infinite and whose gradient is finite.
        gradient_at: Steps whose gradient is NaN and whose loss is finite.
        crash: Step in whose loss the run crashes.
        crash_validation: Step in whose validation the run crashes.
        val: Value of `val/loss` after each step.
        extra: Number of further metrics of a validation.
    """

    def __init__(
        self,
        loss_at: list[int] | None = None,
        gradient_at: list[int] | None = None,
        crash: int = 0,
        crash_validation: int = 0,
        val: list[float] | None = None,
        extra: int = 0,
        **more,
    ) -> None:
        super().__init__(**more)
        self._make_optimizer = lambda groups: torch.optim.AdamW(groups, lr=0.1)
        self.loss_at, self.gradient_at, self.val, self.extra = loss_at or [], gradient_at or [], val, extra
        self.crash, self.crash_validation = crash, crash_validation

    def loss(self, batch, micro):
        output, step = super().loss(batch, micro), self.trainer.global_step + 1
        if micro is None:
            assert step - 1 != self.crash_validation, "crash"
            return output
        assert step != self.crash, "crash"
        return LossOutput(output.sum + math.inf if step in self.loss_at else output.sum, output.count)

    def on_after_backward(self):
        if self.trainer.global_step + 1 in self.gradient_at:
            self.line.weight.grad.fill_(math.nan)  # pyright: ignore[reportOptionalMemberAccess]

    def validation_values(self, sums):
        values = {"loss": self.val[self.trainer.global_step - 1]} if self.val else super().validation_values(sums)
        return values | {f"loss_head{n}": float(n) for n in range(self.extra)}


def scripted(root: Path, **more) -> list[str]:
    """Flags of a run of ScriptedModule in the folder `root`."""
    flags = {
        "model": f"{__name__}.ScriptedModule",
        "data": DATA,
        "trainer.default_root_dir": root,
        "trainer.max_steps": 6,
        "trainer.val_check_interval": 1,
        "trainer.log_every_n_steps": 2,
        "checkpoint.every_n_steps": 1,
    } | more
    return [*(str(part) for name, value in flags.items() for part in (f"--{name}", value)), *QUIET]


def saved(root: Path, name: str = "last") -> dict:
    return torch.load(root / "checkpoints" / f"{name}.ckpt", weights_only=True)


def rows(root: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without times."""
    with (root / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds" and "speed" not in k} for row in csv.DictReader(file)]


@pytest.mark.parametrize("torn", ["3", "", "3,0.5,1."])
def test_torn_row_of_metrics_is_dropped(torn, tmp_path):
    """A last row of metrics.csv that a full disk cut short is dropped on resume, whatever is left of it."""
    assert main(["fit", *scripted(tmp_path / "straight", **{"trainer.max_steps": 32})]) == 0
    root = tmp_path / "torn"
    with pytest.raises(AssertionError, match="crash"):
        main(["fit", *scripted(root, **{"trainer.max_steps": 32, "model.crash": 31})])
    with (root / "metrics.csv").open("a") as file:
        file.write(torn)
    last = root / "checkpoints" / "last.ckpt"
    assert main(["fit", *scripted(root, **{"trainer.max_steps": 32}, ckpt_path=last)]) == 0
    assert rows(root) == rows(tmp_path / "straight")


@pytest.mark.parametrize(
    ("mode", "values"), [("min", "[.nan,0.9,0.5,0.4]"), ("min", "[-.inf,0.9,0.5,0.4]"), ("max", "[.inf,0.1,.nan,0.4]")]
)
def test_nan_is_never_best(mode, values, tmp_path):
    """A NaN or infinite value of the monitored metric is never the best one, and does not hide the best one."""
    more = {"model.val": values, "checkpoint.mode": mode, "trainer.max_steps": 4}
    assert main(["fit", *scripted(tmp_path, **more)]) == 0
    assert saved(tmp_path)["callbacks"]["Checkpoints"]["best"] == pytest.approx(0.4)
    assert saved(tmp_path, "best")["global_step"] == 4


@pytest.mark.parametrize(("cause", "name"), [("loss_at", "train/loss"), ("gradient_at", "optim/grad_norm")])
def test_first_nonfinite_step_stops_the_run(cause, name, tmp_path, capsys):
    """The first NaN or infinite loss or gradient norm stops the run in one line with code 2, and keeps the last checkpoint."""
    assert main(["fit", *scripted(tmp_path, **{f"model.{cause}": "[3]"})]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"{name} is NaN or infinite at step 3; " in message
    assert saved(tmp_path)["global_step"] == 2 and saved(tmp_path)["state_dict"]["line.weight"].isfinite().all()


def test_skipped_steps_change_nothing_and_are_counted(tmp_path, capsys):
    """A skipped step leaves weights and optimiser as they were and out of the metrics; a resumed run counts it too."""
    skip = {"model.on_nonfinite": "skip", "model.loss_at": "[3,5]", "model.gradient_at": "[4]"}
    assert main(["fit", *scripted(tmp_path / "straight", **skip)]) == 0
    assert "train/loss is NaN or infinite at step 5; the step is skipped" in capsys.readouterr().err
    root = tmp_path / "resumed"
    with pytest.raises(AssertionError, match="crash"):
        main(["fit", *scripted(root, **skip, **{"model.crash": 4})])
    assert saved(root)["global_step"] == 3
    assert main(["fit", *scripted(root, **skip, ckpt_path=root / "checkpoints" / "last.ckpt")]) == 0
    straight, resumed = saved(tmp_path / "straight"), saved(root)
    assert torch.equal(straight["state_dict"]["line.weight"], resumed["state_dict"]["line.weight"])
    assert straight["optimizer_states"][0]["state"][0]["step"] == 3  # of 6
    assert rows(root) == rows(tmp_path / "straight")
    logged = [row for row in rows(root) if row["optim/skipped_steps"]]
    assert [float(row["optim/skipped_steps"]) for row in logged] == [0, 2, 1]
    assert [bool(row["train/loss"]) for row in logged] == [True, False, True]


@pytest.mark.parametrize(
    ("stage", "skip", "message"), [(3, "error", "stage 3 cannot train"), (2, "skip", "on_nonfinite"), (2, "error", None)]
)
def test_deepspeed_refuses_what_it_cannot_do(stage, skip, message):
    """DeepSpeed is refused at stage 3, and for skipping steps, before any data is prepared."""
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # deepspeed need not be installed
    strategy.config = {"zero_optimization": {"stage": stage}}
    module = ScriptedModule(on_nonfinite=skip)
    module._trainer = SimpleNamespace(strategy=strategy, datamodule=ToyData())  # pyright: ignore[reportAttributeAccessIssue]
    if message is None:
        assert module.configure_callbacks() == []
    else:
        with pytest.raises(UserError, match=message):
            module.configure_callbacks()


@pytest.mark.parametrize("each", [{}, {"trainer.check_val_every_n_epoch": 1, "trainer.val_check_interval": 1.0}])
def test_run_by_epochs_ends_with_a_validation(each, tmp_path):
    """With `max_epochs` the last step of the last epoch is validated, once, also if no interval ends there."""
    more = {"trainer.max_epochs": 2, "trainer.max_steps": 100, "trainer.val_check_interval": 3} | each
    assert main(["fit", *scripted(tmp_path, **more)]) == 0
    assert [row["step"] for row in rows(tmp_path) if row["val/loss"]] == (["4", "8"] if each else ["3", "6", "8"])
    assert [row["step"] for row in rows(tmp_path) if row["train/loss"]] == ["2", "4", "6", "8"]


def test_schedule_needs_a_last_step(tmp_path, capsys):
    """Without max_steps and max_epochs the default schedule has no end, which is reported in one line."""
    assert main(["fit", *scripted(tmp_path, **{"trainer.max_steps": -1})]) == 2
    assert "the default schedule needs a last step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [
        {"trainer.max_steps": 4},
        {"trainer.max_steps": 100, "trainer.max_epochs": 1},
        {"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1, "trainer.val_check_interval": 1.0},
        {"trainer.max_steps": 7},
    ],
    ids=["steps", "epochs", "each epoch", "within"],
)
def test_interrupted_validation_is_repeated(more, tmp_path, capsys):
    """A run killed in a validation, also its last one, repeats it on resume and then equals an uninterrupted run."""
    more = {"trainer.val_check_interval": 4, "checkpoint.every_n_steps": 3} | more
    assert main(["fit", *scripted(tmp_path / "straight", **more)]) == 0
    root = tmp_path / "killed"
    with pytest.raises(AssertionError, match="crash"):
        main(["fit", *scripted(root, **more, **{"model.crash_validation": 4})])
    assert saved(root)["global_step"] == 4
    again = scripted(root, **more, ckpt_path=root / "checkpoints" / "last.ckpt")
    assert main(["fit", *again]) == 0
    assert rows(root) == rows(tmp_path / "straight")
    assert saved(root, "best")["global_step"] == saved(tmp_path / "straight", "best")["global_step"]
    capsys.readouterr()
    assert main(["fit", *again]) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert rows(root) == rows(tmp_path / "straight")


def test_resume_from_best_does_not_validate_again(tmp_path):
    """`best.ckpt` is written after its validation, so a run that continues from it does not repeat the validation."""
    more = {"trainer.val_check_interval": 3, "model.val": "[9,9,1,9,9,2,9,9]", "trainer.max_steps": 8}
    assert main(["fit", *scripted(tmp_path / "straight", **more)]) == 0
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    best = tmp_path / "straight" / "checkpoints" / "best.ckpt"
    assert main(["fit", *scripted(tmp_path / "run", **more, ckpt_path=best)]) == 0
    assert [row["step"] for row in rows(tmp_path / "run") if row["val/loss"]] == ["6", "8"]


def test_console_shows_the_main_metrics_only(tmp_path, capsys):
    """Of many metrics the console shows the main ones and names the file that has all."""
    assert main(["fit", *scripted(tmp_path, **{"model.extra": 30})]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("validation: "))
    assert line.startswith("validation: loss ") and "head" not in line
    assert line.endswith(f"(all 31 metrics: {tmp_path}/metrics.csv)")
    assert sum("val/loss_head" in name for name in rows(tmp_path)[-1]) == 30


def test_help_explains_ckpt_path(capsys):
    """The help of fit names the command and says what --ckpt_path is, in one sentence."""
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: trainkit ")
    assert "Checkpoint to continue training from, or to validate: last.ckpt or best.ckpt of a run." in text
