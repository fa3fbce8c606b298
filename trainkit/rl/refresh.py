"""Keeps the drafter of the rollouts close to a policy that changes: trains it on recent rollouts, in place for the runner.

While its target is trained, an unchanged drafter still predicts the tokens of the first policy. Rollouts stay exact, because
verification depends on the policy alone; they become slower. A refresh trains a float32 copy of the drafter (the twin) on
rollouts of the last steps, with hidden states and distributions of the current policy, computed again because stored ones are
stale. Training on rejected positions follows online speculative decoding (Liu et al. 2023, arXiv 2310.07177). Left out on
purpose: trees, since acceptance per position decides; and acceptance predictors, which become stale too.
"""

# B rollouts of a batch  T positions  N numbers of all gradients, and sums

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trainkit import bundle
from trainkit.data.teacher.live import LiveTeacher
from trainkit.drafters.base import DraftBatch, Drafter, TargetShape, load_bundle, load_outside
from trainkit.errors import UserError
from trainkit.eval.acceptance import per_head
from trainkit.layers.linear import Linear
from trainkit.losses.chunked import ChunkedDivergence
from trainkit.losses.divergence import TV
from trainkit.losses.output import LossOutput
from trainkit.models.target import LiveTarget
from trainkit.rl.types import Group
from trainkit.runner.engine import load_drafter

Positions = Literal["all", "rejected", "mixed"]
Rollout = tuple[int, Tensor, int]
"""Step, token ids of prompt and response (int32, on the CPU), and number of prompt tokens."""
FALLEN = 0.95
"""A refresh is also due when acceptance is below this share of its best value since the last refresh."""


