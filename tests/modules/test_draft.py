"""Distillation as a whole: accumulation, resume, the contents of checkpoints, and the measured sums."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import tensor

from tests.support.runs import weights
from tests.support.targets import make_target
from tests.support.training import Losses, StopAt, draft_module, fit, text_data
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.losses.divergence import ForwardKL, TVDpp
from trainkit.models.target import FrozenTarget
from trainkit.modules.checkpoint import read_checkpoint
from trainkit.modules.draft import rounds
from trainkit.modules.language import LanguageModule


class Rates(Callback):
    """Records the learning rate of every step in `values`."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer, *args) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


class Start(Callback):
    """Saves the untrained weights as a checkpoint."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_start(self, trainer, module) -> None:
        trainer.save_checkpoint(self.root / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("stop", [3, "epoch"])
def test_resumed_run_equals_uninterrupted_bit_for_bit(stop, tiny_target, chats, tmp_path):
    """Stopping and resuming, within an epoch and at its end, changes neither losses nor weights, with random draws included."""
    straight, first, second = Losses(), Losses(), Losses()
    sampled = TVDpp(estimator="sampled", samples=2)
    trainer = fit(draft_module(tiny_target, divergence=sampled), text_data(chats, tmp_path), tmp_path / "a", straight, steps=30)
    epoch = len(trainer.train_dataloader)
    assert 3 < epoch < 29
    at = epoch if stop == "epoch" else stop
    stopped, resumed = (draft_module(tiny_target, divergence=sampled) for _ in range(2))
    fit(stopped, text_data(chats, tmp_path), tmp_path / "b", first, StopAt(at), steps=30)
    assert len(first.values) == at
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    fit(resumed, text_data(chats, tmp_path), tmp_path / "b", second, steps=30, ckpt_path=last)
    assert first.values + second.values == straight.values
    assert all(torch.equal(value, weights(tmp_path / "b")[name]) for name, value in weights(tmp_path / "a").items())


def test_resumed_run_follows_the_schedule_of_its_new_end(tiny_target, chats, tmp_path):
    """A run of 4 steps that is resumed to 12 takes its first step, too, with the learning rate of a run of 12 steps."""
    straight, resumed = Rates(), Rates()
    fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path / "a", straight, steps=12)
    fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path / "b", steps=4)
    last = tmp_path / "b" / "checkpoints" / "last.ckpt"
    fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path / "b", resumed, steps=12, ckpt_path=last)
    assert resumed.values == straight.values[4:] and straight.values[3] > straight.values[4] > straight.values[11]


def test_schedule_without_an_end_gives_one_line(tiny_target, chats, tmp_path):
    """Without a number of steps or epochs the default schedule has no end, which is said before training."""
    with pytest.raises(UserError, match=r"trainer\.max_steps.*model\.lr_scheduler"):
        fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path, steps=-1, max_epochs=-1, max_time="00:00:01:00")
    constant = draft_module(tiny_target, lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    trainer = fit(constant, text_data(chats, tmp_path), tmp_path, StopAt(2), steps=-1, max_epochs=-1)
    assert trainer.global_step == 2


@pytest.mark.parametrize("divergence", [ForwardKL(), TVDpp(normalise="batch")], ids=["kl", "tvdpp"])
def test_accumulation_equals_one_large_batch(divergence, tiny_target, chats, tmp_path):
    """4 micro-batches of 1 row give the same step as 1 of 4 rows, although rows differ in their number of labels."""
    for name, batch, accumulate in (("large", 4, 1), ("small", 1, 4)):
        data = text_data(chats, tmp_path, batch_size=batch, length=96)
        module = draft_module(tiny_target, divergence=divergence, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
        fit(module, data, tmp_path / name, Start(tmp_path / "start"), steps=3, accumulate_grad_batches=accumulate)
    start, large, small = (weights(tmp_path / name) for name in ("start", "large", "small"))
    assert start.keys() == large.keys()
    moved = max((large[name] - start[name]).abs().max().item() for name in large)
    apart = max((large[name] - small[name]).abs().max().item() for name in large)
    assert apart < 2e-5 < 1e-3 < moved  # float32 sums in another order


def test_target_is_neither_saved_nor_trained(tiny_target, chats, tmp_path):
    """The target is neither trained nor saved in the checkpoint."""
    module = draft_module(tiny_target)
    fit(module, text_data(chats, tmp_path), tmp_path, steps=2)
    assert module.teacher is not None and not any(p.requires_grad for p in module.teacher.model.parameters())
    assert all(name.startswith("drafter.") for name in weights(tmp_path))
    assert set(module.state_dict()) == set(weights(tmp_path))


def test_drafter_loads_without_its_target(tiny_target, chats, tmp_path):
    """A drafter's checkpoint loads although its target is gone."""

    import shutil

    copy = shutil.copytree(tiny_target, tmp_path / "target")
    module = draft_module(copy)
    trainer = fit(module, text_data(chats, tmp_path), tmp_path, steps=2)
    shutil.rmtree(copy)
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    drafter, info = saved.drafter(), saved.info
    assert module.drafter is not None and drafter.target == module.shape
    assert all(torch.equal(value, drafter.state_dict()[name]) for name, value in module.drafter.state_dict().items())
    assert info["step"] == 2 and info["seed"] == 3 and info["data"] == trainer.datamodule.fingerprint  # type: ignore[attr-defined]
    assert 0 < info["metrics"]["val/alpha"] < 1 and info["metrics"]["val/tau"] >= 1


