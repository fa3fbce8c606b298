"""RL fine-tuning in small runs: exact ratios and gradients, equal results however a run is split, resumed or sped up."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tests.support.policies import arguments, weights_apart, write_prompts
from tests.support.processes import torchrun, wait_until
from tests.support.runs import lines, log, resumed, weights
from tests.support.targets import make_target
from tests.support.training import draft_module, text_data
from tests.support.training import fit as train
from trainkit.commands.export import export
from trainkit.commands.fit import run
from trainkit.data.text.chat_template import Encoder, load_tokenizer
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError, note
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.modules.policy import PolicyModule, check_division
from trainkit.modules.prompt_data import PromptData
from trainkit.rl import batches, prepare
from trainkit.rl.algorithms import DAPO, GRPO, DrGRPO, OnPolicyDistillation
from trainkit.rl.batches import policy_logprobs
from trainkit.rl.infalign import Calibration, InfAlign, prompt_digest
from trainkit.rl.joint import JointRefresh
from trainkit.rl.refresh import Refresh
from trainkit.rl.rollout import Rollouts
from trainkit.rl.tasks import read_tasks
from trainkit.rl.thr import THR
from trainkit.runner import Runner
from trainkit.runner.stats import Stats

# R responses  L response tokens


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """A tiny target with moderate logits, so that responses differ and importance ratios stay near 1."""
    return make_target(tmp_path_factory.mktemp("targets") / "policy", num_hidden_layers=2, std=0.1)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl")


@pytest.fixture(scope="module")
def drafter(target, tmp_path_factory) -> Path:
    """A bundle of a one-layer draft of the target."""
    folder = tmp_path_factory.mktemp("drafters") / "lm"
    draft = LMDraft(target_shape(target), num_layers=1, init="target")
    draft.initialise(FrozenTarget(target))
    export_drafter(draft, folder, tokenizer=target)
    return folder


def policy_module(target: Path, **more) -> PolicyModule:
    """Groups of 4 responses to 8 prompts, in two minibatches; `more` replaces arguments."""
    options = {
        "algorithm": GRPO(),
        "rewards": [{"function": "tests.support.policies:odd_share"}],
        "samples": 4,
        "prompts": 8,
        "max_new_tokens": 10,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.1),
    }
    return PolicyModule(str(target), **(options | more))


def fit(module: PolicyModule, prompts: Path, root: Path, *callbacks: Callback, **more) -> Trainer:
    data = PromptData(str(prompts), **{name: more.pop(name) for name in ("validation", "limit") if name in more})
    return train(module, data, root, *callbacks, **more)


class Record(Callback):
    """What the loss reads and the gradient at each optimiser step."""

    def __init__(self) -> None:
        self.batches, self.gradients = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        self.gradients.append([parameter.grad.clone() for parameter in module.parameters()])


class Ratios(GRPO):
    """GRPO that records whether the ratios of each call are exactly 1."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.exact: list[bool] = []

    def loss(self, tokens):
        self.exact.append(torch.equal(tokens.new_RT, tokens.old_RT) and bool(tokens.mask_RT.any()))
        return super().loss(tokens)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_ratio_is_exactly_one_at_first_minibatch(lora, target, prompts, tmp_path, seed):
    """Bit for bit, in every micro-batch, with a temperature; in the second minibatch, after an update, it is not."""
    algorithm = Ratios(clip_low=0.2)
    module = policy_module(target, algorithm=algorithm, lora_rank=lora, temperature=0.7)
    fit(module, prompts, tmp_path, steps=4, accumulate_grad_batches=2)
    assert algorithm.exact == [True, True, False, False] * 2


