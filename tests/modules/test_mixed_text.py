"""Texts that draft and target write together: each token from share q + (1 - share) p, whatever the depth."""

import numpy as np
import pytest
import torch

from tests.support import laws
from tests.support.distribution import tables
from tests.support.models import pair, ragged_prompts, table_runner
from trainkit.errors import UserError
from trainkit.modules.mixed_text import Mixed
from trainkit.runner.verify import Verdict

ROWS = 2048


def counts_of(p, q, share: float, depth: int, seed: int, blocks: int) -> np.ndarray:
    each = -(-blocks // ROWS)
    runner = table_runner(torch.tensor(p), torch.tensor(q), ROWS, 4 * each + 5)
    options = {"temperature": 1.0, "max_new_tokens": 4 * each + 4, "verify": Mixed(share), "depth": depth}
    tokens = np.array([out.tokens[4:] for _, out in runner.generate_each([[0]] * ROWS, seed=seed, **options)]).reshape(-1, 4)
    return np.bincount(tokens @ [64, 16, 4, 1], minlength=256).reshape(4, 4, 4, 4).astype(float)


def law_of(p, q, share: float) -> np.ndarray:
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return laws.plain_law(share * softmax(q) + (1 - share) * softmax(p))


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_joint_of_four_tokens_is_the_mixture(share: float, depth: int, seed: int) -> None:
    """The first four tokens are left out: the very first is always the target's."""
    p, q = tables("generic", np.random.default_rng(seed))
    assert laws.p_value(counts_of(p, q, share, depth, seed, 40_000), law_of(p, q, share)) > 1e-4 / 6


def test_a_wrong_bonus_token_is_detected(seed: int, monkeypatch) -> None:
    """Planted fault: a round that kept all its drafted tokens also emits one of the target's."""
    right = Mixed.verify

    def with_bonus(self, draft, scores, *options):
        verdict = right(self, draft, scores, *options)
        full = (verdict.emitted_BP == draft.tokens_BN[:, 1:]).all(1) & (verdict.counts_B == scores.shape[1])
        emitted = torch.cat([verdict.emitted_BP, scores[:, -1:].argmax(-1)], dim=1)
        path = torch.arange(emitted.shape[1]).clamp(max=scores.shape[1] - 1).expand_as(emitted)  # the last node again
        return Verdict(path, verdict.counts_B + full.long(), emitted)

    monkeypatch.setattr(Mixed, "verify", with_bonus)
    p, q = tables("generic", np.random.default_rng(5))
    assert laws.p_value(counts_of(p, q, 0.7, 2, seed, 40_000), law_of(p, q, 0.7)) < 1e-6


def test_share_0_is_the_targets_greedy_text(seed: int) -> None:
    """The caches stay right when a round ends with a drafted token and no bonus: share 0 and 1 follow one network each."""
    runner = pair(noise=0.3, ends=())
    prompts = ragged_prompts(5)
    plain = [out.tokens for out in runner.generate(prompts, 24, depth=0)]
    options = {"max_new_tokens": 24, "depth": 3}
    own = dict(runner.generate_each(prompts, verify=Mixed(0.0, greedy=True), **options))
    assert [own[place].tokens for place in range(5)] == plain


def test_share_1_is_the_drafts_own_text(seed: int) -> None:
    """With share 1 the text after the first token is the draft's own."""

    from trainkit.runner import Runner

    runner = pair(noise=0.3, ends=())
    prompts = ragged_prompts(5)
    written = dict(runner.generate_each(prompts, max_new_tokens=24, verify=Mixed(1.0, greedy=True), depth=3))
    alone = Runner(runner.drafter.decoder, None, runner.shape, max_batch=8, max_len=96)
    firsts = [[*prompt, written[place].tokens[0]] for place, prompt in enumerate(prompts)]
    assert [written[place].tokens[1:] for place in range(5)] == [out.tokens for out in alone.generate(firsts, 23)]


def test_mixed_text_needs_depth_and_share() -> None:
    """Mixed text needs a depth and a share."""
    with pytest.raises(UserError, match="share 1.5: must be between 0 and 1"):
        Mixed(1.5)
    for runner, options in ((pair(), {"depth": 0}), (pair(noise=None), {})):
        with pytest.raises(UserError, match="Mixed needs a drafter and a chain of at least one token"):
            list(runner.generate_each([[1]], verify=Mixed(0.5), **options))
