"""The lossless promise: speculative output is plain seeded output, token for token, for any drafter, tree, depth and batch."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.support.drafters import VARIANTS
from tests.support.equality import Tie, assert_few, compare, exact_logits
from tests.support.models import BUSHY, END, SHAPE, SIBLINGS, lm_draft, near, pair, ragged_prompts, random_decoder
from trainkit.compress.masks import Pattern, mask_from_scores, parse_pattern
from trainkit.compress.quantise import Grid, quantise
from trainkit.drafters.base import load_kind
from trainkit.layers.linear import Linear
from trainkit.layers.packed import Packed
from trainkit.models.shape import TargetShape
from trainkit.runner import DynamicTree, Runner, Stats
from trainkit.runner.sampling import CHOICE, Sampling, gumbel, request_keys

GROWING = DynamicTree(4, 3, 8)
TREES = {"depth1": 1, "depth2": 2, "depth4": 4, "depth8": 8, "siblings": SIBLINGS, "bushy": BUSHY, "growing": GROWING}
SAMPLINGS = [
    Sampling(0.0),
    Sampling(0.7),
    Sampling(1.0),
    Sampling(0.7, top_p=0.8),
    Sampling(1.0, top_p=0.9),
    Sampling(1.0, top_k=5),
    Sampling(0.7, top_k=7, top_p=0.9),
]


def shaped(tree):
    return {"depth": tree} if isinstance(tree, int) else {"tree": tree}


def settings(sampling):
    return {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}


@pytest.mark.parametrize("noise", [0.0, 0.03, 2.0], ids=["same", "near", "far"])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_speculative_equals_plain_token_for_token(noise, tree, seed):
    """Speculative output equals plain output token for token, for every draft, tree and sampling."""
    runner = pair(noise=noise)
    prompts = ragged_prompts(18)
    ties: list[Tie] = []
    decisions = 0
    for sampling in SAMPLINGS if noise == 0.03 else SAMPLINGS[2:5:2]:
        plain = runner.generate(prompts, max_new_tokens=20, seed=seed, depth=0, **settings(sampling))
        drafted = runner.generate(prompts, max_new_tokens=20, seed=seed, **settings(sampling), **shaped(tree))
        texts = [out.tokens for out in drafted], [out.tokens for out in plain]
        ties += compare(runner.rounds.target, prompts, *texts, sampling, seed)
        decisions += sum(len(out.tokens) for out in plain)
        assert [out.finish for out in drafted] == [out.finish for out in plain] or ties
        if noise == 0.0 and tree is not GROWING:
            # a draft that is the target proposes the target's own choice, under noise as well: every full round accepts all
            depth = tree if isinstance(tree, int) else max(map(len, tree))
            total = Stats.merge(out.stats for out in drafted)
            assert total.accepted[depth:] == [total.rounds] or ties
    assert_few(ties, decisions)


@pytest.mark.parametrize("sampling", SAMPLINGS[:1] + SAMPLINGS[2:4])
def test_plain_decoding_is_the_argmax_of_noisy_logits(sampling, seed):
    """From the first token on, which the prefill chooses: the noise is that of the token's own absolute position."""
    runner = pair(noise=None)
    prompts = ragged_prompts(5)
    outs = runner.generate(prompts, max_new_tokens=12, seed=seed, ignore_end=True, n=2, **settings(sampling))
    expected = []
    for i, out in enumerate(outs):
        prompt = prompts[i // 2]
        logits = exact_logits(runner.rounds.target, prompt + out.tokens)[len(prompt) - 1 : -1]
        scores = sampling.process(logits)
        if not sampling.greedy:
            keys = torch.tensor([request_keys(seed, i // 2, i % 2)], dtype=torch.int32)
            positions = torch.arange(len(prompt), len(prompt) + 12)[None]
            scores = scores + gumbel(keys, positions, torch.arange(48), CHOICE)[0]
        expected.append(scores.argmax(-1).tolist())
    ties = compare(runner.rounds.target, prompts, [out.tokens for out in outs], expected, sampling, seed, n=2)
    assert_few(ties, 120)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_output_does_not_depend_on_the_batch(temperature, seed):
    """A prompt's output does not depend on batch size, row or other prompts."""
    runner = pair()
    prompts = ragged_prompts(9)
    alone = []
    for max_batch in (1, 2, 3, 5, 8, 16):
        runner.scheduler.max_batch = max_batch
        outs = runner.generate(prompts, max_new_tokens=20, temperature=temperature, seed=seed, depth=4)
        alone = alone or outs
        compare(runner.rounds.target, prompts, [o.tokens for o in outs], [o.tokens for o in alone], Sampling(temperature), seed)
    # the same prompt at the same place among quite other prompts, shorter and longer ones
    others = ragged_prompts(9)
    for place in (0, 4, 8):
        crowd = [*others[:place], prompts[place], *others[place + 1 :]]
        outs = runner.generate(crowd, max_new_tokens=20, temperature=temperature, seed=seed, depth=4)
        mixed = [out.tokens for out in alone]
        mixed[place] = outs[place].tokens
        compare(runner.rounds.target, prompts, mixed, [o.tokens for o in alone], Sampling(temperature), seed)


@pytest.mark.parametrize("noise", [0.0, 0.03], ids=["same", "near"])
def test_rows_join_and_leave_at_every_size(noise, seed):
    """Rows end at different rounds because their prompts leave different room; others queue for their places, rows move."""
    runner = pair(noise=noise, ends=())
    sizes = set()
    step = runner.rounds.drafter.step

    def watched(state, *rest):
        sizes.add(state["previous"].shape[0])
        return step(state, *rest)

    runner.rounds.drafter.step = watched
    room = [1 + 4 * k for k in torch.randperm(8).tolist()] + [1 + 4 * k for k in range(12)]
    prompts = [torch.randint(0, 48, (runner.max_len - n,)).tolist() for n in room]
    for temperature in (0.0, 1.0):
        plain = runner.generate(prompts, max_new_tokens=64, temperature=temperature, seed=seed, depth=0)
        for tree in (3, GROWING):
            drafted = runner.generate(prompts, max_new_tokens=64, temperature=temperature, seed=seed, **shaped(tree))
            assert [len(out.tokens) for out in drafted] == room
            texts = [o.tokens for o in drafted], [o.tokens for o in plain]
            assert_few(compare(runner.rounds.target, prompts, *texts, Sampling(temperature), seed), 2 * sum(room))
    if noise == 0.0:  # every round accepts all: the queue empties, then one row leaves after the other
        assert sizes == set(range(1, 9))


def test_samples_differ_and_do_not_depend_on_n(seed):
    """Samples of one prompt differ, and do not depend on how many are drawn."""
    runner = pair(ends=())
    prompts = ragged_prompts(3)
    three = runner.generate(prompts, max_new_tokens=16, temperature=1.0, seed=seed, n=3, depth=2)
    one = runner.generate(prompts, max_new_tokens=16, temperature=1.0, seed=seed, depth=2)
    five = runner.generate(prompts, max_new_tokens=16, temperature=1.0, seed=seed, n=5, depth=0)
    for i in range(3):
        same = [three[3 * i + k].tokens for k in range(3)]
        assert len({tuple(tokens) for tokens in same}) == 3
        assert same[0] == one[i].tokens
        assert same == [five[5 * i + k].tokens for k in range(3)]
    other = runner.generate(prompts, max_new_tokens=16, temperature=1.0, seed=seed + 1, depth=2)
    assert all(a.tokens != b.tokens for a, b in zip(one, other, strict=True))


def test_equal_prompts_sample_differently(seed):
    """Equal prompts in one call get different samples."""
    runner = pair(ends=())
    outs = runner.generate([[3, 1, 4]] * 8, max_new_tokens=16, temperature=1.0, seed=seed, depth=2)
    assert len({tuple(out.tokens) for out in outs}) == 8


def test_trimmed_draft_vocabulary_is_lossless(seed):
    """Proposals over some ids only, in an order that is not ascending, map back to the right ids and noise."""
    runner = pair(ends=())
    ids = torch.randperm(48)[:20]
    drafter = runner.rounds.drafter
    whole = drafter.step

    def trimmed(*args):
        out = whole(*args)
        return type(out)(out.logits_BFK[..., ids], ids, out.hidden_BFD)

    drafter.step = trimmed
    prompts = ragged_prompts(12)
    kept = []
    for tree, sampling in itertools.product((3, SIBLINGS, GROWING), (Sampling(0.0), Sampling(1.0), Sampling(0.8, top_p=0.9))):
        plain = runner.generate(prompts, max_new_tokens=16, seed=seed, depth=0, **settings(sampling))
        drafted = runner.generate(prompts, max_new_tokens=16, seed=seed, **settings(sampling), **shaped(tree))
        ties = compare(runner.rounds.target, prompts, [o.tokens for o in drafted], [o.tokens for o in plain], sampling, seed)
        assert_few(ties, 192)
        kept += [out.stats for out in drafted]
    assert sum(stats.tau for stats in kept) / len(kept) > 1.1  # proposals that were wrongly mapped would hardly be accepted


def test_one_target_forward_per_round(seed):
    """A round calls the target once for the whole batch."""
    runner = pair(ends=())
    calls = []
    runner.rounds.target.register_forward_hook(lambda module, args, out: calls.append(tuple(args[0].shape)))
    outs = runner.generate(ragged_prompts(6), max_new_tokens=20, temperature=1.0, seed=seed, tree=SIBLINGS)
    prefills, verified = calls[:6], calls[6:]
    assert all(shape[0] == 1 for shape in prefills)
    assert all(shape[1] == len(SIBLINGS) + 1 for shape in verified)
    assert len(verified) == max(out.stats.rounds + out.stats.cut_rounds for out in outs)
    assert verified[0][0] == 6


def test_prompts_longer_than_a_prefill_chunk(seed):
    """Prompts longer than a prefill chunk decode as one forward without a cache."""
    runner = pair(max_len=700, ends=())
    prompts = [torch.randint(0, 48, (n,)).tolist() for n in (511, 512, 513, 640, 3)]
    plain = runner.generate(prompts, max_new_tokens=12, depth=0)
    drafted = runner.generate(prompts, max_new_tokens=12, depth=4)
    ties = compare(runner.rounds.target, prompts, [o.tokens for o in drafted], [o.tokens for o in plain], Sampling())
    assert_few(ties, 60)
    for prompt, out in zip(prompts, plain, strict=True):  # and against one forward without a cache
        logits = exact_logits(runner.rounds.target, prompt + out.tokens[:-1])[len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(out.tokens)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() < 1e-4


def compressed_pair(make: Grid | Pattern, variant: str) -> Runner:
    """A random target, pruned or packed on a grid, with a drafter near the dense target, or a random one of another kind."""
    shape = replace(SHAPE, hidden_size=64, intermediate_size=96, head_dim=16)
    target, full = random_decoder(shape, 0.25), TargetShape(shape, (END,))
    draft = lm_draft(full, near(target, 0.03))
    if variant != "lm":
        kind, options = VARIANTS[variant]
        draft = load_kind(kind)(full, **options)
    for part in target.modules():
        if isinstance(part, Linear) and isinstance(make, Pattern):
            part.weight.mul_(mask_from_scores(part.weight.abs(), make))
        elif isinstance(part, Linear):
            found = quantise(part.weight, make)
            part.set_packed(Packed.from_codes(found.codes_RK, found.scale_RG, found.zero_RG, make.bits, make.kind))
    return Runner(target, draft, full, max_batch=3, max_len=64)


GRIDS = [Grid(8), Grid(4, 32), Grid(4, scale_dtype=torch.bfloat16), Grid(8, 16, symmetric=False), Grid(8, kind="float")]


@pytest.mark.parametrize("variant", ["lm", "eagle", "hydra++"])
@pytest.mark.parametrize("make", [*GRIDS, parse_pattern("2:4")], ids=str)
def test_compressed_target_equals_its_plain_decoding(make, variant, seed):
    """Speculative output of a packed or pruned target is its own plain output, with chains and trees, token for token."""
    runner, prompts, texts, decisions = compressed_pair(make, variant), ragged_prompts(4), 0, 0
    for sampling in SAMPLINGS[:3:2]:
        options = {"max_new_tokens": 12, "seed": seed} | settings(sampling)
        plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
        for tree in (3, SIBLINGS, DynamicTree(3, 2, 6)):
            drafted = runner.generate(prompts, **options, **shaped(tree))
            differing = sum(out.tokens != own for out, own in zip(drafted, plain, strict=True))
            assert not differing or tree != 3  # a chain's layers have the very bits of plain decoding
            texts += differing
            decisions += sum(map(len, plain))
    # In a tree a token's keys lie in other slots, so attention differs by the order of a sum; that rarely changes a rounding.
    assert texts <= 1, f"{texts} texts differ in {decisions} decisions"


@pytest.mark.slow
def test_many_prompts_many_shapes_few_ties(seed):
    """Hundreds of prompts over head layouts, drafts and trees: no difference but ties, at most one in 1e5 decisions."""
    ties: list[Tie] = []
    decisions = 0
    shapes = [
        SHAPE,
        replace(SHAPE, num_kv_heads=4, tied=False),
        replace(SHAPE, num_kv_heads=1, qkv_bias=True),
        replace(SHAPE, qk_norm=True, head_dim=16),
    ]
    for shape in shapes:
        runner = pair(shape, draft_layers=1, noise=0.02)
        prompts = ragged_prompts(100)
        for sampling in SAMPLINGS:
            plain = runner.generate(prompts, max_new_tokens=32, seed=seed, depth=0, ignore_end=True, **settings(sampling))
            for tree in (1, 4, BUSHY, GROWING):
                drafted = runner.generate(
                    prompts, max_new_tokens=32, seed=seed, ignore_end=True, **settings(sampling), **shaped(tree)
                )
                texts = [out.tokens for out in drafted], [out.tokens for out in plain]
                ties += compare(runner.rounds.target, prompts, *texts, sampling, seed)
                decisions += sum(len(out.tokens) for out in plain)
    assert_few(ties, decisions)
