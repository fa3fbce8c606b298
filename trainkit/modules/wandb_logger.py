"""Weights & Biases: metrics, configuration and code revision of a run, and the bundle exported from it.

A run folder has one W&B run. Its id is stored in `wandb/run.json`, so that a resumed run and an export continue it. W&B writes
all its files to the same folder `wandb/`. Offline, each process that continues the run writes a record of its own there, and
`wandb sync RUN/wandb/offline-run-*` joins the records in order of time. What a killed run logged after its last checkpoint is
logged again when it resumes, with the same values; W&B then shows both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.loggers import WandbLogger

from trainkit import bundle
from trainkit.card import describe
from trainkit.errors import UserError, first_lines
from trainkit.files import write_json

STEP = "trainer/global_step"
"""The horizontal axis of every chart; Lightning's logger adds it to each row."""
_FOLDERS = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache", "WANDB_ARTIFACT_DIR": "artifacts"}
_ROOT = Path(__file__).resolve().parents[2]


class WandbLog(WandbLogger):
    """Logs to Weights & Biases on rank 0, offline by default. WANDB_MODE (online, offline, disabled) overrides `mode`.

    `wandb sync RUN/wandb/offline-run-*` uploads what was logged offline. `trainkit export` of a checkpoint of the run adds the
    bundle to the run.

    Args:
        project: Project of the run; by default WANDB_PROJECT, or trainkit.
        entity: User or team that owns the project; by default that of the W&B account.
        name: Display name of the run; by default the last two parts of the run folder.
        tags: Tags of the run.
        mode: `offline`, or `online`, which needs a network and a key (`wandb login`, or WANDB_API_KEY).
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["offline", "online"] = "offline",
    ) -> None:
        check_installed("leave configs/logger/wandb.yaml out")
        super().__init__(name=name, project=project)
        self._own_project, self._entity, self._tags, self._mode = project, entity, tags, mode
        self._session: Session | None = None

    @property
    def experiment(self) -> Any:
        """The W&B run; None before `begin`.

        Lightning's property would start the run during set-up, so that a run that cannot start would leave a folder. It would
        also join any other W&B run of this process.
        """
        return self._experiment

    def begin(self, folder: Path, config: str) -> None:
        """Starts the W&B run of this folder, or continues it.

        Args:
            folder: The run folder.
            config: The resolved configuration as YAML text.

        Raises:
            UserError: W&B refuses, or the folder has a W&B run of another project or entity.
        """
        mode, root = chosen_mode(self._mode), folder.resolve()
        if mode == "disabled":
            return
        # Find or create the folder's W&B run, and open it.
        older_rows = sum(path.stat().st_size for path in root.glob("wandb/*run-*/*.wandb")) // 64
        identity = _identify(root, self._own_project, self._entity, mode)
        code, name = code_revision(), self._name or "/".join(root.parts[-2:])
        values = (yaml.safe_load(config) or {}) | {"code": code}
        self._session = Session(root, identity, 5.0, code, name=name, tags=list(self._tags) or None, config=values)
        self._experiment = run = self._session.run
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP)
        if mode == "offline":
            # W&B numbers the rows of each record from 0, but joins records only if their numbers ascend. A row takes more than
            # 64 bytes, so this number is greater than that of every row in older records.
            if older_rows:
                run.log({}, step=older_rows, commit=False)  # W&B continues the row numbers from here
            print(f"W&B: offline; `wandb sync {root}/wandb/offline-run-*` uploads the run", file=sys.stderr)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._experiment is not None:
            super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        """Ends the run; Lightning's logger would end it only with the process."""
        if self._session is not None:
            self._session.end(0 if status == "success" else 1)
            self._session = self._experiment = None


