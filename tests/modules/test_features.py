"""Training from features: the losses of online training, without the target's layers; features of other data are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.runs import weights
from tests.support.targets import make_target
from tests.support.training import Losses, draft_module, fit, text_data
from trainkit.commands.features import features
from trainkit.drafters.base import add_kinds_from, discover
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.losses.divergence import ForwardKL, TVDpp
from trainkit.models.target import FrozenTarget
from trainkit.modules.draft import DraftModule

add_kinds_from("tests.support.kinds")
STEPS = 6


def feature_set(target: Path, chats: Path, out: Path, **options: Any) -> str:
    """Writes features of the rows of `text_data(chats, out.parent)`, with the same batch size."""
    defaults: dict[str, Any] = {
        "length": 128,
        "batch": 2,
        "validation_share": 0.1,
        "seed": 3,
        "cache": str(out.parent),
        "dtype": "float32",
    }
    features(target=str(target), data=str(chats), out=str(out), **(defaults | options))
    return str(out)


def trained(target: Path, chats: Path, root: Path, steps: int = STEPS, **module: Any) -> list[float]:
    losses = Losses()
    fit(draft_module(target, **module), text_data(chats, root.parent), root, losses, steps=steps, val_check_interval=4)
    return losses.values


@pytest.mark.parametrize("kind", sorted(discover()))
def test_training_from_features_equals_online(kind, tiny_target, chats, tmp_path, monkeypatch):
    """In float32 and with the same batches: equal to the bit, for hidden states and top-k rows; k = V is all of it.

    From logits or from stored log-probabilities the same p differs in float32 rounding of one more softmax, hence 1e-4.
    """
    drafter: Any = discover()[kind]
    online = trained(tiny_target, chats, tmp_path / "online", drafter=drafter)
    assert len(set(online)) == STEPS
    runs: list[int] = []
    forward = FrozenTarget.forward
    monkeypatch.setattr(FrozenTarget, "forward", lambda self, *args: runs.append(1) or forward(self, *args))
    for top_k in (None, 320, 8):
        folder = feature_set(tiny_target, chats, tmp_path / f"features-{top_k}", kind=kind, top_k=top_k)
        before = len(runs)
        stored = trained(tiny_target, chats, tmp_path / f"from-{top_k}", drafter=drafter, features=folder)
        assert len(runs) == before, "the target is run"
        whole = trained(tiny_target, chats, tmp_path / f"online-{top_k}", drafter=drafter, teacher_top_k=top_k)
        assert stored == whole
        ours, theirs = (weights(tmp_path / f"{where}-{top_k}") for where in ("from", "online"))
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        if top_k is None:
            assert stored == online
        elif top_k == 320:
            assert stored == pytest.approx(online, rel=1e-4)


def test_batch_statistics_work_with_features(tiny_target, chats, tmp_path):
    """TVD++ reads each window twice, in two micro-batches."""
    folder, losses = feature_set(tiny_target, chats, tmp_path / "features"), []
    for name, more in (("a", {}), ("b", {"features": folder})):
        losses.append(Losses())
        module = draft_module(tiny_target, divergence=TVDpp(normalise="batch"), **more)
        fit(module, text_data(chats, tmp_path), tmp_path / name, losses[-1], steps=4, accumulate_grad_batches=2)
    assert losses[0].values == losses[1].values


def test_other_batch_sizes_differ_only_by_rounding(tiny_target, chats, tmp_path):
    """Features of 5 rows per batch, training on 2 rows per batch: the matrix products sum in another order."""
    folder = feature_set(tiny_target, chats, tmp_path / "features", batch=5, shard_rows=7)
    online = trained(tiny_target, chats, tmp_path / "a")
    stored = trained(tiny_target, chats, tmp_path / "b", features=folder)
    assert stored == pytest.approx(online, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "within"),
    [
        # A state is rounded by up to 2^-9 (float16: 2^-12) of itself, a log-probability of -5 by 0.01, up or down alike;
        # the loss is a mean over tokens, and a tenth of one such rounding was measured.
        ({"dtype": "bfloat16"}, 1e-3),
        ({"dtype": "float16"}, 2e-4),
        ({"dtype": "bfloat16", "top_k": 320}, 1e-3),
        # All tokens but the 64 likeliest of 320 are merged into one, for a target that is nearly uniform: a lower bound.
        ({"dtype": "float32", "top_k": 64}, 0.2),
        ({"dtype": "bfloat16", "top_k": 64}, 0.2),
    ],
)
def test_half_precision_and_top_k_features_are_close(options, within, tiny_target, chats, tmp_path):
    """Losses from features in half precision, or of 64 tokens, are close to those of online training."""
    online = trained(tiny_target, chats, tmp_path / "a", drafter=Medusa)
    folder = feature_set(tiny_target, chats, tmp_path / "features", kind="medusa", **options)
    stored = trained(tiny_target, chats, tmp_path / "b", drafter=Medusa, features=folder)
    apart = max(abs(one - other) / other for one, other in zip(stored, online, strict=True))
    print(f"{options}: losses apart by {apart:.2e} of themselves")
    assert 0 < apart < within
    assert options.get("top_k") != 64 or stored[0] < online[0]


def test_features_training_loads_no_target_layers(tiny_target, chats, tmp_path, monkeypatch):
    """Training from features loads no layer of the target and saves none of its weights."""
    folder = feature_set(tiny_target, chats, tmp_path / "features")
    monkeypatch.setattr(FrozenTarget, "forward", lambda self, *args: pytest.fail("the target is run"))
    module = draft_module(tiny_target, features=folder)
    fit(module, text_data(chats, tmp_path), tmp_path / "run", steps=2)
    assert module.teacher is not None
    names = {name for name, _ in module.teacher.model.named_parameters()}
    assert names == {"model.embed_tokens.weight", "model.norm.weight"}  # the head is tied
    assert all(name.startswith("drafter.") for name in weights(tmp_path / "run"))


def refused(target: Path, chats: Path, root: Path, *parts: str, data: Any = None, **module: Any) -> None:
    with pytest.raises(UserError) as caught:
        fit(draft_module(target, **module), data or text_data(chats, root.parent), root, steps=1)
    line = str(caught.value)
    assert "\n" not in line and all(part in line for part in parts), line


def test_foreign_features_are_refused_by_name(tiny_target, chats, tmp_path):
    """Other data, split, packing, target weights or config, taps or top-k: an error of one line before the first step."""
    folder = feature_set(tiny_target, chats, tmp_path / "features")
    ask = lambda *parts, target=tiny_target, **more: refused(
        target, chats, tmp_path / "run", *parts, **({"features": folder} | more)
    )
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chats.read_text().splitlines(True)[:-1]))
    cache = tmp_path
    ask("other data", "chats.jsonl", data=text_data(other, cache))
    ask("other data", "validation_share 0.1", data=text_data(chats, cache, validation_share=0.2))
    ask("packed to rows of 128", "data.length is 96", data=text_data(chats, cache, length=96))
    ask("another target", "weights", target=make_target(tmp_path / "weights", seed=1))
    config = Path(shutil.copytree(tiny_target, tmp_path / "config"))
    values = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-3}))
    ask("another target", "config", target=config)
    ask("states after layers [4]", "tap 1", "--taps [1, 4]", drafter=discover()["twig"])
    ask("holds hidden states", "teacher_top_k", teacher_top_k=5)
    ask("features.json", "nowhere", features="nowhere")
    for key, value in (("teacher_cache", "kept"), ("target_shard", "fsdp")):
        with pytest.raises(UserError, match=key):
            DraftModule(str(tiny_target), lambda shape: None, features=folder, **{key: value})
    few = feature_set(tiny_target, chats, tmp_path / "few", top_k=4)
    ask("top_k 4", "teacher_top_k", features=few, teacher_top_k=5)
    ask("states after layers []", "tap -1", "--taps [4]", features=few, drafter=Medusa)


def test_missing_validation_features_stop_before_training(tiny_target, chats, tmp_path):
    """Features without the validation set are refused before the first step."""
    folder, alone = feature_set(tiny_target, chats, tmp_path / "features", validation_share=0.0), Losses()
    data = text_data(chats, tmp_path, validation=str(chats), limit_validation=5)
    with pytest.raises(UserError, match="other data than the rows of .* validation"):
        fit(draft_module(tiny_target, features=folder), data, tmp_path / "run", alone, steps=3)
    assert not alone.values


@pytest.mark.parametrize("spoil", ["missing", "torn", "foreign", "unreadable"])
def test_damaged_features_are_named(spoil, tiny_target, chats, tmp_path):
    """A missing, torn or foreign shard is named in the error."""
    folder = Path(feature_set(tiny_target, chats, tmp_path / "features", shard_rows=4))
    shard = folder / "train-00001.safetensors"
    parts = [str(folder)]
    if spoil == "missing":
        shard.unlink()
        parts += ["1 of ", "parts are missing", "run the same trainkit features again"]
    elif spoil == "torn":
        shard.write_bytes(shard.read_bytes()[:-9])
        parts += ["train-00001.safetensors", "not a complete"]
    elif spoil == "foreign":
        other = Path(feature_set(tiny_target, chats, tmp_path / "other", shard_rows=4, dtype="float16"))
        shutil.copyfile(other / shard.name, shard)
        parts += ["train-00001.safetensors", "belongs to another set"]
    else:
        (folder / "features.json").write_text("{")
        parts += ["features.json", "not JSON"]
    with pytest.raises(UserError) as caught:
        fit(draft_module(tiny_target, features=str(folder)), text_data(chats, tmp_path), tmp_path / "run", steps=20)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in parts), caught.value


def test_copied_target_and_renamed_data_are_accepted(tiny_target, chats, tmp_path):
    """A copy of the target and a renamed data file are accepted."""
    folder = feature_set(tiny_target, chats, tmp_path / "features")
    renamed = Path(shutil.copyfile(chats, tmp_path / "renamed.jsonl"))
    copied = Path(shutil.copytree(tiny_target, tmp_path / "copy"))
    module = draft_module(copied, features=folder, divergence=ForwardKL())
    fit(module, text_data(renamed, tmp_path), tmp_path / "run", steps=2)
