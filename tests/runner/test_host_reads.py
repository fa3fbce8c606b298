"""Nothing is read on the host within a round: a graph that is captured holds no such read, and it would stall every round."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.drafters import VARIANTS
from tests.support.models import SIBLINGS
from tests.support.replaying import replayed
from trainkit.drafters.base import load_kind
from trainkit.models.load import load_decoder
from trainkit.models.target import FrozenTarget, target_shape
from trainkit.runner import DynamicTree, Runner
from trainkit.runner.policies.chain import RankedChain
from trainkit.runner.policies.logistic import OnlineLogistic
from trainkit.runner.round import Rounds
from trainkit.runner.trees.static import build, chain

READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "isin", "_unique2", "unique_dim"}
"""Operations whose result or size the host waits for on a GPU; `isin` sorts there once it has more than a few elements."""
MADE_ON_HOST = {"lift_fresh", "lift_fresh_copy"}
"""`torch.tensor` of Python numbers: a captured graph would copy them from memory that is gone. One number needs no copy."""


class NoReads(TorchDispatchMode):
    """Fails at an operation that reads on the host or copies from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS and not (name in MADE_ON_HOST and args[0].dim()), name
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("culprit", [lambda x: x[x > 0], lambda x: torch.isin(x, x), lambda x: bool(x.sum()), torch.nonzero])
def test_reads_are_noticed(culprit):
    """The mode that the next test relies on fails at reads."""
    with pytest.raises(AssertionError), NoReads():
        culprit(torch.arange(3))
    with pytest.raises(AssertionError), NoReads():
        torch.tensor([1, 2])


@pytest.mark.parametrize("kind", VARIANTS)
def test_rounds_read_nothing_on_the_host(kind, tiny_target, seed, monkeypatch):
    """Rounds of every kind, shape and verification, of any temperature, read nothing on the host."""
    name, options = VARIANTS[kind]
    drafter = load_kind(name)(target_shape(tiny_target), **options)
    drafter.initialise(FrozenTarget(tiny_target))
    runner = replayed(Runner(load_decoder(tiny_target), drafter, target_shape(tiny_target), max_len=64), 1)
    depth = min(3, drafter.max_depth or 3)
    shapes = [{"depth": depth}, {"tree": SIBLINGS}, {"tree": DynamicTree(2, 2, 5)}, {"depth": 0}]
    for model in (None, OnlineLogistic(depth, runner.device)):
        shapes.append({"tree": RankedChain(build(chain(depth), runner.device), 1, model)})
    rounds, inner = [], Rounds.__call__

    def watched(self, *args, **named):
        with NoReads():
            rounds.append(inner(self, *args, **named))
        return rounds[-1]

    monkeypatch.setattr(Rounds, "__call__", watched)
    for shape in shapes:
        for sampling in ({}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}, {"temperature": 1.0, "verify": "residual"}):
            if "residual" in sampling.values() and isinstance(shape.get("tree"), RankedChain):
                continue  # may not drop what was drawn
            runner.generate([[5], [6, 7]], max_new_tokens=6, ignore_end=False, logprobs=True, **shape, **sampling)
    assert len(rounds) > 20, "the mode watched them"
