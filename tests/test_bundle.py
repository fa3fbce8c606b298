"""Bundles are written atomically, refused if anything in them changed, and matched to their target."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.bundles import TARGET, fill, make
from trainkit import bundle
from trainkit.card import describe, weight_count
from trainkit.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_bundle_reads_back_unchanged(tmp_path):
    """A bundle that is read equals what was written."""
    written = make(tmp_path / "b", metrics={"tau": 2.5}, runner={"depth": 4}, recipe="x.yaml", data="abc", extra={"k": [1]})
    found = bundle.read(tmp_path / "b")
    assert found == written
    assert found.metrics == {"tau": 2.5}
    assert set(found.files) == {"model.safetensors", "config.json", "sub/notes.md"}
    assert leftovers(tmp_path / "b") == []
    assert bundle.is_bundle(tmp_path / "b")


def test_bundle_is_replaced_as_a_whole(tmp_path):
    """A new bundle replaces the old one as a whole."""
    make(tmp_path / "b", kind="old")
    (tmp_path / "b" / "own.txt").write_text("a user's note")
    make(tmp_path / "b", kind="new")
    assert bundle.read(tmp_path / "b").kind == "new"
    assert not (tmp_path / "b" / "own.txt").exists()
    assert leftovers(tmp_path / "b") == []


@pytest.mark.parametrize("what", ["folder", "file"])
def test_other_folders_are_not_overwritten(tmp_path, what):
    """A folder or file that is no bundle is not overwritten."""
    place = tmp_path / "precious"
    if what == "folder":
        place.mkdir()
        (place / "thesis.txt").write_text("years")
    else:
        place.write_text("years")
    called = []
    with pytest.raises(UserError, match="precious: exists and is not a bundle"):
        bundle.write(place, called.append, kind="fake", config={}, target=TARGET)
    assert called == []
    assert (place / "thesis.txt" if what == "folder" else place).read_text() == "years"


def test_failed_writer_leaves_the_old_bundle(tmp_path):
    """A writer that fails leaves the old bundle and no temporary folder."""
    make(tmp_path / "b", kind="old")

    def fail(path: Path) -> None:
        fill(path)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        bundle.write(tmp_path / "b", fail, kind="new", config={}, target=TARGET)
    assert bundle.read(tmp_path / "b").kind == "old"
    assert leftovers(tmp_path / "b") == []


@pytest.mark.parametrize("name", ["weights.pt", "model.bin", "code.py", "trainkit.json"])
def test_unsafe_file_types_are_not_written(tmp_path, name):
    """Pickles, code and a manifest of its own cannot be written into a bundle."""
    with pytest.raises(ValueError, match=name):
        bundle.write(tmp_path / "b", lambda path: (path / name).write_text("x"), kind="fake", config={}, target=TARGET)
    assert not (tmp_path / "b").exists()


def test_nan_metrics_are_null_but_a_nan_setting_stops(tmp_path):
    """Metrics of NaN are written as null; a setting of NaN stops before anything is written."""
    make(tmp_path / "a", metrics={"tau": float("nan"), "alpha": 0.5})
    assert bundle.read(tmp_path / "a").metrics == {"tau": None, "alpha": 0.5}
    assert "tau" in describe(bundle.read(tmp_path / "a"))
    with pytest.raises(ValueError, match="runner"):
        make(tmp_path / "b", runner={"threshold": float("nan")})
    assert not (tmp_path / "b").exists()


# Each row: a change to a finished bundle, and text that the error must contain.
DAMAGE = {
    "flipped byte": (lambda b: flip(b / "model.safetensors"), "model.safetensors: changed"),
    "cut short": (lambda b: os.truncate(b / "model.safetensors", 40), "model.safetensors: changed"),
    "missing file": (lambda b: (b / "config.json").unlink(), "config.json: missing"),
    "another shard": (lambda b: shutil.copy(b / "model.safetensors", b / "extra.safetensors"), "extra.safetensors: not listed"),
    "a pickle": (lambda b: (b / "pytorch_model.bin").write_bytes(b"x"), "pytorch_model.bin: not listed"),
    "an index": (lambda b: (b / "model.safetensors.index.json").write_text("{}"), "index.json: not listed"),
    "newer version": (lambda b: edit(b, format=99), "format 99 is newer"),
    "no version": (lambda b: edit(b, format=None), "no format version"),
    "unknown key": (lambda b: edit(b, sauce=1), "unknown key 'sauce'"),
    "wrong type": (lambda b: edit(b, target=[]), "target is missing or not a dict"),
    "no JSON": (lambda b: (b / "trainkit.json").write_text("{"), "trainkit.json: not readable as JSON"),
    "a list": (lambda b: (b / "trainkit.json").write_text("[]"), "no format version"),
    "no manifest": (lambda b: (b / "trainkit.json").unlink(), "not a bundle .*; give a folder that `trainkit export"),
    "no folder": (lambda b: shutil.rmtree(b), "no such folder; give a folder that `trainkit export"),
    "path upwards": (lambda b: edit(b, files={"../secret.json": "0"}), "'../secret.json' is not a file"),
    "path hidden upwards": (lambda b: edit(b, files={"sub/../../secret.json": "0"}), "is not a file"),
    "absolute path": (lambda b: edit(b, files={"/etc/secret.json": "0"}), "'/etc/secret.json' is not a file"),
    "listed pickle": (lambda b: edit(b, files={"model.bin": "0"}), "'model.bin' is not a file"),
    "link outside": (lambda b: link_outside(b), "leads out of the bundle"),
    "linked folder": (lambda b: link_outside(b, "sub"), "leads out of the bundle"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "trainkit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def link_outside(folder: Path, name: str = "config.json") -> None:
    outside = folder.parent / "outside"
    shutil.move(folder / name, outside)
    (folder / name).symlink_to(outside)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_bundle_gives_one_line(tmp_path, seed, damage):
    """A damaged bundle gives a one-line error."""
    make(tmp_path / "b")
    change, message = DAMAGE[damage]
    change(tmp_path / "b")
    with pytest.raises(UserError, match=message) as caught:
        bundle.read(tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_readme_in_a_bundle_is_ignored(tmp_path):
    """A README and .gitattributes in a bundle are ignored."""
    make(tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("x")
    (tmp_path / "b" / ".gitattributes").write_text("x")
    bundle.read(tmp_path / "b")


# Forks one writer per step; the n-th is killed, without cleaning up, just before its n-th access to the file system.
KILLED_AT_EVERY_STEP = """
import os, sys
from pathlib import Path
from trainkit import bundle
from tests.support.bundles import make

