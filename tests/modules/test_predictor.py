"""The acceptance predictor: beats the baselines, gives calibrated probabilities, and is exported into its drafter's bundle."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.support.acceptance import make_set
from tests.support.runs import log, resumed
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.fit import run
from trainkit.data.sets.acceptance import AcceptanceSet, drafter_fingerprint
from trainkit.drafters.lm import LMDraft
from trainkit.eval.calibration import fit_scales, predicted
from trainkit.export.drafter import export_drafter
from trainkit.models.predictor import FILE, load_predictor
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.modules.checkpoint import read_checkpoint
from trainkit.runner import Runner


def arguments(records, root, **more) -> list[str]:
    flags = {
        "model": "PredictorModule",
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 0.01,
        "model.width": 16,
        "model.warmup_steps": 10,
        "data": "AcceptanceData",
        "data.train": records,
        "data.batch_size": 64,
        "data.validation_share": 0.2,
        "trainer.default_root_dir": root,
        "trainer.max_steps": 150,
        "trainer.val_check_interval": 10,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 10,
        "checkpoint.every_n_steps": 50,
    }
    return [str(part) for name, value in (flags | more).items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def draft(tmp_path_factory, tiny_target):
    network = LMDraft(target_shape(tiny_target), num_layers=1, init="target")
    network.initialise(FrozenTarget(tiny_target))
    folder = tmp_path_factory.mktemp("bundles") / "draft"
    export_drafter(network, folder, tokenizer=tiny_target)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, draft):
    """An acceptance set, the run folder of a predictor trained on it, and the last validation row of its log."""
    folder = tmp_path_factory.mktemp("trained")
    records = make_set(folder / "set", drafter=drafter_fingerprint(bundle.read(draft)))
    assert run("fit", arguments(records, folder / "run")) == 0
    rows = [row for row in log(folder / "run") if row.get("val/loss")]
    return records, folder / "run", {name: float(value) for name, value in rows[-1].items() if value}


def test_predictor_beats_every_baseline(trained):
    """The label's entropy given the state is about 0.34 nats, without it 0.68."""
    values = trained[2]
    assert values["val/loss"] < 0.45 < 0.6 < values["val/constant_loss"]
    assert values["val/loss"] < values["val/max_q_fitted_loss"] < values["val/max_q_loss"]
    assert values["val/fitted_loss"] <= values["val/loss"] + 1e-6
    assert values["val/fitted_ece"] < 0.08 < values["val/max_q_ece"]


def test_checkpoint_holds_its_own_calibration(trained):
    """A checkpoint holds the calibration that was fitted to its own weights."""
    records, root, _ = trained
    for name in ("last.ckpt", "best.ckpt"):
        saved = read_checkpoint(root / "checkpoints" / name)
        predictor, fingerprint, info = saved.predictor(), saved.description["drafter"], saved.info
        seen = predictor.seen
        held = AcceptanceSet.read(records).split(seen["validation_share"], seen["split_seed"])[1]
        scales = torch.tensor(fit_scales(predicted(predictor, held)[:, 0], held.accepted, held.temperature))
        assert torch.allclose(torch.stack([predictor.scale, predictor.shift], 1), scales, atol=1e-5)
        assert not torch.equal(predictor.scale, torch.ones(2))
        assert fingerprint["kind"] == "lm" and info["metrics"]["val/loss"] < 0.6 and info["module"] == "PredictorModule"