class Refresh:
    """Trains the drafter of the rollouts on recent rollouts, every `every` generations or when acceptance has fallen.

    A step is a generation, unless it is called an optimiser step. All random numbers follow from `seed` and the step. Before
    and after training, acceptance is measured on rollouts of the window that are not trained on; if it fell, the old weights
    and optimiser state are restored.

    Args:
        drafter: The runner's drafter, whose weights are replaced in place.
        source: Bundle or folder that it was loaded from; the twin starts from it in float32.
        target: The policy.
        every: Generations between refreshes.
        steps: Optimiser steps of a refresh.
        window: Number of generations whose rollouts are remembered; of each as many as one refresh reads, chosen at random.
        batch: Rollouts of an optimiser step, on each rank; as many are held out.
        lr: Learning rate of AdamW, constant.
        loss: Any divergence, at the sampling temperature of the rollouts; TV by default, which is 1 - acceptance rate.
        positions: Positions that count: `all` of the responses; `rejected`: drawn with the probability that the first draft
            token is rejected there, 1 - alpha; `mixed`: those, and as many of the others at random.
        seed: Seed of the choice of rollouts and positions.
        reduce: Sums a tensor over all ranks; every rank then holds the same drafter.

    Raises:
        UserError: an option out of range, or a drafter with packed weights.
    """

    def __init__(
        self,
        drafter: Drafter,
        source: str | Path,
        target: LiveTarget,
        every: int = 10,
        steps: int = 10,
        window: int = 20,
        batch: int = 4,
        lr: float = 1e-5,
        loss: ChunkedDivergence | None = None,
        positions: Positions = "mixed",
        seed: int = 0,
        reduce: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        for name, value in {"every": every, "steps": steps, "window": window, "batch": batch, "lr": lr}.items():
            if not value > 0:
                raise UserError(f"model.refresh.{name} is {value}; it must be above 0")
        if positions not in ("all", "rejected", "mixed"):
            raise UserError(f"model.refresh.positions is {positions!r}; choose all, rejected or mixed")
        self.every, self.steps, self.window, self.batch = every, steps, window, batch
        self.loss, self.positions, self.seed, self._reduce = loss or TV(), positions, seed, reduce
        self._drafter, self._source, self._teacher = drafter, Path(source), LiveTeacher(target)
        # The twin.
        self.twin = load_drafter(self._source, target.folder, target.shape())
        if any(isinstance(part, Linear) and part.packed is not None for part in self.twin.modules()):
            raise UserError(f"{source}: quantised weights cannot be trained; refresh a dense drafter, or leave refresh out")
        self.twin = self.twin.float().to(next(drafter.parameters()).device).requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.twin.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        # What it remembers.
        self._rollouts: list[Rollout] = []
        self._last, self._best, self._ended = 0, 0.0, perf_counter()

    def observe(self, groups: Sequence[Group], step: int) -> None:
        """Remembers rollouts of a step and forgets those that left the window."""
        made = [
            (step, torch.tensor([*group.task.tokens, *response.tokens], dtype=torch.int32), len(group.task.tokens))
            for group in groups
            for response in group.responses
        ]
        limit = self.batch * (self.steps + 1)
        chosen = torch.randperm(len(made), generator=self._generator(step, "observe"))[:limit].sort().values
        recent = [rollout for rollout in self._rollouts if step - self.window < rollout[0] < step]
        self._rollouts = recent + [made[index] for index in chosen.tolist()]

    def due(self, step: int, acceptance: float) -> bool:
        """Whether to refresh after a step; call it once for each step.

        Args:
            step: The step.
            acceptance: A measure of the acceptance of all ranks' rollouts, such as tau or the share of first drafted tokens
                that were accepted; NaN if it is unknown.
        """
        self._best = max(self._best, acceptance)
        return step - self._last >= self.every or acceptance < FALLEN * self._best

    def run(self, step: int) -> dict[str, float]:
        """Trains the twin and copies it into the runner's drafter, unless its acceptance fell.

        Returns:
            `refresh/loss` per counted token; `alpha_before` and `alpha_after`, acceptance rate on the rollouts held out, mean
            over draft positions; `kept`, 0 if the old weights were restored; `positions`, share of the response tokens that
            were labels; `seconds`; and `share`, the share of the time since the last refresh that this one took.
        """
        began = perf_counter()
        saved = copy.deepcopy((self.twin.state_dict(), self.optimizer.state_dict()))
        # Some rollouts are held out; the others are trained on.
        order = torch.randperm(len(self._rollouts), generator=self._generator(step, "order")).tolist()
        held_out = min(self.batch, len(order) // 2)
        measured = self._read([self._rollouts[index] for index in order[:held_out]])
        train = [self._rollouts[index] for index in order[held_out:]]
        before = self._alpha(measured)
        sums = torch.zeros(4)
        device = next(self.twin.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for index in range(self.steps):
                generator = self._generator(step, index)
                torch.manual_seed(generator.initial_seed())  # dropout, and losses that sample
                chosen = torch.randperm(len(train), generator=generator)[: self.batch].tolist()
                sums += self._train_step([train[number] for number in chosen], generator)
        after = self._alpha(measured)
        # Keep the new weights if acceptance did not fall; NaN counts as fallen.
        kept = after >= before
        if not kept:
            self.twin.load_state_dict(saved[0])
            self.optimizer.load_state_dict(saved[1])
        self._drafter.copy_weights(self.twin.state_dict())
        loss, count, chosen, labels = sums.tolist()
        ended, previous = perf_counter(), self._ended
        self._last, self._best, self._ended = step, 0.0, ended
        values = {
            "loss": loss / max(count, 1.0),
            "alpha_before": before,
            "alpha_after": after,
            "kept": float(kept),
            "positions": chosen / max(labels, 1.0),
            "seconds": ended - began,
            "share": (ended - began) / (ended - previous),
        }
        return {f"refresh/{name}": value for name, value in values.items()}

    def _train_step(self, rollouts: Sequence[Rollout], generator: torch.Generator) -> Tensor:
        """One optimiser step on these rollouts of each rank; sums as in `_apply`."""
        return self._apply(self._gradients(self._read(rollouts), generator))

    def _gradients(self, whole: DraftBatch | None, generator: torch.Generator) -> Tensor:
        """Gradients of the loss sum over a batch, then four sums: loss, its count, labels, labels of whole responses; [N]."""
        parameters = list(self.twin.parameters())
        if whole is None:
            return torch.zeros(sum(weight.numel() for weight in parameters) + 4, device=parameters[0].device)
        batch = self._at_positions(whole, generator)
        output = self.twin.train()(batch, self.loss)
        gradients = torch.autograd.grad(output.sum, parameters, allow_unused=True, materialize_grads=True)
        numbers = [output.sum.detach(), output.count, *(part.label_mask(1).sum() for part in (batch, whole))]
        return torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack([x.float() for x in numbers])])

    def _apply(self, total_N: Tensor) -> Tensor:
        """An optimiser step along the mean gradient of all ranks; the four sums of `_gradients` over ranks, on the CPU."""
        parameters, total_N = list(self.twin.parameters()), self._reduce(total_N)
        sizes, count = [weight.numel() for weight in parameters], total_N[-3].clamp(min=1)
        for weight, gradient_n in zip(parameters, total_N[:-4].split(sizes), strict=True):
            weight.grad = (gradient_n / count).view_as(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total_N[-4:].cpu()

    def _read(self, rollouts: Sequence[Rollout]) -> DraftBatch | None:
        """The rollouts as rows, with the present policy's outputs; all response tokens are labels. None without rollouts."""
        if not rollouts:
            return None
        device = self._teacher.target.device
        lengths = torch.tensor([len(tokens) for _, tokens, _ in rollouts], device=device)[:, None]
        prompts = torch.tensor([prompt for _, _, prompt in rollouts], device=device)[:, None]
        tokens_BT = pad_sequence([tokens for _, tokens, _ in rollouts], batch_first=True).long().to(device)
        positions_BT = torch.arange(tokens_BT.shape[1], device=device).expand_as(tokens_BT)
        real_BT = positions_BT < lengths
        tensors = {"tokens_BT": tokens_BT, "positions_BT": positions_BT, "document_BT": real_BT.long() - 1}
        with torch.no_grad():
            return DraftBatch.read(self._teacher, tensors | {"mask_BT": real_BT & (positions_BT >= prompts)}, self.twin.taps)

    def _at_positions(self, batch: DraftBatch, generator: torch.Generator) -> DraftBatch:
        """The batch with only the chosen positions as labels."""
        if self.positions == "all":
            return batch
        counted_BT, alpha_BT = first_acceptance(self.twin, batch, self._measure(batch))
        rejected_BT = counted_BT & (torch.rand(alpha_BT.shape, generator=generator) >= alpha_BT)
        chosen_BT = rejected_BT.clone()
        if self.positions == "mixed":
            others = (counted_BT & ~rejected_BT).nonzero()
            drawn = others[torch.randperm(len(others), generator=generator)[: int(rejected_BT.sum())]]
            chosen_BT[drawn[:, 0], drawn[:, 1]] = True
        return replace(batch, mask_BT=chosen_BT.to(batch.mask_BT.device))

    @torch.no_grad()
    def _measure(self, batch: DraftBatch) -> LossOutput:
        return self.twin.eval()(batch, self.loss)

    def _alpha(self, batch: DraftBatch | None) -> float:
        """Acceptance rate of the twin over a batch on all ranks, mean over draft positions; 0 without a batch."""
        total = torch.zeros(2, device=next(self.twin.parameters()).device)
        if batch is not None:
            output = self._measure(batch)
            total = torch.stack([output.metrics["alpha"].float(), output.count.float()])
        alpha, count = self._reduce(total).tolist()
        return alpha / max(count, 1.0)

    def _generator(self, *key: Any) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next refresh depends on, as tensors and plain values; `window` has this rank's rollouts.

        `source` is the folder of the drafter before, with which `load_refreshed` rebuilds it.
        """
        window = {
            "tokens": torch.cat([tokens for _, tokens, _ in self._rollouts] or [torch.zeros(0, dtype=torch.int32)]),
            "numbers": torch.tensor([(step, len(tokens), prompt) for step, tokens, prompt in self._rollouts])
            .view(-1, 3)
            .long(),
        }
        trained = {"twin": self.twin.state_dict(), "optimizer": self.optimizer.state_dict()}
        return trained | {"window": window, "last": self._last, "best": self._best, "source": str(self._source.resolve())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; the runner's drafter receives the trained weights.

        Raises:
            UserError: weights of another drafter.
        """
        lr = self.optimizer.param_groups[0]["lr"]
        try:
            self.twin.load_state_dict(state["twin"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise UserError("the checkpoint's drafter does not fit this run's; resume with the drafter of the run") from error
        self.optimizer.param_groups[0]["lr"] = lr
        numbers = state["window"]["numbers"].tolist()
        parts = state["window"]["tokens"].split([length for _, length, _ in numbers])
        self._rollouts = [(step, tokens.cpu(), prompt) for (step, _, prompt), tokens in zip(numbers, parts, strict=True)]
        self._last, self._best = int(state["last"]), float(state["best"])
        self._drafter.copy_weights(self.twin.state_dict())


def load_refreshed(state: Mapping[str, Any], target: TargetShape, target_folder: Path) -> Drafter:
    """The refreshed drafter of a `state_dict`, float32 on the CPU, bound to a target of the same sizes.

    Raises:
        UserError: the drafter that was refreshed is no longer in its folder.
    """
    source = Path(state["source"])
    if not source.is_dir():
        raise UserError(f"{source}: the drafter that the run refreshed is not there; restore that folder")
    is_bundle = bundle.is_bundle(source)
    drafter = load_bundle(bundle.read(source), target) if is_bundle else load_outside(source, target, target_folder)
    drafter.float().load_state_dict(state["twin"])
    return drafter


def first_acceptance(drafter: Drafter, batch: DraftBatch, output: LossOutput) -> tuple[Tensor, Tensor]:
    """Where the first draft token of a round has a label, and its acceptance rate there, both [B, T] on the CPU."""
    counted_BT, values = per_head(drafter, batch, output)[0]
    if "counted_HBT" not in output.per_token:  # a single prediction per position, listed by the position before the label
        counted_BT = counted_BT.roll(1, 1)
    alpha_BT = torch.zeros(counted_BT.shape)
    alpha_BT[counted_BT] = values["alpha"].float()
    return counted_BT, alpha_BT
