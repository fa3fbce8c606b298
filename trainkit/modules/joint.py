"""Medusa-2, for any drafter that reads its target's states: drafter and target are trained together, the target through LoRA.

Cai et al. 2024, arXiv 2401.10774, section 2.2.2. First the drafter alone for `heads_steps`, then both on

    L = L_base + lam0 * s(t) * L_draft,   s(t) rising from 0 to 1 over `draft_warmup` steps.

Gradients of both terms reach the adapter, those of L_draft through the target's states alone: its probabilities, where they are
what the drafter learns, are a teacher as ever. The checkpoint holds drafter and adapter; `trainkit export` writes the drafter
and, beside it, the target with the adapter merged.
Left out on purpose: sharding (ZeRO, FSDP), and kept or truncated teachers, since the target is never twice the same.
"""

# B batch  T positions  N counted tokens  D hidden

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from trainkit.data.manifest import weights_digest
from trainkit.drafters.base import DraftBatch, Drafter, LossOutput, TargetShape, kind_name
from trainkit.errors import UserError
from trainkit.losses.divergence import CrossEntropy, ForwardKL
from trainkit.models.adapter import PROJECTIONS, AdapterShape, TunedTarget
from trainkit.modules.base import Batch
from trainkit.modules.draft import DraftModule


class JointModule(DraftModule):
    """Trains a drafter and, through LoRA, its target together.

    Logged beside what DraftModule logs: `loss_head0`, the target's own loss per token (its head is head 0), and `loss_draft`,
    the drafter's. `loss` is the sum that is minimised, over the drafter's counted tokens.

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        drafter: Drafter class with its arguments; one that reads the target's hidden states.
        base_loss: Of the target: `cross_entropy` on the text's tokens, or `self_distillation`, KL(adapter off || adapter on),
            for text that the target wrote itself.
        heads_steps: Optimiser steps that train the drafter alone, the adapter untouched.
        draft_weight: lam0, the drafter's loss against the target's.
        draft_warmup: Steps after `heads_steps` over which s rises to 1.
        lora_rank: Rank of the adapter.
        lora_alpha: Its scale is lora_alpha / lora_rank.
        lora_lr: Its learning rate, as a share of the drafter's, which is the optimiser's.
        lora_modules: Names of the projections that get one; the usual seven by default.
        **draft: As in `DraftModule`.
    """

    def __init__(
        self,
        target: str,
        drafter: Callable[[TargetShape], Drafter],
        base_loss: Literal["cross_entropy", "self_distillation"] = "cross_entropy",
        heads_steps: int = 500,
        draft_weight: float = 0.2,
        draft_warmup: int = 500,
        lora_rank: int = 32,
        lora_alpha: float = 16.0,
        lora_lr: float = 0.25,
        lora_modules: list[str] | None = None,
        **draft: Any,
    ) -> None:
        super().__init__(target, drafter, **draft)
        kept = {"teacher_cache": self.teacher_cache, "teacher_top_k": self.teacher_top_k, "features": self.features}
        for name, given in kept.items():
            if given is not None:
                raise UserError(f"model.{name}: keeps what a frozen target says, and this one is trained; leave it out")
        if self._target_options["trust_remote_code"]:
            raise UserError("model.trust_remote_code: a target with code of its own cannot be merged at export; leave it out")
        if self.target_shard != "none":
            raise UserError("model.target_shard: a target that is trained is not sharded here; leave it out")
        least = {"heads_steps": 0, "draft_weight": 0, "draft_warmup": 0, "lora_rank": 1, "lora_alpha": 0, "lora_lr": 0}
        given = dict(zip(least, (heads_steps, draft_weight, draft_warmup, lora_rank, lora_alpha, lora_lr), strict=True))
        for name, value in given.items():
            if not value >= least[name]:
                raise UserError(f"model.{name} is {value}; it must be at least {least[name]}")
        self.heads_steps, self.draft_weight, self.draft_warmup, self.lora_lr = heads_steps, draft_weight, draft_warmup, lora_lr
        self.lora = AdapterShape(lora_rank, lora_alpha, tuple(lora_modules or PROJECTIONS))
        self.base_loss = base_loss
        self._base = CrossEntropy() if base_loss == "cross_entropy" else ForwardKL()
        self.tuned: TunedTarget | None = None
        self.adapter: nn.Module | None = None

    def load_target(self) -> TunedTarget:
        self.tuned = TunedTarget(self.target, self.lora, **self._target_options)
        self.adapter = self.tuned.adapter
        return self.tuned

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a DDPStrategy too
            raise UserError(f"trainer.strategy: JointModule trains under ddp, not {type(self.trainer.strategy).__name__}")
        super().setup(stage)
        assert self.drafter is not None
        if not self.drafter.taps:
            raise UserError(
                f"model.drafter: kind {kind_name(self.drafter)!r} reads none of its target's states; use DraftModule"
            )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"adapter": self.lora.to_dict(), "target_weights": weights_digest(self.target)}

    def trained(self) -> list[tuple[nn.Module, float]]:
        assert self.adapter is not None
        return [*super().trained(), (self.adapter, self.lora_lr)]

    @property
    def joint(self) -> bool:
        """Whether the target is trained by now."""
        return self.trainer.global_step >= self.heads_steps

    def weight(self, step: int) -> float:
        """lam0 * s of an optimiser step; lam0 alone while there is nothing to weigh the drafter's loss against."""
        since = step - self.heads_steps
        return self.draft_weight * (1.0 if since < 0 else min(1.0, (since + 1) / (self.draft_warmup + 1)))

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        joint = self.joint or micro is None
        with nullcontext() if joint else torch.no_grad():
            seen = self._seen(batch)
        drafted = self.draft_loss(seen, batch, micro)
        measured = {**drafted.metrics, "loss_draft": drafted.sum.detach()}
        weight = self.draft_weight if micro is None else self.weight(self.trainer.global_step)
        total = weight * drafted.sum
        if joint:
            base = self.target_loss(seen, batch)
            total = base.sum + total
            measured |= {"loss_head0": base.sum.detach(), "count_head0": base.count}
        else:  # DDP waits for a gradient of every parameter
            assert self.adapter is not None
            total = total + 0.0 * torch.stack([parameter.sum() for parameter in self.adapter.parameters()]).sum()
        return replace(drafted, sum=total, metrics=measured)

    def target_loss(self, seen: DraftBatch, batch: Batch) -> LossOutput:
        """L_base of the target as it is now: its own head on every counted token."""
        assert self.tuned is not None
        counted_BT, hidden_ND, labels_N = seen.training_targets(1)
        teacher_ND, head = hidden_ND, seen.handle.head
        if self.base_loss == "self_distillation":
            with self.tuned.off(), torch.no_grad():
                teacher_BTD, _ = self.tuned.forward(batch["tokens_BT"], batch["positions_BT"], batch["document_BT"])
            teacher_ND = teacher_BTD[counted_BT]
        return self._base(hidden_ND, head, teacher_ND.detach(), head, labels_N=labels_N)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.joint:  # without a gradient the optimiser passes over the adapter: no decay, no moments
            assert self.adapter is not None
            for parameter in self.adapter.parameters():
                parameter.grad = None
        super().on_before_optimizer_step(optimizer)
