"""From the policy that a user names to the chain whose length it decides, with the costs and the predictor that it needs."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from trainkit.errors import UserError
from trainkit.models.predictor import AcceptancePredictor, FoldedPredictor
from trainkit.runner.options import GenerateOptions
from trainkit.runner.policies.chain import PolicyChain, RankedChain
from trainkit.runner.policies.cost import Cost
from trainkit.runner.policies.cost_model import ChainCosts, cached_costs, measure_chain_costs, shapes_digest
from trainkit.runner.policies.simple import Fixed, Recent, Threshold
from trainkit.runner.policies.spec import PolicySpec
from trainkit.runner.policy import MAX_DEPTH, Policy
from trainkit.runner.sampling import Sampling
from trainkit.runner.scheduler import Scheduler
from trainkit.runner.timing import processor
from trainkit.runner.trees.shape import Shape
from trainkit.runner.trees.static import build, chain


class Policies:
    """A runner's policies, each kept with what it has learned for the next call of the same kind.

    Args:
        scheduler: Runs the rounds, captured or not, of the target and its drafter.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.rounds = scheduler, scheduler.rounds
        self.chains: dict[Hashable, PolicyChain] = {}

    def chain(self, policy: str, options: GenerateOptions, predictor: AcceptancePredictor | None) -> PolicyChain:
        """The chain whose length the policy of this name decides.

        Raises:
            UserError: unknown policy, or one that does not go with the drafter, the other options or captured rounds.
        """
        spec, drafter, name = PolicySpec.parse(policy), self.rounds.drafter, f"policy {policy}"
        if drafter is None:
            raise UserError(f"{name}: this runner was loaded without a drafter; give one (--drafter)")
        if options.tree is not None or options.depth == 0 or not isinstance(options.verify, str):
            raise UserError(
                f"{name}: a policy decides the length of chains; leave tree out, or give depth as the largest length"
            )
        if spec.name == "predictor" and predictor is None:
            raise UserError(f"{name}: the drafter has no predictor; train one, or choose another policy")
        if spec.name in ("confidence", "predictor") and self.scheduler.graphs is not None:
            raise UserError(f"{name}: stops within a round, which a captured graph cannot; choose cost or ema")
        predictor = None if spec.name == "cost-blind" else predictor
        max_depth, sampling = options.depth or min(MAX_DEPTH, drafter.max_depth or MAX_DEPTH), options.sampling
        key = (spec, max_depth, sampling.temperature, options.verify, torch.get_num_threads(), predictor, _steps(sampling))
        if key not in self.chains:
            may_drop = options.verify == "coupled" or sampling.greedy
            folded = None if predictor is None else FoldedPredictor(predictor, sampling.temperature)
            decides = self._policy(spec, max_depth, predictor, sampling, may_drop)
            self.chains[key] = PolicyChain(decides, self.scheduler.device, folded, may_drop)
        return self.chains[key]

    def _policy(
        self, spec: PolicySpec, max_depth: int, predictor: AcceptancePredictor | None, sampling: Sampling, may_drop: bool
    ) -> Policy:
        if spec.name == "fixed":
            return Fixed(max_depth)
        if spec.name == "ema":
            return Recent(max_depth)
        if spec.name.startswith("cost"):
            without = "none" if self.scheduler.graphs is None else "confidence"
            signal = without if predictor is None else "predictor"
            return Cost(self.costs(max_depth, predictor, sampling), max_depth, signal, may_drop)
        return Threshold("predictor" if spec.name == "predictor" else "confidence", spec.threshold, max_depth)

    def costs(self, max_depth: int, predictor: AcceptancePredictor | None, sampling: Sampling | None = None) -> ChainCosts:
        """Costs of drafting and verifying up to `max_depth` tokens with the current threads; measured once per machine."""
        assert self.rounds.drafter is not None
        sampling, device = sampling or Sampling(), self.scheduler.device
        target, captured = self.rounds.target, self.scheduler.graphs is not None
        length, batch = min(256, self.scheduler.max_len // 2), self.scheduler.max_batch
        setting = {
            "processor": processor(device),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(target.embed.weight.dtype),
            "target": shapes_digest(target),
            "drafter": shapes_digest(self.rounds.drafter),
            "predictor": shapes_digest(predictor),
            "graphs": captured,
            "max_depth": max_depth,
            "batch": batch,
            "length": length,
            "sampling": _steps(sampling),
            "version": 6,  # raise it when measuring changes
        }
        folded = None if predictor is None else FoldedPredictor(predictor, sampling.temperature)

        def shape_at(levels: int) -> Shape:
            if captured:
                return RankedChain(build(chain(levels), device), levels, folded)
            policy = Policy(levels)
            policy.signal = "none" if predictor is None else "predictor"
            return PolicyChain(policy, device, folded)

        return cached_costs(setting, lambda: measure_chain_costs(self.rounds, shape_at, max_depth, batch, length, sampling))


def _steps(sampling: Sampling) -> tuple[bool, bool, bool]:
    """Which steps of processing take time: noise, top-k, top-p."""
    return not sampling.greedy, not sampling.greedy and sampling.top_k > 0, not sampling.greedy and sampling.top_p < 1
