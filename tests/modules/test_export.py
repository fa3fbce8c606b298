"""`trainkit export`: both sorts of checkpoint become folders that load, and nothing stands where the check fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.test_recipes import tiny
from trainkit import bundle
from trainkit.cli import main
from trainkit.errors import UserError
from trainkit.modules.export import export
from trainkit.modules.training import run
from trainkit.runner import Runner


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"It is {n + 1}."}) + "\n" for n in range(24)))
    return path


def fit(recipe: str, target: Path, rows: Path, folder: Path) -> Path:
    flags = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.logger", "false"]
    assert run("fit", [*tiny(Path(recipe), target, rows, folder), *flags]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_a_drafter_and_a_model_are_exported_inspected_and_decode(tiny_target, rows, tmp_path, capsys):
    draft = fit("recipes/draft_tiny.yaml", tiny_target, rows, tmp_path / "a")
    model = fit("recipes/target_tiny.yaml", tiny_target, rows, tmp_path / "b")
    assert main(["export", str(draft), str(tmp_path / "draft")]) == 0
    assert main(["export", str(model), str(tmp_path / "model")]) == 0
    assert main(["inspect", str(tmp_path / "draft"), "--target", str(tiny_target)]) == 0
    said = capsys.readouterr().out
    assert "draft: lm" in said and "model: model" in said and "It fits" in said and "val/alpha" in said
    assert Runner.load(tiny_target, tmp_path / "draft", max_len=64).generate(["How many"], max_new_tokens=8)[0].tokens
    assert Runner.load(tmp_path / "model", max_len=64).generate(["How many"], max_new_tokens=8)[0].tokens
    assert main(["inspect", str(tmp_path / "model"), "--target", str(tiny_target)]) == 2


def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(tiny_target, rows, tmp_path):
    checkpoint = fit("recipes/draft_tiny.yaml", tiny_target, rows, tmp_path)
    values = torch.load(checkpoint, weights_only=True)
    values["state_dict"]["drafter.decoder.norm.weight"][0] = float("nan")
    torch.save(values, checkpoint)
    with pytest.raises(UserError, match="decoder.norm.weight holds values that are not finite"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_export_that_reloads_otherwise_is_refused(tiny_target, rows, tmp_path, monkeypatch):
    from trainkit.drafters.lm import LMDraft

    checkpoint = fit("recipes/draft_tiny.yaml", tiny_target, rows, tmp_path)
    load = LMDraft.load.__func__

    def spoiled(cls, folder, target, config):
        draft = load(cls, folder, target, config)
        draft.decoder.norm.weight.mul_(1.001)
        return draft

    monkeypatch.setattr(LMDraft, "load", classmethod(spoiled))
    with pytest.raises(UserError, match="reloaded export's logits differ"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert not bundle.is_bundle(tmp_path / "out")
