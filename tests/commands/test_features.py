"""`trainkit features`: kills and ranks change no byte, the announced size is right, and no shard is taken from another set."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from tests.support.processes import ended, files_of, fork, wait_until
from tests.support.targets import make_target
from trainkit.cli import main
from trainkit.data.sets import features as feature_set
from trainkit.data.sets.features import FeatureLayout
from trainkit.data.text.prepare import prepare
from trainkit.losses.topk import compress
from trainkit.models.target import FrozenTarget


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    texts = [{"prompt": f"How many of {n}?", "response": f"In May she sold {n} clips. " * (1 + n % 3)} for n in range(40)]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return path


class Command:
    """`trainkit features` on fixed files; `options` are written as flags."""

    def __init__(self, target: Path, rows: Path, cache: Path) -> None:
        self.fixed = {
            "device": "cpu",
            "target": target,
            "data": rows,
            "taps": "[1,-1]",
            "top_k": 4,
            "length": 96,
            "batch": 2,
            "shard_rows": 3,
            "validation_share": 0.2,
            "cache": cache,
            "dtype": "float32",
        }

    def __call__(self, out: Path, **options: Any) -> int:
        given = {name: value for name, value in (self.fixed | options | {"out": out}).items() if value is not None}
        return main(["features", *(f"--{name}={value}" for name, value in given.items())])


@pytest.fixture(scope="module")
def command(tiny_target: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tiny_target, rows, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def straight(command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of features written without interruption: several shards of training rows, and one of validation rows."""
    out = tmp_path_factory.mktemp("straight") / "out"
    assert command(out) == 0
    files = files_of(out)
    assert len([name for name in files if name.startswith("train-")]) >= 4 and "validation-00000.safetensors" in files
    return files


