"""Compressed models train against their dense original: zeros, masks in checkpoints, resume, processes, LoRA, and exports."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file

from tests.support.compressed_layers import prune
from tests.support.processes import code_of, start, torchrun
from tests.support.runs import arguments, log, weights
from tests.support.training import Losses, StopAt, text_data
from tests.support.training import fit as train
from trainkit.bundle import read as read_bundle
from trainkit.cli import main
from trainkit.commands.compress import compress
from trainkit.commands.export import export
from trainkit.commands.fit import run
from trainkit.compress.masks import unpack_mask
from trainkit.errors import UserError
from trainkit.losses.divergence import TV, CrossEntropy, TVDpp, forward_kl, reverse_kl, tv
from trainkit.models.compressed import dense_tensors, read_scheme
from trainkit.modules.compress import CompressModule, normalised_difference
from trainkit.modules.compression.flow import SRSTE, MaskDecay
from trainkit.modules.compression.masks import FixedMask, GradualMagnitude, HardMask
from trainkit.modules.compression.quantised import QuantAware
from trainkit.modules.language import LanguageModule

# B batch  T positions  N tokens  A blocks  D hidden


def module(folder: Path, teacher: Path, compression=None, **more) -> CompressModule:
    options = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1), "warmup_steps": 2}
    return CompressModule(str(folder), str(teacher), compression or FixedMask(), **(options | more))


def fit(trained, chats: Path, cache: Path, root: Path, *callbacks, **more) -> Trainer:
    data = text_data(chats, cache, length=96, batch_size=more.pop("batch_size", 2))
    return train(trained, data, root, *callbacks, **more)


def saved(root: Path) -> dict:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def pruned(tiny_target, tmp_path_factory) -> Path:
    """The tiny target with 2:4 zeros in its linear layers."""
    return prune(tiny_target, tmp_path_factory.mktemp("pruned") / "target")


class Watch(Callback):
    """Keeps the gradient norm of every step and the live gradients just before clipping."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.live: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        grads = {name: p.grad for name, p in module.lm.named_parameters() if p.grad is not None}
        for name, mask in module.compression.masks.items():
            assert bool((grads[name][~mask] == 0).all())
        self.live.append(float(sum(g.square().sum() for g in grads.values()).sqrt()))

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.norms.append(float(module._gradient_norm))


def test_metrics_worked_example():
    """KL in both directions and total variation of logits [1.5 1.5 0] against the teacher's [2 1 0]."""
    student, teacher, mask = torch.tensor([[[1.5, 1.5, 0]]]), torch.tensor([[[2.0, 1, 0]]]), torch.ones(1, 1, dtype=torch.bool)
    for loss, wanted in ((forward_kl, 0.101566), (reverse_kl, 0.108690), (tv, 0.215425)):
        assert float(loss(student, teacher, mask).sum) == pytest.approx(wanted, abs=2e-6)
    flat = student[0], torch.nn.Identity(), teacher[0], torch.nn.Identity()
    metrics = TV().measuring(coupled=False, kl=True)(*flat).metrics
    assert float(metrics["kl"]) == pytest.approx(0.101566, abs=2e-6)
    assert metrics.keys() == {"alpha", "agreement", "kl"}


def test_recovery_keeps_zeros_and_lowers_the_loss(pruned, tiny_target, chats, tmp_path):
    """Pruned weights stay exactly zero, the others move, the KL to the dense model falls; the norm counts live weights only."""
    losses, watch = Losses(), Watch()
    trainer = fit(module(pruned, tiny_target), chats, tmp_path, tmp_path, losses, watch, steps=25, gradient_clip_val=0.5)
    assert sum(losses.values[-5:]) < 0.7 * sum(losses.values[:5])
    assert watch.norms == pytest.approx(watch.live, rel=1e-5) and max(watch.norms) > 0.5
    checkpoint, before = saved(tmp_path), load_file(pruned / "model.safetensors")
    masks = checkpoint["trainkit_compression"]["masks"]
    assert masks.keys() == {name for name in before if name.endswith("_proj.weight")} and len(masks) == 4 * 7
    for name, value in before.items():
        now = checkpoint["state_dict"][f"lm.{name}"]
        assert not torch.equal(now, value)
        if name in masks:
            assert masks[name]["bits"].dtype == torch.uint8 and masks[name]["bits"].numel() == value.numel() // 8
            assert torch.equal(unpack_mask(masks[name]["bits"], masks[name]["shape"]), value != 0)
            assert torch.equal(now != 0, value != 0)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val/loss"] == pytest.approx(metrics["val/kl"], rel=1e-5) and metrics["val/perplexity"] > 1
    assert metrics["val/tv"] == pytest.approx(1 - metrics["val/alpha"], abs=1e-6)
    assert not [name for name in checkpoint["state_dict"] if "teacher" in name or "mask" in name]


