"""Medusa-2: drafter and target trained together, the target through LoRA; both are exported and decode losslessly."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.drafters import VARIANTS
from tests.support.processes import code_of, start, torchrun
from tests.support.runs import arguments, log, weights
from tests.support.targets import make_target
from tests.support.training import fit as train
from tests.support.training import text_data
from trainkit import bundle
from trainkit.cli import main
from trainkit.commands.export import export
from trainkit.commands.fit import run
from trainkit.drafters.base import DraftBatch, load_kind
from trainkit.drafters.hydra import Hydra
from trainkit.drafters.lm import LMDraft
from trainkit.drafters.medusa import Medusa
from trainkit.errors import UserError
from trainkit.losses.divergence import CrossEntropy, ForwardKL, TVDpp
from trainkit.models.adapter import PROJECTIONS, AdapterShape, TunedTarget, merge_adapter
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.modules.checkpoint import read_checkpoint
from trainkit.modules.draft import DraftModule
from trainkit.modules.joint import JointModule
from trainkit.modules.text_data import TextData
from trainkit.runner import Runner

# B batch  T positions  D hidden  V vocabulary


class Watch(Callback):
    """Records the loss of each micro-batch and stops at a step."""

    def __init__(self, stop: int = -1) -> None:
        self.losses: list[float] = []
        self.stop = stop

    def on_train_batch_end(self, trainer, module, outputs, *args) -> None:
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop |= trainer.global_step == self.stop


def joint_module(target: Path, **more) -> JointModule:
    options = {
        "drafter": lambda shape: Medusa(shape, num_heads=2, decay=0.8),
        "divergence": CrossEntropy(),
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "heads_steps": 3,
        "draft_warmup": 2,
        "warmup_steps": 2,
        "optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3),
    }
    return JointModule(str(target), **(options | more))


def fit(module, chats: Path, cache: Path, root: Path, *callbacks, **more) -> Trainer:
    """Trains on rows of 96 tokens; the rest as in `tests.support.training.fit`."""
    data = text_data(chats, cache, length=96, batch_size=more.pop("batch_size", 2))
    return train(module, data, root, *callbacks, **more)


def saved(root: Path) -> dict:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)


def tuned_target(folder: Path, **options) -> TunedTarget:
    """A target whose adapter has an effect: its matrix B is random instead of zero."""
    target = TunedTarget(folder, AdapterShape(4, 8.0), **options)
    for part in target.adapter.children():
        torch.nn.init.normal_(part["B"].weight, std=0.05)
    return target


def batch_of(target: FrozenTarget) -> dict[str, torch.Tensor]:
    """Two packed documents with padding; the first tokens of each do not count."""
    document = torch.tensor([[0] * 10 + [1] * 12 + [-1] * 2, [0] * 24])
    positions = torch.stack([torch.cat([torch.arange(10), torch.arange(12), torch.arange(2)]), torch.arange(24)])
    mask = (positions > 2) & (document >= 0)
    return {"tokens_BT": torch.randint(320, (2, 24)), "positions_BT": positions, "document_BT": document, "mask_BT": mask}


def seen_by(target: FrozenTarget, batch: dict[str, torch.Tensor], taps=(-1,)) -> DraftBatch:
    names = ("tokens_BT", "positions_BT", "document_BT")
    hidden, tapped = target.forward(*(batch[name] for name in names), taps)
    return DraftBatch(*(batch[name] for name in names), batch["mask_BT"], tapped, hidden, target.handle())


def test_target_without_adapter_is_bit_exact(tiny_target, seed):
    """With its adapter off the target gives the same bits as before."""
    frozen, tuned = FrozenTarget(tiny_target), tuned_target(tiny_target)
    batch = batch_of(frozen)
    before = seen_by(frozen, batch, (1, -1))
    with tuned.off(), torch.no_grad():
        off = seen_by(tuned, batch, (1, -1))
    on = seen_by(tuned, batch, (1, -1))
    assert torch.equal(off.hidden_BTD, before.hidden_BTD) and torch.equal(off.taps_BTAD, before.taps_BTAD)
    assert (on.hidden_BTD - before.hidden_BTD).abs().max() > 1e-3
    theirs = {name.replace(".base_layer", ""): value for name, value in tuned.model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(value, theirs[name]) for name, value in frozen.model.named_parameters())
    trained = {name for name, value in tuned.model.named_parameters() if value.requires_grad}
    assert len(trained) == 4 * len(PROJECTIONS) * 2 == len(list(tuned.adapter.parameters()))
    assert {value.data_ptr() for value in tuned.adapter.parameters()} == {
        value.data_ptr() for name, value in tuned.model.named_parameters() if name in trained
    }


@pytest.mark.parametrize("divergence", [CrossEntropy(chunk=7), ForwardKL(chunk=7)], ids=["labels", "soft"])
@pytest.mark.parametrize("base_loss", ["cross_entropy", "self_distillation"])
def test_both_loss_terms_equal_their_formula(base_loss, divergence, tiny_target, seed):
    """Compares value and gradient of each term, for every matrix of the adapter, with whole logits and autograd.

    In `soft` the teacher of the heads is the target as it is, adapter on, and no gradient goes into it.
    """
    module = joint_module(tiny_target, base_loss=base_loss)
    module.teacher, module.drafter = tuned_target(tiny_target), None
    drafter = Medusa(module.teacher.shape(), num_heads=2, decay=0.8)
    drafter.initialise(FrozenTarget(tiny_target))
    for block in drafter.blocks:
        torch.nn.init.normal_(block[0].linear.weight, std=0.1)
    batch = batch_of(module.teacher)
    seen, weights = seen_by(module.teacher, batch), list(module.teacher.adapter.parameters())
    computed = [module.target_loss(seen, batch).sum, drafter(seen, divergence).sum]

    again, head = seen_by(module.teacher, batch), module.teacher.handle().head
    log_on = head(again.hidden_BTD).log_softmax(-1)
    with module.teacher.off(), torch.no_grad():
        log_off = head(seen_by(module.teacher, batch).hidden_BTD).log_softmax(-1)
    if base_loss == "cross_entropy":
        base = F.nll_loss(log_on[:, :-1].flatten(0, 1), batch["tokens_BT"][:, 1:].flatten(), reduction="none").view(2, 23)
    else:
        base = (log_off.exp() * (log_off - log_on)).sum(-1)[:, :-1]
    wanted = [(base * again.label_mask(1)[:, :-1]).sum(), torch.zeros(())]
    for index, block in enumerate(drafter.blocks):
        log_q = drafter.lm_heads[index](block(again.hidden_BTD)).log_softmax(-1)
        ahead = index + 2
        tokens = batch["tokens_BT"].roll(-ahead, 1)
        log_p = log_on.detach().roll(1 - ahead, 1)
        soft = (log_p.exp() * (log_p - log_q)).sum(-1)
        each = soft if isinstance(divergence, ForwardKL) else -log_q.gather(-1, tokens[..., None])[..., 0]
        wanted[1] = wanted[1] + 0.8**index * (each * again.label_mask(ahead)).sum()
    for ours, theirs in zip(computed, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
        mine, other = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (ours, theirs))
        assert all(value.abs().max() > 1e-4 for value in mine), "every matrix of the adapter has a gradient"
        for value, reference in zip(mine, other, strict=True):  # float32, summed in chunks
            torch.testing.assert_close(value, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))


def test_draft_weight_schedule_by_hand(tiny_target):
    """The weight of the drafter's loss follows its schedule."""
    module = joint_module(tiny_target, heads_steps=3, draft_warmup=3, draft_weight=0.2)
    assert [round(module.weight(step), 6) for step in range(8)] == [0.2, 0.2, 0.2, 0.05, 0.1, 0.15, 0.2, 0.2]


