"""Chains whose length a policy decides: level by level on a CPU, and beforehand where rounds are captured as CUDA graphs.

A captured round cannot stop early. It drafts a chain of a given depth and verifies a given number of tokens over all rows:
those that are likeliest to be accepted.
"""

# B rows  D draft levels  K draft vocabulary

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from trainkit.layers.attention import Packing
from trainkit.models.predictor import FoldedPredictor
from trainkit.runner.policies.logistic import OnlineLogistic
from trainkit.runner.policy import Policy
from trainkit.runner.trees.shape import Draft, Proposals, Shape, Steps
from trainkit.runner.trees.static import Level, Tree, build, chain

Predictor = FoldedPredictor | OnlineLogistic
"""Predicts the probability that a level's best proposal is accepted."""


class PolicyChain(Shape):
    """Asks its policy after each level whether to draft another one. The host reads a number per row, so no graph can hold it.

    Args:
        policy: Decides.
        device: Device of the tree tensors.
        predictor: Predicts acceptance for a policy whose signal is `predictor` or `logistic`, at the temperature of decoding.
        may_drop: Whether drafted tokens may stay unverified. Under `residual` they must not: acceptance supposes tokens drawn
            from q, and a token that is verified or dropped by what it is was not, so the text would not have the target's
            distribution. Under `coupled` the text is the target's choice whatever is verified.
    """

    def __init__(self, policy: Policy, device: torch.device, predictor: Predictor | None = None, may_drop: bool = True) -> None:
        assert policy.signal not in ("predictor", "logistic") or predictor is not None
        self.policy: Policy = policy
        self.predictor, self.device, self.may_drop = predictor, device, may_drop
        self.depth = policy.max_depth
        self._trees: dict[int, Tree] = {}

    def tree(self, depth: int) -> Tree:
        """The chain of this depth; built once."""
        if depth not in self._trees:
            self._trees[depth] = build(chain(depth), self.device)
        return self._trees[depth]

    @property
    def key(self) -> Hashable:
        return None

    def captured(self, levels: int, per_row: int) -> Shape:
        tree = self.tree(levels)
        if not levels or self.policy.signal == "none":
            return tree
        return RankedChain(tree, per_row if self.may_drop else levels, self.predictor)

    def grow(self, steps: Steps) -> Draft:
        # Draft for as long as the policy wants another level.
        policy, tokens, features = self.policy, [steps.root_B[:, None]], []
        for depth, level in enumerate(self.tree(self.depth).levels[: steps.levels]):
            proposals = _propose(steps, level, tokens[-1], depth)
            signal_B, columns_B1, feature_B = self._signal(steps, proposals, depth)
            tokens.append(proposals.tokens(columns_B1))
            features += [] if feature_B is None else [feature_B]
            if not policy.continues([] if signal_B is None else signal_B.tolist()):
                break
        levels, rows = len(tokens) - 1, len(steps.root_B)
        # Verify the tokens that the policy chooses; pack them where rows differ.
        lengths = policy.verified(levels, rows) if self.may_drop else [levels] * rows
        depth, packing = max(lengths), None
        if min(lengths) < depth:
            nodes_B = 1 + torch.tensor(lengths, device=self.device)
            packing = Packing.from_lengths(nodes_B, depth + 1, sum(lengths) + rows)
        tree, tokens_BN = self.tree(depth), torch.cat(tokens[: depth + 1], dim=1)
        logits, signals = tuple(steps.logits[:depth]), tuple(steps.signals[:depth])
        features_BD = torch.stack(features, 1) if features else None
        return Draft(tree, tokens_BN, tree.topology, levels, logits, signals, packing=packing, features_BD=features_BD)

    def _signal(self, steps: Steps, proposals: Proposals, depth: int) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """As `level_chance`, for the policy's signal; the probability is None if the policy reads no signal."""
        if self.policy.signal == "none":
            return None, proposals.noisy_BFK.argmax(-1), None
        return level_chance(proposals, depth, None if self.policy.signal == "confidence" else self.predictor, steps.logits)


class RankedChain(Shape):
    """Drafts a chain in every row and verifies the tokens that are likeliest to be accepted; nothing is read on the host.

    A token is never likelier to be accepted than the one before it, so the likeliest tokens form chains.

    Args:
        tree: The chain that is drafted.
        per_row: Mean number of tokens verified in a row; rows whose text has ended take none while others have any.
        predictor: Predicts acceptance; without one the draft's own probabilities are used.
    """

    def __init__(self, tree: Tree, per_row: int, predictor: Predictor | None = None) -> None:
        self.tree, self.per_row, self.predictor = tree, per_row, predictor
        self.depth = tree.depth

    @property
    def key(self) -> Hashable:
        return self.tree.paths, self.per_row, self.predictor

    def grow(self, steps: Steps) -> Draft:
        # Draft every level, with each token's probability of being accepted.
        B, D = steps.root_B.shape[0], self.depth
        tokens, chances, features = [steps.root_B[:, None]], [], []
        for depth, level in enumerate(self.tree.levels):
            proposals = _propose(steps, level, tokens[-1], depth)
            chance_B, columns_B1, feature_B = level_chance(proposals, depth, self.predictor, steps.logits)
            tokens.append(proposals.tokens(columns_B1))
            chances.append(chance_B)
            features += [] if feature_B is None else [feature_B]
        chances_BD = torch.stack(chances, 1).clamp(max=1.0).cumprod(1)
        if steps.done_B is not None:
            chances_BD = chances_BD.masked_fill(steps.done_B[:, None], 0.0)
        # Give the budget of verified tokens to the likeliest; stable, so that of equal tokens of a row the first come first.
        packing = None
        if self.per_row < D:
            best = chances_BD.flatten().sort(descending=True, stable=True).indices[: B * self.per_row]
            nodes_B = torch.ones_like(steps.root_B).scatter_add(0, best // D, torch.ones_like(best))
            packing = Packing.from_lengths(nodes_B, D + 1, B * (1 + self.per_row))
        tree, tokens_BN, logits, signals = self.tree, torch.cat(tokens, dim=1), tuple(steps.logits), tuple(steps.signals)
        learnt = {"chances_BD": chances_BD, "features_BD": torch.stack(features, 1) if features else None}
        return Draft(tree, tokens_BN, tree.topology, D, logits, signals, packing=packing, **learnt)


def _propose(steps: Steps, level: Level, token_B1: Tensor, depth: int) -> Proposals:
    """The proposals of a chain's level after a token."""
    return steps.expand(level.frontier(token_B1, steps.position_B, depth, is_chain=True), 1)


def level_chance(
    proposals: Proposals, depth: int, predictor: Predictor | None, logits: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B] probability that a level's best proposal is accepted; its column [B, 1]; the online model's feature [B], or None.

    The probability is the predictor's, or without one the draft's. `logits` are the draft logits of the levels so far, without
    noise; an `OnlineLogistic` that does not read noise needs them.
    """
    noisy_BFK = proposals.noisy_BFK
    if isinstance(predictor, OnlineLogistic):
        chance_B, feature_B = predictor(noisy_BFK[:, 0] if predictor.reads_noise else logits[-1][:, 0], depth)
        return chance_B, noisy_BFK.argmax(-1), feature_B
    if predictor is not None:
        chance_B11, columns_B11 = predictor(proposals.hidden_BFD, noisy_BFK, 1, depth)
        return chance_B11[:, 0, 0], columns_B11[:, 0], None
    best_B1 = noisy_BFK.softmax(-1).max(-1)
    return best_B1.values[:, 0], best_B1.indices, None
