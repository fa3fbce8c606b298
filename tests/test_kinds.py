"""Every discovered drafter kind trains, exports, loads and decodes losslessly."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.drafters import EXAMPLE, KINDS, VARIANTS
from tests.support.equality import assert_few, compare
from tests.support.pauses import check_pauses
from trainkit import bundle
from trainkit.drafters.base import DraftBatch, Drafter, load_kind
from trainkit.errors import UserError
from trainkit.export.drafter import export_drafter, first_logits
from trainkit.losses.divergence import ForwardKL
from trainkit.models.target import FrozenTarget
from trainkit.modules.draft import agreement_by_position, rounds
from trainkit.runner import DynamicTree, Runner, Stats
from trainkit.runner.sampling import Sampling

SHAPES: dict[str, dict] = {
    "chain": {"depth": 2},
    "static": {"tree": ((0,), (1,), (0, 0), (0, 1), (1, 0))},
    "dynamic": {"tree": DynamicTree(3, 3, 7)},
}
PROMPTS = ["Natalia sold clips", "How many", "In May she sold 48 / 2 = 24 clips. Altogether", "x"]


@pytest.fixture(scope="module")
def teacher(tiny_target: Path) -> FrozenTarget:
    return FrozenTarget(tiny_target)


@pytest.fixture(params=VARIANTS)
def drafter(request: pytest.FixtureRequest, teacher: FrozenTarget, seed: int) -> Drafter:
    kind, options = VARIANTS[request.param]
    made = load_kind(kind)(teacher.shape(), **options)
    made.initialise(teacher)
    return made


def batch_for(teacher: FrozenTarget, drafter: Drafter) -> DraftBatch:
    """Two packed documents and padding; the first tokens of each do not count."""
    tokens = torch.randint(teacher.shape().decoder.vocab_size, (2, 24))
    document = torch.tensor([[0] * 10 + [1] * 12 + [-1] * 2, [0] * 24])
    positions = torch.cat([torch.arange(10), torch.arange(12), torch.arange(2)]), torch.arange(24)
    mask = (torch.stack(positions) > 2) & (document >= 0)
    hidden, taps = teacher.forward(tokens, torch.stack(positions), document, drafter.taps)
    return DraftBatch(tokens, torch.stack(positions), document, mask, taps, hidden, teacher.handle())


def own_text(teacher: FrozenTarget, drafter: Drafter, prompt: list[int], count: int) -> tuple[DraftBatch, list[int]]:
    """A batch whose labels are the target's own greedy continuation, and the tokens of that continuation."""
    plain = runner_for(teacher.folder, None).generate([prompt], max_new_tokens=count, ignore_end=True)[0].tokens
    tokens = torch.tensor([prompt + plain])
    positions, document = torch.arange(tokens.shape[1])[None], torch.zeros_like(tokens)
    hidden, taps = teacher.forward(tokens, positions, document, drafter.taps)
    return DraftBatch(tokens, positions, document, positions >= len(prompt), taps, hidden, teacher.handle()), plain


def train(drafter: Drafter, batch: DraftBatch, steps: int, lr: float) -> list[float]:
    """Trains on one repeated batch; returns the losses."""
    optimizer, losses = torch.optim.AdamW(drafter.parameters(), lr=lr, weight_decay=0.0), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = drafter(batch, ForwardKL()).mean
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def runner_for(target: Path, folder: Path | None, **options: object) -> Runner:
    return Runner.load(target, folder, max_batch=3, max_len=128, **options)  # type: ignore[arg-type]


def exported(drafter: Drafter, target: Path, out: Path) -> Path:
    export_drafter(drafter, out, tokenizer=target)
    return out


def test_discovery_finds_all_kinds() -> None:
    """Discovery finds the shipped kinds, that of the tests and the README's example."""
    assert {"lm", "twig", EXAMPLE} <= set(KINDS)