def test_foreign_checkpoint_gives_one_line(tmp_path):
    """A file that is no checkpoint of ours gives a one-line error."""
    broken = tmp_path / "a.ckpt"
    broken.write_bytes(b"nothing")
    foreign = tmp_path / "b.ckpt"
    torch.save({"state_dict": {}}, foreign)
    for path in (broken, foreign, tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_padding_token_outside_the_vocabulary_is_not_used(tiny_target, chats, tmp_path):
    """A tokenizer whose padding token the model does not know, as many fine-tunes have, trains like one without it."""
    from transformers import AutoTokenizer

    losses = []
    for pad in (None, "<pad>"):
        tokenizer, folder = AutoTokenizer.from_pretrained(tiny_target), tmp_path / f"tokenizer-{pad}"
        tokenizer.add_special_tokens({"pad_token": pad or tokenizer.eos_token})
        assert pad is None or tokenizer.pad_token_id == len(tokenizer) - 1 == 320
        tokenizer.save_pretrained(folder)
        seen = Losses()
        fit(
            draft_module(tiny_target), text_data(chats, tmp_path, tokenizer=str(folder)), tmp_path / f"run-{pad}", seen, steps=2
        )
        losses.append(seen.values)
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("precision", "said"), [("bf16-true", True), ("bf16-mixed", False)])
def test_weights_trained_in_bfloat16_are_reported(precision, said, tiny_target, chats, tmp_path, capsys):
    """Weights that are themselves bfloat16 lose most small updates; the run says so, and names the precision that does not."""
    fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path, steps=1, precision=precision)
    assert ("update below 0.0039 of a weight is lost; bf16-mixed" in capsys.readouterr().err) == said


def test_draft_equal_to_target_accepts_everything(tiny_target, chats, tmp_path):
    """A draft that IS the target accepts everything: alpha, coupled alpha and agreement 1, tau depth + 1."""
    trainer = Trainer(logger=False, enable_progress_bar=False, accelerator="cpu", enable_checkpointing=False)
    module = draft_module(tiny_target, drafter=lambda shape: LMDraft(shape, num_layers=4), depth=3)
    (values,) = trainer.validate(module, datamodule=text_data(chats, tmp_path), verbose=False)
    for name in ("alpha", "alpha_coupled", "agreement"):
        assert values[f"val/{name}"] == pytest.approx(1.0, abs=1e-3), name
    assert values["val/loss"] == pytest.approx(0.0, abs=1e-4)
    assert values["val/tau"] == pytest.approx(4.0)


def test_rounds_by_hand():
    """Depth 2. First document 1 1 1 0 1: the third position is the bonus of the first round (1 1), the fourth a bonus by
    itself, the fifth is cut short: 4 tokens in 2 rounds. Second 0 1 0: bonus, then 1 and bonus: 3 tokens in 2 rounds.

    A gap in the counted positions starts anew: 1 | 1 0 1 loses its first position, (1 0), and 1 is cut short.
    """
    document = tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]])
    labels = tensor([[1, 1, 1, 1, 1, 0, 1, 1, 1, 0]]).bool()
    agreement = tensor([[1, 1, 1, 0, 1, 0, 0, 1, 0, 0]]).bool()
    counts = rounds(agreement.expand(2, -1, -1), labels, document)
    assert (counts["emitted"], counts["rounds"]) == (4 + 3, 2 + 2)
    assert [counts[f"{name}_{k}"] for k in (1, 2) for name in ("accepted", "offered")] == [2, 4, 1, 2]
    labels[0, 1] = False
    counts = rounds(agreement.expand(2, -1, -1), labels, document)
    assert (counts["emitted"], counts["rounds"]) == (2 + 3, 1 + 2)
    assert set(rounds(agreement.expand(2, -1, -1), torch.zeros_like(labels), document).values()) == {0}