def test_one_minibatch_gives_plain_policy_gradient(target, prompts, tmp_path, seed):
    """The gradient of a step on a whole generation equals -1/B sum_i 1/n_i sum_t A_i grad log p, each response alone."""
    record, module = Record(), policy_module(target, minibatches=1)
    fit(module, prompts, tmp_path, record, steps=1, accumulate_grad_batches=2, gradient_clip_val=0)
    # The same responses from a runner, and their advantages by hand.
    reference = FrozenTarget(target)
    reference.model.requires_grad_(True)
    losses, responses = [], 0
    for batch in record.batches:
        for row, exists_L in enumerate(batch["exists_RL"]):
            place, count = int(batch["index_RL"][row, 0]), int(exists_L.sum())
            tokens, positions = batch["tokens_BT"].flatten(), batch["positions_BT"].flatten()
            start = place - int(positions[place])
            text = tokens[start : place + count + 1]
            logp = reference.model(text[None]).logits[0].log_softmax(-1)
            labels = text[-count:]
            chosen = logp[-count - 1 : -1].gather(1, labels[:, None]).mean()
            losses.append(-batch["advantage_RL"][row, 0] * chosen)
            responses += 1
    assert responses == 32 and sum(bool(loss) for loss in losses) > 16
    wanted = torch.autograd.grad(torch.stack(losses).sum() / responses, list(reference.model.parameters()))
    for ours, theirs in zip(record.gradients[0], wanted, strict=True):  # float32, packed against alone
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()) + 1e-7)


def test_advantages_are_those_of_the_rewards(target, prompts, tmp_path, seed):
    """Each response's advantage is (R - mean) / (std + 1e-4) of its group, with rewards computed from its own tokens."""
    record, module = Record(), policy_module(target, minibatches=1)
    fit(module, prompts, tmp_path, record, steps=1)
    (batch,) = record.batches
    shares = [(row[exists] % 2).float().mean() for row, exists in zip(batch["labels_RL"], batch["exists_RL"], strict=True)]
    rewards_PG = torch.stack(shares).view(8, 4)
    wanted_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantage_RL"][:, 0].view(8, 4), wanted_PG, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algorithm", [GRPO, DAPO, lambda: DrGRPO(10)], ids=["responses", "tokens", "constant"])
def test_accumulation_equals_one_batch(algorithm, target, prompts, tmp_path, seed):
    """Eight micro-batches per step and one give the same weights."""
    modules = []
    for accumulate in (1, 8):
        module = policy_module(target, algorithm=algorithm())
        fit(module, prompts, tmp_path / str(accumulate), steps=4, accumulate_grad_batches=accumulate)
        modules.append(module)
    start = FrozenTarget(target).model
    assert weights_apart(modules[0], start) > 1e-3
    assert weights_apart(*modules) < 1e-5  # sums in another order


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_runner_has_the_trained_weights(lora, target, prompts, tmp_path, seed):
    """At every generation the runner's log-probabilities are those of the trainer, with the adapter merged in float32."""
    record = Record()
    module = policy_module(target, lora_rank=lora, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, prompts, tmp_path, record, steps=6)
    apart = [(batch["old_RL"] - batch["sampler_RL"]).abs().max() for batch in record.batches]
    assert len(apart) == 6 and max(apart) < 1e-4  # float32 rounding
    first, last = record.batches[0], record.batches[-1]
    with torch.no_grad():
        now_RL, _, _ = policy_logprobs(module.policy, first, 1.0)
        assert (now_RL - first["old_RL"]).abs().max() > 1e-2, "the policy did not move, so a stale runner would not show"
        old = Runner.load(target, max_len=64)
        prompt, continuation = _texts(last)[0]
        (stale,) = old.score([prompt], [continuation])
        module.sync()
        (fresh,) = module.rollouts.runner.score([prompt], [continuation])
        trainer_RL, _, _ = policy_logprobs(module.policy, last, 1.0)
    trained = trainer_RL[0, : len(continuation)]
    assert (torch.tensor(fresh) - trained).abs().max() < 1e-4 < (torch.tensor(stale) - trained).abs().max()


