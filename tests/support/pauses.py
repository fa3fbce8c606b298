"""Compares rounds that draft, pause and leave tokens unverified at random with rounds that always draft."""

from __future__ import annotations

import torch

from trainkit.runner.policies.chain import PolicyChain
from trainkit.runner.policy import Policy


class Erratic(Policy):
    """Draws its decisions."""

    def is_paused(self, rows):
        return bool(torch.rand(()) < 0.5)  # then the drafter reads a prompt before its first draft

    def begin(self, rows):
        return int(torch.randint(0, self.max_depth + 1, ()))

    def continues(self, signal_B):
        return bool(torch.rand(()) < 0.7)

    def verified(self, levels, rows):
        different = torch.rand(()) < 0.7
        return torch.randint(0, levels + 1, (rows if different else 1,)).expand(rows).tolist()


def check_pauses(runner, prompts, depth, least=20, **options):
    """The text equals that of plain decoding; at the same position of the same text the draft's first logits are the same.

    Args:
        runner: The runner.
        prompts: Prompts as token ids.
        depth: Largest number of drafted tokens in a round.
        least: Smallest number of positions that must have been compared.
        **options: Of `Runner.generate`.
    """
    firsts: list[dict] = [{}, {}]
    shapes = [{"depth": depth}, {"tree": PolicyChain(Erratic(depth), runner.device)}]
    for logits, shape in zip(firsts, shapes, strict=True):

        def observe(trace, logits=logits):
            for row in range(trace.draft.tokens_BN.shape[0]):
                if trace.draft.logits and trace.verdict.counts_B[row]:
                    position = (*trace.keys_B2[row].tolist(), int(trace.position_B[row]))
                    logits[position] = trace.draft.logits[0][row, 0]

        runner.observe = observe
        texts = [out.tokens for out in runner.generate(prompts, **shape, **options)]
        runner.observe = None
        assert texts == [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    both = firsts[0].keys() & firsts[1].keys()
    assert len(both) >= least
    for position in both:
        torch.testing.assert_close(firsts[0][position], firsts[1][position], atol=1e-4, rtol=0)