def test_heads_stage_leaves_the_adapter_untouched(tiny_target, chats, tmp_path):
    """With weight decay, which would shrink matrices whose gradient is zero instead of None."""
    watch, options = Watch(), {"optimizer": lambda p: torch.optim.AdamW(p, lr=2e-2, weight_decay=0.1)}
    fit(joint_module(tiny_target, **options), chats, tmp_path, tmp_path / "a", steps=3)
    fit(joint_module(tiny_target, **options), chats, tmp_path, tmp_path / "b", watch, steps=40)
    alone, both = saved(tmp_path / "a"), saved(tmp_path / "b")
    adapter = [name for name in alone["state_dict"] if name.startswith("adapter.")]
    assert len(adapter) == 4 * 7 * 2 and set(alone["state_dict"]) == {*adapter, *(n for n in both["state_dict"] if n[0] == "d")}
    assert all(name.startswith(("adapter.", "drafter.")) for name in both["state_dict"]), "no weight of the target is saved"
    for name in adapter:
        assert bool((alone["state_dict"][name] == 0).all()) == name.endswith("B.weight")
        assert not torch.equal(alone["state_dict"][name], both["state_dict"][name])
    states = alone["optimizer_states"][0]
    groups = [group["params"] for group in states["param_groups"]]
    assert [len(group) for group in groups] == [4, 2, 56] and set(states["state"]) == {0, 1, 2, 3, 4, 5}, (
        "the adapter has no moments"
    )
    rates = [group["initial_lr"] for group in states["param_groups"]]
    assert rates == [2e-2, 2e-2, pytest.approx(2e-2 / 4)]
    assert sum(watch.losses[-5:]) < 0.85 * sum(watch.losses[4:9]), (
        watch.losses
    )  # from the step where both terms have their full weight