class Session:
    """An open W&B run: W&B writes all files to the run folder, and `end` also stops W&B's service process.

    Args:
        folder: The run folder.
        identity: Contents of `wandb/run.json`.
        seconds: Maximum time for `end` to wait for uploads; 0 for no limit. What is not uploaded remains in the folder.
        code: Result of `code_revision`, to record it with the run.
        init: Further arguments of wandb.init.

    Raises:
        UserError: W&B refuses.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], seconds: float, code: Mapping[str, Any] | None = None, **init: Any
    ) -> None:
        import wandb
        from wandb.errors import Error

        self._environment = {name: os.environ.get(name) for name in _FOLDERS}
        os.environ.update({name: str(folder / "wandb" / subfolder) for name, subfolder in _FOLDERS.items()})
        try:
            settings = wandb.Settings(
                console="off",
                silent=identity["mode"] == "offline",
                finish_timeout=seconds,
                init_timeout=30,
                x_transaction_log_flush_interval=0.5,  # seconds of log that a kill may lose; 15 by default
                disable_git=code is None,
                git_root=str(_ROOT),
                git_commit=code["commit"] if code else None,
            )
            options = {"dir": str(folder), "resume": "allow", "reinit": "create_new", "settings": settings}
            self.run = wandb.init(**identity, **options, **init)
        except (Error, ValueError, OSError) as error:
            self._leave()
            raise UserError(
                f"W&B ({identity['mode']}): {first_lines(error, 1)}; WANDB_MODE=offline needs no network"
            ) from error

    def end(self, code: int) -> None:
        """Ends the run with an exit code; everything that was logged is then on disk."""
        try:
            self.run.finish(exit_code=code)
        finally:
            self._leave()

    def _leave(self) -> None:
        import wandb

        if wandb.run is None:  # otherwise a caller of our Python functions has a run of its own in this process
            wandb.teardown()
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


# Exported bundles


def tracked_folder(checkpoint: str) -> Path | None:
    """The run folder of a checkpoint; None if that run did not log to W&B or WANDB_MODE disables it.

    Raises:
        UserError: wandb is not installed.
    """
    folder = Path(checkpoint).resolve().parent.parent
    if recorded(folder) is None or chosen_mode("offline") == "disabled":
        return None
    check_installed("--track false leaves W&B out")
    return folder


def attach(exported: bundle.Bundle, folder: Path, checkpoint: str) -> str:
    """Adds a bundle with its card, as an artifact, to the W&B run of a run folder. Returns one line about it.

    Raises:
        UserError: W&B refuses; the bundle remains.
    """
    identity = recorded(folder)
    assert identity is not None
    identity = {**identity, "mode": chosen_mode(identity["mode"])}
    try:
        session, name = Session(folder, identity, 0.0), None
        try:
            name = _log_bundle(session.run, exported, checkpoint)
        finally:
            session.end(0 if name else 1)
    except (UserError, OSError) as error:
        remedy = "export again, or leave it out with --track false"
        raise UserError(
            f"{exported.path} is written, but not added to its W&B run: {first_lines(error, 1)}; {remedy}"
        ) from error
    later = f"; `wandb sync {folder}/wandb/offline-run-*` uploads it" if identity["mode"] == "offline" else ""
    return f"W&B: added to run {identity['id']} of project {identity['project']} as artifact {name}{later}"


def _log_bundle(run: Any, exported: bundle.Bundle, checkpoint: str) -> str:
    import wandb

    card = describe(exported)
    metadata = {name: getattr(exported, name) for name in ("kind", "metrics", "recipe", "seed", "data", "versions")}
    metadata |= {"target": exported.target.get("fingerprint"), "checkpoint": str(Path(checkpoint).resolve())}
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", exported.path.name)[:128]
    artifact = wandb.Artifact(name, type="model", description=card, metadata=metadata)
    for file in (*exported.files, bundle.MANIFEST):
        artifact.add_file(str(exported.path / file), name=file)  # copies the file, because it may be uploaded much later
    with artifact.new_file("card.md") as stream:
        stream.write(card)
    run.log_artifact(artifact)
    return name


# Settings and records


def check_installed(alternative: str) -> None:
    """Raises UserError if wandb is not installed; `alternative` is the way to run without it."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"W&B: wandb is not installed; pip install wandb, or {alternative}")


def chosen_mode(default: str) -> str:
    """The value of WANDB_MODE, or `default`.

    Raises:
        UserError: WANDB_MODE is not online, offline or disabled.
    """
    mode = os.environ.get("WANDB_MODE") or default
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # W&B's older names of the modes
    if mode not in ("online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE is {mode!r}; it must be online, offline or disabled")
    return mode


def recorded(folder: Path) -> dict[str, Any] | None:
    """Contents of `wandb/run.json` in a run folder: `id`, `project`, `entity`, `mode`; None if there is no such file.

    Raises:
        UserError: the file is not readable.
    """
    path = folder / "wandb" / "run.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: values[name] for name in ("id", "project", "entity", "mode")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable; remove it, then the next start creates a new W&B run") from error


def _identify(folder: Path, project: str | None, entity: str | None, mode: str) -> dict[str, Any]:
    """The folder's W&B run; written to `wandb/run.json` before W&B starts it, so that a kill cannot lead to two runs."""
    project, entity = project or os.environ.get("WANDB_PROJECT"), entity or os.environ.get("WANDB_ENTITY")
    saved = recorded(folder) or {"id": secrets.token_hex(4), "project": project or "trainkit", "entity": entity}
    for name, value in (("project", project), ("entity", entity)):
        if value not in (None, saved[name]):
            raise UserError(
                f"{folder}: its W&B run has {name} {saved[name]}, not {value}; use {saved[name]}, or start a new run"
            )
    identity = {**saved, "mode": mode}
    write_json(folder / "wandb" / "run.json", identity)
    return identity


def code_revision() -> dict[str, Any] | None:
    """The git `commit` of this checkout and whether it is `dirty` (changed since); None outside a git checkout of trainkit."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == _ROOT:  # not the repository around an installed copy
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return None
