"""The drafter refresh: it follows a policy that changed, never changes the rollouts, and resumes exactly."""

from __future__ import annotations

import io
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.drafters import VARIANTS
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter
from trainkit.losses.divergence import TV, ForwardKL, TVDpp
from trainkit.models.target import FrozenTarget, LiveTarget, load_model, target_shape
from trainkit.rl.refresh import Refresh, first_acceptance, load_refreshed
from trainkit.rl.types import Group, Response, Task
from trainkit.runner import Runner

OWN = [name for name, (kind, _) in VARIANTS.items() if kind in ("eagle", "hydra", "lm", "medusa")]
PROMPTS = [list(range(40 + n, 52 + n)) for n in range(8)]
SEED = int(os.environ["TRAINKIT_TEST_SEED"])
TIMES = ("refresh/seconds", "refresh/share")
OPTIONS = {"temperature": 1.0, "max_new_tokens": 24, "seed": 5, "ignore_end": True, "depth": 2}


@pytest.fixture(scope="module")
def bundles(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A new drafter of every kind and variant, and one with a trimmed vocabulary, as bundles."""
    teacher, made = FrozenTarget(tiny_target), {}
    torch.manual_seed(SEED)
    for variant, (kind, options) in (VARIANTS | {"trimmed": ("lm", {"draft_vocab": list(range(0, 320, 2))})}).items():
        drafter = load_kind(kind)(teacher.shape(), **options)
        drafter.initialise(teacher)
        made[variant] = tmp_path_factory.mktemp("drafts") / variant.replace("+", "p")
        drafter.fill_untrained()
        export_drafter(drafter, made[variant], tokenizer=tiny_target, target=tiny_target)
    return made


@pytest.fixture(scope="module")
def policy(tiny_target: Path) -> Any:
    """A policy that has left its start."""
    model = load_model(tiny_target, torch.float32)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


class Setting:
    """The runner on a policy's weights with a drafter, and the refresh of that drafter."""

    def __init__(self, folder: Path, policy: Any, bundle: Path, dtype: str = "float32", **options: Any) -> None:
        self.policy, self.runner = policy, Runner.load(folder, bundle, max_len=64, dtype=dtype)
        self.runner.update(policy.state_dict().items())
        assert self.runner.drafter is not None
        self.drafter = self.runner.drafter
        chosen = {"steps": 8, "batch": 2, "lr": 3e-3, "loss": ForwardKL()} | options
        self.refresh = Refresh(self.drafter, bundle, LiveTarget(policy, folder), **chosen)

    def rollouts(self, step: int = 0) -> list[Group]:
        outputs = self.runner.generate(PROMPTS, **(OPTIONS | {"seed": step}))
        tasks = [Task(index, prompt, "") for index, prompt in enumerate(PROMPTS)]
        responses = [Response(o.tokens, o.text, o.finish, [], o.stats) for o in outputs]
        return [Group(task, [response]) for task, response in zip(tasks, responses, strict=True)]


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_refresh_raises_acceptance_not_rollouts(variant, tiny_target, policy, bundles, seed):
    """For each of our kinds loss falls and acceptance on other rollouts rises; for all, texts are the same, token by token."""
    setting = Setting(tiny_target, policy, bundles[variant], steps=16, positions="all")
    before = setting.rollouts()
    setting.refresh.observe(before, 1)
    first, second = setting.refresh.run(1), setting.refresh.run(2)
    if variant in OWN:  # the other kinds hardly learn from a few texts
        assert second["refresh/loss"] < first["refresh/loss"]
        assert first["refresh/alpha_after"] > first["refresh/alpha_before"]
        assert first["refresh/kept"] == 1
    assert [group.responses[0].tokens for group in setting.rollouts()] == [group.responses[0].tokens for group in before]
    assert equal(setting.drafter.state_dict(), setting.refresh.twin.state_dict())
    assert all(weight.grad is None for weight in policy.parameters())


@pytest.mark.parametrize("variant", ["lm", "hydra++"])
def test_resumed_refresh_is_the_same(variant, tiny_target, policy, bundles, seed):
    """A state that went through a file with plain values continues bit for bit, and gives the runner its trained drafter."""
    whole = Setting(tiny_target, policy, bundles[variant], loss=TVDpp(estimator="sampled"))
    whole.refresh.observe(whole.rollouts(1), 1)
    whole.refresh.run(1)
    file = io.BytesIO()
    torch.save(whole.refresh.state_dict(), file)
    resumed = Setting(tiny_target, policy, bundles[variant], loss=TVDpp(estimator="sampled"))
    resumed.refresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert equal(resumed.drafter.state_dict(), whole.drafter.state_dict())
    metrics = []
    for setting in (whole, resumed):
        torch.randn(3)  # randomness does not come from the global generator
        setting.refresh.observe(setting.rollouts(2), 2)
        metrics.append({name: value for name, value in setting.refresh.run(2).items() if name not in TIMES})
    assert metrics[0] == metrics[1]
    assert equal(resumed.drafter.state_dict(), whole.drafter.state_dict())
    assert whole.refresh.due(9, 2.0) == resumed.refresh.due(9, 2.0)


def test_worse_drafter_is_not_kept(tiny_target, policy, bundles, seed):
    """If acceptance on held-out rollouts fell, the twin, its optimiser and the runner's drafter are those of before."""
    setting = Setting(tiny_target, policy, bundles["lm"], lr=10.0, positions="all")
    weights = {name: value.clone() for name, value in setting.drafter.state_dict().items()}
    setting.refresh.observe(setting.rollouts(), 1)
    metrics = setting.refresh.run(1)
    assert metrics["refresh/kept"] == 0 and not metrics["refresh/alpha_after"] >= metrics["refresh/alpha_before"]
    assert equal(setting.drafter.state_dict(), weights) and equal(setting.refresh.twin.state_dict(), weights)
    assert not setting.refresh.optimizer.state


def test_served_drafter_is_changed_in_place(tiny_target, policy, bundles, seed):
    """The runner's tensors stay where they are and keep their dtype; rows of a trimmed head follow too."""
    setting = Setting(tiny_target, policy, bundles["trimmed"], dtype="bfloat16", positions="all")
    setting.refresh.observe(setting.rollouts(), 1)
    drafter: Any = setting.drafter
    places = {name: value.data_ptr() for name, value in drafter.state_dict().items()} | {"rows": drafter.head_KD.data_ptr()}
    old = drafter.head_KD.clone()
    assert setting.refresh.run(1)["refresh/kept"] == 1
    assert places == {name: value.data_ptr() for name, value in drafter.state_dict().items()} | {
        "rows": drafter.head_KD.data_ptr()
    }
    assert drafter.head_KD.dtype == torch.bfloat16 and not torch.equal(drafter.head_KD, old)
    assert torch.equal(drafter.head_KD, setting.refresh.twin.decoder.head_weight[drafter.ids_K].bfloat16())


@pytest.mark.parametrize("variant", ["lm", "eagle"])
def test_refreshed_drafter_is_rebuilt_from_a_state(variant, tiny_target, policy, bundles, seed):
    """Its weights are the twin's and its target the one given; without the folder of the first drafter the error names it."""
    refresh = Setting(tiny_target, policy, bundles[variant]).refresh
    with torch.no_grad():
        next(refresh.twin.parameters()).mul_(2.0)
    state, shape = refresh.state_dict(), target_shape(tiny_target)
    other = replace(shape, fingerprint={"config": "another"})
    drafter = load_refreshed(state, other, tiny_target)
    assert equal(drafter.state_dict(), state["twin"]) and drafter.target == other
    with pytest.raises(UserError, match="gone: the drafter that the run refreshed is not there"):
        load_refreshed(state | {"source": "gone"}, shape, tiny_target)


def test_due_by_steps_and_by_fallen_tau(tiny_target, policy, bundles, seed):
    """Due every `every` steps, or below 0.95 of the best tau since the last refresh; an unknown tau changes nothing."""
    refresh = Setting(tiny_target, policy, bundles["lm"], every=10, steps=1).refresh
    taus = {1: 2.0, 2: float("nan"), 3: 1.91, 4: 2.1, 5: 1.99, 6: 2.0, 10: 3.0}
    assert [step for step, tau in taus.items() if refresh.due(step, tau)] == [5, 10]
    refresh.run(10)
    assert [step for step, tau in {11: 1.0, 12: 0.96, 13: 0.94, 20: 1.0}.items() if refresh.due(step, tau)] == [13, 20]


def test_window_forgets_and_is_bounded(tiny_target, policy, bundles, seed):
    """Rollouts older than the window are forgotten, a step again replaces its own, and no step exceeds one refresh's need."""
    refresh = Setting(tiny_target, policy, bundles["lm"], window=2, steps=1, batch=2).refresh
    groups = [Group(Task(n, [1, 2], ""), [Response([n, n + 1], "", "end", [])] * 3) for n in range(4)]
    for step in (1, 2, 2, 3):
        refresh.observe(groups, step)
    numbers = refresh.state_dict()["window"]["numbers"]
    assert numbers[:, 0].tolist() == [2] * 4 + [3] * 4 and numbers[0].tolist() == [2, 4, 2]


@pytest.mark.parametrize("variant", ["lm", "medusa"])
def test_first_acceptance_equals_the_served_one(variant, tiny_target, policy, bundles, seed):
    """It is the overlap of target and draft that the runner sees in a round whose first token has that position."""
    setting = Setting(tiny_target, policy, bundles[variant])
    seen: dict[int, float] = {}

    def observe(trace: Any) -> None:
        p_V, q_V = trace.scores_BNV[0, 0].softmax(-1), trace.draft.logits[0][0, 0].softmax(-1)
        seen[int(trace.position_B[0]) + 1] = float(torch.minimum(p_V, q_V).sum())

    setting.runner.observe = observe
    output = setting.runner.generate(PROMPTS[:1], **OPTIONS)[0]
    setting.refresh.observe([Group(Task(0, PROMPTS[0], ""), [Response(output.tokens, "", "length", [])])], 1)
    batch = setting.refresh._read(setting.refresh._rollouts)
    assert batch is not None
    counted_BT, alpha_BT = first_acceptance(setting.refresh.twin, batch, setting.refresh._measure(batch))
    common = [position for position in seen if position < counted_BT.shape[1] and counted_BT[0, position]]
    assert len(common) > 5
    for position in common:
        assert abs(float(alpha_BT[0, position]) - seen[position]) < 1e-4  # float32 sums in another order


def test_positions_are_the_rejected_and_as_many(tiny_target, policy, bundles, seed):
    """`rejected` keeps some labels, none outside of the responses; `mixed` has them and the same number of others."""
    chosen: dict[str, torch.Tensor] = {}
    for positions in ("all", "rejected", "mixed"):
        setting = Setting(tiny_target, policy, bundles["eagle"], positions=positions)
        setting.refresh.observe(setting.rollouts(), 1)
        batch = setting.refresh._read(setting.refresh._rollouts)
        assert batch is not None
        picked = setting.refresh._at_positions(batch, torch.Generator().manual_seed(seed))
        chosen[positions] = picked.label_mask(2)
    count = {name: int(mask_BT.sum()) for name, mask_BT in chosen.items()}
    assert 0 < count["rejected"] < count["all"]
    assert count["mixed"] == min(2 * count["rejected"], count["all"])
    assert not (chosen["rejected"] & ~chosen["mixed"]).any() and not (chosen["mixed"] & ~chosen["all"]).any()


def test_ranks_end_with_the_same_drafter(tiny_target, policy, bundles, seed):
    """Gradients are averaged over ranks, also if one has no rollouts; both keep or reject together."""
    barrier, parts, lock = threading.Barrier(2), dict[int, torch.Tensor](), threading.Lock()

    def reduce(rank: int):
        def total(value: torch.Tensor) -> torch.Tensor:
            parts[rank] = value
            barrier.wait(60)
            result = parts[0] + parts[1]
            barrier.wait(60)
            return result

        return total

    settings = [Setting(tiny_target, policy, bundles["lm"], steps=3, reduce=reduce(rank)) for rank in (0, 1)]
    alone = Setting(tiny_target, policy, bundles["lm"], steps=3)
    for setting in (settings[1], alone):
        setting.refresh.observe(alone.rollouts(), 1)
    metrics: dict[int, dict[str, float]] = {}

    def run(rank: int) -> None:
        values = settings[rank].refresh.run(1)
        with lock:
            metrics[rank] = values

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = alone.refresh.run(1)
    for name in ("refresh/loss", "refresh/alpha_after", "refresh/kept"):
        assert metrics[0][name] == metrics[1][name] == pytest.approx(expected[name], abs=1e-6)
    assert equal(settings[0].drafter.state_dict(), settings[1].drafter.state_dict())
    assert equal(settings[0].drafter.state_dict(), alone.drafter.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "model.refresh.every is 0; it must be above 0"),
        ({"lr": -1.0}, "model.refresh.lr is -1.0; it must be above 0"),
        ({"positions": "wrong"}, "model.refresh.positions is 'wrong'; choose all, rejected or mixed"),
    ],
)
def test_wrong_options_are_refused(options, message, tiny_target, policy, bundles):
    """A value out of range is one line that names it."""
    with pytest.raises(UserError) as error:
        Setting(tiny_target, policy, bundles["lm"], **options)
    assert str(error.value) == message


def test_state_of_another_drafter_is_refused(tiny_target, policy, bundles):
    """A checkpoint of a run with another kind of drafter does not fit."""
    state = Setting(tiny_target, policy, bundles["medusa"]).refresh.state_dict()
    with pytest.raises(UserError, match="does not fit this run's"):
        Setting(tiny_target, policy, bundles["lm"], loss=TV()).refresh.load_state_dict(state)
