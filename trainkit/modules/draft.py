"""Distils a drafter, whatever its kind, from a frozen target."""

# B batch  T positions  N counted tokens

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from trainkit.data.teacher.live import TargetReader, Teacher
from trainkit.data.teacher.stored import FeatureReader
from trainkit.drafters.base import Divergence, DraftBatch, Drafter, LossOutput, TargetShape, kind_name
from trainkit.errors import UserError
from trainkit.losses.divergence import ChunkedDivergence, ForwardKL, TVDpp
from trainkit.models.target import FrozenTarget
from trainkit.modules.base import Batch, TrainingModule
from trainkit.modules.meter import Meter, means


class DraftModule(TrainingModule):
    """Trains a drafter to predict what a frozen target would say.

    Logged per counted token: the loss, `alpha` and `agreement` (DESIGN: acceptance at temperature 1 and 0), in validation also
    `alpha_coupled` and `tau`, simulated by `rounds`.

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        drafter: Drafter class with its arguments; the target's sizes are handed to it.
        divergence: What is minimised; forward KL by default.
        optimizer: Optimiser class with its arguments.
        lr_scheduler: Scheduler class with its arguments, stepped each optimiser step; by default linear warm-up, then cosine.
        warmup_steps: Of the default schedule.
        final_lr: Where the default schedule ends, as a share of the peak learning rate.
        depth: Draft tokens per round in the simulated tau.
        target_dtype: Precision of the target's weights.
        target_shard: `fsdp` spreads the target's layers over all processes, for one that is too large for one GPU; each is
            gathered while it computes. Each process still reads the whole checkpoint into main memory once.
        teacher_cache: Folder that keeps what the target says of each packed row, so that later epochs, and later runs with the
            same target and data, do not run it again; exact. Its size is printed before training.
        teacher_top_k: Keep only the target's so many likeliest tokens at each position and train on those: small, and
            approximate below the vocabulary's size (losses/topk.py).
        features: Folder that `trainkit features` wrote for this target and data: the target is not run, and of it only
            embedding, final norm and output head are loaded. The teacher is what is there, hidden states or likeliest tokens.
        trust_remote_code: Whether to run model code that the target's folder carries.
    """

    def __init__(
        self,
        target: str,
        drafter: Callable[[TargetShape], Drafter],
        divergence: ChunkedDivergence | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 50,
        final_lr: float = 0.1,
        depth: int = 5,
        target_dtype: Literal["float32", "bfloat16"] = "float32",
        target_shard: Literal["none", "fsdp"] = "none",
        teacher_cache: str | None = None,
        teacher_top_k: int | None = None,
        features: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, warmup_steps, final_lr)
        if depth < 1:
            raise UserError(f"model.depth is {depth}; it must be at least 1 draft token")
        if target_shard != "none" and teacher_cache is not None:
            raise UserError(
                "model.target_shard: all processes run the target at once, with teacher_cache each alone; give one of them"
            )
        if features is not None and (target_shard != "none" or teacher_cache is not None):
            raise UserError("model.features: the target is not run, so leave target_shard and teacher_cache out")
        if not (Path(target) / "config.json").is_file():  # before its tokenizer is looked for on the hub
            raise UserError(f"model.target: {target}: no config.json there; give a Hugging Face model folder")
        self.target, self.target_shard = target, target_shard
        self.divergence = divergence or ForwardKL()
        self.depth = depth
        self._make_drafter = drafter
        self._target_options = {"dtype": getattr(torch, target_dtype), "trust_remote_code": trust_remote_code}
        self.teacher: FrozenTarget | None = None  # no nn.Module: neither trained, nor saved, nor wrapped by a strategy
        self.shape: TargetShape | None = None
        self.drafter: Drafter | None = None
        self._statistics: Divergence | None = None
        self.teacher_cache, self.teacher_top_k = teacher_cache, teacher_top_k
        self.features = features
        self._reader: Teacher | None = None

    @property
    def network(self) -> nn.Module | None:
        return self.drafter

    @property
    def tokenizer_folder(self) -> str | None:
        return self.target

    @property
    def needs_window(self) -> bool:
        return self.divergence.spans_batch

    def setup(self, stage: str) -> None:
        # Not in configure_model: ZeRO-3's context there would shard the target as if it were trained, and leave an empty shard
        # of each layer of the drafter before it can be filled in from the target; and tensors would be made on the GPU.
        if self.teacher is None:
            self.teacher = self.load_target()
            if self.target_shard == "fsdp":
                self.teacher.shard(self.device)
            self.shape = self.teacher.shape()
            if self.features is None:
                self._reader = TargetReader(self.teacher, self.teacher_cache, self.teacher_top_k)
            else:
                self._reader = FeatureReader(self.features, self.teacher, self.teacher_top_k)
            self.check_fits(self.shape.decoder.vocab_size, self.shape.decoder.max_positions)
        if self.drafter is None:
            assert self.shape is not None
            drafter = self._make_drafter(self.shape)
            if self.trainer.ckpt_path is None:
                drafter.initialise(Path(self.target))
            self.drafter = drafter
            if self.features is not None:  # said now, not at the first validation
                for split in ("train", "validation") if self.trainer.state.fn == "fit" else ("validation",):
                    self._store(split)

    def load_target(self) -> FrozenTarget:
        """The target that teaches."""
        return FrozenTarget(self.target, **self._target_options, layers=self.features is None)

    def describe(self) -> dict[str, Any]:
        assert self.drafter is not None and self.shape is not None
        return {"kind": kind_name(self.drafter), "config": self.drafter.config(), "target": self.shape.to_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["trainkit"]["info"]["target"] = str(self.target)

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        return self.draft_loss(self._seen(batch), batch, micro)

    def draft_loss(self, seen: DraftBatch, batch: Batch, micro: int | None) -> LossOutput:
        """The drafter's loss over a batch that the target has read; in validation (no `micro`) with the rounds of serving."""
        assert self.drafter is not None
        if micro is None:
            output = self.drafter(seen, self.divergence.measuring(coupled=True))
            self._measure_rounds(seen, output)
            return output
        return self.drafter(seen, self._step_divergence(batch, micro))

    def _seen(self, batch: Batch) -> DraftBatch:
        """The batch with what the target says of it."""
        assert self.teacher is not None and self.drafter is not None and self._reader is not None
        if self.target_shard == "none":
            self.teacher.to(self.device)
        store = self._store("train" if self.trainer.training else "validation") if "rows_B" in batch else None
        return DraftBatch.read(self._reader, batch, self.drafter.taps, store)

    def _store(self, split: str) -> Any:
        """Where what the target says of the rows of training or validation is kept, if anywhere."""
        assert self._reader is not None and self.drafter is not None
        prepared = getattr(getattr(self.trainer, "datamodule", None), "prepared", None)
        if prepared is None:
            return None
        return self._reader.store(f"{prepared.fingerprint} {split}", getattr(prepared, split), self.drafter.taps)

    def _step_divergence(self, batch: Batch, micro: int) -> Divergence:
        """The divergence, given the statistics of the whole optimiser step, on all ranks, where it needs them."""
        if not self.divergence.spans_batch:
            return self.divergence
        assert isinstance(self.divergence, TVDpp)
        if micro == 0:
            first, sums = self.divergence.first_pass(), Meter()
            with torch.no_grad():
                for index, other in enumerate(batch["window"]):
                    self.key_randomness(index)  # the dropout and draws that this micro-batch will train with
                    sums.add_output(self.drafter(self._seen(other), first))  # pyright: ignore[reportOptionalCall]
            self.key_randomness(0)
            totals = {k: torch.tensor(v, device=self.device) for k, v in sums.take(self._reduce, self.device).items()}
            self._statistics = self.divergence.with_statistics(totals, totals["count"])
        assert self._statistics is not None
        return self._statistics

    def _measure_rounds(self, seen: DraftBatch, output: LossOutput) -> None:
        """Adds what serving would show; the same sums on every rank, also on one without a row of the last batch."""
        agreement_KBT = agreement_by_position(output, seen, self.depth)
        if agreement_KBT is None:
            return  # a kind with several steps a position, which says nothing of them; no round to simulate
        label_BT = seen.mask_BT & (seen.document_BT >= 0)
        for name, value in rounds(agreement_KBT, label_BT, seen.document_BT).items():
            self._validation.add(name, value)

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        served = {name: value for name, value in sums.items() if name.startswith(("emitted", "rounds", "offered", "accepted"))}
        values = means(sums, apart=tuple(served))
        if served.get("rounds"):
            values["tau"] = served["emitted"] / served["rounds"]
        for name, offered in served.items():
            if name.startswith("offered") and offered:
                k = name.removeprefix("offered_")
                values[f"alpha_{k}"] = served[f"accepted_{k}"] / offered
        return values


def agreement_by_position(output: LossOutput, seen: DraftBatch, depth: int) -> Tensor | None:
    """[K, B, T] whether draft position k proposes what the target says, for a label at that place; None where nothing tells.

    K is `depth`, or the number of heads if that is less.
    """
    if "agreement_HBT" in output.per_token:
        return output.per_token["agreement_HBT"][:depth].bool()
    counted_BT, agreement_N = seen.label_mask(1), output.per_token.get("agreement")
    if agreement_N is None or agreement_N.numel() != int(counted_BT.sum()):
        return None
    agreement_BT = torch.zeros_like(counted_BT)
    agreement_BT[:, 1:][counted_BT[:, :-1]] = agreement_N.bool()
    return agreement_BT.expand(depth, -1, -1)


def rounds(agreement_KBT: Tensor, label_BT: Tensor, document_BT: Tensor) -> dict[str, int]:
    """What greedy speculative decoding along the given text would do: `emitted` tokens in `rounds`; their ratio is tau.

    A round whose next label stands at position p drafts K tokens, for p to p + K - 1; it accepts those before the first that
    disagrees and emits one more. A last round that the end of the labels cuts short is left out, as in serving. `offered_k` and
    `accepted_k` count the rounds that came to draft position k, and those that accepted it. The text is teacher-forced, so this
    equals serving where the text is the target's own greedy continuation.

    Args:
        agreement_KBT: Whether draft position k + 1 proposes what the target says, for a label at that position of the text.
        label_BT: Where labels are.
        document_BT: Document numbers.
    """
    depth = len(agreement_KBT)
    by_position = [f"{name}_{k + 1}" for k in range(depth) for name in ("offered", "accepted")]
    found = dict.fromkeys(["emitted", "rounds", *by_position], 0)
    rows_N, columns_N = label_BT.nonzero(as_tuple=True)
    agrees_NK = agreement_KBT[:, rows_N, columns_N].T.tolist()
    places = list(zip(rows_N.tolist(), columns_N.tolist(), document_BT[rows_N, columns_N].tolist(), strict=True))
    ends = [i for i in range(1, len(places)) if places[i] != (places[i - 1][0], places[i - 1][1] + 1, places[i - 1][2])]
    for start, end in zip([0, *ends], [*ends, len(places)], strict=True):
        p = start
        while p < end:
            accepted = next((k for k in range(min(depth, end - p)) if not agrees_NK[p + k][k]), min(depth, end - p))
            if p + accepted == end:
                break  # the bonus token would come after the text
            found["emitted"] += accepted + 1
            found["rounds"] += 1
            for k in range(min(accepted + 1, depth)):
                found[f"offered_{k + 1}"] += 1
                found[f"accepted_{k + 1}"] += k < accepted
            p += accepted + 1
    return found