def test_rounds_of_heads_by_hand():
    """Each head on its own label: 5 labels; the first head is right on 1 and 4, the second on 2 and 3. First round: 1 and 2 are
    accepted, 3 is the bonus; second: 4 is accepted, 5 is not, the bonus instead. A label's own head counts, not another's.
    """
    document, labels = torch.zeros(1, 5).long(), torch.ones(1, 5).bool()
    agreement = tensor([[[1, 0, 0, 1, 0]], [[0, 1, 1, 0, 0]]]).bool()
    counts = rounds(agreement, labels, document)
    assert (counts["emitted"], counts["rounds"]) == (3 + 2, 2)
    assert [counts[f"{name}_{k}"] for k in (1, 2) for name in ("accepted", "offered")] == [2, 2, 1, 2]


def test_language_model_learns_and_loads(chats, tiny_target, tmp_path):
    """A language model's loss falls, and its checkpoint loads with the same logits."""
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
    }
    losses = Losses()
    module = LanguageModule(config=config, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), warmup_steps=2)
    fit(module, text_data(chats, tmp_path, tokenizer=str(tiny_target)), tmp_path, losses, steps=12)
    assert sum(losses.values[-3:]) < 0.8 * sum(losses.values[:3])
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    model, info = saved.language_model(), saved.info
    assert Path(info["tokenizer"]) == tiny_target.resolve() and info["metrics"]["val/perplexity"] > 1
    tokens = torch.randint(5, 300, (1, 9))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, module.lm.eval()(tokens).logits)
    assert model.config.vocab_size == 320 and model.config.eos_token_id == module.lm.config.eos_token_id
    with pytest.raises(UserError, match="last.ckpt: holds no trained drafter"):
        saved.drafter()


def test_packed_loss_equals_loss_per_document(chats, tiny_target, tmp_path):
    """The loss of packed rows equals the sum of the losses of their documents."""
    module = LanguageModule(folder=str(tiny_target))
    data = text_data(chats, tmp_path, batch_size=1)
    fit(module, data, tmp_path, steps=1)
    module.lm.eval()
    batch = next(iter(data.val_dataloader()))
    total = 0.0
    for number in range(int(batch["document_BT"].max()) + 1):
        here = batch["document_BT"][0] == number
        tokens, mask = batch["tokens_BT"][0][here][None], batch["mask_BT"][0][here][None]
        with torch.no_grad():
            logp = module.lm(tokens, use_cache=False).logits.log_softmax(-1)
        total -= (logp[0, :-1].gather(1, tokens[0, 1:, None])[:, 0] * mask[0, 1:]).sum().item()
    output = module.loss(batch, None)
    assert float(output.sum) == pytest.approx(total, rel=1e-5)
    assert float(output.count) == float(batch["mask_BT"].sum()) == float(batch["window_count"])


@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "model_type"), ({"model_type": "llama", "hiden": 3}, "hiden"), ({"model_type": "lama"}, "lama")],
)
def test_invalid_model_config_gives_one_line(config, message, chats, tiny_target, tmp_path):
    """An invalid model configuration gives a one-line error."""
    with pytest.raises(UserError, match=message) as caught:
        fit(LanguageModule(config=config), text_data(chats, tmp_path, tokenizer=str(tiny_target)), tmp_path)
    assert "\n" not in str(caught.value)