def test_readme_example_kind_is_below_100_lines() -> None:
    """The README's example kind has fewer than 100 lines."""
    source = inspect.getsource(sys.modules[load_kind(EXAMPLE).__module__])
    assert 20 < len(source.splitlines()) < 100


def test_unknown_kind_lists_the_known_ones() -> None:
    """An unknown kind is refused, and the error lists the known ones."""
    with pytest.raises(UserError, match=r"unknown drafter kind 'nope'; choose from .*lm.*twig"):
        load_kind("nope")


def test_loss_falls_on_one_repeated_batch(drafter: Drafter, teacher: FrozenTarget) -> None:
    """Trained on one repeated batch, every kind's loss falls by at least 30 %."""
    losses = train(drafter, batch_for(teacher, drafter), steps=30, lr=3e-3)
    assert losses[-1] < 0.7 * losses[0], losses


def test_target_gets_no_gradient(drafter: Drafter, teacher: FrozenTarget) -> None:
    """Training gives the target no gradient, and the drafter some."""
    drafter(batch_for(teacher, drafter), ForwardKL()).mean.backward()
    assert all(weight.grad is None for weight in teacher.model.parameters())
    assert any(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in drafter.parameters())


def test_bfloat16_target_trains_a_float32_drafter(drafter: Drafter, tiny_target: Path) -> None:
    """A float32 drafter can be trained on a bfloat16 target."""
    batch = batch_for(FrozenTarget(tiny_target, torch.bfloat16), drafter)
    drafter(batch, ForwardKL()).mean.backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in drafter.parameters())


def test_export_then_load_gives_equal_logits(drafter: Drafter, tiny_target: Path, tmp_path: Path) -> None:
    """Export and load give equal logits and configuration."""
    before = first_logits(drafter)
    folder = exported(drafter, tiny_target, tmp_path / "out")
    card = bundle.read(folder)
    again = load_kind(card.kind).load(folder, drafter.target, card.config)
    assert torch.equal(first_logits(again), before)
    assert again.config() == drafter.config()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("depth", [None, 1, 2])
def test_speculative_output_equals_plain_output(
    drafter: Drafter, tiny_target: Path, tmp_path: Path, temperature: float, depth: int | None
) -> None:
    """Speculative output equals plain output at every depth, greedy and sampled."""
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 5, "ignore_end": True}
    plain = runner_for(tiny_target, None).generate(PROMPTS, **options)
    runner = runner_for(tiny_target, exported(drafter, tiny_target, tmp_path / "out"))
    drafted = runner.generate(PROMPTS, depth=depth, **options)
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]
    assert Stats.merge(o.stats for o in drafted).tau >= 1 and all(o.stats.tau == 1 for o in plain)


def test_every_tree_and_batch_gives_plain_output(
    drafter: Drafter, teacher: FrozenTarget, tiny_target: Path, tmp_path: Path
) -> None:
    """Chain, static and dynamic tree; a little training on this text makes paths of every length accepted."""
    prompt = list(range(60, 70))
    batch, _ = own_text(teacher, drafter, prompt, 40)
    train(drafter, batch, steps=60, lr=3e-3)
    folder = exported(drafter, tiny_target, tmp_path / "out")
    prompts = [prompt, *(torch.randint(320, (n,)).tolist() for n in (1, 5, 9, 2, 7, 3, 4, 6))]
    accepted: dict[str, Stats] = {}
    for size in (1, 3, 8):
        runner = Runner.load(tiny_target, folder, max_batch=size, max_len=64)
        for temperature in (0.0, 0.7, 1.0):
            options = {"max_new_tokens": 16, "temperature": temperature, "seed": 5, "ignore_end": True}
            asked = prompts[: size + 1]
            plain = [o.tokens for o in runner.generate(asked, depth=0, **options)]
            for name, shape in SHAPES.items():
                drafted = runner.generate(asked, **shape, **options)
                texts = [o.tokens for o in drafted], plain
                ties = compare(runner.rounds.target, asked, *texts, Sampling(temperature), 5)
                assert_few(ties, 16 * len(asked))
                accepted[name] = Stats.merge([accepted.get(name, Stats()), *(o.stats for o in drafted)])
    assert all(sum(stats.accepted[1:]) > 0 for stats in accepted.values()), accepted


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_paused_drafter_catches_up_exactly(
    drafter: Drafter, teacher: FrozenTarget, tiny_target: Path, tmp_path: Path, temperature: float
) -> None:
    """Reading missed tokens leaves the state of drafting; a little training makes rounds of all lengths occur."""
    prompt = list(range(60, 70))
    train(drafter, own_text(teacher, drafter, prompt, 40)[0], steps=60, lr=3e-3)
    runner = Runner.load(tiny_target, exported(drafter, tiny_target, tmp_path / "out"), max_batch=3, max_len=96)
    prompts = [prompt, [3], list(range(5, 12)), [9, 8]]
    check_pauses(runner, prompts, 2, 8, max_new_tokens=30, temperature=temperature, seed=3, ignore_end=True)


