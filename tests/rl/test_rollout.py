"""Rollouts: the sampler's log-probabilities are the trainer's, whatever is drafted; draws depend on nothing but their keys."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from tests.support.drafters import VARIANTS
from tests.support.equality import assert_few, compare
from tests.support.models import SIBLINGS, lm_draft, near, pair, ragged_prompts, random_decoder
from tests.support.targets import make_target
from trainkit.drafters.base import load_kind
from trainkit.errors import UserError, note
from trainkit.models.load import hf_views, load_decoder
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.rl.correction import mismatch
from trainkit.rl.rollout import RETRY, Rollouts
from trainkit.rl.types import Task
from trainkit.rl.weights import policy_tensors
from trainkit.runner import Runner
from trainkit.runner.sampling import Sampling
from trainkit.runner.stats import Stats


def tasks_of(prompts, first=0):
    return [Task(first + index, prompt, "") for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target with logits of about 3, because the rounding of float32 grows with them and must stay below 1e-5."""
    return make_target(tmp_path_factory.mktemp("policy") / "target", std=0.1)


@pytest.fixture(scope="module")
def engines(folder):
    """A runner for each variant of the kinds, with a drafter that is near its start."""
    made = {}

    def get(variant):
        if variant not in made:
            name, options = VARIANTS[variant]
            drafter = load_kind(name)(target_shape(folder), **options)
            drafter.initialise(FrozenTarget(folder))
            for parameter in drafter.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
            made[variant] = Runner(load_decoder(folder), drafter, target_shape(folder), max_len=96)
        return made[variant]

    return get


def trained(model, groups, temperature):
    """For each response, the log-probabilities of its tokens by transformers at this temperature, and the sampler's."""
    found = []
    for group in groups:
        for response in group.responses:
            tokens = group.task.tokens + response.tokens
            with torch.no_grad():
                logits_TV = model(torch.tensor([tokens])).logits[0, len(group.task.tokens) - 1 : -1] / temperature
            log_p = logits_TV.log_softmax(-1).gather(1, torch.tensor(response.tokens)[:, None])[:, 0]
            found.append((log_p, torch.tensor(response.logprobs)))
    return found


def gap(model, groups, temperature):
    """Largest difference of the two."""
    return max(float((old - sampler).abs().max()) for old, sampler in trained(model, groups, temperature))