def test_heads_stage_keeps_the_initial_adapter_bits(tiny_target, chats, tmp_path):
    """The adapter's weights are equal bit for bit before the first step and after the steps that train the heads alone."""

    class Start(Callback):
        def on_train_start(self, trainer, module) -> None:
            self.before = {name: value.clone() for name, value in module.adapter.state_dict().items()}

    start, module = Start(), joint_module(tiny_target, heads_steps=9)
    fit(module, chats, tmp_path, tmp_path / "run", start, steps=4)
    assert module.adapter is not None
    assert all(torch.equal(value, start.before[name]) for name, value in module.adapter.state_dict().items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_self_distillation_starts_at_zero(accumulate, tiny_target, chats, tmp_path):
    """At the first joint step the target equals its teacher: with weight 0 for the drafter the whole loss is 0."""
    watch = Watch()
    module = joint_module(tiny_target, base_loss="self_distillation", heads_steps=0, draft_weight=0.0)
    fit(module, chats, tmp_path, tmp_path, watch, steps=2, accumulate_grad_batches=accumulate)
    assert watch.losses[:accumulate] == [pytest.approx(0.0, abs=1e-6)] * accumulate


def test_self_distillation_limits_the_targets_change(tiny_target, chats, tmp_path):
    """With the drafter's loss, the target changes, but less than with cross entropy on the text."""
    moved = {}
    for base in ("self_distillation", "cross_entropy"):
        module = joint_module(tiny_target, base_loss=base, heads_steps=0)
        trainer = fit(module, chats, tmp_path, tmp_path / base, steps=20)
        batch = next(iter(trainer.val_dataloaders))
        assert module.teacher is not None
        with torch.no_grad():
            on = seen_by(module.teacher, batch)
            with module.teacher.off():
                off = seen_by(module.teacher, batch)
        counted, head = on.label_mask(1), on.handle.head
        kl = ForwardKL()(on.hidden_BTD[counted], head, off.hidden_BTD[counted], head)
        moved[base] = float(kl.mean)
    assert 1e-6 < moved["self_distillation"] < 0.5 * moved["cross_entropy"], moved


@pytest.mark.parametrize(("stop", "divergence"), [(2, CrossEntropy()), (5, TVDpp(normalise="batch"))], ids=["heads", "both"])
def test_resumed_run_equals_uninterrupted_bit_for_bit(stop, divergence, tiny_target, chats, tmp_path):
    """Stopped during the steps that train the heads alone, and after them."""
    straight, first, second = Watch(), Watch(stop), Watch()
    fit(joint_module(tiny_target, divergence=divergence), chats, tmp_path, tmp_path / "a", straight, steps=9)
    fit(joint_module(tiny_target, divergence=divergence), chats, tmp_path, tmp_path / "b", first, steps=9)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    module = joint_module(tiny_target, divergence=divergence)
    fit(module, chats, tmp_path, tmp_path / "b", second, steps=9, ckpt_path=last)
    assert len(first.losses) == stop and first.losses + second.losses == straight.losses
    one, other = saved(tmp_path / "a")["state_dict"], saved(tmp_path / "b")["state_dict"]
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_accumulation_equals_one_large_batch(tiny_target, chats, tmp_path):
    """Both terms are divided by the labels of the whole step: 4 micro-batches of 1 row equal 1 of 4, to rounding."""
    for name, batch, accumulate in (("large", 4, 1), ("small", 1, 4)):
        module = joint_module(tiny_target, heads_steps=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
        fit(module, chats, tmp_path, tmp_path / name, batch_size=batch, steps=3, accumulate_grad_batches=accumulate)
    large, small = saved(tmp_path / "large")["state_dict"], saved(tmp_path / "small")["state_dict"]
    tuned = {name: value for name, value in large.items() if name.endswith("B.weight")}
    assert max(value.abs().max().item() for value in tuned.values()) > 1e-3
    assert max((large[name] - small[name]).abs().max().item() for name in large) < 2e-5


@pytest.fixture(scope="module")
def trained(tiny_target, chats, tmp_path_factory) -> Path:
    """A checkpoint whose target changed so much that it decodes other text than before."""
    root = tmp_path_factory.mktemp("trained")
    module = joint_module(tiny_target, heads_steps=5, lora_lr=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, chats, root, root, steps=40)
    return root / "checkpoints" / "last.ckpt"


PROMPTS = ["Natalia sold clips", "How many", "In May she sold 48 / 2 = 24 clips. Altogether"]


def test_merged_target_equals_tuned_and_decodes(trained, tiny_target, tmp_path, capsys):
    """The merged target has the tuned one's logits, and the drafter decodes with it and with no other."""
    out, target = tmp_path / "heads", tmp_path / "heads-target"
    assert main(["export", str(trained), str(out), "--format", "vllm"]) == 0
    assert str(target) in capsys.readouterr().out
    adapter = read_checkpoint(trained).adapter()
    assert adapter is not None
    shape, weights = adapter
    tuned = TunedTarget(tiny_target, shape)
    tuned.adapter.load_state_dict(weights)
    model, tokens = AutoModelForCausalLM.from_pretrained(target), torch.randint(320, (2, 40))
    with torch.no_grad():
        on, plain = tuned.model(tokens).logits, model(tokens).logits
        with tuned.off():
            off = tuned.model(tokens).logits
    torch.testing.assert_close(plain, on, rtol=0, atol=1e-4 * float(on.abs().max()))  # float32 sums in another order
    assert (on - off).abs().max() > 0.1 * off.abs().max(), "otherwise the comparison above proves nothing"
    stored = {name: tuple(value.shape) for name, value in load_file(target / "model.safetensors").items()}
    assert stored == {name: tuple(value.shape) for name, value in load_file(tiny_target / "model.safetensors").items()}

    options = {"max_new_tokens": 40, "ignore_end": True}
    merged_text = [o.tokens for o in Runner.load(target, max_len=128).generate(PROMPTS, **options)]
    before = [o.tokens for o in Runner.load(tiny_target, max_len=128).generate(PROMPTS, **options)]
    drafted = Runner.load(target, out, max_len=128).generate(PROMPTS, depth=2, **options)
    assert [o.tokens for o in drafted] == merged_text != before
    assert main(["inspect", str(out), "--target", str(target)]) == 0
    with pytest.raises(UserError, match=r"not the target that the drafter was tuned together with \(heads-target\)"):
        Runner.load(tiny_target, out, max_len=128)
    assert main(["inspect", str(out), "--target", str(tiny_target)]) == 2
    assert bundle.read(out).target["fingerprint"] == bundle.fingerprint(target)
    assert bundle.read(target).kind == "model"


def test_merged_target_keeps_end_ids_and_has_dtype(trained, tiny_target, tmp_path, chats):
    """The target's end ids, of which the tokenizer has only one, and its defaults for sampling are kept."""
    source = make_target(tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        values = json.loads((source / name).read_text())
        sampling = {"temperature": 0.6, "do_sample": True} if name.startswith("generation") else {}
        (source / name).write_text(json.dumps(values | sampling | {"eos_token_id": [0, 7]}))
    fit(joint_module(source), chats, tmp_path, tmp_path / "run", steps=5)
    export(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), str(tmp_path / "out") + "/", dtype="bfloat16")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out-target" / name).read_text())["eos_token_id"] == [0, 7]
    assert json.loads((tmp_path / "out-target" / "generation_config.json").read_text())["temperature"] == 0.6
    for folder in ("out", "out-target"):
        assert {value.dtype for value in load_file(tmp_path / folder / "model.safetensors").values()} == {torch.bfloat16}
    prompts = ["How many"]
    plain = Runner.load(tmp_path / "out-target", max_len=64).generate(prompts, max_new_tokens=20)
    drafted = Runner.load(tmp_path / "out-target", tmp_path / "out", max_len=64).generate(prompts, max_new_tokens=20)
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]


def test_adapter_is_not_merged_into_another_target(trained, tiny_target, tmp_path):
    """A target with equal sizes and tokenizer but other weights."""
    other = make_target(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="its weights are not those that were tuned"):
        export(str(trained), str(tmp_path / "out"), target=str(other))
    with pytest.raises(UserError, match="does not hold the tuned target; give its folder with --target"):
        export(str(trained), str(tmp_path / "out"), target=str(tmp_path / "none"))
    with pytest.raises(UserError, match="a drafter of kind 'medusa' has no such format"):
        export(str(trained), str(tmp_path / "out"), format="sglang")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-target").exists()


def test_merge_that_changes_logits_is_refused(trained, tiny_target, monkeypatch):
    """A merge whose logits differ from the tuned target's is refused."""

    from peft.tuners.lora import Linear

    adapter = read_checkpoint(trained).adapter()
    assert adapter is not None
    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 1.01 * delta(self, name))
    with pytest.raises(UserError, match="merging the adapter changed its logits"):
        merge_adapter(tiny_target, *adapter, "digest")


