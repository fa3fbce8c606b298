"""Weights & Biases: metrics, configuration and code revision of a run, and the bundle exported from it.

A run folder has one W&B run. Its id lies in `wandb/run.json`, so that a resumed run, and an export, go on with it; everything
that W&B writes lies beside it in `wandb/`. Offline, each of them leaves a record of its own under that id there, and
`wandb sync RUN/wandb/offline-run-*` makes one run of them, in order of time. What a killed run had logged past its last
checkpoint is logged again when it is resumed: to the same values, and W&B keeps both.
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
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from trainkit import bundle
from trainkit.card import describe
from trainkit.errors import UserError

STEP = "trainer/global_step"
"""The axis of every chart, under the name that Lightning's own logger gives it."""
_PLACES = {"WANDB_DATA_DIR": "data", "WANDB_CACHE_DIR": "cache", "WANDB_ARTIFACT_DIR": "artifacts"}
_ROOT = Path(__file__).resolve().parents[2]


class WandbLog(Logger):
    """Logs to Weights & Biases, offline unless told otherwise; WANDB_MODE (online, offline, disabled) goes before `mode`.

    `wandb sync RUN/wandb/offline-run-*` uploads what was logged offline. `trainkit export` of a checkpoint of the run adds the
    bundle to it.

    Args:
        project: By default what WANDB_PROJECT says, else trainkit.
        entity: User or team; W&B's own default otherwise.
        name: Of the run; by default the last two parts of the run folder.
        tags: Of the run.
        mode: `online` needs a network and a key (`wandb login`, or WANDB_API_KEY).
        folder: Where to write; the run folder by default.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
        mode: Literal["offline", "online"] = "offline",
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.folder = folder  # nothing is checked here: the parser would wrap what is wrong into pages of its own
        self._project, self._entity, self._name, self._tags = project, entity, name, tags
        self._mode = mode
        self._session: Session | None = None
        self._first_row: int | None = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self._session.run.id if self._session else ""

    @property
    def save_dir(self) -> str | None:
        return self.folder

    @rank_zero_only
    def begin(self, folder: str, config: str) -> None:
        """Begins the run of this folder, or goes on with it.

        Args:
            folder: The run folder.
            config: The resolved configuration as YAML text.

        Raises:
            UserError: wandb is not installed, W&B refuses, or the folder's run is of another project.
        """
        self.folder = self.folder or folder
        mode = chosen_mode(self._mode)
        if mode == "disabled":
            return
        check_installed("leave configs/logger/wandb.yaml out")
        place = Path(self.folder).resolve()
        who = _identify(place, self._project, self._entity, mode)
        self._first_row = _rows_before(place) if mode == "offline" else None
        code = code_revision()
        values = (yaml.safe_load(config) or {}) | {"code": code}
        name = self._name or "/".join(place.parts[-2:])
        self._session = Session(place, who, 5.0, code, name=name, tags=list(self._tags) or None, config=values)
        self._session.run.define_metric(STEP)
        self._session.run.define_metric("*", step_metric=STEP)
        if mode == "offline":
            print(f"W&B: offline; `wandb sync {place}/wandb/offline-run-*` uploads the run", file=sys.stderr)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # `begin` was given the whole configuration

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self._session is not None:
            row = metrics if step is None else {**metrics, STEP: int(step)}
            self._session.run.log(row, step=self._first_row, commit=True)
            self._first_row = None  # W&B counts on from it

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._session is not None:
            self._session.end(0 if status == "success" else 1)
            self._session = None


class Session:
    """W&B at work on the run of a folder: nothing is written elsewhere, and `end` stops its service process too.

    Args:
        folder: The run folder.
        who: What `wandb/run.json` holds.
        seconds: How long `end` may wait for uploads; 0 for as long as they take. What is left lies in the folder.
        code: `code_revision`, where the run shall name it.
        init: More for wandb.init.

    Raises:
        UserError: W&B refuses.
    """

    def __init__(
        self, folder: Path, who: Mapping[str, Any], seconds: float, code: Mapping[str, Any] | None = None, **init: Any
    ) -> None:
        import wandb
        from wandb.errors import Error

        self._before = {name: os.environ.get(name) for name in _PLACES}
        os.environ.update({name: str(folder / "wandb" / place) for name, place in _PLACES.items()})
        try:
            settings = wandb.Settings(
                console="off",
                silent=who["mode"] == "offline",
                finish_timeout=seconds,
                init_timeout=30,
                x_transaction_log_flush_interval=0.5,  # what a kill may lose; by default 15 seconds
                disable_git=code is None,
                git_root=str(_ROOT),
                git_commit=code["commit"] if code else None,
            )
            self.run = wandb.init(
                id=who["id"],
                project=who["project"],
                entity=who["entity"],
                mode=who["mode"],
                dir=str(folder),
                resume="allow",
                reinit="create_new",
                settings=settings,
                **init,
            )
        except (Error, ValueError, OSError) as error:
            self._leave()
            raise UserError(f"W&B ({who['mode']}): {one_line(error)}; WANDB_MODE=offline goes on without a network") from error

    def end(self, code: int) -> None:
        """Ends the run with an exit code, everything logged on disk."""
        try:
            self.run.finish(exit_code=code)
        finally:
            self._leave()

    def _leave(self) -> None:
        import wandb

        if wandb.run is None:  # else the caller of our Python functions has a run of their own in this process
            wandb.teardown()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------------------- exported bundles


def tracked_folder(checkpoint: str) -> Path | None:
    """The run folder of a checkpoint, where that run logged to W&B and WANDB_MODE does not disable it.

    Raises:
        UserError: wandb is not installed.
    """
    folder = Path(checkpoint).resolve().parent.parent
    if recorded(folder) is None or chosen_mode("offline") == "disabled":
        return None
    check_installed("--track false leaves W&B out")
    return folder


def attach(made: bundle.Bundle, folder: Path, checkpoint: str) -> str:
    """Adds a bundle, as an artifact with its card, to the W&B run of a run folder; says so in one line.

    Raises:
        UserError: W&B refuses; the bundle stands all the same.
    """
    who = recorded(folder)
    assert who is not None
    who = {**who, "mode": chosen_mode(who["mode"])}
    try:
        session = Session(folder, who, 0.0)
        code = 1
        try:
            name = _log_bundle(session.run, made, checkpoint)
            code = 0
        finally:
            session.end(code)
    except (UserError, OSError) as error:
        again = "export again, or leave it out with --track false"
        raise UserError(f"{made.path} is written, but not added to its W&B run: {one_line(error)}; {again}") from error
    later = f"; `wandb sync {folder}/wandb/offline-run-*` uploads it" if who["mode"] == "offline" else ""
    return f"W&B: added to run {who['id']} of project {who['project']} as artifact {name}{later}"


def _log_bundle(run: Any, made: bundle.Bundle, checkpoint: str) -> str:
    import wandb

    card = describe(made)
    metadata = {
        "kind": made.kind,
        "metrics": dict(made.metrics),
        "recipe": made.recipe,
        "seed": made.seed,
        "data": made.data,
        "versions": dict(made.versions),
        "target": made.target.get("fingerprint"),
        "checkpoint": str(Path(checkpoint).resolve()),
    }
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", made.path.name)[:128]
    artifact = wandb.Artifact(name, type="model", description=card, metadata=metadata)
    for file in (*made.files, bundle.MANIFEST):
        artifact.add_file(str(made.path / file), name=file)  # copies it: an upload may come much later
    with artifact.new_file("card.md") as stream:
        stream.write(card)
    run.log_artifact(artifact)
    return name


# ------------------------------------------------------------------------------------------------------------------- the rest


def check_installed(otherwise: str) -> None:
    """Raises UserError where there is no wandb; `otherwise` says how to do without."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"W&B: wandb is not installed; pip install wandb, or {otherwise}")