def test_resumed_run_equals_uninterrupted(trained, tmp_path):
    """A resumed run ends with the weights of an uninterrupted one."""
    records, _, _ = trained
    short = {
        "trainer.max_steps": 30,
        "checkpoint.every_n_steps": 12,
        "trainer.val_check_interval": 22,
        "model.lr_scheduler": "torch.optim.lr_scheduler.ConstantLR",
    }
    assert run("fit", arguments(records, tmp_path / "whole", **short)) == 0
    assert run("fit", arguments(records, tmp_path / "parts", **{**short, "trainer.max_steps": 12})) == 0
    cut = arguments(records, tmp_path / "parts", **short)
    assert run("fit", resumed(cut, tmp_path / "parts")) == 0
    weights = [
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt").predictor().state_dict() for name in ("whole", "parts")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_rejection_weight_lowers_predictions(trained, tmp_path):
    """If nothing predicts the label, P = rate / (rate + 6 (1 - rate)); the weighted loss keeps the scale of the plain one."""
    records, _, _ = trained
    flags = {"model.rejection_weight": 6.0, "model.width": 4, "trainer.max_steps": 60, "trainer.log_every_n_steps": 60}
    assert run("fit", arguments(records, tmp_path / "run", **flags)) == 0
    predictor = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt").predictor()
    held = AcceptanceSet.read(records).split(0.2, 0)[1]
    logits, label = predicted(predictor, held)[:, 0], held.accepted
    assert logits.sigmoid().mean() < label.mean() - 0.08
    assert abs(predictor.calibrated(logits, held.temperature).mean() - label.mean()) < 0.02
    row = next(row for row in log(tmp_path / "run") if row.get("train/loss"))
    assert 0.3 < float(row["train/loss"]) < 1.0


def test_export_adds_predictor_to_the_bundle(trained, draft, tiny_target, tmp_path, capsys):
    """Exporting a predictor adds it to its drafter's bundle, which decodes as before."""
    exported = tmp_path / "draft"
    shutil.copytree(draft, exported)
    (exported / "README.md").write_text("ours")
    was = bundle.amend(exported, runner={"tree": [[0], [0, 0]]})
    checkpoint = trained[1] / "checkpoints" / "best.ckpt"
    before = Runner.load(tiny_target, exported, max_len=64).generate(["How many"], max_new_tokens=12, temperature=1.0)[0].tokens
    assert main(["export", str(checkpoint), str(exported)]) == 0
    now = bundle.read(exported)
    assert now.runner["tree"] == [[0], [0, 0]] and now.files.keys() - was.files.keys() == {FILE}
    assert {**now.files, FILE: ""} == {**was.files, FILE: ""} and (exported / "README.md").read_text() == "ours"
    assert (now.config, now.target, now.versions, now.extra) == (was.config, was.target, was.versions, was.extra)
    predictor = read_checkpoint(checkpoint).predictor()
    loaded = load_predictor(exported, now.runner["predictor"])
    for name, value in predictor.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    after = (
        Runner.load(tiny_target, exported, max_len=64)
        .generate(["How many"], max_new_tokens=12, temperature=1.0, depth=2)[0]
        .tokens
    )
    assert after == before
    assert main(["inspect", str(exported), "--target", str(tiny_target)]) == 0
    printed = capsys.readouterr().out
    assert "**predictor**: width 16, verify coupled" in printed and "all checksums agree" in printed

    # an older predictor is replaced, and no predictor is part of the drafter's fingerprint
    assert main(["export", str(trained[1] / "checkpoints" / "last.ckpt"), str(exported)]) == 0
    again = bundle.read(exported)
    assert again.files.keys() == now.files.keys() and load_file(exported / FILE).keys() == predictor.state_dict().keys()
    assert drafter_fingerprint(again) == drafter_fingerprint(now) == {**drafter_fingerprint(was)}
    assert not [path for path in tmp_path.iterdir() if path != exported]


def test_predictor_export_to_wrong_bundle_is_refused(trained, draft, tiny_target, tmp_path, capsys):
    """A predictor is not exported into another drafter's bundle, which stays unchanged."""
    other = LMDraft(target_shape(tiny_target), num_layers=1, init="scratch")
    export_drafter(other, tmp_path / "other", tokenizer=tiny_target)
    before = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    checkpoint = str(trained[1] / "checkpoints" / "best.ckpt")
    for out, part in (
        (tmp_path / "other", "not the drafter that the predictor was trained for, draft"),
        (tmp_path / "none", "no such folder"),
    ):
        assert main(["export", checkpoint, str(out)]) == 2
        error = capsys.readouterr().err.strip()
        assert part in error and error.count("\n") == 0
    assert main(["export", checkpoint, str(draft), "--format", "vllm"]) == 2
    assert "--format: a predictor is added to its drafter's bundle" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before
    assert not (tmp_path / "none").exists()


def test_predictor_export_is_refused_if_reload_differs(trained, draft, tmp_path, monkeypatch, capsys):
    """A predictor whose reloaded outputs differ is refused, and the bundle stays unchanged."""
    exported = tmp_path / "draft"
    shutil.copytree(draft, exported)

    def spoiled(folder, config):
        loaded = load_predictor(folder, config)
        loaded.shift += 0.5
        return loaded

    monkeypatch.setattr("trainkit.export.predictor.load_predictor", spoiled)
    assert main(["export", str(trained[1] / "checkpoints" / "best.ckpt"), str(exported)]) == 2
    assert "the logits of the reloaded predictor differ" in capsys.readouterr().err
    assert bundle.read(exported).files == bundle.read(draft).files and not (exported / FILE).exists()


def test_predictor_command_prints_held_out_table(trained, draft, tmp_path, capsys):
    """The command prints, stores and plots the measures of held-out questions."""
    exported, records = tmp_path / "draft", trained[0]
    shutil.copytree(draft, exported)
    assert main(["predictor", str(exported), "--data", str(records)]) == 2
    assert "has no acceptance predictor" in capsys.readouterr().err
    assert main(["export", str(trained[1] / "checkpoints" / "best.ckpt"), str(exported)]) == 0
    capsys.readouterr()
    files = tmp_path / "out.json", tmp_path / "out.png"
    assert main(["predictor", str(exported), "--data", str(records), "--json", str(files[0]), "--plot", str(files[1])]) == 0
    printed = capsys.readouterr().out
    assert "of 8 held-out prompts" in printed and "temperature 0 " in printed and "position 4" in printed
    values = json.loads(files[0].read_text())
    every = values["groups"][0]
    best = torch.load(trained[1] / "checkpoints" / "best.ckpt", weights_only=True)["trainkit"]["info"]["metrics"]
    assert every["log_loss"]["raw"] == pytest.approx(best["val/loss"], abs=1e-4)
    assert every["log_loss"]["predictor"] == pytest.approx(best["val/fitted_loss"], abs=1e-4)
    assert every["ece"]["max_q_fitted"] == pytest.approx(best["val/max_q_fitted_ece"], abs=1e-4)
    first, second = values["ranks"]
    assert first["log_loss"]["predictor"] == every["log_loss"]["predictor"] and "proposal 2" in printed
    assert second["accepted"] == pytest.approx((1 - every["accepted"]) / 2, abs=0.05)
    assert second["log_loss"]["predictor"] < second["log_loss"]["draft"], "it learns from the second proposals too"
    assert every["records"] == sum(g["records"] for g in values["groups"] if g["group"].startswith("position"))
    assert files[1].read_bytes()[:4] == b"\x89PNG"

    fresh = make_set(tmp_path / "fresh", seed=9, drafter=drafter_fingerprint(bundle.read(draft)), verify="residual")
    assert main(["predictor", str(exported), "--data", str(fresh)]) == 0
    printed = capsys.readouterr().out
    assert "of 40 prompts" in printed and "trained for coupled, this set was decoded with residual" in printed
    other = make_set(tmp_path / "other")
    assert main(["predictor", str(exported), "--data", str(other)]) == 2
    assert "made with another drafter" in capsys.readouterr().err


def test_invalid_flags_give_one_line(trained, tmp_path, capsys):
    """An invalid flag gives a one-line error that names it."""
    records = trained[0]
    for flags, part in (
        ({"data.train": tmp_path}, "no acceptance set"),
        ({"data.validation_share": 0.0}, "validation_share"),
        ({"model.rejection_weight": 0}, "rejection_weight is 0"),
        ({"model.width": 0}, "predictor.width: 0 must be at least 1"),
    ):
        assert main(["fit", *arguments(records, tmp_path / "run", **flags)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trainkit: error: ") and part in error
