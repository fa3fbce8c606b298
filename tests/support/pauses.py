"""Rounds that draft, pause and leave tokens unverified, of each row others, as a die falls; and rounds that always draft."""

from __future__ import annotations

import torch

from trainkit.runner.policies.chain import PolicyChain
from trainkit.runner.policy import Policy


class Erratic(Policy):
    """Draws its decisions."""

    def is_paused(self, rows):
        return bool(torch.rand(()) < 0.5)  # then the drafter reads a prompt when it is first asked

    def begin(self, rows):
        self.rows = rows
        return int(torch.randint(0, self.max_depth + 1, ()))

    def continues(self, signal_B):
        return bool(torch.rand(()) < 0.7)

    def verified_levels(self, levels):
        return int(torch.randint(0, levels + 1, ()))

    def verified_per_row(self, levels):
        return torch.randint(0, levels + 1, (self.rows,)).tolist() if torch.rand(()) < 0.7 else ()


def check_pauses(runner, prompts, depth, least=20, **options):
    """The text is plain decoding's; and at the same place of the same text the draft's first logits are the same."""
    firsts: list[dict] = [{}, {}]
    shapes = [{"depth": depth}, {"tree": PolicyChain(Erratic(depth), runner.device)}]
    for found, shape in zip(firsts, shapes, strict=True):

        def observe(trace, found=found):
            for row in range(trace.draft.tokens_BN.shape[0]):
                if trace.draft.logits and trace.verdict.counts_B[row]:
                    place = (*trace.keys_B2[row].tolist(), int(trace.position_B[row]))
                    found[place] = trace.draft.logits[0][row, 0]

        runner.observe = observe
        texts = [out.tokens for out in runner.generate(prompts, **shape, **options)]
        runner.observe = None
        assert texts == [out.tokens for out in runner.generate(prompts, depth=0, **options)]
    both = firsts[0].keys() & firsts[1].keys()
    assert len(both) >= least
    for place in both:
        torch.testing.assert_close(firsts[0][place], firsts[1][place], atol=1e-4, rtol=0)