def shards_in(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def check_error(capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    *others, line = capsys.readouterr().err.strip().splitlines()  # others: progress bars
    assert line.startswith("trainkit: error: ") and "Traceback" not in others and all(part in line for part in parts), line
    return line


def test_features_after_three_kills_are_identical(command, straight, tmp_path, seed, capsys):
    """SIGKILL three times; a shard with its final name is complete and is not written again."""
    draw, out = random.Random(seed), tmp_path / "out"
    for _ in range(3):
        pid = fork(lambda: command(out))
        wanted = min(len(straight) - 2, shards_in(out) + draw.randint(0, 2))
        wait_until(lambda wanted=wanted: shards_in(out) >= wanted, pid)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) in (-signal.SIGKILL, 0)
        there = files_of(out) if out.exists() else {}
        assert {name: content for name, content in there.items() if not name.endswith(".partial")}.items() <= straight.items()
    there = shards_in(out)
    capsys.readouterr()
    assert command(out) == 0
    assert (
        f"{len(straight) - 1 - there} of {len(straight) - 1} shards written, {there} already existed" in capsys.readouterr().out
    )
    assert files_of(out) == straight


@pytest.mark.parametrize("call", ["replace", "fsync", "write"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_during_shard_write_is_recovered(call, when, command, straight, tmp_path, seed):
    """Killed before or after write, sync and rename, at a random shard."""
    at, out = random.Random(seed).randint(1, len(straight) - 1), tmp_path / "out"

    def die() -> None:
        # only a shard's `os.replace` counts, not that of the prepared set or of features.json
        owner, name = (safetensors.torch, "save") if call == "write" else (os, call)
        real, calls = getattr(owner, name), [0]

        def deadly(*given: Any, **options: Any) -> Any:
            calls[0] += call != "replace" or str(given[1]).endswith(".safetensors")
            if calls[0] < at:
                return real(*given, **options)
            if when == "after":
                result = real(*given, **options)
                if call == "write":
                    partial = (out / shard_files(out)[shards_in(out)]).with_suffix(".partial")
                    partial.write_bytes(result[: len(result) // 2])
            os._exit(9)

        setattr(owner, name, deadly)
        command(out)

    assert ended(fork(die)) == 9
    assert command(out) == 0
    assert files_of(out) == straight


def shard_files(out: Path) -> list[str]:
    manifest = json.loads((out / "features.json").read_text())
    return [shard[0] for packed in manifest["sets"].values() for shard in packed["shards"]]


def test_two_ranks_make_the_same_features_as_one(command, straight, tmp_path):
    """Two ranks write the features that one would, and one process can finish what one of two ranks began."""

    def rank(number: int, out: Path) -> int:
        os.environ.update(RANK=str(number), WORLD_SIZE="2")
        return command(out)

    both = [fork(lambda number=number: rank(number, tmp_path / "both")) for number in (0, 1)]
    assert [ended(pid) for pid in both] == [0, 0]
    assert files_of(tmp_path / "both") == straight
    assert ended(fork(lambda: rank(1, tmp_path / "one"))) == 0
    assert shards_in(tmp_path / "one") == (len(straight) - 1) // 2 and command(tmp_path / "one") == 0
    assert files_of(tmp_path / "one") == straight


@pytest.mark.parametrize("options", [{}, {"top_k": None, "taps": None, "dtype": "bfloat16"}, {"kind": "lm", "taps": None}])
def test_announced_size_equals_written_size(options, command, tmp_path, capsys):
    """The announced size is the size of the written files without their headers."""
    out = tmp_path / "out"
    assert command(out, **options) == 0
    announced = json.loads((out / "features.json").read_text())["bytes"]
    (shown,) = re.findall(r"tokens, ([\d.]+) MB in", capsys.readouterr().out)
    assert float(shown) == pytest.approx(announced / 1e6, abs=6e-4)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert announced < written <= announced + 1000 * shards_in(out)  # each shard has a header


def test_full_disk_is_reported_before_the_start(command, tmp_path, monkeypatch, capsys):
    """Too little disk space is reported before anything is written."""
    monkeypatch.setattr(feature_set.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert command(tmp_path / "out") == 2
    check_error(capsys, str(tmp_path / "out"), "0.001 MB are free", "another disk")
    assert not (tmp_path / "out").exists()


def test_stored_features_equal_target_outputs(command, straight, tiny_target, rows, tmp_path):
    """Hidden states of the taps and top-k rows, each once, in the order of the packed rows; the last state only as a tap."""
    target, made = FrozenTarget(tiny_target), prepare([str(rows)], None, str(tiny_target), 96, validation_share=0.2)
    out = tmp_path / "out"
    out.mkdir()
    for name, content in straight.items():
        (out / name).write_bytes(content)
    for name, packed in (("train", made.train), ("validation", made.validation)):
        parts = [load_file(path) for path in sorted(out.glob(f"{name}-*"))]
        found = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert set(found) == {"hidden.1", "hidden.4", "top_ids", "top_log_p", "log_rest"}
        assert len(found["top_ids"]) == len(packed)
        for row in range(len(packed)):
            batch = packed.batch([row], 1)
            hidden, taps = target.forward(batch["tokens_BT"], batch["positions_BT"], batch["document_BT"], (1, 4))
            assert taps is not None
            close = {"rtol": 1e-4, "atol": 1e-5}  # in batches of two, float32 sums are rounded differently
            torch.testing.assert_close(found["hidden.1"][row], taps[0, :, 0], **close)
            torch.testing.assert_close(found["hidden.4"][row], hidden[0], **close)
            kept = compress(target.handle().head(hidden[0]), 4)
            torch.testing.assert_close(found["top_log_p"][row], kept[:, 4:8], **close)
            torch.testing.assert_close(found["log_rest"][row], kept[:, 8], **close)
            assert (found["top_ids"][row] == kept[:, :4]).float().mean() > 0.99


def test_provenance_lists_all_settings(straight):
    """The provenance file lists settings, digests and shards."""
    values = json.loads(straight["features.json"])
    assert values["states"] == [1, 4] and values["top_k"] == 4 and values["dtype"] == "float32" and values["length"] == 96
    assert len(values["weights"]) == 64 and values["target"]["config"] and values["data"]["fingerprint"]
    table = [shard for described in values["sets"].values() for shard in described["shards"]]
    assert {shard[0] for shard in table} == set(straight) - {"features.json"}
    for described in values["sets"].values():
        bounds = [shard[1:] for shard in described["shards"]]
        assert [row for first, last in bounds for row in range(first, last)] == list(range(described["rows"]))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"top_k": 5}, "top_k 4, but now it is 5"),
        ({"taps": "[1,2]"}, "states [1, 4], but now it is [1, 2]"),
        ({"dtype": "bfloat16"}, 'dtype "float32"'),
        ({"length": 80}, "length 96, but now it is 80"),
        ({"limit": 20}, "data limit null, but now it is 20"),
        ({"seed": 1}, "data seed 0, but now it is 1"),
        ({"target_dtype": "bfloat16"}, "precision"),
        ({"shard_rows": 4}, "sets"),
    ],
)
def test_resume_with_other_setting_is_refused(options, key, command, straight, tmp_path, capsys):
    """Resuming with another setting gives a one-line error that names it, and changes no file."""
    (tmp_path / "out").mkdir()
    for name, content in list(straight.items())[:3]:
        (tmp_path / "out" / name).write_bytes(content)
    before = files_of(tmp_path / "out")
    assert command(tmp_path / "out", **options) == 2
    check_error(capsys, "started with", key)
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"top_k": 0}, ("--top_k: 0", "320")),
        ({"top_k": 321}, ("--top_k: 321", "320")),
        ({"taps": "[9]"}, ("tap 9", "0 to 4")),
        ({"kind": "medusa"}, ("--taps", "--kind")),
        ({"kind": "nope", "taps": None}, ("'nope'", "medusa")),
        ({"length": 1024}, ("--length: 1024", "512")),
        ({"batch": 0}, ("--batch",)),
        ({"limit": -1}, ("--limit: -1 must be at least 1",)),
        ({"limit_validation": 0}, ("--limit_validation: 0 must be at least 1",)),
        ({"seed": -1}, ("seed: -1 must be at least 0",)),
        ({"dtype": "int8"}, ("dtype", "int8")),
        ({"target": "nowhere"}, ("nowhere", "config.json")),
    ],
)
def test_bad_option_gives_one_line_and_no_output(options, parts, command, tmp_path, capsys):
    """A wrong option gives a one-line error and no output folder."""
    assert command(tmp_path / "out", **options) == 2
    check_error(capsys, *parts)
    assert not (tmp_path / "out").exists()