def _texts(batch: dict) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of each response of a micro-batch."""
    pairs, tokens, positions = [], batch["tokens_BT"].flatten(), batch["positions_BT"].flatten()
    for place_L, labels_L, exists_L in zip(batch["index_RL"], batch["labels_RL"], batch["exists_RL"], strict=True):
        first = int(place_L[0])
        pairs.append((tokens[first - int(positions[first]) : first + 1].tolist(), labels_L[exists_L].tolist()))
    return pairs


def test_resume_at_every_step_is_exact(target, prompts, tmp_path):
    """Runs that stop after each step, inside a generation and at its end, and resume, end with the same weights bit for bit."""
    options = {"lora_rank": 4, "algorithm": DAPO(beta=0.01), "epochs": 2, "reward": "first_odd"}
    straight = fit(_adam(target, **options), prompts, tmp_path / "straight", steps=9, accumulate_grad_batches=2)
    root, last = tmp_path / "parts", None
    for steps in range(1, 10):
        parts = fit(_adam(target, **options), prompts, root, steps=steps, accumulate_grad_batches=2, ckpt_path=last)
        last = root / "checkpoints" / "last.ckpt"
    for ours, theirs in zip(straight.lightning_module.parameters(), parts.lightning_module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _adam(target: Path, reward: str = "odd_share", **more) -> PolicyModule:
    rewards = [{"function": f"tests.support.policies:{reward}"}]
    return policy_module(target, rewards=rewards, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **more)


def test_resumed_log_equals_that_of_one_run(target, drafter, prompts, tmp_path):
    """Rewards, statistics, refreshes of the drafter and weights of a run that was stopped inside a generation and resumed."""
    more = {
        "model.drafter": drafter,
        "model.speculate": "on",
        "model.refresh": "Refresh",
        "model.refresh.every": 1,
        "model.refresh.steps": 2,
        "model.refresh.lr": 1e-3,
        "model.pass_at": "[1,4]",
        "data.validation": prompts,
        "data.limit_validation": 4,
        "trainer.val_check_interval": 5,
    }
    flags = lambda name, steps: arguments(target, prompts, tmp_path / name, **more, **{"trainer.max_steps": steps})
    assert run("fit", flags("straight", 8)) == 0
    for steps in (3, 8):
        assert run("fit", resumed(flags("parts", steps), tmp_path / "parts")) == 0
    straight, parts = (_rows(tmp_path / name) for name in ("straight", "parts"))
    names = {name for row in straight for name in row}
    assert {"train/reward", "train/reward/odd_share", "train/ratio_max", "train/tau", "refresh/alpha_after"} <= names
    assert parts == straight
    assert any("val/pass@4" in row for row in log(tmp_path / "straight"))
    ours, theirs = weights(tmp_path / "straight"), weights(tmp_path / "parts")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def _rows(root: Path) -> list[dict[str, str]]:
    """The training rows of the log, without times."""
    timed = ("refresh/seconds", "refresh/share")
    return [{k: v for k, v in row.items() if v and k not in timed} for row in log(root) if row["train/loss"]]


def test_speculation_changes_nothing_but_speed(target, drafter, prompts, tmp_path, seed):
    """With a drafter, frozen, refreshed or trained in the policy's forward, the same weights bit for bit as without."""
    plain = _adam(target)
    fit(plain, prompts, tmp_path / "plain", steps=6)
    refresh = lambda *given, **options: Refresh(*given, every=1, steps=2, lr=1e-3, **options)
    joint = lambda *given, **options: JointRefresh(*given, lr=1e-3, **options)
    for name, more in {"frozen": {}, "refreshed": {"refresh": refresh}, "joint": {"refresh": joint}}.items():
        module = _adam(target, drafter=str(drafter), speculate="on", **more)
        fit(module, prompts, tmp_path / name, steps=6)
        assert Stats.merge(r.stats for group in module.groups for r in group.responses).drafted > 0
        assert weights_apart(module, plain) == 0
        if module.refresh is not None:  # the drafter of the rollouts was trained too
            served, before = module.rollouts.runner.drafter.state_dict(), Runner.load(target, drafter).drafter.state_dict()
            assert any(not torch.equal(value, before[name]) for name, value in served.items())