def test_perplexity_is_that_of_the_text(tiny_target, pruned, chats, tmp_path):
    """Without prompts it equals the perplexity that LanguageModule reports for the same weights, whatever the loss."""
    values = []
    for trained in (module(pruned, tiny_target, prompts=False, divergence=TV()), LanguageModule(folder=str(pruned))):
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
        values.append(trainer.validate(trained, text_data(chats, tmp_path, length=96), verbose=False)[0])
    assert values[0]["val/perplexity"] == pytest.approx(values[1]["val/perplexity"], rel=1e-5)
    assert values[0]["val/loss"] == pytest.approx(values[0]["val/tv"], rel=1e-5) and values[0]["val/kl"] > 0


def test_dense_student_of_itself_has_no_loss(tiny_target, chats, tmp_path):
    """Uncompressed and equal to its teacher, a student has KL 0 and a gradient of 0, hidden term included."""
    losses = Losses()
    dense = module(tiny_target, tiny_target, HardMask("2:4", dense=1.0), hidden_weight=1.0)
    fit(dense, chats, tmp_path, tmp_path, losses, steps=1)
    assert losses.values == [pytest.approx(0, abs=1e-6)]


def test_hidden_term_by_hand():
    """States are compared after division by their root mean square."""
    student, teacher = (
        torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]], requires_grad=True),
        torch.tensor([[[6.0, 8.0]], [[1.0, -1.0]]]),
    )
    value = normalised_difference(student, teacher.requires_grad_())
    assert float(value.detach()) == pytest.approx((0 + 0) / 2 + (0 + 4) / 2)
    value.backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_hidden_states_are_those_of_the_blocks(tiny_target, pruned, chats, tmp_path):
    """The student's and the teacher's block outputs equal those of transformers, for a student with fewer blocks too."""
    from transformers import AutoModelForCausalLM

    trained = module(pruned, tiny_target, hidden_weight=0.5)
    trainer = fit(trained, chats, tmp_path, tmp_path, steps=1)
    batch = next(iter(trainer.val_dataloaders))
    plain = AutoModelForCausalLM.from_pretrained(tiny_target)
    inputs = {"input_ids": batch["tokens_BT"], "position_ids": batch["positions_BT"], "use_cache": False}
    with torch.no_grad():
        wanted = plain(**inputs, output_hidden_states=True).hidden_states
        found = trained._teacher_states(batch)
        ours = trained._states(batch)
        last = trained.lm.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(found, torch.stack(wanted[1:], 2))
    assert ours.shape == found.shape and torch.equal(ours[:, :, -1], last)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("fixed", FixedMask),
        ("gradual", lambda: GradualMagnitude(0.5, every=2)),
        ("decay", lambda: MaskDecay("2:4", dense=0.2, hard=0.3)),
        ("learned", lambda: QuantAware(4, 16, "learned")),
    ],
)
def test_resumed_run_equals_uninterrupted_bit_for_bit(name, make, pruned, tiny_target, chats, tmp_path):
    """Stopped in the middle, with accumulation: equal losses, weights, masks and optimiser states."""
    folder = pruned if name == "fixed" else tiny_target
    straight, first, second = Losses(), Losses(), Losses()
    options = {"steps": 9, "accumulate_grad_batches": 2}
    fit(module(folder, tiny_target, make()), chats, tmp_path, tmp_path / "a", straight, **options)
    fit(module(folder, tiny_target, make()), chats, tmp_path, tmp_path / "b", first, StopAt(5), **options)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    fit(module(folder, tiny_target, make()), chats, tmp_path, tmp_path / "b", second, ckpt_path=last, **options)
    assert len(first.values) == 10 and first.values + second.values == straight.values
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b")
    for part in ("state_dict", "trainkit_compression", "optimizer_states"):
        assert _equal(one[part], other[part]), part


