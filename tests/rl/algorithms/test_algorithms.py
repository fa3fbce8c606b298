from __future__ import annotations

import jsonargparse
import pytest
import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.rl.algorithms import CISPO, DAPO, GRPO, GSPO, Algorithm, DrGRPO, OnPolicyDistillation, has_signal
from trainkit.rl.types import PolicyTokens

NAN = float("nan")


def padded(rows: list[list[float]]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


NEW = padded([[-0.5, -1, -0.2], [-1.2, -0.3], [-0.7, -0.9, -0.4, -0.1], [-2]])
OLD = padded([[-0.6, -0.9, -0.2], [-0.9, -0.5], [-0.7, -1.3, -0.4, -0.3], [-1.5]])
REF = padded([[-0.4, -1.1, -0.3], [-1, -0.3], [-0.8, -0.9, -0.5, -0.1], [-1.8]])
TEACHER = padded([[-0.3, -1.4, -0.2], [-0.2, -0.3], [-1.7, -0.9, -0.4, -0.2], [-1]])
MASK = (NEW != 0).double()
ADVANTAGE = torch.tensor([1, -1, 0.5, -0.5], dtype=torch.float64)[:, None].expand(4, 4)
ALGORITHMS = [GRPO(), GRPO(beta=0.04), DrGRPO(8), DAPO(), GSPO(), GSPO(0.2, 0.2), CISPO(0.8, 1.28), OnPolicyDistillation()]
NAMES = ["grpo", "grpo_kl", "dr_grpo", "dapo", "gspo", "gspo_wide", "cispo", "distillation"]


def by_algorithm(function):
    return pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)(function)


def random_tokens(seed: int, spread: float = 0.3) -> PolicyTokens:
    """6 responses of 1 to 7 tokens with ratios on both sides of the clips, none within 1e-4 of one."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(6, 7, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 8, (6,), generator=generator)
    mask = (torch.arange(7) < lengths[:, None]).double()
    old = -draw().abs()
    new = old + spread * draw()
    for bound in (0.8, 1.2, 1.28):
        new = torch.where(((new - old).exp() - bound).abs() < 1e-3, new + 5e-3, new)
    correction = 1 + 0.5 * torch.rand(6, 7, generator=generator, dtype=torch.float64)
    return PolicyTokens(new, old, draw(), mask, old + spread * draw(), correction)


def with_new(tokens: PolicyTokens, new: Tensor) -> PolicyTokens:
    return PolicyTokens(new, tokens.old_RT, tokens.advantage_RT, tokens.mask_RT, tokens.ref_RT, tokens.correction_RT)


def gradient(algorithm: Algorithm, tokens: PolicyTokens) -> Tensor:
    new = tokens.new_RT.clone().requires_grad_()
    return torch.autograd.grad(algorithm.loss(with_new(tokens, new)).mean, new)[0]


@pytest.mark.parametrize(
    ("algorithm", "value"),
    [
        (GRPO(), -0.03565868),
        (GRPO(beta=0.04), -0.03526397),
        (DAPO(clip_high=0.2), -0.27886056),
        (DAPO(), -0.28393070),
        (DrGRPO(8), -0.08714392),
        (GSPO(), -0.00016250),
        (GSPO(0.2, 0.2), -0.05742192),
        (CISPO(), 0.10778808),
        (CISPO(0.8, 1.28), 0.07180722),
    ],
)
def test_loss_equals_worked_example(algorithm, value):
    """Each loss of a batch worked by hand: four responses of 3, 2, 4 and 1 tokens."""
    output = algorithm.loss(PolicyTokens(NEW, OLD, ADVANTAGE, MASK, REF if algorithm.beta else None))
    assert output.mean.item() == pytest.approx(value, abs=1e-8)


def test_grpo_gradient_and_metrics_of_worked_example():
    """GRPO's gradient by the log-probabilities, and the sums of its metrics, worked by hand."""
    tokens = PolicyTokens(NEW, OLD, ADVANTAGE, MASK, REF)
    expected = padded([[-0.0920976, -0.0754031, -0.0833333], [0, 0.1526753], [-0.03125, 0, -0.03125, 0], [0]])
    torch.testing.assert_close(gradient(GRPO(), tokens), expected, rtol=0, atol=1e-7)
    metrics = GRPO().loss(tokens).metrics
    assert (metrics["clip_low"], metrics["clip_high"], metrics["count_tokens"]) == (2, 2, 10)
    assert metrics["kl_ref_k3"].item() == pytest.approx(0.06732611, abs=1e-8)
    assert metrics["kl_ref_k1"].item() == pytest.approx(((NEW - REF) * MASK).sum().item(), abs=1e-12)
    assert metrics["kl_old_k1"].item() == pytest.approx(((OLD - NEW) * MASK).sum().item(), abs=1e-12)
    assert metrics["ratio"].item() == pytest.approx(10.291988, abs=1e-6)