@pytest.mark.slow
def test_two_processes_train_as_one(target, prompts, tmp_path):
    """DAPO with refill, and a reward that raises on one rank only: equal rewards, and weights to 1e-5."""
    more = {
        "model.algorithm": "DAPO",
        "model.rewards": json.dumps([{"function": "tests.support.policies:first_odd"}]),
        "model.prompts": 4,
        "model.optimizer": "torch.optim.SGD",
        "model.optimizer.lr": 0.1,
        "trainer.max_steps": 6,
        "data.validation": prompts,
        "data.limit_validation": 5,
    }
    assert run("fit", arguments(target, prompts, tmp_path / "one", **more)) == 0
    process = torchrun(arguments(target, prompts, tmp_path / "two", **more), tmp_path / "output")
    assert process.wait(120) == 0, (tmp_path / "output").read_text()[-2000:]
    for row, other in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        for name in ("train/reward", "train/filtered", "train/zero_variance", "train/length", "val/reward", "val/length"):
            assert row[name] == other[name], name
        assert not row["train/loss"] or float(row["train/loss"]) == pytest.approx(float(other["train/loss"]), abs=1e-5)
    assert {row["train/filtered"] for row in log(tmp_path / "one")} - {"", "0.0"}, "nothing was refilled"
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(value, two[name], rtol=0, atol=1e-5) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_and_resume_is_exact(processes, target, drafter, prompts, tmp_path, seed):
    """Processes that are killed at random times, inside generations too, and resumed, equal an uninterrupted run."""
    more = {
        "model.algorithm": "DAPO",
        "model.rewards": json.dumps([{"function": "tests.support.policies:first_odd"}]),
        "model.epochs": 2,
        "model.drafter": drafter,
        "model.speculate": "on",
        "model.refresh": "Refresh",
        "model.refresh.every": 1,
        "model.refresh.steps": 1,
        "trainer.max_steps": 16,
        "checkpoint.every_n_steps": 1,
    }

    def begin(root: Path):
        flags = resumed(arguments(target, prompts, root, **more), root)
        if processes == 2:
            return torchrun(flags, tmp_path / "output")
        command = [sys.executable, "-m", "trainkit.cli", "fit", *flags]
        left = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")  # by training in this process
        environment = {name: value for name, value in os.environ.items() if name not in left}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    assert begin(tmp_path / "straight").wait(200) == 0
    root = tmp_path / "parts"
    for _ in range(3):
        process, before = begin(root), lines(root)
        wait_until(lambda: lines(root) > before + random.randint(0, 3) or process.poll() is not None, seconds=100)  # noqa: B023
        time.sleep(random.uniform(0, 0.3))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        for pid in [*map(int, children.read_text().split() if children.exists() else []), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(60)
    assert begin(root).wait(200) == 0
    assert _rows(tmp_path / "straight") == _rows(root)
    ours, theirs = weights(tmp_path / "straight"), weights(root)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_missing_rewards_stop_with_one_line(target, prompts, tmp_path):
    """Rewards that are missing for all responses of ten generations end the run and name the function, also if it resumed."""
    more = {"rewards": [{"function": "tests.support.policies:never"}], "prompts": 2, "samples": 2}
    fit(policy_module(target, **more), prompts, tmp_path, steps=12)
    module, last = policy_module(target, **more), tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"no response of the last 10 generations has a reward.*never") as caught:
        fit(module, prompts, tmp_path, steps=40, ckpt_path=last)
    assert "\n" not in str(caught.value) and module.global_step == 18  # nine generations of two steps


def test_a_reward_that_fails_once_is_passed_over(target, prompts, tmp_path):
    """A generation whose reward function raises changes no weight, and the run goes on; metrics have what it logs."""
    rewards = json.dumps([{"function": "tests.support.policies:fails_at_first"}])
    assert run("fit", arguments(target, prompts, tmp_path, **{"model.rewards": rewards, "trainer.max_steps": 4})) == 0
    rows = log(tmp_path)
    assert [row["train/missing/fails_at_first"] for row in rows if row["train/missing/fails_at_first"]] == ["1.0", "0.0"]
    assert [bool(row["optim/grad_norm"]) for row in rows] == [False, False, True, True]
    assert rows[0]["train/reward"] == rows[0]["train/reward/fails_at_first"] == "" != rows[2]["train/reward"]
    assert [row["train/log/seen"] for row in rows if row["train/log/seen"]] == ["32.0"]


