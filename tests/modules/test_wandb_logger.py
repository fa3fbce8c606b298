"""W&B without a network: its own files hold the expected records, and it writes nothing outside the run folder."""

import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

from tests.support import wandb_records
from tests.support.processes import code_of, start, wait_until
from tests.support.runs import arguments, lines, resumed
from trainkit import bundle
from trainkit.card import describe
from trainkit.cli import main
from trainkit.commands.export import export
from trainkit.commands.fit import run
from trainkit.errors import UserError
from trainkit.modules.wandb_logger import STEP, WandbLog, code_revision


@pytest.fixture
def isolated(tmp_path):
    """Environment variables with their own home and temporary folder; fails if a process connects to the network."""
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection.recv(200))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        values = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy)
        for name in ("HOME", "TMPDIR"):
            (tmp_path / name).mkdir()
            values[name] = str(tmp_path / name)
        yield values
        server.shutdown(socket.SHUT_RDWR)
    assert connections == [], "a process connected to the network"


def within(environment: dict[str, str], work, *args) -> int:
    """Runs `work(*given)` with these environment variables; to be called in a child process."""
    os.environ.update(environment)
    os.environ.pop("WANDB_MODE", None)
    return work(*args)


def tracked(args: list[str]) -> list[str]:
    return [*args, "--trainer.logger", "configs/logger/wandb.yaml"]


