"""Where things are kept when nobody's home is known; what a kill leaves is in test_kills.py and test_bundle.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainkit.files import cache_folder


def test_what_can_be_made_anew_is_kept_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("costs") == tmp_path / ".cache" / "trainkit" / "costs"


def test_a_user_without_a_home_can_load_the_runner_too(tmp_path):
    """As a container's made-up user id: no HOME, no entry in the user database."""
    code = (
        "import os, pwd\n"
        "os.environ.pop('HOME', None)\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "import trainkit.runner.policies.cost_model, trainkit.data.text.prepare\n"
        "print(trainkit.runner.policies.cost_model.CACHE, trainkit.data.text.prepare.CACHE)\n"
    )
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "TMPDIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(tmp_path / "trainkit" / name) for name in ("costs", "data")]