def test_dr_grpo_divides_by_the_length_limit(target):
    """Named without arguments, as recipes may, DrGRPO takes the run's longest response."""
    assert policy_module(target, algorithm=DrGRPO()).algorithm.count(torch.ones(3, 2)) == 30


def test_validation_fails_on_all_ranks(target, prompts, tmp_path, monkeypatch):
    """A mistake of a reward function in the validation of another rank ends this one with the same line."""

    class Elsewhere(Callback):
        def on_validation_start(self, trainer, module) -> None:
            others = lambda value: [value, "reward x is wrong"] if value == "" else [value]
            monkeypatch.setattr(module, "_gather_objects", others)

    with pytest.raises(UserError, match="reward x is wrong"):
        more = {"validation": str(prompts), "val_check_interval": 2, "callbacks": [Elsewhere()]}
        fit(policy_module(target), prompts, tmp_path, steps=2, **more)


def test_rewards_know_the_progress_of_training(target, prompts, tmp_path):
    """`trainer_state` has the optimiser step and their number, as in TRL, in training and in validation."""
    more = {"data.validation": prompts, "data.limit_validation": 2, "trainer.val_check_interval": 4}
    more["model.rewards"] = json.dumps([{"function": "tests.support.policies:progress"}])
    assert run("fit", arguments(target, prompts, tmp_path, **more)) == 0
    rows = log(tmp_path)
    assert [row["train/reward"] for row in rows if row["train/reward"]] == ["0.5", "0.75", "1.0", "1.25"]
    assert [row["train/log/step"] for row in rows if row["train/log/step"]] == ["0.0", "2.0", "4.0", "6.0"]
    assert [row["val/reward"] for row in rows if row["val/reward"]] == ["1.0", "1.5"]


def test_step_without_signal_leaves_weights_alone(target, prompts, tmp_path):
    """With dynamic sampling and rewards that are all equal, no group is left; moments and weight decay do not act."""
    module = policy_module(
        target,
        algorithm=DAPO(),
        rewards=[{"function": "length", "options": {"minimum": 1, "maximum": 10}}],
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    )
    fit(module, prompts, tmp_path, steps=2)
    assert weights_apart(module, FrozenTarget(target).model) == 0


