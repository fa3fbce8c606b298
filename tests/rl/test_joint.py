"""The drafter in the policy's own forward pass: the same gradients as in a pass of its own, and none in the policy."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from trainkit.drafters.base import load_kind
from trainkit.export.drafter import export_drafter
from trainkit.losses.divergence import ForwardKL
from trainkit.models.target import FrozenTarget, LiveTarget
from trainkit.rl.batches import Sample, pack_responses, policy_logprobs
from trainkit.rl.joint import JointRefresh
from trainkit.rl.types import Response
from trainkit.runner import Runner

SEED = int(os.environ["TRAINKIT_TEST_SEED"])
VARIANTS = {"lm": {}, "eagle": {"steps": 2}, "hydra": {"prefix": True, "dropout": 0.2}}


@pytest.fixture(scope="module")
def bundles(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A new drafter of some kinds."""
    teacher, made = FrozenTarget(tiny_target), {}
    torch.manual_seed(SEED)
    for kind, options in VARIANTS.items():
        drafter = load_kind(kind)(teacher.shape(), **options)
        drafter.initialise(teacher)
        made[kind] = tmp_path_factory.mktemp("drafts") / kind
        export_drafter(drafter, made[kind], tokenizer=tiny_target, target=tiny_target)
    return made


def setting(folder: Path, bundle: Path) -> tuple[FrozenTarget, JointRefresh, Runner]:
    """A trainable policy, the joint training of a drafter, and the runner that serves it."""
    policy = FrozenTarget(folder)
    policy.frozen = False
    policy.model.requires_grad_(True)
    runner = Runner.load(folder, bundle, max_len=64)
    assert runner.drafter is not None
    return policy, JointRefresh(runner.drafter, bundle, LiveTarget(policy.model, folder), lr=1e-3, loss=ForwardKL()), runner


def responses(count: int = 3) -> list[Sample]:
    """Responses of several lengths to prompts of several lengths."""
    samples = []
    for _ in range(count):
        prompt, response = (torch.randint(320, (int(torch.randint(4, 16, ())),)).tolist() for _ in range(2))
        samples.append(Sample(prompt, Response(response, "", "length", [0.0] * len(response)), 1.0))
    return samples


@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_are_those_of_a_pass_of_its_own(kind, tiny_target, bundles, seed):
    """Listening to the packed forward of the policy gives the sums of each response alone, and changes no gradient there."""
    policy, joint, _ = setting(tiny_target, bundles[kind])
    joint.twin.dropout = 0.0  # drawn in another order below
    samples = responses()
    micro = pack_responses(samples)
    plain = policy_logprobs(policy, micro, 1.0)[0].sum()
    expected = torch.autograd.grad(plain, list(policy.model.parameters()), allow_unused=True)
    with joint.listening(micro):
        heard = policy_logprobs(policy, micro, 1.0)[0].sum()
    heard.backward()
    for weight, gradient in zip(policy.model.parameters(), expected, strict=True):
        assert (gradient is None) == (weight.grad is None) and (gradient is None or torch.equal(gradient, weight.grad))
    # Each response alone, through the pass of `Refresh`.
    total: Any = 0.0
    for sample in samples:
        tokens = torch.tensor([*sample.prompt, *sample.response.tokens], dtype=torch.int32)
        total = total + joint._gradients(joint._read([(0, tokens, len(sample.prompt))]), torch.Generator())
    assert joint._pending is not None
    scale = float(total[:-4].abs().max())
    assert (joint._pending[:-4] - total[:-4]).abs().max() < 1e-4 * scale  # float32 sums in another order
    assert torch.allclose(joint._pending[-4:], total[-4:], rtol=1e-4)


def test_joint_training_resumes_and_serves(tiny_target, bundles, seed):
    """The loss falls over the steps; a resumed run is the same bit for bit; the runner gets the drafter when it is due."""
    batches = [pack_responses(responses()) for _ in range(2)]
    file, results = io.BytesIO(), []
    policy, joint, runner = setting(tiny_target, bundles["hydra"])
    old = {name: value.clone() for name, value in runner.drafter.state_dict().items()}
    assert not joint.due(1, 1.0)
    losses = []
    for step in range(6):
        if step == 3:
            torch.save(joint.state_dict(), file)
        for batch in batches:
            with joint.listening(batch):
                policy_logprobs(policy, batch, 1.0)
        joint.step()
        losses.append(float(joint._sums[0]) - sum(losses))
    assert losses[-1] < losses[0]
    assert all(torch.equal(old[name], value) for name, value in runner.drafter.state_dict().items())
    assert joint.due(1, 1.0)
    results.append(joint.run(1))
    served = {name: value.clone() for name, value in runner.drafter.state_dict().items()}
    assert not joint.due(1, 1.0) and any(not torch.equal(old[name], value) for name, value in served.items())
    # The second half again, from the file.
    torch.randn(3)
    policy, joint, runner = setting(tiny_target, bundles["hydra"])
    joint.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for _ in range(3):
        for batch in batches:
            with joint.listening(batch):
                policy_logprobs(policy, batch, 1.0)
        joint.step()
    results.append(joint.run(1))
    assert all(results[0][name] == results[1][name] for name in ("refresh/loss", "refresh/positions"))
    assert all(torch.equal(served[name], value) for name, value in runner.drafter.state_dict().items())
