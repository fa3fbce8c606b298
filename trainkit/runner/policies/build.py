"""From a policy's name to the chain or tree that it paces, with what it needs: the costs on this machine, the predictor."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from trainkit.errors import UserError
from trainkit.models.predictor import AcceptancePredictor, FoldedPredictor
from trainkit.runner.policies.chain import AdaptiveChain, RankedChain
from trainkit.runner.policies.cost import Cost
from trainkit.runner.policies.cost_model import ChainCosts, kept_costs, measure_chain_costs, sizes_of
from trainkit.runner.policies.pruned import AdaptiveTree, PredictedTree, TreeCost
from trainkit.runner.policies.simple import Recent, Threshold
from trainkit.runner.policy import MOST, Policy, PolicyName
from trainkit.runner.request import Options
from trainkit.runner.round import Rounds
from trainkit.runner.sampling import Sampling
from trainkit.runner.scheduler import Schedule
from trainkit.runner.timing import processor
from trainkit.runner.trees.dynamic import DynamicTree
from trainkit.runner.trees.shape import Shape
from trainkit.runner.trees.static import build, chain


class Pacer:
    """A runner's policies, each kept with what it has learnt for the next call of the same kind.

    Args:
        rounds: Of the target and its drafter.
        schedule: Whether rounds are captured, and how many texts are decoded together.
        max_len: Of the runner.
    """

    def __init__(self, rounds: Rounds, schedule: Schedule, max_len: int) -> None:
        self.rounds, self.schedule, self.max_len = rounds, schedule, max_len
        self.device = schedule.device
        self.chains: dict[Hashable, AdaptiveChain] = {}
        self.trees: dict[Hashable, Shape] = {}

    def shape(self, options: Options, predictor: AcceptancePredictor | None) -> Shape:
        """What `options.policy` paces.

        Raises:
            UserError: no such policy, or one that does not go with the drafter, the other options or captured rounds.
        """
        assert options.policy is not None
        asked, drafter, policy = PolicyName.parse(options.policy), self.rounds.drafter, f"policy {options.policy}"
        if drafter is None:
            raise UserError(f"{policy}: this runner was loaded without a drafter; give one (--drafter)")
        tree = options.tree
        if (tree is not None and type(tree) is not DynamicTree) or options.depth == 0 or options.verify == "mixed":
            raise UserError(f"{policy}: paces chains and dynamic trees; leave tree out, or give depth as the most it may draft")
        if asked.needs_predictor and predictor is None:
            raise UserError(f"{policy}: the drafter has no predictor; train one, or choose another policy")
        if asked.stops_within and self.schedule.graphs is not None:
            raise UserError(f"{policy}: stops within a round, which a captured graph cannot; take cost or ema")
        predictor = None if asked.blind else predictor
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        if isinstance(tree, DynamicTree):
            return self._tree(asked, tree, sampling, options, predictor)
        most = options.depth or min(MOST, drafter.max_depth or MOST)
        key = (asked, most, options.temperature, options.verify, torch.get_num_threads(), predictor, _parts(sampling))
        if key not in self.chains:
            drops = options.verify == "coupled" or options.temperature == 0
            made = self._policy(asked, most, predictor, sampling, drops)
            word = None if predictor is None else FoldedPredictor(predictor, options.temperature)
            self.chains[key] = AdaptiveChain(made, self.device, word, drops)
        return self.chains[key]

    def _tree(
        self, asked: PolicyName, tree: DynamicTree, sampling: Sampling, options: Options, predictor: AcceptancePredictor | None
    ) -> Shape:
        if asked.name not in ("fixed", "cost"):
            raise UserError(f"policy {options.policy}: paces chains; for a dynamic tree take cost or fixed")
        key = (asked, tree, options.temperature, options.verify, torch.get_num_threads(), predictor, _parts(sampling))
        if key not in self.trees:
            independent = options.verify == "residual" and options.temperature > 0  # of the noise that the predictor knows
            word = None if predictor is None or independent else FoldedPredictor(predictor, options.temperature)
            whole = PredictedTree(tree.depth, tree.top_k, tree.nodes, word)
            if asked.name == "fixed":
                self.trees[key] = whole
            else:
                costs = self.costs(tree.depth, predictor, sampling, whole)
                self.trees[key] = AdaptiveTree(TreeCost(costs, whole), self.device)
        return self.trees[key]

    def _policy(
        self, asked: PolicyName, most: int, predictor: AcceptancePredictor | None, sampling: Sampling, drops: bool
    ) -> Policy:
        if asked.name == "fixed":
            return Policy(most)
        if asked.name == "ema":
            return Recent(most)
        if asked.name == "cost":
            blind = "nothing" if self.schedule.graphs is None else "confidence"
            return Cost(self.costs(most, predictor, sampling), most, blind if predictor is None else "predictor", drops)
        return Threshold("predictor" if asked.name == "predictor" else "confidence", asked.threshold, most)

    def costs(
        self,
        most: int,
        predictor: AcceptancePredictor | None,
        sampling: Sampling | None = None,
        tree: PredictedTree | None = None,
    ) -> ChainCosts:
        """What drafting and verifying up to `most` tokens takes here, with as many threads as now; measured once a machine.

        With `tree` what its levels and nodes take.
        """
        assert self.rounds.drafter is not None
        sampling = sampling or Sampling()
        target, captured = self.rounds.target, self.schedule.graphs is not None
        length, batch = min(256, self.max_len // 2), self.schedule.max_batch
        setting = {
            "processor": processor(self.device),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": str(target.embed.weight.dtype),
            "target": sizes_of(target),
            "drafter": sizes_of(self.rounds.drafter),
            "predictor": sizes_of(predictor),
            "graphs": captured,
            "most": most,
            "batch": batch,
            "length": length,
            "sampling": _parts(sampling),
            "parts": "draft, verify, packing, rest 4",
            "tree": None if tree is None else [tree.depth, tree.top_k, tree.nodes],
        }

        word = None if predictor is None else FoldedPredictor(predictor, sampling.temperature)

        def drafted(levels: int) -> Shape:
            if tree is not None:  # numbers of nodes from few to all
                return tree.cut(levels, max(2, round(tree.nodes * levels / most)))
            if captured:
                return RankedChain(build(chain(levels), self.device), levels, word)
            whole = Policy(levels)
            whole.reads = "nothing" if predictor is None else "predictor"
            return AdaptiveChain(whole, self.device, word)

        return kept_costs(setting, lambda: measure_chain_costs(self.rounds, drafted, most, batch, length, sampling))


def _parts(sampling: Sampling) -> tuple[bool, bool, bool]:
    """Which parts of processing it has, each with its time: noise, top-k, top-p."""
    return not sampling.greedy, not sampling.greedy and sampling.top_k > 0, not sampling.greedy and sampling.top_p < 1