BAD = {
    "one sample": ({"samples": 1}, "model.samples is 1, but GRPO compares responses"),
    "minibatches": ({"minibatches": 3}, "model.minibatches: 8 prompts do not divide into 3"),
    "no reward": ({"rewards": []}, "model.rewards: GRPO needs at least one reward"),
    "unknown reward": ({"rewards": [{"function": "nmeric"}]}, "model.rewards.*unknown function 'nmeric'"),
    "temperature": ({"temperature": 0.0}, "model.temperature is 0.0"),
    "no teacher": ({"algorithm": OnPolicyDistillation(), "rewards": None}, "model.reference: OnPolicyDistillation needs"),
    "unread reference": ({"reference": "x"}, "model.reference: the algorithm reads no reference"),
    "rank": ({"lora_rank": 0}, "lora_rank 0 must be at least 1"),
    "projection": ({"lora_rank": 2, "lora_modules": ["qq"]}, "model.lora_modules"),
    "pass@k": ({"pass_at": [8]}, "model.pass_at: 8 must be between 1 and model.samples"),
    "long": ({"max_new_tokens": 510}, "data.train: prompt 0 has .* lower model.max_new_tokens"),
    "too few prompts": ({"prompts": 64}, "data.train: 24 prompts, but a generation needs 64"),
    "target": ({"target": "nowhere"}, "nowhere: no"),
    "top_p": ({"rollout": {"top_p": 0.9}}, "model.rollout: top_p 0.9: the policy is trained on its whole distribution"),
    "lossy": ({"rollout": {"verify": "typical"}}, "model.rollout: verify 'typical'"),
    "rollout temperature": ({"rollout": {"temperature": 0.7}}, "model.rollout.temperature: set model.temperature instead"),
    "rollout seed": ({"rollout": {"seed": 1}}, "model.rollout.seed: set seed_everything instead"),
    "unused projections": ({"lora_modules": ["q_proj"]}, "model.lora_modules: .* set model.lora_rank"),
    "length limit": ({"algorithm": DrGRPO(99)}, "model.algorithm.max_length is 99, but model.max_new_tokens 10"),
    "overlong": ({"algorithm": DAPO(overlong=11)}, "model.algorithm.overlong is 11; it must be at most the length limit, 10"),
    "unknown option": ({"rollout": {"dept": 2}}, "model.rollout: .*unknown option 'dept'"),
    "no drafter": ({"refresh": Refresh}, "model.refresh: there is no drafter to refresh"),
    "drafter": ({"drafter": "nowhere"}, "nowhere: no such folder"),
    "correction": ({"correction": "tokens"}, "model.correction is 'tokens'"),
    "graded for THR": ({"reweight": THR(0.1)}, "model.reweight: THR needs rewards of 0 or 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_give_one_line(name, target, prompts, tmp_path):
    """A wrong option gives one line that names it."""
    more, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        fit(policy_module(**({"target": target} | more)), prompts, tmp_path, steps=1)
    assert "\n" not in str(caught.value)


def test_drafter_of_another_target_is_refused(drafter, prompts, tmp_path):
    """A drafter whose target has another vocabulary is refused in one line."""
    other = make_target(tmp_path / "other", num_hidden_layers=1, vocab_size=400)
    with pytest.raises(UserError, match="vocab") as caught:
        fit(policy_module(other, drafter=str(drafter)), prompts, tmp_path, steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((8, 4, 2, 3, 1), "model.prompts: 8 prompts do not divide into 2 minibatches on 3 processes"),
        ((8, 4, 2, 2, 3), "accumulate_grad_batches: 8 responses of a process and minibatch do not divide into 3"),
    ],
)
def test_groups_must_divide_over_processes(values, message):
    """Ranks or micro-batches that do not divide a generation are refused; others are not."""
    with pytest.raises(UserError, match=message):
        check_division(*values)
    check_division(8, 4, 2, 4, 4)


def test_only_prompt_data_trains_a_policy(target, prompts, tmp_path):
    """Other data is refused, and so are these prompts for another module."""
    with pytest.raises(UserError, match="PolicyModule cannot train on TextData"):
        train(policy_module(target), text_data(prompts, tmp_path), tmp_path)
    with pytest.raises(UserError, match="DraftModule cannot train on PromptData"):
        train(draft_module(target), PromptData(str(prompts)), tmp_path)


def test_resume_with_other_groups_is_refused(target, prompts, tmp_path):
    """A checkpoint is continued only with the numbers that its generation was made with."""
    fit(policy_module(target), prompts, tmp_path, steps=1)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="samples: the checkpoint has 4, this run 8"):
        fit(policy_module(target, samples=8), prompts, tmp_path, steps=2, ckpt_path=last)


@pytest.mark.parametrize("model", ["full", "lora", "teacher"])
def test_reference_logprobs_are_those_of_its_model(model, target, prompts, tmp_path, seed):
    """After the policy has moved, `ref_RL` is that of the model before training, or of the teacher."""
    teacher = make_target(tmp_path / "teacher", seed=1, num_hidden_layers=2, std=0.1)
    more = {"algorithm": GRPO(beta=0.04), "lora_rank": 4 if model == "lora" else None}
    if model == "teacher":
        more = {"algorithm": OnPolicyDistillation(), "reference": str(teacher), "rewards": None, "samples": 1}
    record, module = Record(), policy_module(target, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **more)
    fit(module, prompts, tmp_path / "run", record, steps=4)
    last, reference = record.batches[-1], FrozenTarget(teacher if model == "teacher" else target)
    wanted_RL, _, _ = policy_logprobs(reference, last, 1.0)
    assert (last["ref_RL"] - wanted_RL).abs().max() < 1e-5
    assert (last["ref_RL"] - last["old_RL"]).abs().max() > 1e-2
    assert last["mask_RL"].any()