def chosen_mode(given: str) -> str:
    """What WANDB_MODE says, else `given`.

    Raises:
        UserError: WANDB_MODE says something else than online, offline or disabled.
    """
    mode = os.environ.get("WANDB_MODE") or given
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # their older names
    if mode not in ("online", "offline", "disabled"):
        raise UserError(f"WANDB_MODE is {mode!r}; it must be online, offline or disabled")
    return mode


def recorded(folder: Path) -> dict[str, Any] | None:
    """What `wandb/run.json` of a run folder says: `id`, `project`, `entity`, `mode`; None where there is none.

    Raises:
        UserError: it is not readable.
    """
    path = folder / "wandb" / "run.json"
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: values[name] for name in ("id", "project", "entity", "mode")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable; remove it, and the next run begins a new one at W&B") from error


def _identify(folder: Path, project: str | None, entity: str | None, mode: str) -> dict[str, Any]:
    """The folder's W&B run, named in `wandb/run.json` before W&B hears of it, so that no kill makes two of it."""
    project, entity = project or os.environ.get("WANDB_PROJECT"), entity or os.environ.get("WANDB_ENTITY")
    then = recorded(folder)
    if then is not None:
        for name, value in (("project", project), ("entity", entity)):
            if value not in (None, then[name]):
                raise UserError(f"{folder}: its W&B run has {name} {then[name]}, not {value}; keep it, or begin a new run")
    else:
        then = {"id": secrets.token_hex(4), "project": project or "trainkit", "entity": entity}
    who = {**then, "mode": mode}
    path = folder / "wandb" / "run.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(who, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return who


def _rows_before(folder: Path) -> int | None:
    """A number for the first row, past those of every record there; None where there is none.

    W&B numbers the rows of each offline record from 0, but joins records only where their numbers ascend. A row takes more than
    64 bytes.
    """
    size = sum(path.stat().st_size for path in (folder / "wandb").glob("*run-*/*.wandb"))
    return size // 64 or None


def code_revision() -> dict[str, Any] | None:
    """The git `commit` of this checkout and whether it is `dirty` (changed since); None where trainkit lies in no checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(git("rev-parse", "--show-toplevel")).resolve() == _ROOT:  # not the repository around an installed copy
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return None


def one_line(error: BaseException) -> str:
    """The first line of what an exception says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