base, old = Path(sys.argv[1]), sys.argv[2] == "True"
bundle._versions = dict
step = 0
while True:
    step += 1
    folder = base / str(step) / "b"
    folder.parent.mkdir()
    if old:
        make(folder, kind="old")
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            global seen
            if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "glob"):
                seen += 1
                if seen == step:
                    os._exit(9)
        sys.addaudithook(hook)
        make(folder, kind="new")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def python(script: str, *arguments: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], env=environment, stdout=subprocess.PIPE)


@pytest.mark.parametrize("old", [True, False], ids=["replacing", "new"])
def test_kill_at_any_step_leaves_old_or_new(tmp_path, old):
    """A writer killed at any step leaves the old bundle, the new one, or none if there was none."""
    child = python(KILLED_AT_EVERY_STEP, tmp_path, old)
    child.communicate()
    assert child.returncode == 0
    states = []
    for step in range(1, len(list(tmp_path.iterdir())) + 1):
        folder = tmp_path / str(step) / "b"
        if not old and not folder.exists():
            with pytest.raises(UserError, match="no such folder"):
                bundle.read(folder)
            states.append("absent")
        else:
            states.append(bundle.read(folder).kind)
        make(folder, kind="next")
        assert leftovers(folder) == [], f"the next write did not tidy up after a kill at step {step}"
    before = "old" if old else "absent"
    assert len(states) > 30
    assert states == [before] * states.count(before) + ["new"] * states.count("new")
    assert states[-1] == "new"


EXTENDED_AT_EVERY_STEP = (
    KILLED_AT_EVERY_STEP.replace('make(folder, kind="new")', 'bundle.amend(folder, add, runner={"more": 1})')
    .replace("import make", "import add, make")
    .replace('"shutil",', '"shutil", "pathlib",')
)


def test_kill_while_adding_files_leaves_before_or_after(tmp_path):
    """Both states pass all checksums: files that stay are hard links and must survive the removal of the old folder."""
    child = python(EXTENDED_AT_EVERY_STEP, tmp_path, True)
    child.communicate()
    assert child.returncode == 0
    states = []
    for step in range(1, len(list(tmp_path.iterdir())) + 1):
        found = bundle.read(tmp_path / str(step) / "b")
        assert ("more/model.safetensors" in found.files) == (found.runner == {"more": 1}) and found.kind == "old"
        states.append(len(found.files))
    assert len(states) > 20 and states == sorted(states) and states[0] < states[-1]


def test_added_files_replace_those_of_equal_name(tmp_path):
    """Added files replace those of equal name, without changing other hard links of them."""
    was = make(tmp_path / "b", 1.0)
    (tmp_path / "b" / "NOTES.md").write_text("ours")
    os.link(tmp_path / "b" / "model.safetensors", tmp_path / "linked")
    before = (tmp_path / "linked").read_bytes()
    now = bundle.amend(tmp_path / "b", lambda folder: fill(folder, 2.0), runner={})
    assert now.files["model.safetensors"] != was.files["model.safetensors"] and bundle.read(tmp_path / "b") == now
    assert (tmp_path / "linked").read_bytes() == before and (tmp_path / "b" / "NOTES.md").read_text() == "ours"
    assert "NOTES.md" not in now.files and leftovers(tmp_path / "b") == []