def test_distillation_approaches_its_teacher(target, prompts, tmp_path, seed):
    """On-policy distillation without rewards and with one response to a prompt lowers KL(policy || teacher)."""
    teacher = make_target(tmp_path / "teacher", seed=1, num_hidden_layers=2, std=0.1)
    more = {"algorithm": OnPolicyDistillation(), "reference": str(teacher), "rewards": None, "samples": 1, "prompts": 24}
    record = Record()
    module = policy_module(target, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), minibatches=1, **more)
    fit(module, prompts, tmp_path / "run", record, steps=20)
    gaps = [float(((b["old_RL"] - b["ref_RL"]) * b["mask_RL"]).sum() / b["mask_RL"].sum()) for b in record.batches]
    assert sum(gaps[-4:]) / 4 < 0.8 * sum(gaps[:2]) / 2, gaps


def test_thr_changes_advantages_by_token(target, prompts, tmp_path, seed):
    """The advantages of each group are those of THR on hidden states of its texts alone, in split micro-batches."""
    thr, rewards = THR(0.1), [{"function": "tests.support.policies:first_odd"}]
    record, module = Record(), policy_module(target, reweight=thr, rewards=rewards, minibatches=1)
    fit(module, prompts, tmp_path, record, steps=1, accumulate_grad_batches=8)
    policy, changed = FrozenTarget(target), 0
    rows = [pair for batch in record.batches for pair in zip(_texts(batch), batch["advantage_RL"], strict=True)]
    for start in range(0, 32, 4):
        group = rows[start : start + 4]
        hidden, tokens, correct = [], [], []
        for (prompt, response), _ in group:
            text = torch.tensor([prompt + response])
            positions = torch.arange(text.shape[1])[None]
            states, _ = policy.forward(text, positions, torch.zeros_like(text))
            hidden.append(states[0, len(prompt) - 1 : -1])
            tokens.append(torch.tensor(response))
            correct.append(response[0] % 2 == 1)
        right = torch.tensor(correct).float()
        advantages = (right - right.mean()) / (right.std() + 1e-4)
        plain = [advantage.expand(len(part)) for advantage, part in zip(advantages, tokens, strict=True)]
        wanted = thr.reweight(hidden, tokens, policy.handle().head, correct, plain)
        for (_, ours_L), theirs_n, plain_n in zip(group, wanted, plain, strict=True):
            # a token whose influence is the threshold itself, which rounding decides, may differ
            apart = (ours_L[: len(theirs_n)] - theirs_n).abs() > 1e-3
            assert apart.sum() <= 1
            changed += int((ours_L[: len(plain_n)] - plain_n).abs().gt(1e-3).sum())
    assert changed > 0


def test_transform_acts_before_the_advantages(target, prompts, tmp_path, seed):
    """With InfAlign the advantages are those of the transformed rewards."""
    tasks = read_tasks(str(prompts), Encoder(load_tokenizer(str(target)), str(target)))
    rewards = {task.index: [0.2, 0.4, 0.5, 0.6] for task in tasks}
    Calibration({}, rewards, {task.index: prompt_digest(task) for task in tasks}).save(tmp_path / "table.json")
    transform = InfAlign(tmp_path / "table.json", "best", 4.0)
    record, module = Record(), policy_module(target, transform=transform, minibatches=1)
    fit(module, prompts, tmp_path / "run", record, steps=1)
    (batch,) = record.batches
    responses = [row[exists].tolist() for row, exists in zip(batch["labels_RL"], batch["exists_RL"], strict=True)]
    shares = [sum(token % 2 for token in tokens) / len(tokens) for tokens in responses]
    rewards_PG = torch.tensor([transform.transform(0, share) for share in shares]).view(8, 4)
    wanted_PG = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantage_RL"][:, 0].view(8, 4), wanted_PG, rtol=1e-3, atol=1e-3)


def _stale(patch) -> None:
    patch.setattr(PolicyModule, "sync", lambda self: None)


def _other_temperature(patch) -> None:
    generate = Rollouts.generate

    def warmer(self, tasks, step):
        self.options["temperature"] = 1.3
        return generate(self, tasks, step)

    patch.setattr(Rollouts, "generate", warmer)