def test_folder_with_other_files_is_refused(command, tmp_path, capsys):
    """A folder with unrelated files is refused and left as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    assert command(tmp_path) == 2
    check_error(capsys, "holds something else")
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


def test_values_beyond_the_dtype_are_refused(command, tiny_target, tmp_path, capsys):
    """A value above 65504 would be infinite in float16, but not in bfloat16."""
    large = shutil.copytree(tiny_target, tmp_path / "large")
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"] *= 1e6
    from safetensors.torch import save_file

    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    options = {"target": large, "top_k": None, "taps": None}
    assert command(tmp_path / "out", dtype="float16", **options) == 2
    check_error(capsys, "float16", "layer 4", "bfloat16")
    assert not (tmp_path / "out").exists()
    assert command(tmp_path / "out", dtype="bfloat16", **options) == 0


def test_second_writer_is_refused(command, straight, tmp_path, monkeypatch, capsys):
    """A second process that writes the same set is refused."""
    out = tmp_path / "out"

    def slow() -> int:
        real = feature_set._shard_tensors
        feature_set._shard_tensors = lambda *given: time.sleep(3600) or real(*given)
        return command(out)

    pid = fork(slow)
    wait_until(lambda: any(out.glob("*.partial")) if out.exists() else False, pid)
    assert command(out) == 2
    check_error(capsys, "train-00000.partial", "another process is writing")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    assert command(out) == 0 and files_of(out) == straight


def test_taps_are_read_from_the_kind(tiny_target, rows, command, tmp_path):
    """The taps are taken from the drafter kind when none are given."""
    assert command(tmp_path / "out", kind="hydra", taps=None) == 0
    assert json.loads((tmp_path / "out" / "features.json").read_text())["states"] == [4]


def layout(**changes: Any) -> FeatureLayout:
    values: dict[str, Any] = {
        "rows": {"train": 10, "validation": 1},
        "length": 8,
        "states": (2, 4),
        "hidden_size": 6,
        "top_k": 3,
        "dtype": torch.bfloat16,
        "shard_rows": 4,
    }
    return FeatureLayout(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, 8 * (2 * 6 * 2 + 3 * (4 + 2) + 2)),
        ({"top_k": None}, 8 * 2 * 6 * 2),
        ({"states": ()}, 8 * (3 * 6 + 2)),
        ({"dtype": torch.float32}, 8 * (2 * 6 * 4 + 3 * 8 + 4)),
    ],
)
def test_row_bytes_by_hand(changes, row):
    """The bytes per row equal those computed by hand."""
    assert layout(**changes).row_bytes == row and layout(**changes).bytes == 11 * row


def test_every_row_is_in_one_shard():
    """Every row is in exactly one shard."""
    for step in (1, 3, 4, 10, 50, None):
        shards = layout(shard_rows=step).shards().values()
        assert [(name, row) for name, rows in shards for row in rows] == [("train", n) for n in range(10)] + [("validation", 0)]
        assert step is None or all(0 < len(rows) <= step for _, rows in shards)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gpt2"])
def test_target_without_layers_keeps_its_head(model_type, tmp_path, seed):
    """For each model family, with and without tied embeddings; the layers are not in memory."""
    more: Callable[..., Any] = lambda: {"tie_word_embeddings": False} if model_type != "gpt2" else {}
    folder = make_target(tmp_path, model_type, **more())
    whole, parts = FrozenTarget(folder), FrozenTarget(folder, layers=False)
    ids, hidden = torch.randint(320, (7,)), torch.randn(5, whole.hidden_size)
    for name, given in (("embed", ids), ("head", hidden)):
        assert torch.equal(getattr(parts.handle(), name)(given), getattr(whole.handle(), name)(given))
    assert parts.num_layers == whole.num_layers == 4 and parts.shape() == whole.shape()
    count = lambda target: sum(parameter.numel() for parameter in target.model.parameters())
    assert count(parts) < count(whole) / 2
