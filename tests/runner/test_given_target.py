"""The losslessness table on a target and draft of your own: long, and what a serving engineer would want to see.

    TRAINKIT_TARGET=DIR TRAINKIT_DRAFTER=DIR TRAINKIT_PROMPTS=FILE ./launch.sh test -m slow -s tests/runner/test_given_target.py

Several drafters, DIR:DIR, are taken one after the other. Without these variables a tiny random target is taken, and a draft
made of two of its four layers. `-s` shows the figures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.equality import assert_few, compare
from tests.support.served_acceptance import served_acceptance
from trainkit.data.text.prompts import read_prompts
from trainkit.drafters.lm import LMDraft
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import DynamicTree, Runner, Stats
from trainkit.runner.sampling import Sampling

pytestmark = pytest.mark.slow
QUESTIONS = int(os.environ.get("TRAINKIT_QUESTIONS", "100"))
NEW_TOKENS = 128


TARGET, DRAFTERS = os.environ.get("TRAINKIT_TARGET"), os.environ.get("TRAINKIT_DRAFTER", "").split(":")
SHAPES = {
    "chain": {"depth": 3},
    "static tree": {"tree": [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)]},
    "dynamic tree": {"tree": DynamicTree(depth=3, top_k=3, nodes=8)},
}
POLICIES = {
    **{
        name: {"policy": name}
        for name in ("fixed", "confidence:0.6", "predictor:0.6", "logistic:0.6", "cost", "cost:logistic", "cost-blind", "ema")
    },
    "cost, dynamic tree": {"policy": "cost", "tree": SHAPES["dynamic tree"]["tree"]},
    "fixed, dynamic tree": {"policy": "fixed", "tree": SHAPES["dynamic tree"]["tree"]},
}


@pytest.fixture(scope="module", params=DRAFTERS, ids=lambda folder: Path(folder).name or "tiny")
def folders(request: pytest.FixtureRequest, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if TARGET and request.param:
        return Path(TARGET), Path(request.param)
    draft = LMDraft(target_shape(tiny_target), num_layers=2)
    draft.initialise(FrozenTarget(tiny_target))
    folder = tmp_path_factory.mktemp("drafts") / "two-layers"
    export_drafter(draft, folder, tokenizer=tiny_target)
    return tiny_target, folder


@pytest.fixture(scope="module")
def runner(folders: tuple[Path, Path]) -> Runner:
    return Runner.load(*folders, max_batch=8, max_len=512)


@pytest.fixture(scope="module")
def prompts(runner: Runner) -> list[list[int]]:
    source = os.environ.get("TRAINKIT_PROMPTS")
    if source:
        return [prompt for prompt in read_prompts(source, runner.tokenizer, QUESTIONS + 20) if len(prompt) < 380][:QUESTIONS]
    generator = torch.Generator().manual_seed(0)
    V = runner.shape.decoder.vocab_size
    return [torch.randint(V, (int(n),), generator=generator).tolist() for n in torch.randint(4, 60, (QUESTIONS,))]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_every_depth_decodes_as_plain_decoding(runner: Runner, prompts: list[list[int]], temperature: float) -> None:
    """At every depth the text is that of plain decoding."""
    options = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": 3}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    decisions = sum(map(len, plain))
    deepest = runner.drafter.max_depth if runner.drafter else None
    for depth in (depth for depth in (1, 2, 4, 8) if deepest is None or depth <= deepest):
        outs = runner.generate(prompts, depth=depth, **options)
        ties = compare(runner.rounds.target, prompts, [out.tokens for out in outs], plain, Sampling(temperature), seed=3)
        stats = Stats.merge(out.stats for out in outs)
        print(
            f"\ntemperature {temperature} depth {depth}: {len(prompts)} prompts, {decisions} tokens, "
            f"equal {len(prompts) - len(ties)}, ties {len(ties)}, tau {stats.tau:.3f}"
        )
        assert_few(ties, decisions)


def check_ways(
    ways: Mapping[str, Any],
    runner: Runner,
    folders: tuple[Path, Path],
    prompts: list[list[int]],
    temperature: float,
    batch: int,
    seed: int,
) -> None:
    """Each of these options of `generate` gives the tokens of plain decoding, over so many rows."""
    options = {"max_new_tokens": NEW_TOKENS, "temperature": temperature, "seed": seed}
    plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    batched = Runner.load(*folders, max_batch=batch, max_len=512)
    for name, way in ways.items():
        if name.startswith("predictor") and batched.predictor is None:
            continue
        outs = batched.generate(prompts, **way, **options)
        ties = compare(runner.rounds.target, prompts, [out.tokens for out in outs], plain, Sampling(temperature), seed=seed)
        stats = Stats.merge(out.stats for out in outs)
        print(
            f"\n{folders[1].name}, temperature {temperature}, batch {batch}, {name}: {len(prompts)} prompts, "
            f"{sum(map(len, plain))} tokens, equal {len(prompts) - len(ties)}, ties {len(ties)}, tau {stats.tau:.3f}, "
            f"{stats.paused} of {stats.rounds} rounds without a draft"
        )
        assert_few(ties, sum(map(len, plain)))


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_every_tree_and_batch_decodes_as_plain_decoding(
    runner: Runner, folders: tuple[Path, Path], prompts: list[list[int]], temperature: float, batch: int
) -> None:
    """For every tree and batch size the text is that of plain decoding."""
    check_ways(SHAPES, runner, folders, prompts, temperature, batch, seed=4)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_every_policy_decodes_as_plain_decoding(
    runner: Runner, folders: tuple[Path, Path], prompts: list[list[int]], temperature: float, batch: int
) -> None:
    """Under every policy the text is that of plain decoding."""
    check_ways(POLICIES, runner, folders, prompts, temperature, batch, seed=5)


def test_greedy_tokens_equal_transformers(runner: Runner, prompts: list[list[int]], folders: tuple[Path, Path]) -> None:
    """Greedy tokens equal those of transformers."""

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        row = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=list(runner.shape.end_ids) or None,
            pad_token_id=0,
        )
        theirs.append(row[0, len(prompt) :].tolist())
    ours = [out.tokens for out in runner.generate(prompts, max_new_tokens=NEW_TOKENS, depth=3)]
    ties = compare(runner.rounds.target, prompts, ours, theirs, Sampling())
    print(f"\ntransformers greedy: {len(prompts)} prompts, {sum(map(len, ours))} tokens, ties {len(ties)}")
    assert_few(ties, sum(map(len, ours)))


@pytest.mark.parametrize("verify", ["coupled", "residual"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_served_acceptance_equals_the_exact_value(
    runner: Runner, prompts: list[list[int]], verify: str, temperature: float
) -> None:
    """The observed acceptance is within three standard errors of the exact one."""
    found = served_acceptance(
        runner, prompts[:40], max_new_tokens=NEW_TOKENS, temperature=temperature, verify=verify, depth=3, seed=3
    )
    print(
        f"\n{verify} temperature {temperature}: {found.evaluated} nodes judged, accepted {found.observed:.4f}, exact "
        f"{found.expected:.4f}, deviation {found.deviation:+.2f} standard errors"
    )
    assert abs(found.deviation) <= 3


def test_target_as_its_own_draft_is_always_accepted(folders: tuple[Path, Path], prompts: list[list[int]]) -> None:
    """A draft that is the target is always accepted."""
    runner = Runner.load(folders[0], folders[0], max_batch=8, max_len=512)
    stats = Stats.merge(out.stats for out in runner.generate(prompts[:10], max_new_tokens=64, depth=4))
    print(f"\ntarget as its own draft: tau {stats.tau} over {stats.rounds} rounds")
    assert stats.accepted[:4] == [0, 0, 0, 0]
