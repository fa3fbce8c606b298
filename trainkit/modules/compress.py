"""Trains a compressed language model to match its dense original: recovery, sparse training, quantisation-aware training.

The teacher is the dense model. What is compressed, and how, is a `Compression` (compression/): fixed or growing masks,
progressive gradient flow, quantisers. Left out on purpose: sharding (FSDP, DeepSpeed), and stored teachers, which would save a
quarter of the computation.
"""

# B batch  T positions  N counted tokens  D hidden  A blocks

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from trainkit.errors import UserError
from trainkit.losses.divergence import ChunkedDivergence, CrossEntropy, ForwardKL
from trainkit.losses.output import LossOutput
from trainkit.models.adapter import PROJECTIONS
from trainkit.models.documents import run_documents_separately
from trainkit.models.target import FrozenTarget
from trainkit.modules.base import CHECKPOINT_KEY, Batch
from trainkit.modules.checkpoint import COMPRESSION_KEY
from trainkit.modules.compression.base import CompressedLinear, Compression, Masks, check_zeros, compress_linear
from trainkit.modules.language import LanguageModule
from trainkit.modules.meter import means


class CompressModule(LanguageModule):
    """Trains a Hugging Face causal LM under a compression of its linear layers, with the dense model as teacher.

    Logs per counted token: the loss, `kl` (from teacher to student, nats), `tv` (total variation distance, 1 - alpha) and
    `agreement` (equal argmax); in validation also the `perplexity` of the text. In training also `compress/sparsity` (share of
    the weights of the compressed layers), `compress/mask_flips` (share of mask bits changed since the last line, every change
    counts) and `compress/beta` (`MaskDecay`).

    Args:
        folder: Folder of the model to train: dense, or already pruned by `trainkit compress`.
        teacher: Folder of the dense model; the same folder if `folder` is dense.
        compression: What is compressed, and how.
        divergence: Loss between the distributions of teacher and student; forward KL by default. `CrossEntropy` reads the text
            instead of the teacher.
        hidden_weight: Weight of a second term: the mean over blocks and channels of the squared difference between the outputs
            of student and teacher blocks, each divided by its root mean square. It is logged as `hidden`; a weight that makes
            both terms equal at the start is usual when blocks were removed.
        prompts: Whether prompt tokens count too. The rows' own mask decides otherwise.
        targets: Names of the projections that are compressed; by default all seven of attention and MLP.
        lora_rank: Rank of low-rank additions, which are trained instead of all weights; 0 trains all weights. The mask or
            quantiser is applied to W + BA.
        lora_alpha: Numerator of the scale of BA, lora_alpha / lora_rank.
        teacher_dtype: Precision of the teacher's weights.
        **optim: As in `TrainingModule`.
    """

    teacher: FrozenTarget  # not an nn.Module: neither trained nor saved
    linears: dict[str, CompressedLinear]

    def __init__(
        self,
        folder: str,
        teacher: str,
        compression: Compression,
        divergence: ChunkedDivergence | None = None,
        hidden_weight: float = 0.0,
        prompts: bool = True,
        targets: list[str] | None = None,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        teacher_dtype: Literal["float32", "bfloat16"] = "float32",
        **optim: Any,
    ) -> None:
        super().__init__(folder=folder, **optim)
        for name, path in (("folder", folder), ("teacher", teacher)):
            if not (Path(path) / "config.json").is_file():
                raise UserError(f"model.{name}: {path}: no config.json there; give a Hugging Face model folder")
        if not hidden_weight >= 0 or lora_rank < 0:
            raise UserError(f"model: hidden_weight {hidden_weight} and lora_rank {lora_rank} must not be negative")
        if lora_rank and not lora_alpha > 0:
            raise UserError(f"model.lora_alpha is {lora_alpha}; it must be above 0, or nothing trains")
        if targets is not None and not targets:
            raise UserError("model.targets is empty; name projections, or leave it out for all seven")
        divergence = divergence or ForwardKL()
        if divergence.spans_batch:
            raise UserError(
                "model.divergence: this loss needs statistics over the optimiser step, which CompressModule does not gather; "
                "set normalise: position"
            )
        self.teacher_folder, self.compression = teacher, compression
        self.divergence = divergence.measuring(coupled=False, kl=True)
        self.hidden_weight, self.prompts, self.targets = hidden_weight, prompts, tuple(targets or PROJECTIONS)
        self.lora_rank, self.lora_alpha, self.teacher_dtype = lora_rank, lora_alpha, getattr(torch, teacher_dtype)
        self._nll = CrossEntropy(chunk=divergence.chunk)

    # Networks

    def setup(self, stage: str) -> None:
        if type(self.trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):  # DeepSpeed's is a subclass of DDPStrategy
            raise UserError(f"trainer.strategy: CompressModule trains under ddp, not {type(self.trainer.strategy).__name__}")
        if not hasattr(self, "teacher"):
            self.teacher = FrozenTarget(self.teacher_folder, self.teacher_dtype)

    def configure_model(self) -> None:
        built = self.lm is not None
        super().configure_model()
        if built:
            return
        for name, size in (("vocab_size", self.teacher.handle().vocab_size), ("hidden_size", self.teacher.hidden_size)):
            ours = getattr(self.lm.config, name)
            if ours != size and (name == "vocab_size" or self.hidden_weight):
                raise UserError(f"model.teacher: its {name} is {size}, that of model.folder {ours}; give the dense original")
        if self.lora_rank:
            self.lm.requires_grad_(False)
        self.linears = {
            f"{name}.weight": compress_linear(part, self.lora_rank, self.lora_alpha)
            for name, part in self.lm.base_model.named_modules(prefix=self.lm.base_model_prefix)
            if type(part) is nn.Linear and name.rpartition(".")[2] in self.targets
        }
        for target in self.targets:
            if not any(name.endswith(f".{target}.weight") for name in self.linears):
                raise UserError(f"model.targets: {self.folder} has no linear layer {target!r}; name projections of its blocks")
        self.compression.attach(self.linears)

    def describe(self) -> dict[str, Any]:
        lora = {"rank": self.lora_rank, "alpha": self.lora_alpha}
        return super().describe() | {"compression": self.compression.describe(), "lora": lora}

    # Loss

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        # Positions whose next token counts.
        tokens_BT, document_BT = batch["tokens_BT"], batch["document_BT"]
        counted_BT = (document_BT[:, 1:] == document_BT[:, :-1]) & (document_BT[:, 1:] >= 0)
        if not self.prompts:
            counted_BT = counted_BT & batch["mask_BT"][:, 1:]
        labels_N = tokens_BT[:, 1:][counted_BT]
        # Student and teacher.
        self.teacher.to(self.device)
        student_BTAD, teacher_BTAD = self._states(batch), self._teacher_states(batch)
        hidden_ND, teacher_ND = (states[:, :-1, -1][counted_BT] for states in (student_BTAD, teacher_BTAD))
        head = self.lm.get_output_embeddings()
        output = self.divergence(hidden_ND, head, teacher_ND, self.teacher.handle().head, labels_N=labels_N)
        # Metrics, and the term of the blocks.
        total, metrics = output.sum, {**output.metrics, "tv": output.count - output.metrics["alpha"]}
        if self.hidden_weight:
            pairs = (states[:, :-1, :-1][counted_BT] for states in (student_BTAD, teacher_BTAD))
            hidden = normalised_difference(*pairs)
            total, metrics["hidden"] = total + self.hidden_weight * hidden, hidden.detach()
        if micro is None:
            metrics["nll"] = self._nll(hidden_ND, head, hidden_ND, None, labels_N=labels_N).sum
        return LossOutput(total, output.count, metrics, output.per_token)

    def _states(self, batch: Batch) -> Tensor:
        """[B, T, A, D] student's states: the block outputs if the loss reads them, then the last ones, after the final norm."""

        def run(tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
            inputs = {"input_ids": tokens_BT, "position_ids": positions_BT, "use_cache": False}
            output = self.lm.base_model(**inputs, output_hidden_states=bool(self.hidden_weight))
            return torch.cat([*(output.hidden_states or ())[1:-1], output.last_hidden_state], -1)

        if self._one_document_per_row:
            states = run_documents_separately(run, batch["tokens_BT"], batch["document_BT"])
        else:
            states = run(batch["tokens_BT"], batch["positions_BT"])
        return states.unflatten(-1, (-1, self.lm.config.hidden_size))

    def _teacher_states(self, batch: Batch) -> Tensor:
        """[B, T, A, D] teacher's states: the block outputs at the same relative depths as the student's, then the last ones."""
        blocks, ours = self.teacher.num_layers, self.lm.config.num_hidden_layers
        taps = [round(i * blocks / ours) for i in range(1, ours)] if self.hidden_weight else []
        last_BTD, tapped = self.teacher.forward(batch["tokens_BT"], batch["positions_BT"], batch["document_BT"], taps)
        return last_BTD[:, :, None] if tapped is None else torch.cat([tapped, last_BTD[:, :, None]], 2)

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        values = means(sums)
        return values | {"perplexity": torch.tensor(values.pop("nll")).exp().item()}

    # Schedule: after each optimiser step, before the step is logged and saved

    def on_train_start(self) -> None:
        super().on_train_start()
        self._refresh()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.trainer.global_step != self._logged_step:
            self._refresh()
        super().on_train_batch_end(outputs, batch, batch_idx)

    def _refresh(self) -> None:
        total = self.trainer.estimated_stepping_batches
        steps = None if total == float("inf") else int(total)
        self.compression.refresh(self.trainer.global_step, steps, self.trainer.optimizers[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.compression.adjust_gradients()  # Lightning computes the norm and clips after this hook

    def training_values(self) -> dict[str, float]:
        return {f"compress/{name}": value for name, value in self.compression.metrics().items()}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["info"] |= {"source": str(self.folder), "teacher": str(self.teacher_folder)}
        checkpoint[COMPRESSION_KEY] = self.compression.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.compression.restore(checkpoint[COMPRESSION_KEY])
        if isinstance(self.compression, Masks) and self.compression.holds and not self.lora_rank:
            weights = {name: checkpoint["state_dict"][f"lm.{name}"] for name in self.linears}
            check_zeros(str(self.trainer.ckpt_path), self.compression.masks, weights)


def normalised_difference(student_NAD: Tensor, teacher_NAD: Tensor) -> Tensor:
    """Sum over tokens of the mean over blocks and channels of (s / rms(s) - t / rms(t))^2; no gradient into the teacher."""
    s_NAD, t_NAD = (
        x / x.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt() for x in (student_NAD.float(), teacher_NAD.float())
    )
    return (s_NAD - t_NAD.detach()).square().mean((1, 2)).sum()
