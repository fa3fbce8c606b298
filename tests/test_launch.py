"""launch.sh: which environment it takes, what it starts, and with how many processes; no network, no installation."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Stands for an environment's python: answers what launch.sh asks of the environment, says what it was told to run.
FAKE_PYTHON = """#!{python}
import os, shlex, sys
arguments = sys.argv[1:]
held = {held!r}  # the checkout that this environment has installed
if arguments[:2] == ["-P", "-"]:
    assert "PYTHONPATH" not in os.environ
    sys.exit(arguments[2] != held)
if arguments[0] == "-c":
    code = arguments[1]
    if "device_count" in code:
        print({gpus})
    elif "scripts" in code:
        print(os.path.dirname(__file__))
    else:
        exec(code)
elif arguments[:2] == ["-m", "venv"]:
    target = os.path.join(arguments[-1], "bin")
    os.makedirs(target)
    text = open(__file__).read().replace("held = " + repr(held), "held = " + repr({root!r}))
    with open(os.path.join(target, "python"), "w") as file:
        file.write(text)
    os.chmod(os.path.join(target, "python"), 0o755)
    print("VENV", *arguments[2:])
elif arguments[:2] == ["-m", "pip"]:
    if "--version" not in arguments:
        print("PIP", *arguments[2:])
        sys.exit(os.path.exists({root!r} + "/pip-fails"))
else:
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE")
    print("RUN", shlex.join([os.path.dirname(__file__), *arguments]))
    print("ENV", *[name + "=" + os.environ.get(name, "unset") for name in names])
    print("CWD", os.getcwd())
"""


class Checkout:
    """A copy of launch.sh with a stub project beside it, and a PATH that holds a fake python and hardly anything else."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "check out", folder / "bin"  # the space is meant
        for path in (self.root / "recipes", self.bin):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "launch.sh", self.root)
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "recipes" / "tiny.yaml").write_text("trainer.max_steps: 1\n")
        (self.root / "recipes" / "quickstart.sh").write_text('echo "QUICK $PWD $*"\npython -m something\n')
        for tool in "bash dirname basename cksum cat mkdir date sleep getconf env grep flock".split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        self.environment = {"PATH": str(self.bin)}

    def python(self, held: Path | str = "", gpus: int = 0) -> None:
        for name in ("python", "python3"):
            path = self.bin / name
            path.write_text(FAKE_PYTHON.format(python=sys.executable, held=str(held), gpus=gpus, root=str(self.root)))
            path.chmod(0o755)
        if gpus:
            (self.bin / "nvidia-smi").write_text("#!/bin/bash\necho 'GPU 0: some'\n")
            (self.bin / "nvidia-smi").chmod(0o755)

    def launch(self, *arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.root / "launch.sh"), *arguments],
            cwd=cwd or self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