def _shifted(patch) -> None:
    def pack(samples):
        micro = batches.pack_responses(samples)
        return micro | {"index_RL": (micro["index_RL"] - 1).clamp(min=0)}

    patch.setattr(prepare, "pack_responses", pack)


@pytest.mark.parametrize(
    "fault", [None, _stale, _other_temperature, _shifted], ids=lambda fault: getattr(fault, "__name__", "none")
)
def test_planted_mismatch_is_measured(fault, target, prompts, tmp_path, monkeypatch, capsys, seed):
    """Stale weights, another temperature and a shift by one token show in the mismatch, which is tiny otherwise."""
    if fault is not None:
        fault(monkeypatch)
    note.cache_clear()
    module = policy_module(target, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2))
    fit(module, prompts, tmp_path, steps=6)
    found, printed = module.statistics["mismatch"], "runner and trainer differ by" in capsys.readouterr().err
    assert found > 0.02 if fault is not None else found < 1e-5
    assert printed == (found > 0.1)
    assert module.statistics["corrected"] == float(fault is not None)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_exported_folder_is_the_policy(lora, target, prompts, tmp_path):
    """The exported folder has the logits of the trained policy, and its card names algorithm and rewards."""
    module = policy_module(target, lora_rank=lora, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    fit(module, prompts, tmp_path / "run", steps=2)
    export(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours, theirs = (FrozenTarget(folder).model(tokens).logits for folder in (target, tmp_path / "out"))
        policy = module.policy.model(tokens).logits
    assert (theirs - policy).abs().max() < 1e-4 < 1e-2 < (ours - policy).abs().max()
    card = json.loads((tmp_path / "out" / "trainkit.json").read_text())
    assert card["extra"]["policy"]["algorithm"] == "GRPO" and card["extra"]["policy"]["rewards"] == ["odd_share"]
    assert card["metrics"]["step"] == 2
    Runner.load(tmp_path / "out", max_len=64).generate(["1 + 1?"], max_new_tokens=4)


@pytest.mark.parametrize("lora", [None, 4], ids=["full", "lora"])
def test_refreshed_drafter_is_exported_too(lora, target, drafter, prompts, tmp_path):
    """OUT-draft holds the refreshed weights and fits the exported policy, with an adapter only that."""
    refresh = lambda *given, **options: Refresh(*given, every=1, steps=2, lr=1e-3, **options)
    module = policy_module(target, drafter=str(drafter), refresh=refresh, lora_rank=lora)
    fit(module, prompts, tmp_path / "run", steps=4)
    report = export(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), str(tmp_path / "out"))
    assert f"drafter: {tmp_path / 'out-draft'}; refreshed together with this policy" in report
    runner = Runner.load(tmp_path / "out", tmp_path / "out-draft", max_len=64)
    assert runner.generate(["1 + 1?"], max_new_tokens=4, depth=2)[0].stats.drafted
    twin = module.refresh.twin.state_dict()
    assert all(torch.equal(value, twin[name]) for name, value in runner.drafter.state_dict().items())
    assert any(not torch.equal(value, twin[name]) for name, value in Runner.load(target, drafter).drafter.state_dict().items())
    if lora:
        with pytest.raises(UserError, match="not the target that the drafter was tuned together with"):
            Runner.load(target, tmp_path / "out-draft")


def _mean_reward(module: PolicyModule) -> float:
    values = [response.reward for group in module.groups for response in group.responses]
    return sum(values) / len(values)


@pytest.mark.slow
def test_policy_learns_a_trivial_reward(target, prompts, tmp_path, seed):
    """The share of odd token ids rises well above chance within 16 generations."""
    module = policy_module(target, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), samples=8)
    rewards = []

    class Rewards(Callback):
        def on_train_batch_end(self, trainer, module, *args) -> None:
            rewards.append(_mean_reward(module))

    fit(module, prompts, tmp_path, Rewards(), steps=32)
    assert sum(rewards[-6:]) / 6 > sum(rewards[:2]) / 2 + 0.15