def _equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (dict, list)):
        items = lambda value: value.items() if isinstance(value, dict) else enumerate(value)
        return len(one) == len(other) and all(_equal(value, other[key]) for key, value in items(one))
    return one == other


@pytest.mark.parametrize("make", [lambda: SRSTE("2:4", decay=0.05, dense=0), lambda: QuantAware(4, 16)])
def test_accumulation_equals_one_large_batch(make, tiny_target, chats, tmp_path):
    """Masks, scales and the pull of SR-STE count once per optimiser step: 4 micro-batches of 1 row equal 1 of 4."""
    for name, batch, accumulate in (("large", 4, 1), ("small", 1, 4)):
        trained = module(tiny_target, tiny_target, make(), optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
        fit(trained, chats, tmp_path, tmp_path / name, batch_size=batch, steps=3, accumulate_grad_batches=accumulate)
    large, small = saved(tmp_path / "large")["state_dict"], saved(tmp_path / "small")["state_dict"]
    start = load_file(tiny_target / "model.safetensors")
    moved = max((large[f"lm.{name}"] - value).abs().max().item() for name, value in start.items())
    # A weight at a tie of its group, or between two codes, may round the other way, so count instead of taking the maximum.
    apart = sum(int(((large[name] - small[name]).abs() > 1e-4).sum()) for name in large)
    assert moved > 1e-2 and apart <= 1e-3 * sum(value.numel() for value in large.values())


def test_lora_under_a_mask_merges_sparse(pruned, tiny_target, chats, tmp_path):
    """Only the additions train; the layer computes with (W + BA) M, so that the merged weight is as sparse as the mask."""
    trained = module(pruned, tiny_target, lora_rank=4, lora_alpha=8.0, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    losses = Losses()
    fit(trained, chats, tmp_path, tmp_path, losses, steps=25)
    assert sum(losses.values[-5:]) < 0.9 * sum(losses.values[:5])
    state, before = saved(tmp_path)["state_dict"], load_file(pruned / "model.safetensors")
    for name, value in before.items():
        assert torch.equal(state[f"lm.{name}"], value)
    x = torch.randn(3, 64)
    for name, linear in trained.linears.items():
        merged = linear.weight + 2.0 * linear.lora_B @ linear.lora_A
        assert not torch.equal(merged != 0, before[name] != 0)
        if linear.in_features == 64:
            torch.testing.assert_close(linear(x), x @ torch.where(before[name] != 0, merged, 0).T)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher": "nowhere"}, "model.teacher: nowhere: no config.json"),
        ({"targets": ["query"]}, "no linear layer 'query'"),
        ({"hidden_weight": -1.0}, "hidden_weight -1.0"),
        ({"divergence": TVDpp(normalise="batch")}, "normalise: position"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "model.lora_alpha is 0.0; it must be above 0"),
        ({"hidden_weight": float("nan")}, "hidden_weight nan"),
        ({"targets": []}, "model.targets is empty"),
        ({"compression": GradualMagnitude(0.5, end=100)}, "is reached at step 100, after the last step 6; lower begin or end"),
        ({"compression": GradualMagnitude(0.5, begin=6)}, "is reached at step 7, after the last step 6"),
        ({"compression": FixedMask()}, "none of its weights is zero"),
    ],
)
def test_invalid_options_give_one_line(more, message, tiny_target, chats, tmp_path):
    """An invalid option gives a one-line error that names it."""
    options = {"folder": tiny_target, "teacher": tiny_target, "compression": HardMask("2:4")} | more
    with pytest.raises(UserError) as caught:
        fit(module(**options), chats, tmp_path, tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoint_with_wrong_weights_is_refused(pruned, tiny_target, chats, tmp_path):
    """Masks that do not fit the weights, and another compression than the checkpoint's, are refused."""
    fit(module(pruned, tiny_target), chats, tmp_path, tmp_path, steps=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="compression.method is FixedMask in the checkpoint, HardMask in this run"):
        fit(module(pruned, tiny_target, HardMask("2:4")), chats, tmp_path, tmp_path, ckpt_path=last)
    checkpoint = saved(tmp_path)
    checkpoint["state_dict"]["lm.model.layers.1.mlp.up_proj.weight"] += 1.0
    torch.save(checkpoint, last)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not zero where its mask prunes"):
        fit(module(pruned, tiny_target), chats, tmp_path, tmp_path, ckpt_path=last)


def test_every_loss_trains(pruned, tiny_target, chats, tmp_path):
    """Cross entropy reads the text, the others the teacher; all log the same metrics."""
    for loss in (CrossEntropy(), TVDpp()):
        losses = Losses()
        trainer = fit(
            module(pruned, tiny_target, divergence=loss), chats, tmp_path, tmp_path / type(loss).__name__, losses, steps=8
        )
        names = {name.removeprefix("val/") for name in trainer.callback_metrics if name.startswith("val/")}
        assert names == {"loss", "alpha", "tv", "agreement", "kl", "perplexity"}
        assert sum(losses.values[-3:]) < sum(losses.values[:3])


@pytest.mark.slow
def test_two_processes_train_as_one(pruned, tiny_target, chats, tmp_path):
    """Equal losses, sparsities and weights up to float32 rounding, and equal masks, through all phases of a mask."""
    more = {
        "model": "CompressModule",
        "model.target": None,
        "model.drafter": None,
        "model.folder": tiny_target,
        "model.teacher": tiny_target,
        "model.compression": "GradualMagnitude",
        "model.compression.sparsity": 0.5,
        "model.compression.every": 2,
        "model.divergence": "ForwardKL",
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.05,
        "checkpoint.monitor": "val/loss",
        "trainer.max_steps": 8,
        "trainer.log_every_n_steps": 1,
        "trainer.val_check_interval": 16,
        **dict.fromkeys([f"model.divergence.{name}" for name in ("estimator", "samples", "normalise")]),
    }
    args = arguments("draft", tiny_target, chats, tmp_path / "one", **more, **{"data.batch_size": 4})
    assert code_of(start(run, "fit", args)) == 0
    args = arguments("draft", tiny_target, chats, tmp_path / "two", **more, **{"data.batch_size": 2})
    assert torchrun(args, tmp_path / "output").wait(300) == 0, (tmp_path / "output").read_text()[-2000:]
    for row, other in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for name in ("train/loss", "train/kl", "val/loss", "compress/sparsity"):
            assert bool(row[name]) == bool(other[name])
            assert not row[name] or float(row[name]) == pytest.approx(float(other[name]), rel=1e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    apart = sum(int(((one[name] == 0) != (two[name] == 0)).sum()) for name in one)
    assert apart <= 4, "at most near-ties"


@pytest.fixture(scope="module")
def recovered(pruned, tiny_target, chats, tmp_path_factory) -> Path:
    """The checkpoint of a short recovery of the pruned target."""
    root = tmp_path_factory.mktemp("recovered")
    fit(module(pruned, tiny_target), chats, root, root, steps=3)
    return root / "checkpoints" / "last.ckpt"


def test_export_of_pruned_model_has_its_zeros(recovered, pruned, tmp_path):
    """The folder loads in plain transformers with the weights of the run, pruned ones zero, and its card has the sparsity."""
    bundle = export(str(recovered), str(tmp_path / "out"), dtype="bfloat16") and read_bundle(tmp_path / "out")
    written, state = load_file(tmp_path / "out" / "model.safetensors"), torch.load(recovered, weights_only=True)["state_dict"]
    assert written.keys() == load_file(pruned / "model.safetensors").keys()
    assert all(torch.equal(value, state[f"lm.{name}"].bfloat16()) for name, value in written.items())
    found = bundle.extra["compression"]
    assert found["method"] == "training (FixedMask)" and found["sparsity"]["matrices"] == 0.5
    assert bundle.metrics["val/kl"] > 0
    assert "Zeros in compressed matrices | 50.00%" in (tmp_path / "out" / "README.md").read_text()


def test_recovery_of_a_quantised_folder_exports_dense(tiny_target, chats, tmp_path):
    """Its int8 weights were unpacked to train; the result has the zeros, float weights and no quantization_config."""
    compress(str(tiny_target), str(tmp_path / "int8"), method="magnitude", sparsity="2:4", bits=8, device="cpu")
    fit(module(tmp_path / "int8", tiny_target), chats, tmp_path, tmp_path, steps=2)
    export(str(tmp_path / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_bundle(tmp_path / "out").extra["compression"]["sparsity"]["matrices"] >= 0.5


def test_export_of_wrong_weights_is_refused(recovered, tmp_path, capsys):
    """Zeros are asserted against the masks; nothing is written if one is missing."""
    checkpoint = torch.load(recovered, weights_only=True)
    checkpoint["state_dict"]["lm.model.layers.2.self_attn.o_proj.weight"] += 1.0
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert main(["export", str(tmp_path / "last.ckpt"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "model.layers.2.self_attn.o_proj.weight is not zero where its mask prunes" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scales", ["minmax", "learned"])
@pytest.mark.parametrize("rank", [0, 4])
def test_exported_codes_equal_those_of_training(scales, rank, tiny_target, chats, tmp_path):
    """Loaded by transformers in float32, every quantised weight is bit for bit the one of the training forward pass."""
    trained = module(tiny_target, tiny_target, QuantAware(4, 16, scales), targets=["q_proj", "down_proj"], lora_rank=rank)
    fit(trained, chats, tmp_path, tmp_path, steps=4)
    export(str(tmp_path / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))
    scheme = read_scheme(json.loads((tmp_path / "out" / "config.json").read_text()))
    assert scheme is not None and scheme.of("model.layers.0.mlp.up_proj") is None
    loaded = dict(dense_tensors(tmp_path / "out", torch.float32))
    for name, linear in trained.linears.items():
        assert torch.equal(loaded[name], linear.transform(linear.merged()))
        assert not torch.equal(loaded[name], linear.merged())
    state = saved(tmp_path)["state_dict"]
    assert torch.equal(loaded["model.layers.0.mlp.up_proj.weight"], state["lm.model.layers.0.mlp.up_proj.weight"].bfloat16())


def test_export_merges_lora_under_the_mask(pruned, tiny_target, chats, tmp_path):
    """The exported weight is (W + BA) M, bit for bit what the layers computed with."""
    trained = module(pruned, tiny_target, lora_rank=4, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(trained, chats, tmp_path, tmp_path, steps=4)
    export(str(tmp_path / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, linear in trained.linears.items():
        assert torch.equal(written[name], linear.transform(linear.merged()))
        assert torch.equal(written[name] != 0, linear.weight != 0)


def test_export_of_unfinished_runs_is_refused(tiny_target, chats, tmp_path):
    """While pruned weights still count, or before anything is pruned; and a dtype in which the codes would differ."""
    for name, compression, part in (
        ("decay", MaskDecay("2:4", "linear", dense=0.0, hard=0.0, rate=0.05), "pruned weights still contribute"),
        ("dense", HardMask("2:4", dense=1.0), "no weight is pruned yet"),
        ("codes", QuantAware(8), "--dtype float16: the scales were trained in bfloat16"),
    ):
        stop = [StopAt(1)] if name == "dense" else []
        fit(module(tiny_target, tiny_target, compression), chats, tmp_path, tmp_path / name, *stop, steps=3)
        with pytest.raises(UserError, match=part):
            export(str(tmp_path / name / "checkpoints" / "last.ckpt"), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()
