"""`trainkit export`: drafter and model checkpoints become folders that load; nothing is written if a check fails."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.recipes import tiny_flags
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.export import export
from trainkit.commands.fit import run
from trainkit.errors import UserError
from trainkit.runner import Runner


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"It is {n + 1}."}) + "\n" for n in range(24)))
    return path


def fit(recipe: str, target: Path, rows: Path, folder: Path) -> Path:
    flags = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.logger", "false"]
    assert run("fit", [*tiny_flags(Path(recipe), target, rows, folder), *flags]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


def test_drafter_and_model_export_and_decode(tiny_target, rows, tmp_path, capsys):
    """A trained drafter and a trained model can be exported, inspected and decoded with."""
    draft = fit("recipes/draft_tiny.yaml", tiny_target, rows, tmp_path / "a")
    model = fit("recipes/target_tiny.yaml", tiny_target, rows, tmp_path / "b")
    assert main(["export", str(draft), str(tmp_path / "draft"), "--format", "vllm"]) == 0
    assert main(["export", str(model), str(tmp_path / "model"), "--format", "hf"]) == 0
    assert main(["export", str(model), str(tmp_path / "none"), "--format", "gguf"]) == 2
    assert main(["inspect", str(tmp_path / "draft"), "--target", str(tiny_target)]) == 0
    assert bundle.read(tmp_path / "draft").extra["format"] == "vllm" and not (tmp_path / "none").exists()
    printed = capsys.readouterr().out
    for name in ("draft", "model"):
        assert f"written to {tmp_path / name}; the reloaded files compute exactly what was exported" in printed
    assert "draft: lm" in printed and "model: model" in printed and "It fits" in printed and "val/alpha" in printed
    assert Runner.load(tiny_target, tmp_path / "draft", max_len=64).generate(["How many"], max_new_tokens=8)[0].tokens
    assert Runner.load(tmp_path / "model", max_len=64).generate(["How many"], max_new_tokens=8)[0].tokens
    assert main(["inspect", str(tmp_path / "model"), "--target", str(tiny_target)]) == 2


def test_model_exports_in_half_precision(tiny_target, rows, tmp_path):
    """Its rotary frequencies must stay float32, as after a reload; otherwise the logits would differ."""
    checkpoint = fit("recipes/target_tiny.yaml", tiny_target, rows, tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        out = tmp_path / str(dtype)
        export(str(checkpoint), str(out), dtype=str(dtype).removeprefix("torch."))
        assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {dtype}


def test_non_finite_weights_are_not_exported(tiny_target, rows, tmp_path):
    """Weights with NaN are refused, and nothing is written."""
    checkpoint = fit("recipes/draft_tiny.yaml", tiny_target, rows, tmp_path)
    values = torch.load(checkpoint, weights_only=True)
    values["state_dict"]["drafter.decoder.norm.weight"][0] = float("nan")
    torch.save(values, checkpoint)
    with pytest.raises(UserError, match="decoder.norm.weight holds values that are not finite"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_export_is_refused_if_reload_differs(tiny_target, rows, tmp_path, monkeypatch):
    """An export whose reloaded logits differ is refused."""

    from trainkit.drafters.lm import LMDraft

    checkpoint = fit("recipes/draft_tiny.yaml", tiny_target, rows, tmp_path)
    load = LMDraft.load.__func__

    def spoiled(cls, folder, target, config):
        draft = load(cls, folder, target, config)
        draft.decoder.norm.weight.mul_(1.001)
        return draft

    monkeypatch.setattr(LMDraft, "load", classmethod(spoiled))
    with pytest.raises(UserError, match="logits of the reloaded export differ"):
        export(str(checkpoint), str(tmp_path / "out"))
    assert not bundle.is_bundle(tmp_path / "out")


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickle_payload_is_refused_and_not_run(tiny_target, rows, tmp_path, capsys):
    """A pickle payload in a checkpoint or in a bundle is refused and never executed."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists(), "the payload works"
    mark.unlink()

    args = [*tiny_flags(Path("recipes/draft_tiny.yaml"), tiny_target, rows, tmp_path), "--trainer.logger", "false"]
    assert run("fit", [*args, "--trainer.max_steps", "1"]) == 0
    good = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert main(["export", str(good), str(tmp_path / "out")]) == 0
    values = torch.load(good, weights_only=True)
    values["trainkit"]["info"]["recipe"] = Payload(mark)  # in an otherwise valid checkpoint
    torch.save(values, tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Payload(mark)))
    capsys.readouterr()
    for evil in (str(tmp_path / "evil.ckpt"), str(tmp_path / "plain.ckpt")):
        training = [[name, *args, "--ckpt_path", evil] for name in ("fit", "validate")]
        for command in (["export", evil, str(tmp_path / "x")], *training):
            assert main(command) == 2, command
            printed = capsys.readouterr().err.splitlines()[-1]
            assert printed.startswith(f"trainkit: error: {evil}: not a checkpoint that loads with weights_only")
    assert not (tmp_path / "x").exists()

    torch.save({"lm_head.weight": Payload(mark)}, tmp_path / "out" / "pytorch_model.bin")
    assert main(["inspect", str(tmp_path / "out")]) == 2
    (tmp_path / "out" / "model.safetensors").unlink()  # only the payload is left
    for listed in (False, True):
        if listed:
            manifest = json.loads((tmp_path / "out" / "trainkit.json").read_text())
            files = {name: value for name, value in manifest["files"].items() if name != "model.safetensors"}
            manifest["files"] = files | {"pytorch_model.bin": "0"}
            (tmp_path / "out" / "trainkit.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError):
            Runner.load(tiny_target, tmp_path / "out", max_len=64)
    (tmp_path / "out" / "trainkit.json").unlink()  # a plain model folder now
    with pytest.raises(UserError):
        Runner.load(tiny_target, tmp_path / "out", max_len=64)
    with pytest.raises(UserError):
        Runner.load(tmp_path / "out", max_len=64)
    assert not mark.exists()