def line(done: subprocess.CompletedProcess[str], word: str) -> str:
    assert done.returncode == 0, done.stderr
    return next(text for text in done.stdout.splitlines() if text.startswith(f"{word} "))


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The folder of the python that was started last, and its arguments."""
    return shlex.split(line(done, "RUN"))[1:]


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_needs_no_environment(checkout, arguments):
    """Without arguments and with --help it explains itself, and sets nothing up."""
    done = checkout.launch(*arguments)
    assert done.returncode == 0
    for command in ("quickstart", "test", "lint", "RECIPE.yaml", "--resume", "NNODES", "NPROC"):
        assert command in done.stdout
    assert not (checkout.root / ".venv").exists()


def test_environment_with_this_checkout_is_used(checkout):
    """An environment in which this checkout is installed is used as it is."""
    checkout.python(held=checkout.root)
    done = checkout.launch("test", "-k", "some thing")
    assert ran(done) == [str(checkout.bin), "-m", "pytest", "-k", "some thing"]
    assert "PIP" not in done.stdout
    assert not (checkout.root / ".venv").exists()


def test_installation_of_another_copy_is_not_used(checkout, tmp_path):
    """The installation of another copy is not used; the checkout gets an environment of its own."""
    checkout.python(held=tmp_path / "another")
    done = checkout.launch("test")
    assert ran(done) == [f"{checkout.root}/.venv/bin", "-m", "pytest"]
    assert f"--editable {checkout.root}[dev]" in done.stdout
    assert (checkout.root / ".venv" / "trainkit").read_text().strip() not in ("", "incomplete")


def test_installation_check_tells_copies_apart(tmp_path):
    """The snippet in launch.sh, on a real interpreter: installed here, installed elsewhere, merely standing here."""
    script = (ROOT / "launch.sh").read_text()
    snippet = script.split("<<'PY'\n")[1].split("\nPY\n")[0]
    site = tmp_path / "site"
    for name in ("trainkit", "pytest", "torch"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").touch()
    prefix = f"import sys; sys.path.insert(0, {str(site)!r})\n"

    def ask(checkout: Path, prefix: str) -> bool:
        command = [sys.executable, "-P", "-S", "-", str(checkout)]
        return subprocess.run(command, input=prefix + snippet, text=True, cwd=checkout, env={}).returncode == 0

    assert ask(site, prefix)
    (tmp_path / "elsewhere").mkdir()
    assert not ask(tmp_path / "elsewhere", prefix)
    assert not ask(site, "")


def test_stale_venv_is_updated_and_a_finished_one_reused(checkout):
    """A finished environment is reused, and a stale one is updated."""
    checkout.python()
    assert "PIP" in checkout.launch("test").stdout
    again = checkout.launch("test")
    assert "PIP" not in again.stdout
    assert ran(again)[0] == f"{checkout.root}/.venv/bin"
    (checkout.root / "pyproject.toml").write_text("[project]\ndependencies = ['new']\n")
    stale = checkout.launch("test").stdout
    assert "PIP" in stale
    assert "VENV" not in stale


def test_interrupted_venv_is_made_again(checkout):
    """An environment whose installation was interrupted is made again."""
    checkout.python()
    (checkout.root / "pip-fails").touch()
    assert checkout.launch("test").returncode != 0
    assert (checkout.root / ".venv" / "trainkit").read_text().strip() == "incomplete"
    (checkout.root / "pip-fails").unlink()
    shutil.rmtree(checkout.root / ".venv" / "bin")  # the fake venv does not know --clear
    done = checkout.launch("test")
    assert f"VENV --clear {checkout.root}/.venv" in done.stdout
    assert ran(done)[0] == f"{checkout.root}/.venv/bin"


def test_torch_is_chosen_by_the_machine(checkout):
    """The torch to install depends on the machine and on TORCH_SPEC."""
    checkout.python()
    assert "torch==2.13.0" in checkout.launch("test").stdout
    shutil.rmtree(checkout.root / ".venv")
    assert "torch==2.11.0+cpu" in checkout.launch("test", TORCH_SPEC="torch==2.11.0+cpu").stdout
    shutil.rmtree(checkout.root / ".venv")
    checkout.python(gpus=1)
    with_gpu = checkout.launch("test").stdout
    assert "torch==" not in with_gpu
    assert f"{checkout.root}[deepspeed]" in with_gpu


def test_missing_python_is_explained(checkout):
    """Without a suitable Python the error says so."""
    done = checkout.launch("test")
    assert done.returncode == 2
    assert "no Python >= 3.11" in done.stderr


def run_folder(words: list[str]) -> str:
    return words[words.index("--trainer.default_root_dir") + 1]


def test_single_process_needs_no_torchrun(checkout):
    """One process runs without torchrun, in a new run folder."""
    checkout.python(held=checkout.root)
    words = ran(done := checkout.launch("recipes/tiny.yaml", "--trainer.max_steps", "9"))
    assert words[1:6] == ["-m", "trainkit.cli", "fit", "--config", "recipes/tiny.yaml"]
    assert words[-6:] == ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.max_steps", "9"]
    folder = Path(run_folder(words))
    assert folder.parent == checkout.root / "runs" / "tiny"
    assert folder.is_dir()
    again = run_folder(ran(checkout.launch("recipes/tiny.yaml")))
    assert again != str(folder)
    # which of the two depends on the load of the machine
    assert re.search("OMP_WAIT_POLICY=(active|passive) TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=unset", line(done, "ENV"))


def test_processes_share_the_cores(checkout):
    """Several processes share the cores."""
    checkout.python(held=checkout.root)
    words = ran(done := checkout.launch("recipes/tiny.yaml", NPROC="2"))
    assert words[1:7] == ["-m", "trainkit.launch", "--standalone", "--nproc-per-node=2", "-m", "trainkit.cli"]
    assert words[words.index("--trainer.devices") + 1] == "2"
    assert f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // 2)}" in line(done, "ENV")


@pytest.mark.parametrize(
    ("command", "several"), [("distill", True), ("features", True), ("acceptance", True), ("export", False)]
)
def test_sets_are_made_in_several_processes(command, several, checkout):
    """The commands that make training data run in NPROC processes, each with its share; the others run in one."""
    checkout.python(held=checkout.root)
    words = ran(checkout.launch(command, "--out", "a b", NPROC="3"))
    launcher = ["-m", "trainkit.launch", "--standalone", "--nproc-per-node=3"] if several else []
    assert words[1:] == ["-P", *launcher, "-m", "trainkit.cli", command, "--out", "a b"]


def test_every_gpu_gets_a_process(checkout):
    """Each GPU gets one process."""
    checkout.python(held=checkout.root, gpus=8)
    words = ran(done := checkout.launch("recipes/tiny.yaml"))
    assert "--nproc-per-node=8" in words
    assert words[words.index("--trainer.devices") + 1] == "8"
    assert "OMP_WAIT_POLICY=unset" in line(done, "ENV")


@pytest.mark.parametrize(("master", "port"), [("node0", "29500"), ("node0:1234", "1234")])
def test_several_nodes(checkout, tmp_path, master, port):
    """Several nodes start torchrun with their number, rank and master."""
    checkout.python(held=checkout.root)
    shared = str(tmp_path / "shared")
    done = checkout.launch("recipes/tiny.yaml", NPROC="4", NNODES="3", NODE_RANK="2", MASTER=master, RUN_DIR=shared)
    words = ran(done)
    assert {"--nnodes=3", "--node-rank=2", "--nproc-per-node=4", "--master-addr=node0", f"--master-port={port}"} <= set(words)
    assert words[words.index("--trainer.num_nodes") + 1] == "3"
    assert run_folder(words) == shared


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"NNODES": "2", "RUN_DIR": "x"}, "NODE_RANK"), ({"NNODES": "2", "NODE_RANK": "0", "MASTER": "a"}, "RUN_DIR")],
)
def test_several_nodes_need_rank_and_folder(checkout, environment, message):
    """Several nodes need NODE_RANK and RUN_DIR."""
    checkout.python(held=checkout.root)
    done = checkout.launch("recipes/tiny.yaml", **environment)
    assert done.returncode == 2
    assert message in done.stderr


def test_resume_continues_in_its_folder(checkout):
    """--resume continues in the given folder, also where a kill left the checkpoint under its temporary name."""
    checkout.python(held=checkout.root)
    run = checkout.root / "runs" / "tiny" / "then"
    refused = checkout.launch("recipes/tiny.yaml", "--resume", "runs/tiny/then")
    assert refused.returncode == 2
    assert "no checkpoint" in refused.stderr
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    words = ran(checkout.launch("tiny.yaml", "--resume", "../runs/tiny/then", cwd=checkout.root / "recipes"))
    assert Path(run_folder(words)).resolve() == run
    assert Path(words[words.index("--ckpt_path") + 1]).resolve() == run / "checkpoints" / "last.ckpt"
    assert sorted(path.name for path in run.parent.iterdir()) == ["then"]
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "last.old")  # caught by a kill between two renames
    assert "--ckpt_path" in ran(checkout.launch("recipes/tiny.yaml", "--resume", "runs/tiny/then"))


def test_scripts_and_commands_are_started(checkout, tmp_path):
    """Scripts and commands are started; a recipe that does not exist is refused."""
    checkout.python(held=checkout.root)
    done = checkout.launch("quickstart", "a")
    assert line(done, "QUICK") == f"QUICK {checkout.root} a"
    assert ran(done) == [str(checkout.bin), "-m", "something"]
    assert line(checkout.launch("recipes/quickstart.sh", "b"), "QUICK") == f"QUICK {checkout.root} b"
    command = checkout.launch("export", "a.ckpt", "out", cwd=tmp_path)
    assert ran(command) == [str(checkout.bin), "-P", "-m", "trainkit.cli", "export", "a.ckpt", "out"]
    assert line(command, "CWD") == f"CWD {tmp_path}"
    missing = checkout.launch("recipes/none.yaml")
    assert missing.returncode == 2
    assert "no recipe" in missing.stderr
