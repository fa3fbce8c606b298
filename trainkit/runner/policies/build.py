"""From the policy that a user names to the chain whose length it decides, with the costs and the predictor that it needs."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from trainkit.errors import UserError
from trainkit.models.predictor import AcceptancePredictor, FoldedPredictor
from trainkit.runner.options import GenerateOptions
from trainkit.runner.policies.chain import PolicyChain, RankedChain
from trainkit.runner.policies.cost import Cost
from trainkit.runner.policies.cost_model import ChainCosts, CostMeasurement, cached_costs, shapes_digest, store_costs
from trainkit.runner.policies.logistic import OnlineLogistic
from trainkit.runner.policies.simple import Fixed, Recent, Threshold
from trainkit.runner.policies.spec import PolicySpec
from trainkit.runner.policy import MAX_DEPTH, Policy, Signal
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
        signal = spec.signal or ("logistic" if predictor is None else "predictor")
        if signal == "predictor" and predictor is None:
            raise UserError(f"{name}: the drafter has no predictor; train one, or choose another policy")
        trained = predictor if signal == "predictor" else None
        max_depth, sampling = options.depth or min(MAX_DEPTH, drafter.max_depth or MAX_DEPTH), options.sampling
        key = (spec, max_depth, sampling.temperature, options.verify, torch.get_num_threads(), trained, _steps(sampling))
        if key not in self.chains:
            device, coupled = self.scheduler.device, options.verify == "coupled" or sampling.greedy
            chance = FoldedPredictor(trained, sampling.temperature) if trained is not None else None
            if signal == "logistic":
                chance = OnlineLogistic(max_depth, device, reads_noise=options.verify != "residual" or sampling.greedy)
            decides: Policy = Fixed(max_depth)
            learns = chance if isinstance(chance, OnlineLogistic) else None
            if spec.name == "ema":
                decides = Recent(max_depth)
            elif spec.name == "threshold":
                decides = Threshold(signal, spec.threshold, max_depth, learns)
            elif spec.name == "cost":
                decides = Cost(self.costs(max_depth, trained, sampling, signal), max_depth, signal, coupled, learns)
            self.chains[key] = PolicyChain(decides, device, chance, may_drop=coupled)
        chosen = self.chains[key]
        if isinstance(chosen.policy, Cost) and (rows := chosen.policy.drifted_rows()):
            chosen.policy.use(self.costs(max_depth, trained, sampling, signal, (chosen.policy.costs, rows)))
        return chosen

    def costs(
        self,
        max_depth: int,
        predictor: AcceptancePredictor | None,
        sampling: Sampling | None = None,
        signal: Signal | None = None,
        drifted: tuple[ChainCosts, int] | None = None,
    ) -> ChainCosts:
        """Costs of drafting and verifying up to `max_depth` tokens with the current threads; measured once per machine.

        Args:
            max_depth: Largest number of tokens.
            predictor: The predictor that the policy reads, whose time counts.
            sampling: Sampling of the calls; noise and filters take their time.
            signal: What the policy reads; by default the predictor if there is one, else nothing.
            drifted: Costs, and the number of texts whose costs are measured again now.
        """
        assert self.rounds.drafter is not None
        sampling, device = sampling or Sampling(), self.scheduler.device
        signal = signal or ("none" if predictor is None else "predictor")
        target, captured = self.rounds.target, self.scheduler.graphs is not None
        length, batch = min(256, self.scheduler.max_len // 2), self.scheduler.max_batch
        longer = min(8 * length, self.scheduler.max_len - 2 * (max_depth + 1))
        setting = {
            "processor": processor(device),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(target.embed.weight.dtype),
            "target": shapes_digest(target),
            "drafter": shapes_digest(self.rounds.drafter),
            "predictor": shapes_digest(predictor),
            "signal": signal,
            "graphs": captured,
            "max_depth": max_depth,
            "batch": batch,
            "length": length,
            "sampling": _steps(sampling),
            "longer": longer,
            "version": 7,  # raise it when measuring changes
        }
        chance = FoldedPredictor(predictor, sampling.temperature) if predictor is not None else None
        if signal == "logistic":
            chance = OnlineLogistic(max_depth, device)

        def shape_at(levels: int) -> Shape:
            if captured and signal != "none":
                return RankedChain(build(chain(levels), device), levels, chance)
            policy = Policy(levels)
            policy.signal = signal
            return PolicyChain(policy, device, chance)

        measurement = CostMeasurement(self.rounds, shape_at, max_depth, batch, length, longer, sampling)
        if drifted is None:
            return cached_costs(setting, measurement.measure)
        costs = measurement.again(*drifted)
        store_costs(setting, costs)
        return costs


def _steps(sampling: Sampling) -> tuple[bool, bool, bool]:
    """Which steps of processing take time: noise, top-k, top-p."""
    return not sampling.greedy, not sampling.greedy and sampling.top_k > 0, not sampling.greedy and sampling.top_p < 1
