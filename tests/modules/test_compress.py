"""Compressed models train against their dense original: zeros, masks in checkpoints, resume, processes, LoRA, and exports."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file

from tests.support.processes import code_of, start, torchrun
from tests.support.runs import arguments, log, weights
from tests.support.training import Losses, StopAt, text_data
from tests.support.training import fit as train
from trainkit.compress.masks import Pattern, mask_from_scores, unpack_mask
from trainkit.commands.fit import run
from trainkit.errors import UserError
from trainkit.losses.divergence import TV, CrossEntropy, ForwardKL, TVDpp, forward_kl, reverse_kl, tv
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


def is_pruned(name: str) -> bool:
    return name.endswith("_proj.weight")


@pytest.fixture(scope="module")
def pruned(tiny_target, tmp_path_factory) -> Path:
    """The tiny target with 2:4 zeros in its linear layers."""
    folder = tmp_path_factory.mktemp("pruned")
    for path in tiny_target.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tiny_target / "model.safetensors")
    for name, value in tensors.items():
        if is_pruned(name):
            tensors[name] = value * mask_from_scores(value.abs(), Pattern(0.5, 2, 4))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


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

    def on_train_batch_start(self, trainer, module, *args) -> None:
        self.modules = module

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        if module._gradient_norm is not None:
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
    assert masks.keys() == {name for name in before if is_pruned(name)} and len(masks) == 4 * 7
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
    assert float(value) == pytest.approx((0 + 0) / 2 + (0 + 4) / 2)
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
    """Masks, scales and the pull of SR-STE count once per optimiser step: 4 micro-batches of 1 row equal 1 of 4, to rounding."""
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
    for loss in (CrossEntropy(), ForwardKL(temperature=2.0), TVDpp()):
        losses = Losses()
        trainer = fit(
            module(pruned, tiny_target, divergence=loss), chats, tmp_path, tmp_path / type(loss).__name__, losses, steps=12
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
