"""Captured rounds on a GPU equal eager ones, token for token. TF32 stays off, so both compute the same float32 products."""

import copy

import pytest
import torch

from tests.support.models import SIBLINGS, lm_draft, pair, ragged_prompts
from trainkit.runner import DynamicTree, Runner

pytestmark = pytest.mark.gpu
GROWING = DynamicTree(4, 3, 8)


def on_gpu(capture: bool, runner: Runner, max_len: int = 600) -> Runner:
    target = copy.deepcopy(runner.rounds.target).cuda()
    draft = None if runner.drafter is None else lm_draft(runner.shape, copy.deepcopy(runner.drafter.decoder)).cuda()
    return Runner(target, draft, runner.shape, max_batch=5, max_len=max_len, capture=capture)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}]
)
@pytest.mark.parametrize(
    "shaped", [{"depth": 0}, {"depth": 4}, {"tree": SIBLINGS}, {"tree": GROWING}], ids=["plain", "chain", "tree", "dynamic"]
)
def test_captured_equals_eager(shaped, settings, seed):
    """Captured rounds give the output of eager ones."""
    base = pair()
    captured, eager = on_gpu(True, base), on_gpu(False, base)
    for count in (1, 5, 12):
        prompts = ragged_prompts(count)
        outs = [r.generate(prompts, max_new_tokens=24, seed=seed, **shaped, **settings) for r in (captured, eager)]
        # batches are padded to powers of two when captured: only ties may differ
        differ = sum(a.tokens != b.tokens for a, b in zip(*outs, strict=True))
        assert differ <= (1 if count == 12 else 0)
        assert [len(out.tokens) for out in outs[0]] == [len(out.tokens) for out in outs[1]] or differ


def test_finished_long_row_does_not_disturb_others(seed):
    """A finished long row stays behind as padding of the next graph."""
    base = pair(ends=(), max_len=600)
    captured, eager = on_gpu(True, base), on_gpu(False, base)
    prompts = [[1, 2, 3], [5, 6], [8], [4] * 590, [7] * 595]
    for _ in range(2):
        outs = [r.generate(prompts, max_new_tokens=40, tree=SIBLINGS, temperature=1.0, seed=seed) for r in (captured, eager)]
        assert [out.tokens for out in outs[0]] == [out.tokens for out in outs[1]]
        prompts = prompts[:3]


def test_graphs_survive_calls_updates_and_end_ids(seed):
    """Captured graphs stay valid over calls, weight updates and other end ids."""
    base = pair(ends=(7,))
    captured, eager = on_gpu(True, base), on_gpu(False, base)
    prompts = ragged_prompts(5)
    for step in range(3):
        for ignore_end in (False, True):
            outs = [
                r.generate(prompts, max_new_tokens=16, depth=3, temperature=1.0, seed=seed + step, ignore_end=ignore_end)
                for r in (captured, eager)
            ]
            assert [out.tokens for out in outs[0]] == [out.tokens for out in outs[1]]
        new = torch.randn_like(base.rounds.target.embed.weight).cuda() * 0.35
        for runner in (captured, eager):
            runner.update([("model.embed_tokens.weight", new)])
    assert captured.scheduler.graphs is not None and captured.scheduler.graphs._captured


@pytest.mark.parametrize("verify", ["residual", "typical"])
@pytest.mark.parametrize("tree", [SIBLINGS, GROWING], ids=["tree", "dynamic"])
def test_captured_residual_and_typical_equal_eager(tree, verify, seed):
    """Captured rounds with residual and typical verification equal eager ones."""
    base = pair(ends=())
    prompts = ragged_prompts(4)
    outs = [
        on_gpu(capture, base).generate(prompts, max_new_tokens=16, temperature=1.0, seed=seed, verify=verify, tree=tree)
        for capture in (True, False)
    ]
    assert [out.tokens for out in outs[0]] == [out.tokens for out in outs[1]]


def test_one_capture_serves_all_dynamic_trees(seed):
    """Which node hangs where is data: rounds over other texts replay the same graph."""
    runner = on_gpu(True, pair(ends=()))
    for count in range(4):
        runner.generate(ragged_prompts(1), max_new_tokens=40, temperature=1.0, seed=seed + count, tree=GROWING)
    assert len(runner.scheduler.graphs._captured) == 1