def test_every_kind_with_taps_trains_jointly(tiny_target, chats, tmp_path):
    """The module names no kind: each kind that reads taps trains, and passes gradients to the target."""
    kinds = {name: partial(load_kind(kind), **options) for name, (kind, options) in VARIANTS.items()}
    kinds = {name: make for name, make in kinds.items() if make(target_shape(tiny_target)).taps}
    assert {"medusa", "hydra", "hydra++", "twig"} <= set(kinds)
    for name, make in kinds.items():
        module = joint_module(tiny_target, drafter=make, heads_steps=0, draft_weight=1.0, divergence=None)
        trainer = fit(module, chats, tmp_path, tmp_path / name, steps=2)
        batch = next(iter(trainer.val_dataloaders))
        assert module.teacher is not None and module.drafter is not None
        drafted = module.drafter(seen_by(module.teacher, batch, module.drafter.taps), ForwardKL())
        gradients = torch.autograd.grad(drafted.sum, list(module.teacher.adapter.parameters()), allow_unused=True)
        assert any(value is not None and value.abs().max() > 0 for value in gradients), name


def test_each_loss_is_averaged_over_its_own_tokens(tiny_target, chats, tmp_path):
    """Validation before the first step, with heads that equal the target's head, so all losses are known."""
    module = joint_module(tiny_target, draft_weight=0.5)
    data = TextData(str(chats), cache=str(tmp_path), length=96, batch_size=2, validation_share=0.1)
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    (values,) = trainer.validate(module, datamodule=data, verbose=False)
    frozen, total, labels, heads, labels_of_heads = FrozenTarget(tiny_target), 0.0, 0, 0.0, 0
    for batch in data.val_dataloader():
        seen = seen_by(frozen, batch)
        log_p = seen.handle.head(seen.hidden_BTD).log_softmax(-1)
        for ahead in (1, 2, 3):
            counted = seen.label_mask(ahead)
            loss = -log_p.gather(-1, seen.tokens_BT.roll(-ahead, 1)[..., None])[..., 0][counted]
            if ahead == 1:
                total, labels = total + float(loss.sum()), labels + int(counted.sum())
            else:
                heads += 0.8 ** (ahead - 2) * float(loss.sum())
                labels_of_heads += int(counted.sum())
    assert values["val/loss_head0"] == pytest.approx(total / labels, rel=1e-4)
    assert values["val/loss_draft"] == pytest.approx(heads / labels_of_heads, rel=1e-4)
    assert values["val/loss"] == pytest.approx((total + 0.5 * heads) / labels_of_heads, rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"drafter": lambda shape: LMDraft(shape)}, "kind 'lm' reads no hidden states of its target"),
        ({"teacher_cache": "x"}, "teacher_cache"),
        ({"teacher_top_k": 4}, "teacher_top_k"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"lora_modules": ["qq_proj"]}, "lora_modules"),
        ({"lora_modules": ["embed_tokens"]}, "outside of the decoder layers"),
        ({"target_shard": "fsdp"}, "target_shard"),
        ({"lora_lr": -1.0}, "lora_lr"),
    ],
)
def test_invalid_options_give_one_line(more, message, tiny_target, chats, tmp_path):
    """An invalid option gives a one-line error that names it."""
    with pytest.raises(UserError, match=message) as caught:
        fit(joint_module(tiny_target, **more), chats, tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


def test_checkpoint_of_another_module_is_refused(trained, tiny_target, chats, tmp_path):
    """A checkpoint of JointModule is refused by DraftModule."""
    plain = DraftModule(str(tiny_target), drafter=lambda shape: Medusa(shape, num_heads=2, decay=0.8))
    with pytest.raises(UserError, match="written by JointModule, but this run uses DraftModule"):
        fit(plain, chats, tmp_path, tmp_path, ckpt_path=trained)


def test_joint_training_from_a_recipe(tiny_target, chats, tmp_path):
    """A recipe trains jointly; the result can be exported and loaded."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""
model:
  class_path: JointModule
  init_args:
    target: {tiny_target}
    drafter: {{class_path: Hydra, init_args: {{num_heads: 2}}}}
    base_loss: self_distillation
    heads_steps: 1
    lora_rank: 4
    divergence: {{class_path: CrossEntropy}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
data:
  class_path: TextData
  init_args: {{train: {chats}, length: 96, batch_size: 2, cache: {tmp_path}, validation_share: 0.1}}
trainer.max_steps: 3
trainer.val_check_interval: 3
trainer.accelerator: cpu
trainer.default_root_dir: {tmp_path / "run"}
trainer.enable_progress_bar: false
"""
    )
    assert main(["fit", "--config", str(recipe)]) == 0
    assert "loss_head0" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert main(["export", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), str(tmp_path / "out")]) == 0
    assert isinstance(Runner.load(tmp_path / "out-target", tmp_path / "out", max_len=64).drafter, Hydra)


@pytest.mark.slow
def test_two_processes_train_as_one_in_both_stages(tiny_target, chats, tmp_path):
    """Equal losses and weights up to float32 rounding, though the adapter has no gradient at first."""
    more = {
        "model": "JointModule",
        "model.drafter": "Medusa",
        "model.divergence": "ForwardKL",
        "model.heads_steps": 3,
        "model.draft_warmup": 2,
        "model.lora_rank": 4,
        "model.lora_lr": 4.0,
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
    process = torchrun(args, tmp_path / "output")
    assert process.wait(300) == 0, (tmp_path / "output").read_text()[-2000:]
    for row, other in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for name in ("train/loss", "train/loss_head0", "val/loss"):
            assert bool(row[name]) == bool(other[name])
            assert not row[name] or float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert any(name.endswith("B.weight") and value.abs().max() > 1e-3 for name, value in one.items())
    assert all(torch.allclose(value, two[name], rtol=0, atol=1e-4) for name, value in one.items())