def test_distillation_of_worked_example():
    """Distillation follows teacher minus policy on each token: -A log-probability sums to 2.19, and its KL estimate to -0.7."""
    tokens = PolicyTokens(NEW, NEW, torch.zeros_like(NEW), MASK, TEACHER)
    advantage = padded([[0.2, -0.4, 0], [1, 0], [-1, 0, 0, -0.1], [1]])
    found = gradient(OnPolicyDistillation(), tokens)
    torch.testing.assert_close(found, -advantage / 10, rtol=0, atol=1e-12)
    assert (found * NEW).sum().item() == pytest.approx(0.219, abs=1e-12)
    assert OnPolicyDistillation().loss(tokens).metrics["kl_ref_k1"].item() == pytest.approx(-0.7, abs=1e-12)


def test_distillation_gradient_is_that_of_reverse_kl(seed):
    """Averaged over the old policy's samples, the gradient is that of KL(policy || teacher), also off-policy."""
    logits, old, teacher = torch.randn(3, 5, dtype=torch.float64)
    logits = logits.requires_grad_()
    new, old, teacher = logits.log_softmax(-1), old.log_softmax(-1), teacher.log_softmax(-1)
    # a response of one token for each word of a vocabulary of 5, weighted by how often the old policy draws it
    columns = (new[:, None], old[:, None], torch.zeros(5, 1), torch.ones(5, 1), teacher[:, None], old[:, None].exp())
    (found,) = torch.autograd.grad(OnPolicyDistillation().loss(PolicyTokens(*columns)).sum, logits, retain_graph=True)
    (expected,) = torch.autograd.grad((new.exp() * (new - teacher)).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)  # float64, the same sum written twice


def slopes(value, tokens: PolicyTokens) -> Tensor:
    """Finite differences of a function of the new log-probabilities."""
    result, step = torch.zeros_like(tokens.new_RT), 1e-5
    for place in tokens.mask_RT.nonzero():
        shift = torch.zeros_like(tokens.new_RT)
        shift[tuple(place)] = step
        result[tuple(place)] = (value(tokens.new_RT + shift) - value(tokens.new_RT - shift)) / (2 * step)
    return result


@pytest.mark.parametrize("algorithm", [GRPO(), GRPO(beta=0.04), DrGRPO(8), DAPO(beta=0.1)], ids=lambda a: type(a).__name__)
def test_clipped_gradient_equals_finite_differences(seed, algorithm):
    """The gradient equals finite differences of the loss, with correction and KL term, inside and outside the clips."""
    tokens = random_tokens(seed)
    expected = slopes(lambda new: algorithm.loss(with_new(tokens, new)).mean, tokens)
    torch.testing.assert_close(
        gradient(algorithm, tokens), expected, rtol=0, atol=1e-6
    )  # the error of differences is near 1e-9


def test_gspo_gradient_equals_finite_differences(seed):
    """The token form has the gradient of the paper's response ratio, also where that ratio is clipped."""
    tokens = random_tokens(seed)
    lengths, advantage = tokens.mask_RT.sum(-1), tokens.advantage_RT[:, :1]
    tokens = PolicyTokens(tokens.new_RT, tokens.old_RT, advantage.expand(6, 7), tokens.mask_RT)

    def value(new: Tensor) -> Tensor:
        ratio = (((new - tokens.old_RT) * tokens.mask_RT).sum(-1) / lengths).exp()
        return -torch.minimum(ratio * advantage[:, 0], ratio.clamp(0.8, 1.2) * advantage[:, 0]).mean()

    ratio = (((tokens.new_RT - tokens.old_RT) * tokens.mask_RT).sum(-1) / lengths).exp()
    smooth = ((ratio - 0.8).abs() > 1e-4) & ((ratio - 1.2).abs() > 1e-4)  # differences across a kink mean nothing
    found, expected = gradient(GSPO(0.2, 0.2), tokens), slopes(value, tokens)
    torch.testing.assert_close(found[smooth], expected[smooth], rtol=0, atol=1e-6)


