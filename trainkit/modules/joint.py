"""Medusa-2, for any drafter that reads hidden states of its target: trains the drafter and, through LoRA, the target together.

Cai et al. 2024, arXiv 2401.10774, section 2.2.2. The first `heads_steps` optimiser steps train the drafter alone. After them
both are trained by the loss

    L = L_base + lam0 * s(t) * L_draft,   s(t) rising from 0 to 1 over `draft_warmup` steps.

Both terms have gradients with respect to the adapter. The gradient of L_draft reaches the adapter only through the target's
hidden states: the target distribution, if the drafter learns it, is detached. The checkpoint holds drafter and adapter.
`trainkit export` writes the drafter and, beside it, the target with the merged adapter. Left out on purpose: sharding (ZeRO,
FSDP), and stored or truncated teachers, because the target changes at each step.
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
    """Trains a drafter together with its target, the target through a LoRA adapter.

    Logs in addition to DraftModule: `loss_head0`, the loss of the target per token (the target's own head is head 0), and
    `loss_draft`, the loss of the drafter. `loss` is the weighted sum that is minimised, per counted token of the drafter.

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        drafter: Drafter class with its arguments; it must read hidden states of the target.
        base_loss: Loss of the target: `cross_entropy` on the tokens of the text, or `self_distillation`, KL(adapter off ||
            adapter on), for text that the target wrote itself.
        heads_steps: Optimiser steps that train the drafter alone and leave the adapter unchanged.
        draft_weight: lam0, weight of the drafter's loss relative to the target's.
        draft_warmup: Steps after `heads_steps` over which s rises to 1.
        lora_rank: Rank of the adapter.
        lora_alpha: Numerator of the adapter's scale, lora_alpha / lora_rank.
        lora_lr: Learning rate of the adapter, as a share of the drafter's, which is that of the optimiser.
        lora_modules: Names of the projections with an adapter; by default all seven of attention and MLP.
        **draft: As in `DraftModule`.
    """

    teacher: TunedTarget
    adapter: nn.Module  # from `setup` on, like `teacher`

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
        # Refuse options of a frozen target, and values out of range.
        super().__init__(target, drafter, **draft)
        for name in ("teacher_cache", "teacher_top_k", "features"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"model.{name}: stores the output of a frozen target, but JointModule trains its target; leave it out"
                )
        if self._target_options["trust_remote_code"]:
            raise UserError("model.trust_remote_code: a target with its own code cannot be merged at export; leave it out")
        if self.target_shard != "none":
            raise UserError("model.target_shard: JointModule trains its target and cannot shard it; leave it out")
        minimum = {"heads_steps": 0, "draft_weight": 0, "draft_warmup": 0, "lora_rank": 1, "lora_alpha": 0, "lora_lr": 0}
        values = (heads_steps, draft_weight, draft_warmup, lora_rank, lora_alpha, lora_lr)
        for (name, least), value in zip(minimum.items(), values, strict=True):
            if not value >= least:
                raise UserError(f"model.{name} is {value}; it must be at least {least}")
        self.heads_steps, self.draft_weight, self.draft_warmup, self.lora_lr = heads_steps, draft_weight, draft_warmup, lora_lr
        self.lora = AdapterShape(lora_rank, lora_alpha, tuple(lora_modules or PROJECTIONS))
        self.base_loss = base_loss
        self._base = CrossEntropy() if base_loss == "cross_entropy" else ForwardKL()

    def load_target(self) -> TunedTarget:
        target = TunedTarget(self.target, self.lora, **self._target_options)
        self.adapter = target.adapter
        return target

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a subclass of DDPStrategy
            raise UserError(f"trainer.strategy: JointModule trains under ddp, not {type(self.trainer.strategy).__name__}")
        super().setup(stage)
        if not self.drafter.taps:
            raise UserError(
                f"model.drafter: kind {kind_name(self.drafter)!r} reads no hidden states of its target; use DraftModule"
            )

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"adapter": self.lora.to_dict(), "target_weights": weights_digest(self.target)}

    def trained(self) -> list[tuple[nn.Module, float]]:
        return [*super().trained(), (self.adapter, self.lora_lr)]

    @property
    def joint(self) -> bool:
        """Whether the current optimiser step trains the target too."""
        return self.trainer.global_step >= self.heads_steps

    def weight(self, step: int) -> float:
        """Weight of the drafter's loss, lam0 * s(step); lam0 while the drafter is trained alone."""
        joint_steps = step - self.heads_steps
        return self.draft_weight * (1.0 if joint_steps < 0 else min(1.0, (joint_steps + 1) / (self.draft_warmup + 1)))

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        joint = self.joint or micro is None
        with nullcontext() if joint else torch.no_grad():
            draft_batch = self.draft_batch(batch)
        draft = self.draft_loss(draft_batch, batch, micro)
        metrics = {**draft.metrics, "loss_draft": draft.sum.detach()}
        weight = self.draft_weight if micro is None else self.weight(self.trainer.global_step)
        total = weight * draft.sum
        if joint:
            base = self.target_loss(draft_batch, batch)
            total = base.sum + total
            metrics |= {"loss_head0": base.sum.detach(), "count_head0": base.count}
        else:  # DDP waits for a gradient of every parameter, so give the adapter a zero gradient
            total = total + 0.0 * torch.stack([parameter.sum() for parameter in self.adapter.parameters()]).sum()
        return replace(draft, sum=total, metrics=metrics)

    def target_loss(self, draft_batch: DraftBatch, batch: Batch) -> LossOutput:
        """L_base: loss of the target with its current adapter, summed over the counted tokens."""
        counted_BT, hidden_ND, labels_N = draft_batch.training_targets(1)
        teacher_ND, head = hidden_ND, draft_batch.handle.head
        if self.base_loss == "self_distillation":
            with self.teacher.off(), torch.no_grad():
                teacher_BTD, _ = self.teacher.forward(batch["tokens_BT"], batch["positions_BT"], batch["document_BT"])
            teacher_ND = teacher_BTD[counted_BT]
        return self._base(hidden_ND, head, teacher_ND.detach(), head, labels_N=labels_N)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.joint:  # the optimiser skips parameters without a gradient, so weight decay and moments do not change them
            for parameter in self.adapter.parameters():
                parameter.grad = None
