"""`trainkit fit`, `validate` and `test`: LightningCLI, whose configuration is the constructor signatures, typed and strict.

Differences from LightningCLI, each with a test in tests/commands/test_fit.py or tests/modules/test_progress.py:
configs/base.yaml holds defaults for every run; an error is one line; `--ckpt_path` restores training but never overrides recipe
or flags; processes started by torchrun train together or not at all; each run has its folder, which a resumed run continues;
messages of the libraries go to log.txt in that folder.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainkit.drafters.base import discover
from trainkit.errors import UserError
from trainkit.modules.base import TrainingModule
from trainkit.modules.callbacks import Checkpoints, RunFolder, how_to_resume, is_dry, put_back
from trainkit.modules.checkpoint import read_checkpoint
from trainkit.modules.progress import METRICS, Progress
from trainkit.modules.run_log import RunLog, quiet_libraries
from trainkit.modules.signals import Interrupted, Signals
from trainkit.modules.training_data import TrainingData
from trainkit.parser import OneLine, one_line

# Imported so that recipes can name their classes without the path of the module.
_MODULES = "text_data mixture_data acceptance_data prompt_data draft joint language predictor compress policy completions"
_COMPRESSION = "masks flow quantised"
for _module in (
    *(f"modules.{name}" for name in _MODULES.split()),
    *(f"modules.compression.{name}" for name in _COMPRESSION.split()),
    *("losses.divergence", "rl.algorithms", "rl.refresh", "rl.thr", "rl.infalign"),
):
    importlib.import_module(f"trainkit.{_module}")

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
COMMANDS = ("fit", "validate", "test")
RENAMED = {"PolicyData": "MixtureData"}
"""Old name -> new name of a class, for recipes that use the old one."""


class OneLineParser(OneLine, LightningArgumentParser):
    """Lightning's parser with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        for old, new in RENAMED.items():
            if self.exit_on_error and re.search(rf"\b{old}\b", message):
                raise UserError(f"class_path: {old} is now called {new}; use the new name") from ex
        super().error(message, ex)


class TrainingCLI(LightningCLI):
    """Runs one command with the `TrainingModule` and `TrainingData` classes that the configuration names."""

    def __init__(self, command: str, args: Sequence[str], log: RunLog | None = None) -> None:
        if not BASE.is_file():  # the parser silently ignores a missing default file
            raise UserError(f"{BASE}: not found; run trainkit from a checkout that has configs/")
        discover()
        self.command, self.log = command, log or RunLog()
        super().__init__(
            TrainingModule,
            TrainingData,
            args=[command, *args],
            save_config_callback=None,
            parser_class=OneLineParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={"prog": "trainkit"} | {name: {"default_config_files": [str(BASE)]} for name in COMMANDS},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = LightningCLI.subcommands()
        return {name: {*skipped[name], "weights_only", "verbose", "ckpt_path"} for name in COMMANDS}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        flags = [part for flag in args for part in (flag.split("=", 1) if flag.startswith("--config=") else [flag])]
        for flag, value in zip(flags, flags[1:], strict=False):
            if flag in ("--config", "-c"):
                _check_yaml(Path(value))
        self.config = parser.parse_args(args)  # the base class warns about arguments in sys.argv

    def _parse_ckpt_path(self) -> None:
        pass  # Lightning's method lets hyper-parameters of a checkpoint override recipe and flags

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            help="Checkpoint to continue training from, or to validate: last.ckpt or best.ckpt of a run.",
        )

    def before_instantiate_classes(self) -> None:
        values, fits = self.config[self.command], self.command == "fit"
        trainer = values.trainer
        # Refuse values that would fail much later.
        for name, part in (("trainer", trainer), ("model", values.model), ("data", values.get("data"))):
            _check_null(name, part, Trainer)
        if fits and trainer.max_steps == 0:
            raise UserError("trainer.max_steps is 0, so nothing would be trained; give at least 1, or -1 for no limit")
        if values.get("ckpt_path"):
            put_back(Path(values.ckpt_path))
            if not Path(values.ckpt_path).is_dir():  # a folder of shards is checked by the strategy that wrote it
                read_checkpoint(values.ckpt_path)
        # Choose the run folder, which must not hold another run.
        trainer.default_root_dir = str(trainer.default_root_dir or self._run_folder(values))
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        put_back(last)
        if fits and not values.get("ckpt_path") and not trainer.fast_dev_run and last.exists():
            raise UserError(f"{last.parents[1]}: holds a run already; {how_to_resume(last)}, or name another folder")
        # Use all processes that torchrun started.
        processes, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if processes > 1 and trainer.devices == "auto":
            trainer.devices, trainer.num_nodes = local, processes // local

    def _run_folder(self, values: Any) -> Path:
        """The run folder of the checkpoint that `fit` resumes from, otherwise a new folder."""
        if values.get("ckpt_path") and self.command == "fit":
            folder = Path(values.ckpt_path).resolve().parents[1]
            if (folder / "config.yaml").is_file():
                return folder
        name = Path(self.recipe).stem if self.recipe else "run"
        suffix = "" if self.command == "fit" else f"-{self.command}"
        return Path("runs") / name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}{suffix}"

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = {} if subcommand == "fit" else {"verbose": False}  # `summary` prints the metrics
        options |= {"ckpt_path": self.config[subcommand].ckpt_path, "weights_only": True}
        return super()._prepare_subcommand_kwargs(subcommand) | options

    @property
    def recipe(self) -> str | None:
        """The last configuration file on the command line, as the user wrote it."""
        files = self.config[self.command].get("config") or []
        return str(files[-1]) if files else None

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # jsonargparse wraps the constructors' exceptions in it
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            raise cause or UserError(one_line(str(error), [])) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # Create the trainer, with our progress bar unless another one is configured.
        self.model.recipe = self.recipe
        text = self._parser(self.command).dump(self.config[self.command])
        settings = self.config_init[self.command].trainer
        configured = settings.callbacks if isinstance(settings.callbacks, list) else [settings.callbacks]
        if settings.enable_progress_bar is not False and not any(isinstance(item, ProgressBar) for item in configured):
            self.trainer_defaults = {"callbacks": Progress()}
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"trainer: {reason}; correct the flag or key trainer.* named here") from error
        # Add the other callbacks of every run.
        callbacks = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        callbacks.append(RunFolder(text, self.log))
        if self.command == "fit" and not is_dry(trainer):
            checkpoints = next(callback for callback in callbacks if isinstance(callback, Checkpoints))
            callbacks.insert(0, Signals(checkpoints))  # first, so that it handles a signal before any other callback acts
        # Refuse processes that would train apart.
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if trainer.world_size != processes and "LOCAL_RANK" in os.environ:
            raise UserError(
                f"trainer.strategy, devices: {processes} processes were started but the trainer uses {trainer.world_size}, "
                "so each would train its own copy; set trainer.strategy: ddp and trainer.devices: auto"
            )
        return trainer