def test_rows_longer_than_the_model_are_refused(chats, tiny_target, tmp_path):
    """Rows longer than the model's positions are refused."""
    with pytest.raises(UserError, match="512 positions"):
        fit(draft_module(tiny_target), text_data(chats, tmp_path, length=1024), tmp_path)


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """A list that grows by one element each time the target is run."""
    calls, forward = [], FrozenTarget.forward
    monkeypatch.setattr(FrozenTarget, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    return calls


@pytest.mark.parametrize("divergence", [ForwardKL(), TVDpp(normalise="batch")], ids=["kl", "tvdpp"])
def test_cached_teacher_trains_to_the_same_bits(divergence, tiny_target, chats, tmp_path, runs):
    """Two epochs and validation, so that rows are read from the cache; the next run does not run the target at all."""
    straight, cached, later = Losses(), Losses(), Losses()
    for name, losses, cache in (("a", straight, None), ("b", cached, "kept"), ("c", later, "kept")):
        before = len(runs)
        module = draft_module(tiny_target, divergence=divergence, teacher_cache=cache and str(tmp_path / cache))
        data = text_data(chats, tmp_path, batch_size=3)
        trainer = fit(module, data, tmp_path / name, losses, steps=14, accumulate_grad_batches=2, val_check_interval=4)
        assert module.teacher is not None and trainer.current_epoch >= 1
        every = -(-len(data.rows[0]) // 3), -(-len(data.rows[1]) // 3)
        if name == "b":
            assert len(runs) - before == sum(every), "each row is read by the target once"
    assert len(runs) == before  # pyright: ignore[reportPossiblyUnboundVariable]
    assert cached.values == straight.values == later.values and len(set(cached.values)) > 10
    for name in ("b", "c"):
        assert all(torch.equal(value, weights(tmp_path / name)[key]) for key, value in weights(tmp_path / "a").items())


def test_cached_teacher_is_not_used_for_another_target(tiny_target, chats, tmp_path):
    """Another target with the same config and tokenizer trains as without the cache, which holds the first target."""
    other = make_target(tmp_path / "other", seed=1)
    fit(draft_module(tiny_target, teacher_cache=str(tmp_path / "kept")), text_data(chats, tmp_path), tmp_path / "a", steps=2)
    alone, beside = Losses(), Losses()
    fit(draft_module(other), text_data(chats, tmp_path), tmp_path / "b", alone, steps=2)
    fit(draft_module(other, teacher_cache=str(tmp_path / "kept")), text_data(chats, tmp_path), tmp_path / "c", beside, steps=2)
    assert alone.values == beside.values and len(list((tmp_path / "kept").iterdir())) == 2 * 2  # training and validation


def test_top_k_teacher_trains_and_is_exact_at_full_k(tiny_target, chats, tmp_path, runs):
    """Log-probabilities instead of hidden states and a head: equal up to the float32 rounding of one more softmax."""
    exact, whole, some, resumed = (Losses() for _ in range(4))
    fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path / "a", exact)
    fit(draft_module(tiny_target, teacher_top_k=320), text_data(chats, tmp_path), tmp_path / "b", whole)
    assert whole.values == pytest.approx(exact.values, rel=1e-4)
    options = {"teacher_top_k": 8, "teacher_cache": str(tmp_path / "kept")}
    fit(draft_module(tiny_target, **options), text_data(chats, tmp_path), tmp_path / "c", some, steps=20)
    assert sum(some.values[-4:]) < 0.9 * sum(some.values[:4])
    assert some.values[0] < exact.values[0], "a lower bound of the loss with the whole distribution"
    before = len(runs)
    fit(draft_module(tiny_target, **options), text_data(chats, tmp_path), tmp_path / "d", resumed, steps=20)
    assert resumed.values == some.values and len(runs) == before


def test_bfloat16_target_is_cached_in_bfloat16(tiny_target, chats, tmp_path):
    """The outputs of a bfloat16 target are cached in bfloat16, and training is the same."""
    straight, cached = Losses(), Losses()
    for name, losses, more in (("a", straight, {}), ("b", cached, {"teacher_cache": str(tmp_path / "kept")})):
        module = draft_module(tiny_target, target_dtype="bfloat16", **more)
        fit(module, text_data(chats, tmp_path, batch_size=8), tmp_path / name, losses, steps=8)
    assert cached.values == straight.values
    sizes = {json.loads(path.read_text())["dtype"] for path in (tmp_path / "kept").rglob("key.json")}
    assert sizes == {"torch.bfloat16"}


def test_cache_under_autocast_is_separate(tiny_target, chats, tmp_path):
    """Outputs cached under autocast are not used without it."""
    cache = {"teacher_cache": str(tmp_path / "kept")}
    fit(draft_module(tiny_target, **cache), text_data(chats, tmp_path), tmp_path / "a", steps=3, precision="bf16-mixed")
    alone, beside = Losses(), Losses()
    fit(draft_module(tiny_target), text_data(chats, tmp_path), tmp_path / "b", alone, steps=3)
    fit(draft_module(tiny_target, **cache), text_data(chats, tmp_path), tmp_path / "c", beside, steps=3)
    assert alone.values == beside.values


@pytest.mark.parametrize("top_k", [0, 321])
def test_invalid_teacher_top_k_gives_one_line(top_k, tiny_target, chats, tmp_path):
    """An invalid teacher_top_k gives a one-line error."""
    with pytest.raises(UserError, match="teacher_top_k") as caught:
        fit(draft_module(tiny_target, teacher_top_k=top_k), text_data(chats, tmp_path), tmp_path)
    assert "\n" not in str(caught.value)