def test_stopped_weights_equal_finite_differences(seed):
    """CISPO and distillation have the gradient of their loss with the stopped factors held fixed."""
    tokens = random_tokens(seed)
    assert tokens.ref_RT is not None and tokens.correction_RT is not None
    scale = tokens.correction_RT * tokens.mask_RT / tokens.mask_RT.sum()
    weight = (tokens.new_RT - tokens.old_RT).exp().clamp(0.8, 1.28)
    expected = slopes(lambda new: -(weight * tokens.advantage_RT * new * scale).sum(), tokens)
    torch.testing.assert_close(gradient(CISPO(0.8, 1.28), tokens), expected, rtol=0, atol=1e-6)
    advantage = tokens.ref_RT - tokens.new_RT
    expected = slopes(lambda new: -(advantage * (new - tokens.old_RT).exp() * scale).sum(), tokens)
    torch.testing.assert_close(gradient(OnPolicyDistillation(), tokens), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("algorithm", [GRPO(), DAPO(), DrGRPO(8), GSPO(), CISPO()], ids=lambda a: type(a).__name__)
def test_on_policy_gradient_is_the_plain_policy_gradient(seed, algorithm):
    """Where new = old, the gradient is -A / denominator: the policy gradient without clip or ratio."""
    tokens = random_tokens(seed)
    tokens = PolicyTokens(tokens.old_RT, tokens.old_RT, tokens.advantage_RT, tokens.mask_RT)
    lengths = tokens.mask_RT.sum(-1, keepdim=True)
    share = {GRPO: 1 / lengths / 6, GSPO: 1 / lengths / 6, DrGRPO: 1 / (6 * 8)}.get(type(algorithm), 1 / lengths.sum())
    torch.testing.assert_close(gradient(algorithm, tokens), -tokens.advantage_RT * tokens.mask_RT * share, rtol=0, atol=1e-12)


@by_algorithm
def test_micro_batches_add_up_to_one_batch(seed, algorithm):
    """Sums, counts and metrics of two parts add up to those of the whole, with an empty response on the way."""
    whole = random_tokens(seed)
    whole.mask_RT[2] = 0  # a response whose reward is missing
    fields = ("new_RT", "old_RT", "advantage_RT", "mask_RT", "ref_RT", "correction_RT")
    parts = [PolicyTokens(*(getattr(whole, name)[rows] for name in fields)) for rows in (slice(0, 2), slice(2, 6))]
    outputs, output = [algorithm.loss(part) for part in parts], algorithm.loss(whole)
    counts = {"responses": 5, "tokens": int(whole.mask_RT.sum())}  # of responses that have a token
    assert output.count == counts[algorithm.mean_over] * getattr(algorithm, "max_length", 1)
    assert output.count.item() == sum(algorithm.count(part.mask_RT).item() for part in parts)
    torch.testing.assert_close(
        outputs[0].sum + outputs[1].sum, output.sum, rtol=0, atol=1e-12
    )  # float64, another order of sums
    for name, value in output.metrics.items():
        torch.testing.assert_close(outputs[0].metrics[name] + outputs[1].metrics[name], value, rtol=0, atol=1e-12)


@by_algorithm
def test_masked_tokens_change_nothing(seed, algorithm):
    """Any finite value where the mask is 0 changes neither loss, gradient nor metrics; a batch of them has a zero gradient."""
    tokens = random_tokens(seed)
    hidden = tokens.mask_RT == 0
    other = [x.masked_fill(hidden, 1e6) for x in (tokens.new_RT, tokens.old_RT * 0.5, tokens.advantage_RT, tokens.ref_RT)]
    other[1] = tokens.old_RT.masked_fill(hidden, -1e6)
    changed = PolicyTokens(other[0], other[1], other[2], tokens.mask_RT, other[3], tokens.correction_RT)
    ours, theirs = algorithm.loss(changed), algorithm.loss(tokens)
    assert ours.sum.item() == theirs.sum.item() and all(theirs.metrics[n] == value for n, value in ours.metrics.items())
    assert torch.equal(gradient(algorithm, changed), gradient(algorithm, tokens))
    tokens.mask_RT.zero_()
    assert not gradient(algorithm, tokens).any()


def test_extreme_ratios_stay_finite():
    """Log-probabilities that differ by thousands of nats give a finite loss and gradient."""
    tokens = PolicyTokens(NEW - 3000, NEW, ADVANTAGE, MASK, NEW + 3000)
    for algorithm in ALGORITHMS:
        assert algorithm.loss(tokens).sum.isfinite() and gradient(algorithm, tokens).isfinite().all()


def test_advantages_of_worked_groups():
    """Group scale divides by the sample standard deviation; missing rewards count nowhere; equal or single rewards give 0."""
    rewards = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [1, NAN, 0, NAN], [NAN, 1, NAN, NAN], [0.1, 0.1, 0.1, 0.1], [NAN] * 4])
    half = 0.5 / (0.5**0.5 + 1e-4)
    expected = [[0.865875, -0.865875] * 2, [1.499700, -0.4999, -0.4999, -0.4999], [half, 0, -half, 0], *[[0] * 4] * 3]
    torch.testing.assert_close(GRPO().advantages(rewards), torch.tensor(expected), rtol=0, atol=1e-6)
    assert not GRPO().advantages(rewards)[3:].any()
    assert has_signal(rewards).tolist() == [True, True, True, False, False, False]
    centred = [[0.5, -0.5] * 2, [0.75, -0.25, -0.25, -0.25], [0.5, 0, -0.5, 0], *[[0] * 4] * 3]
    torch.testing.assert_close(DrGRPO(8).advantages(rewards), torch.tensor(centred), rtol=0, atol=1e-7)