def _check_null(name: str, values: Any, owner: type) -> None:
    """Refuses null for a parameter of the class `owner` that needs a value; the parser accepts it, and the run fails later."""
    if not isinstance(values, Namespace):
        return
    if "class_path" in values:
        module, _, class_name = values.class_path.rpartition(".")
        owner, values = getattr(importlib.import_module(module), class_name), values.get("init_args", Namespace())
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(owner.__mro__ if isinstance(owner, type) else ()):
        parameters |= inspect.signature(base.__init__).parameters
    for key, value in vars(values).items():
        known = parameters.get(key)
        if value is None and known and known.default is not None and not re.search("None|Optional|Any", str(known)):
            raise UserError(f"{name}.{key} is null but needs a value; leave the key out for its default")
        _check_null(f"{name}.{key}", value, type(value))


def _check_yaml(file: Path) -> None:
    """Refuses a file that is not YAML, with the line of the error, which the parser does not report."""
    try:
        if file.is_file():
            yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{file}{line}: not YAML ({problem or ' '.join(str(error).split())}); fix the file") from None


def run(command: str, args: Sequence[str]) -> int:
    """Runs fit, validate or test with command-line arguments (`--config RECIPE ...`) and returns the exit code.

    Raises:
        UserError: a mistake in configuration, data or files.
    """
    assert command in COMMANDS
    try:
        with quiet_libraries() as log:
            cli = TrainingCLI(command, args, log)
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except Interrupted as interrupted:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            print(f"trainkit: {interrupted}", file=sys.stderr)
        return interrupted.exit_code
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if os.environ.get("RANK", "0") == "0":  # Lightning exits with code 1 and prints nothing
            print("trainkit: aborted by Ctrl-C; the checkpoints written before are kept", file=sys.stderr)
        return 130
    if cli.trainer.is_global_zero:
        for line in summary(cli.trainer, command):
            print(line)
    return 0


def summary(trainer: Trainer, command: str) -> list[str]:
    """Lines that end a run's output: the main metrics of the last validation and the paths of the checkpoints."""
    checkpoints = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)  # pyright: ignore[reportAttributeAccessIssue]
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    main = {f"val/{name}" for name in METRICS} | {checkpoints.monitor if checkpoints else ""}
    log = Path(trainer.default_root_dir) / "metrics.csv"
    shown = [name for name in metrics if name in main or not log.is_file()]
    text = "  ".join(f"{name.removeprefix('val/')} {metrics[name]:.4g}" for name in shown)
    more = f"  (all {len(metrics)} metrics: {log})" if len(shown) < len(metrics) else ""
    lines = [f"validation: {text}{more}"] if text else []
    if command == "fit" and checkpoints is not None and not is_dry(trainer):
        folder = Path(trainer.default_root_dir) / "checkpoints"
        last = f"{folder / 'last.ckpt'} (step {trainer.global_step})"
        lines.append(f"checkpoint: {last}")
        if not checkpoints.started:
            lines = [f"nothing to train: {last} is already the last step; raise trainer.max_steps or trainer.max_epochs"]
        if checkpoints.best is not None:
            best = f"{checkpoints.monitor} {checkpoints.best:.4g} at step {checkpoints.best_step}"
            lines.append(f"best:       {folder / 'best.ckpt'} ({best})")
    return lines
