"""Trains like it serves: the acceptance worked out from the two distributions is the one the runner shows, node by node."""

# B rows  V vocabulary

import pytest
import torch

from tests.support.models import pair, ragged_prompts
from trainkit.losses.measures import acceptance, coupled_acceptance

EXACT = {"residual": acceptance, "coupled": coupled_acceptance}


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}], ids=["plain", "top-p"])
def test_exact_alpha_equals_the_accepted_share(method, settings, seed):
    """Within four standard errors (a chance failure in 16,000), whose variance is that of independent coin tosses."""
    runner = pair(noise=0.06, ends=(), max_batch=64)
    alphas, kept = [], 0

    def observe(trace):
        nonlocal kept
        for depth in range(trace.draft.shape.depth):
            judged_B = trace.verdict.counts_B > depth
            p_BV = trace.scores_BNV[judged_B, depth].double().softmax(-1)
            q_BV = trace.draft.logits[depth][judged_B, 0].double().softmax(-1)
            alphas.append(EXACT[method](p_BV, q_BV))
            kept += int((trace.verdict.counts_B > depth + 1).sum())

    runner.observe = observe
    outs = runner.generate(ragged_prompts(64), max_new_tokens=64, seed=seed, depth=4, verify=method, **settings)
    alpha = torch.cat(alphas)
    error = (alpha * (1 - alpha)).sum().sqrt() / len(alpha)
    assert len(alpha) > 1500 and 0.1 < alpha.mean() < 0.95, "too little to tell"
    assert abs(kept / len(alpha) - alpha.mean()) < 4 * error
    # and the counts the outputs report are those of the trace, apart from the rounds cut by the length
    rounds = [out.stats for out in outs]
    reported = sum(k * n for stats in rounds for k, n in enumerate(stats.accepted))
    assert kept - 4 * sum(stats.cut_rounds for stats in rounds) <= reported <= kept


def test_alpha_k_is_exact_at_each_depth(seed):
    """With p and q the same everywhere, each draft position is accepted with probability alpha, given the ones before."""
    from tests.support.models import table_runner
    from trainkit.runner import Stats

    p, q = torch.randn(2, 6)
    runner = table_runner(p.expand(1, 6, 6).clone(), q.expand(1, 6, 6).clone(), 512, 200)
    for method, exact in EXACT.items():
        outs = runner.generate([[0]] * 512, max_new_tokens=120, temperature=1.0, seed=seed, depth=3, verify=method)
        stats = Stats.merge(out.stats for out in outs)
        alpha = float(exact(p.softmax(-1), q.softmax(-1)))
        reached = float(stats.rounds)
        for measured in stats.alpha_k:
            assert abs(measured - alpha) < 4.5 * (alpha * (1 - alpha) / reached) ** 0.5 + 0.004
            reached *= measured
        assert abs(stats.tau - sum(alpha**k for k in range(4))) < 0.05