def test_sigkill_at_random_moments_leaves_a_bundle(tmp_path, seed):
    """A real SIGKILL against a writer that replaces one bundle over and over."""
    folder = tmp_path / "b"
    make(folder, kind="0")
    script = (
        "import sys\nfrom pathlib import Path\nfrom tests.support.bundles import make\nprint('ready', flush=True)\n"
        "for i in range(10**6): make(Path(sys.argv[1]), kind=str(i))"
    )
    for _ in range(4):
        child = python(script, folder)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(random.uniform(0.01, 0.1))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert bundle.read(folder).kind.isdigit()
    make(folder, kind="last")
    assert leftovers(folder) == []


def test_running_writer_is_not_cleaned_up(tmp_path):
    """Cleaning up after killed writers leaves a running writer's folder alone."""
    folder = tmp_path / "b"

    def nested(path: Path) -> None:
        make(folder, kind="inner")  # another writer of the same folder, while this one works
        fill(path)

    bundle.write(folder, nested, kind="outer", config={}, target=TARGET)
    assert bundle.read(folder).kind == "outer"
    assert leftovers(folder) == []


def model_folder(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "hidden_size": 64} | config))
    tokens = {"version": "1.0", "padding": None, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def test_fingerprint_survives_saving_but_no_change(tmp_path):
    """A fingerprint is the same after saving a model again, and differs after any change."""
    one = bundle.fingerprint(model_folder(tmp_path / "one", dtype="float32"))
    other = model_folder(tmp_path / "other", dtype="bfloat16", transformers_version="9.9")
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["padding"], tokens["model"]["merges"] = {"length": 3}, [["a", "b"]]
    (other / "tokenizer.json").write_text(json.dumps(tokens, indent=4))
    two = bundle.fingerprint(other)
    assert two == one | {"path": "other"}
    assert one["vocab_size"] == "320"

    tokens["model"]["vocab"]["b"] = 1
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    assert bundle.fingerprint(other)["tokenizer"] != one["tokenizer"]
    assert bundle.fingerprint(model_folder(tmp_path / "deep", num_hidden_layers=9))["config"] != one["config"]
    with pytest.raises(UserError, match=r"nowhere/config.json.*give a Hugging Face model folder"):
        bundle.fingerprint(tmp_path / "nowhere")


def test_check_fit_names_what_does_not_fit():
    """`check_fit` names what does not fit the target."""
    decoder = {"vocab_size": 320, "hidden_size": 64}
    target = {"decoder": decoder, "fingerprint": {"config": "c", "tokenizer": "t", "path": "small"}}
    made = bundle.Bundle(Path("b"), "fake", {}, target, extra={"taps": [-1]})
    same = {"config": "c", "tokenizer": "t", "path": "big"}
    assert bundle.check_fit(made, same, {"vocab_size": 320, "hidden_size": 64}) == []
    with pytest.raises(UserError, match="big: vocab_size 400 does not fit the bundle, made for 320 .small."):
        bundle.check_fit(made, same, {"vocab_size": 400, "hidden_size": 64})
    with pytest.raises(UserError, match="hidden_size 96"):
        bundle.check_fit(made, same, {"vocab_size": 320, "hidden_size": 96})
    assert bundle.check_fit(replace(made, extra={}), same, {"vocab_size": 320, "hidden_size": 96}) == []
    with pytest.raises(UserError, match="tokenizer"):
        bundle.check_fit(made, same | {"tokenizer": "u"}, {"vocab_size": 320, "hidden_size": 64})
    (note,) = bundle.check_fit(made, same | {"config": "d"}, {"vocab_size": 320, "hidden_size": 64})
    assert "config" in note


def test_card_counts_weights_from_file_headers(tmp_path):
    """The card counts parameters from the files' headers, without those of the predictor."""
    found = make(tmp_path / "b", metrics={"tau": 2.51234}, recipe="recipes/x.yaml")
    assert weight_count(found) == (15, 15 * 4 + 4 * 8)

    def predictor(folder):
        (folder / "predictor").mkdir()
        save_file({"state.weight": np.ones(9, np.float32)}, folder / "predictor" / "model.safetensors")

    found = bundle.amend(found.path, predictor, runner={})
    assert "predictor/model.safetensors" in found.files and weight_count(found)[0] == 15
    card = describe(found)
    for text in ("b: fake", "15 parameters", "tiny", "vocabulary 320", "tau 2.512", "recipes/x.yaml", "seed**: 7"):
        assert text in card


def test_card_of_a_model_names_no_target(tmp_path):
    """The card of a language model names no target."""

    def fill(folder):
        (folder / "config.json").write_text("{}")

    found = bundle.write(tmp_path / "b", fill, kind="model", config={}, target={})
    assert "target" not in describe(found) and "b: model" in describe(found)