def everything(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def services() -> set[str]:
    """Process ids of running W&B service processes."""
    ids = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"/wandb/bin/" in file.read_bytes().split(b"\0")[0]:
                ids.add(file.parent.name)
        except OSError:
            continue
    return ids


def gone(before: set[str]) -> None:
    wait_until(lambda: not services() - before, seconds=5)


def logged(root: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv without their time."""
    with (root / "metrics.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return [{(STEP if name == "step" else name): row[name] for name in row if name != "seconds"} for row in rows]


def at_wandb(records: list) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name[0] != "_"} for row in wandb_records.rows(records)]


def test_wandb_records_are_complete_and_only_in_run_folder(tiny_target, chats, tmp_path, isolated):
    """Metrics, configuration, revision and bundle are recorded, and only in the run folder."""
    before, here = services(), everything(Path.cwd() / "wandb", Path.cwd() / "runs", Path.cwd() / "artifacts")
    root, out = tmp_path / "run", tmp_path / "a bundle"
    args = tracked(arguments("draft", tiny_target, chats, root, **{"trainer.max_steps": 12}))
    assert code_of(start(within, isolated, run, "fit", args)) == 0
    gone(before)

    (file,) = wandb_records.files(root)
    records = wandb_records.records(file)
    assert at_wandb(records) == logged(root) and [row[STEP] for row in logged(root)][-2:] == [12, 12]
    config = wandb_records.config(records)
    assert config["model"] == yaml.safe_load((root / "config.yaml").read_text())["model"]
    assert config["checkpoint"]["every_n_steps"] == 4
    assert config["code"] == code_revision()
    (started,) = wandb_records.of_kind(records, "run")
    assert (started.project, started.display_name) == ("trainkit", f"{tmp_path.name}/run")
    if config["code"]:
        assert started.git.commit == config["code"]["commit"] and len(started.git.commit) == 40
    assert [end.exit_code for end in wandb_records.of_kind(records, "exit")] == [0]

    last = root / "checkpoints" / "last.ckpt"
    assert code_of(start(within, isolated, main, ["export", str(last), str(out)])) == 0
    gone(before)
    _, file = wandb_records.files(root)
    records = wandb_records.records(file)
    assert [again.run_id for again in wandb_records.of_kind(records, "run")] == [started.run_id]
    (artifact,) = wandb_records.of_kind(records, "artifact")
    written = bundle.read(out)
    assert (artifact.name, artifact.type, artifact.description) == ("a-bundle", "model", describe(written))
    contents = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(contents) == {*written.files, "trainkit.json", "card.md"}
    for name, copy in contents.items():
        assert copy.is_relative_to(root), "otherwise a sync after the bundle was moved would find no file"
        assert copy.read_bytes() == ((out / name).read_bytes() if name != "card.md" else describe(written).encode())
    assert json.loads(artifact.metadata)["metrics"] == written.metrics

    assert everything(tmp_path / "HOME", tmp_path / "TMPDIR") == set()
    assert here == everything(Path.cwd() / "wandb", Path.cwd() / "runs", Path.cwd() / "artifacts")
    outside = {path.name for path in tmp_path.iterdir()} - {"HOME", "TMPDIR", "run", "cache", "a bundle"}
    assert outside == set()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGKILL])
def test_wandb_loses_no_row_on_signal_and_resumes_its_run(number, tiny_target, chats, tmp_path, isolated):
    """A signal loses no row and leaves no process, and a resumed run continues the same W&B run."""
    before, root = services(), tmp_path / "run"
    args = tracked(arguments("draft", tiny_target, chats, root, **{"trainer.log_every_n_steps": 1, "trainer.max_steps": 20}))
    process = start(within, isolated, fit_slowly, args)
    wait_until(lambda: lines(root) > 5 or not process.is_alive())
    known = logged(root)
    # W&B writes its records half a second later; a kill may cost what it has not written yet
    wait_until(lambda: at_wandb(wandb_records.records(wandb_records.files(root)[0]))[: len(known)] == known)
    os.kill(process.pid, number)
    assert code_of(process) == (-9 if number == signal.SIGKILL else 128 + number)
    gone(before)
    first = wandb_records.records(wandb_records.files(root)[0])
    rows = at_wandb(first)
    assert rows[: len(known)] == known and len(known) >= 5
    if number != signal.SIGKILL:
        assert rows == logged(root)
        assert [end.exit_code for end in wandb_records.of_kind(first, "exit")] == [1]

    assert code_of(start(within, isolated, run, "fit", resumed(args, root))) == 0
    gone(before)
    parts = [wandb_records.records(file) for file in wandb_records.files(root)]
    (one,), (other,) = (wandb_records.of_kind(part, "run") for part in parts)
    assert one.run_id == other.run_id and other.resume, "both records belong to one run of W&B"
    numbers = [row["_step"] for part in parts for row in wandb_records.rows(part)]
    assert numbers == sorted(set(numbers)), "W&B joins records only where their numbers ascend"
    again = at_wandb(parts[1])
    assert logged(root)[-len(again) :] == again
    if number != signal.SIGKILL:
        assert rows + again == logged(root), "no row is lost or logged twice"


def fit_slowly(args: list[str]) -> int:
    """Trains slowly enough to be stopped before the end."""
    from trainkit.modules.draft import DraftModule

    step = DraftModule.training_step

    def slow(self, batch, batch_idx):
        time.sleep(0.1)
        return step(self, batch, batch_idx)

    DraftModule.training_step = slow
    return run("fit", args)


def test_wandb_mode_disabled_writes_nothing(tmp_path, monkeypatch):
    """With WANDB_MODE=disabled nothing is written."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = WandbLog()
    log.begin(tmp_path, "a: 1")
    log.log_metrics({"x": 1.0}, 1)
    log.finalize("success")
    assert everything(tmp_path) == set()


def test_invalid_wandb_settings_give_one_line(tmp_path, monkeypatch, isolated):
    """Invalid W&B settings give a one-line error."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in isolated.items():
        monkeypatch.setenv(name, value)
    log = WandbLog(project="one")
    log.begin(tmp_path / "run", "a: 1")
    log.finalize("success")

    def spoiled() -> None:
        (tmp_path / "run" / "wandb" / "run.json").write_text("{")
        log.begin(tmp_path / "run", "")

    cases = [
        (lambda: WandbLog(project="two").begin(tmp_path / "run", ""), "its W&B run has project one, not two"),
        (lambda: WandbLog(project="a/b").begin(tmp_path / "b", ""), "W&B .offline.: .*project"),
        (lambda: WandbLog(mode="online").begin(tmp_path / "c", ""), "W&B .online.: .*API key.*WANDB_MODE=offline"),
        (spoiled, "run.json: not readable"),
    ]
    for work, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            work()
        assert "\n" not in str(caught.value)
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(UserError, match="WANDB_MODE is 'onlin'"):
        log.begin(tmp_path / "d", "")


def test_missing_wandb_package_is_explained(tiny_target, chats, tmp_path, monkeypatch):
    """If wandb is not installed the error says how to go on."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "wandb" else find_spec(name, *more))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    args = tracked(arguments("draft", tiny_target, chats, tmp_path / "run"))
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb, or leave"):
        run("fit", args)
    (tmp_path / "run" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "wandb" / "run.json").write_text('{"id": "a", "project": "b", "entity": null, "mode": "offline"}')
    with pytest.raises(UserError, match="wandb is not installed; pip install wandb, or --track false"):
        export(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))


def test_code_revision_is_that_of_the_checkout(tmp_path, monkeypatch):
    """The recorded revision is that of the checkout itself, with a mark for uncommitted changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", tmp_path / "a", *arguments], check=True, capture_output=True, text=True).stdout

    (tmp_path / "a" / "inside").mkdir(parents=True)
    git("init", "-q")
    (tmp_path / "a" / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x")
    monkeypatch.setattr("trainkit.modules.wandb_logger._ROOT", (tmp_path / "a").resolve())
    commit = git("rev-parse", "HEAD").strip()
    assert code_revision() == {"commit": commit, "dirty": False}
    (tmp_path / "a" / "file").write_text("2")
    assert code_revision() == {"commit": commit, "dirty": True}
    monkeypatch.setattr("trainkit.modules.wandb_logger._ROOT", (tmp_path / "a" / "inside").resolve())
    assert code_revision() is None