def mean_mismatch(model, groups, temperature):
    """Mean difference and mean k3 per token, as the training reports them."""
    pairs = [pad_sequence(list(side), batch_first=True) for side in zip(*trained(model, groups, temperature), strict=True)]
    lengths = [len(response.tokens) for group in groups for response in group.responses]
    mask_RT = pad_sequence([torch.ones(length) for length in lengths], batch_first=True)
    sums = mismatch(*pairs, mask_RT)
    return float(sums["abs"] / sums["tokens"]), float(sums["k3"] / sums["tokens"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_equal_the_trainers(variant, shape, temperature, engines, folder, seed):
    """Within 1e-5 for every token, before and after an update: the importance ratio of the first minibatch is 1."""
    runner = engines(variant)
    wide = runner.drafter.max_width is None or runner.drafter.max_width > 1
    shaped = {"tree": SIBLINGS} if shape == "tree" and wide else {"depth": 2}
    rollouts = Rollouts(runner, 2, 12, temperature, seed, **shaped)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for step in range(2):
        groups = rollouts.generate(tasks_of(ragged_prompts(3, 320)), step)
        # rounding of float32 logits of a few units is about 3e-6
        assert gap(model, groups, temperature) <= 1e-5
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.01 * torch.randn_like(weight)
        rollouts.update(policy_tensors(model))
    rollouts.update(hf_views(load_decoder(folder)).items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_equals_a_fresh_runner(variant, engines, folder, seed):
    """After an update, responses, log-probabilities and acceptance are, bit for bit, those of a runner loaded with the weights.

    So nothing that old weights computed is used again, and what a drafter shares with its target has followed.
    """
    runner, model = engines(variant), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tasks, found = tasks_of(ragged_prompts(3, 320)), []
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    fresh = Runner(load_decoder(folder), runner.drafter, runner.shape, max_len=96)
    fresh.update(policy_tensors(model))
    used = Rollouts(runner, 2, 12, seed=seed, depth=2)
    old = used.generate(tasks, 0)
    used.update(policy_tensors(model))
    for rollouts in (used, Rollouts(fresh, 2, 12, seed=seed, depth=2)):
        groups = rollouts.generate(tasks, 0)
        found.append([(one.tokens, one.logprobs, one.stats) for group in groups for one in group.responses])
    assert found[0] == found[1]
    assert found[0] != [(one.tokens, one.logprobs, one.stats) for group in old for one in group.responses]
    used.update(hf_views(load_decoder(folder)).items())


def test_planted_mismatches_are_caught(folder, seed):
    """Stale weights, one stale layer, another temperature and shifted tokens are far above the 1e-6 nats of a right sampler."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rollouts = Rollouts(Runner(load_decoder(folder), None, target_shape(folder), max_len=96), 4, 12, 0.7, seed)
    tasks = tasks_of(ragged_prompts(4, 320))

    def right(groups):
        mean, k3 = mean_mismatch(model, groups, 0.7)
        return mean <= 2e-6 and k3 <= 1e-9

    def wrong(groups, temperature=0.7):
        mean, k3 = mean_mismatch(model, groups, temperature)
        return mean > 1e-3 and k3 > 1e-6

    groups = rollouts.generate(tasks, 0)
    assert right(groups) and wrong(groups, 1.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    assert wrong(groups) and wrong(rollouts.generate(tasks, 1))
    rollouts.update((name, value) for name, value in policy_tensors(model) if "layers.2." not in name)
    assert wrong(rollouts.generate(tasks, 1))
    rollouts.update(policy_tensors(model))
    groups = rollouts.generate(tasks, 1)
    assert right(groups)
    for group in groups:
        for response in group.responses:
            response.logprobs = response.logprobs[1:] + response.logprobs[:1]
    assert wrong(groups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_copied_weight_is_named(dtype, folder, seed):
    """A tensor of which only a part was copied is the one that `differing` names."""
    rollouts = Rollouts(Runner.load(folder, dtype=dtype, max_len=96), 1, 4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
    assert len(rollouts.differing(policy_tensors(model))) == len(list(model.parameters()))
    rollouts.update(policy_tensors(model))
    assert not rollouts.differing(policy_tensors(model))
    name = "model.layers.1.self_attn.k_proj.weight"
    view = hf_views(rollouts.runner.rounds.target)[name]
    view[len(view) // 2 :] += 0.01 * torch.randn_like(view[len(view) // 2 :])
    assert rollouts.differing(policy_tensors(model)) == [name]
    rollouts.update(policy_tensors(model))
    assert not rollouts.differing(policy_tensors(model))
    assert rollouts.differing([("lm_head.weight", model.get_input_embeddings().weight), ("bogus", view)]) == ["bogus"]


def test_responses_depend_on_their_keys_alone(seed):
    """They are the same with and without a draft, in any number of rows, in any order, and split between two engines."""
    draw = random.Random(seed)
    runner, prompts = pair(max_len=96, max_batch=8), ragged_prompts(6)
    target, shape, tasks = runner.rounds.target, runner.shape, tasks_of(prompts)
    first = Rollouts(runner, 3, 20, 0.9, seed, depth=3)
    plain, found = first.generate(tasks, 0), []
    for speculate, max_batch, shaped in [("off", 8, {}), ("on", 1, {"tree": SIBLINGS}), ("auto", 2, {"policy": "ema"})]:
        other = Runner(target, runner.drafter, shape, max_batch=max_batch, max_len=96)
        found.append(Rollouts(other, 3, 20, 0.9, seed, speculate, **shaped).generate(tasks, 0))
    shuffled = draw.sample(tasks, len(tasks))
    found.append(sorted(first.generate(shuffled, 0), key=lambda group: group.task.index))
    parts = [first.generate(shuffled[:2], 0), Rollouts(Runner(target, None, shape), 3, 20, 0.9, seed).generate(shuffled[2:], 0)]
    found.append(sorted(parts[0] + parts[1], key=lambda group: group.task.index))
    texts = [[one.tokens for group in groups for one in group.responses] for groups in [plain, *found]]
    for other in texts[1:]:
        assert_few(compare(target, prompts, other, texts[0], Sampling(0.9), seed, n=3), 18 * 20)


def test_step_seed_task_and_sample_fix_the_draws(seed):
    """Another step, seed, index or sample gives other responses; the same ones give the same."""
    runner = pair(noise=None, ends=())
    at = lambda index: [Task(index, [1, 2, 3], "")]
    rollouts = Rollouts(runner, 2, 20, seed=seed)
    texts = [rollouts.generate(at(0), 0), rollouts.generate(at(1), 0), rollouts.generate(at(0), 1), rollouts.generate(at(1), 1)]
    texts.append(Rollouts(runner, 2, 20, seed=seed + 1).generate(at(0), 0))
    flat = [tuple(response.tokens) for (group,) in texts for response in group.responses]
    assert len(set(flat)) == len(flat) == 10
    again = rollouts.generate(at(0), 1)[0].responses
    assert [response.tokens for response in again] == [response.tokens for response in texts[2][0].responses]


def test_greedy_is_the_likeliest_text(seed):
    """One response to each task, as `Runner.generate` writes it at temperature 0; the report stays that of the samples."""
    runner = pair()
    rollouts, prompts = Rollouts(runner, 2, 5, seed=seed, depth=2), ragged_prompts(3)
    rollouts.generate(tasks_of(prompts), 0)
    report = rollouts.report()
    greedy = rollouts.greedy(tasks_of(prompts), 9)
    assert [one.tokens for one in greedy] == [out.tokens for out in runner.generate(prompts, 9)]
    assert report == rollouts.report() and max(len(one.tokens) for one in rollouts.greedy(tasks_of(prompts))) <= 5


def test_report_counts_by_hand():
    """A draft that is always right, cut at 11 tokens: the first comes from the prompt, then two rounds of 4 and a cut one."""
    runner = pair(noise=0.0, ends=())
    rollouts = Rollouts(runner, 4, 11, depth=3)
    rollouts.generate(tasks_of([[1] * 30, [2] * 10]), 0)
    report = rollouts.report()
    assert report.pop("rollout/seconds") * report.pop("rollout/tokens_per_second") == pytest.approx(88)
    expected = {"tokens": 88, "shared": 0.75, "length_mean": 11, "length_max": 11, "truncated": 1, "tau": 4, "paused": 0}
    expected |= {f"acceptance_{depth}": 1 for depth in (1, 2, 3)} | {"drafter_useless": 0}
    assert report == {f"rollout/{name}": float(value) for name, value in expected.items()}
    Rollouts(runner, 4, 11, speculate="off").generate([], 0)


def test_short_texts_do_not_make_a_drafter_useless(capsys):
    """Rounds that a text's end cuts short have accepted their first token, and count for the report of a useless drafter."""
    note.cache_clear()
    rollouts = Rollouts(pair(noise=0.0, ends=()), 1, 3, depth=3)
    counts = Stats(accepted=[120], offered=[0, 120], cut_rounds=40, tokens=280)
    assert counts.alpha_k == [0] and counts.first_drafts == (40, 160)
    rollouts._measure([], counts, 1.0, 0)
    assert rollouts.report()["rollout/drafter_useless"] == 0 and not capsys.readouterr().err
    (group,) = rollouts.generate(tasks_of([[1, 2]]), 0)  # a token of the prompt, then a round of four, of which two are taken
    assert group.responses[0].stats.first_drafts == (1, 1) and not group.responses[0].stats.rounds


def useless_pair():
    """A target with a draft that proposes what the target finds least likely."""
    target = random_decoder()
    decoder = near(target, 0.0)
    decoder.norm.weight.data.neg_()
    runner = pair(ends=())
    return Runner(target, lm_draft(runner.shape, decoder), runner.shape, max_batch=8, max_len=96)


def test_useless_drafter_is_reported_once(capsys, seed):
    """One line in all, and 1 in every step's report; `auto` drafts again after 20 steps, or when the weights have changed."""
    note.cache_clear()
    runner, tasks = useless_pair(), tasks_of([[1, 2], [3]])
    rollouts = Rollouts(runner, 8, 20, 0.3, seed, depth=2)
    for step in range(2):
        rollouts.generate(tasks, step)
        assert rollouts.report()["rollout/drafter_useless"] == 1 and rollouts.report()["rollout/acceptance_1"] < 0.05
    assert capsys.readouterr().err.count("\n") == 1
    rollouts = Rollouts(runner, 8, 20, 0.3, seed, "auto", policy="fixed", depth=2)
    drafted = lambda step: rollouts.generate(tasks, step) and "rollout/tau" in rollouts.report()
    assert [drafted(step) for step in (3, 4, RETRY + 2, RETRY + 3, RETRY + 4)] == [True, False, False, True, False]
    resumed = Rollouts(runner, 8, 20, 0.3, seed, "auto", policy="fixed", depth=2)
    resumed.load_state_dict(rollouts.state_dict())
    assert resumed._draft(RETRY + 5)["depth"] == 0 and "policy" in resumed._draft(2 * RETRY + 3)
    with torch.no_grad():
        runner.drafter.decoder.norm.weight.neg_()
    assert drafted(RETRY + 5) and rollouts.report()["rollout/acceptance_1"] == 1
    assert "not used for 20 generations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"top_p": 0.9}, "top_p 0.9"),
        ({"top_k": 5}, "top_k 5"),
        ({"verify": "typical"}, "verify 'typical'"),
        ({"verify": "residual", "speculate": "auto"}, "speculate auto"),
        ({"tree": [[0], [1]], "speculate": "auto"}, "leave tree out"),
        ({"speculate": "maybe"}, "speculate 'maybe'"),
        ({"temperature": 0.0}, "temperature 0"),
        ({"samples": 0}, "samples 0"),
        ({"depht": 2}, "'depht'"),
    ],
)
def test_invalid_options_are_named(options, named):
    """What would change the trained distribution, or means nothing, is refused in one line before anything is decoded."""
    with pytest.raises(UserError, match=named) as caught:
        Rollouts(pair(), **({"samples": 2, "max_new_tokens": 4} | options))
    assert "\n" not in str(caught.value)
