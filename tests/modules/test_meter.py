from __future__ import annotations

from trainkit.modules.meter import means


def test_means_divide_tokens_apart_from_loss():
    """With `count_tokens` only the loss is divided by `count`; without it every sum is, but those of a head."""
    assert means({"loss": 6.0, "kl": 8.0, "count": 2.0, "count_tokens": 4.0}) == {"loss": 3.0, "kl": 2.0}
    sums = {"loss": 6.0, "alpha": 1.0, "alpha_head2": 3.0, "count": 2.0, "count_head2": 6.0}
    assert means(sums) == {"loss": 3.0, "alpha": 0.5, "alpha_head2": 0.5}