def test_trained_drafter_is_accepted_on_its_text(
    drafter: Drafter, teacher: FrozenTarget, tiny_target: Path, tmp_path: Path
) -> None:
    """Trained on the target's own greedy text, it drafts nearly all of it: shift, taps and positions agree."""
    prompt = list(range(20, 28))
    batch, plain = own_text(teacher, drafter, prompt, 40)
    train(drafter, batch, steps=600, lr=5e-3)
    runner = runner_for(tiny_target, exported(drafter, tiny_target, tmp_path / "out"))
    drafted = runner.generate([prompt], max_new_tokens=40, ignore_end=True, depth=2)[0]
    assert drafted.tokens == plain
    # the worst kind predicts 0.9 of these tokens; a kind that is off by one position predicts almost none
    assert drafted.stats.tau > 0.8 * 3, drafted.stats


@pytest.mark.parametrize("steps", [0, 40])
def test_simulated_rounds_equal_served_rounds(
    drafter: Drafter, teacher: FrozenTarget, tiny_target: Path, tmp_path: Path, steps: int
) -> None:
    """On the target's own greedy text the tau of validation equals the runner's exactly, round for round."""
    prompt, depth = list(range(40, 52)), 2
    batch, _ = own_text(teacher, drafter, prompt, 60)
    label = batch.positions_BT > len(prompt)  # prefill emits the first token
    batch = replace(batch, mask_BT=label)
    train(drafter, batch, steps=steps, lr=3e-3)
    with torch.no_grad():
        agreement = agreement_by_position(drafter(batch, ForwardKL().measuring()), batch, depth)
    assert agreement is not None, "output.per_token must contain the agreement of each proposal (losses/output.py)"
    simulated = rounds(agreement, label, batch.document_BT)
    runner = runner_for(tiny_target, exported(drafter, tiny_target, tmp_path / "out"))
    stats = runner.generate([prompt], max_new_tokens=60, ignore_end=True, depth=depth)[0].stats
    assert (simulated["rounds"], simulated["emitted"]) == (stats.rounds, round(stats.rounds * stats.tau))
    assert steps == 0 or stats.tau > 1, "nothing was accepted"


@pytest.mark.gpu
def test_captured_rounds_equal_eager(drafter: Drafter, tiny_target: Path, tmp_path: Path) -> None:
    """Rounds captured as CUDA graphs give the output of eager ones."""
    folder = exported(drafter, tiny_target, tmp_path / "out")
    options = {"max_new_tokens": 40, "temperature": 0.8, "seed": 5, "ignore_end": True}
    runners = [runner_for(tiny_target, folder, device="cuda", capture=capture) for capture in (False, True)]
    for shape in ({}, *SHAPES.values()):
        outputs = [runner.generate(PROMPTS, **shape, **options) for runner in runners]
        assert [o.tokens for o in outputs[0]] == [o.tokens for o in outputs[1]]