def test_batch_scale_divides_by_one_deviation(seed):
    """Batch scale divides by the standard deviation of all rewards, those of all groups."""
    rewards = torch.randn(6, 4, dtype=torch.float64) + 3
    rewards[1, 2] = NAN
    algorithm = GRPO(scale="batch")
    whole = algorithm.advantages(rewards)
    valid = rewards[rewards.isfinite()]
    centred = (rewards - rewards.nanmean(-1, keepdim=True)).nan_to_num(0.0)
    torch.testing.assert_close(whole, centred / (valid.std() + 1e-4), rtol=1e-10, atol=0)
    lone = torch.tensor([[NAN, 2.0], [1.0, 1.0]])  # no group has a spread, but the batch has
    assert not algorithm.advantages(lone).any()


def test_algorithms_are_named_in_recipes():
    """A recipe names an algorithm by its class, with its arguments."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--algorithm", type=Algorithm)
    flags = {
        "GRPO": "beta=0.1",
        "DrGRPO": "max_length=64",
        "DAPO": "overlong=16",
        "GSPO": "scale=batch",
        "CISPO": "max_ratio=3",
    }
    for name, flag in (flags | {"OnPolicyDistillation": "mask_truncated=true"}).items():
        built = parser.instantiate(parser.parse_args([f"--algorithm={name}", f"--algorithm.{flag}"])).algorithm
        option, value = flag.split("=")
        assert type(built).__name__ == name and str(getattr(built, option)).lower().startswith(value)


def test_dapo_shapes_rewards_of_long_responses():
    """With a limit of 20 and 4 tokens of buffer, lengths of 16, 17, 18, 20 and 21 get 0, -1/4, -1/2, -1 and -1."""
    assert [DAPO(overlong=4).shape_reward(n, 20) for n in (16, 17, 18, 20, 21)] == [0, -0.25, -0.5, -1, -1]
    assert DAPO().shape_reward(20, 20) == GRPO().shape_reward(20, 20) == 0
    assert DAPO().dynamic_sampling and not DAPO(dynamic_sampling=False).dynamic_sampling and not GRPO().dynamic_sampling
    with pytest.raises(UserError, match="overlong is 30; it must be at most the length limit, 20"):
        DAPO(overlong=30).shape_reward(1, 20)


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        (GRPO, {"clip_low": 0}, "model.algorithm.clip_low is 0; it must be above 0 and at most 1"),
        (GRPO, {"beta": -1}, "model.algorithm.beta is -1; it must be at least 0"),
        (GSPO, {"scale": "token"}, "model.algorithm.scale is token; it must be group, batch or none"),
        (DrGRPO, {"max_length": 0}, "model.algorithm.max_length is 0; it must be at least 1"),
        (CISPO, {"max_ratio": 0.5}, "model.algorithm.max_ratio is 0.5; it must be at least 1"),
    ],
)
def test_algorithm_refuses_bad_option(algorithm, options, message):
    """An option out of range is refused in one line that names it."""
    with pytest.raises(UserError, match=message):
        algorithm(**options)


def test_algorithm_needs():
    """A KL term needs the reference, distillation needs a teacher and no rewards."""
    assert GRPO(beta=0.1).needs_reference and not GRPO().needs_reference and not OnPolicyDistillation().needs_reference
    assert OnPolicyDistillation().needs_teacher and not OnPolicyDistillation().needs_rewards and GRPO().needs_rewards
