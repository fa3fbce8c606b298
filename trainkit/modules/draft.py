"""Distils a drafter of any kind from a frozen target."""

# B batch  T positions  K draft positions  H heads  N counted tokens

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.data.teacher.live import LiveTeacher, Teacher
from trainkit.data.teacher.stored import StoredTeacher
from trainkit.drafters.base import Divergence, DraftBatch, Drafter, LossOutput, TargetShape, kind_name
from trainkit.errors import UserError
from trainkit.losses.divergence import ChunkedDivergence, ForwardKL, TVDpp
from trainkit.models.target import FrozenTarget
from trainkit.modules.base import CHECKPOINT_KEY, Batch, TrainingModule
from trainkit.modules.meter import Meter, means
from trainkit.modules.text_data import TextData


class DraftModule(TrainingModule):
    """Trains a drafter to match the output distribution of a frozen target.

    Logs per counted token: the loss, `alpha` and `agreement` (acceptance rate at temperature 1 and 0). In validation also
    `alpha_coupled` (at temperature 1 under Gumbel coupling), and `tau` and `alpha_k` from the rounds that `rounds` simulates.

    Args:
        target: Folder of the target, any Hugging Face causal LM.
        drafter: Drafter class with its arguments; it receives the sizes of the target in addition.
        divergence: The loss between target and draft distributions; forward KL by default.
        depth: Draft tokens per round in the simulated tau.
        target_dtype: Precision of the target's weights.
        target_shard: `fsdp` distributes the target's layers over all processes, for a target that is too large for one GPU.
            Each layer is gathered while it computes. Each process still reads the whole checkpoint into main memory once.
        teacher_cache: Folder that caches the teacher's output for each packed row, so that later epochs, and later runs with
            the same target and data, do not run the target again. Exact. The size is printed before training.
        teacher_top_k: Number of likeliest tokens of the target distribution that are used at each position. This saves space
            and is an approximation unless it equals the vocabulary size (losses/topk.py).
        features: Folder that `trainkit features` wrote for this target and data. The target is then not run: only its
            embedding, final norm and output head are loaded, and the folder provides its hidden states or likeliest tokens.
        trust_remote_code: Whether to run model code from the target's folder.
        **optim: As in `TrainingModule`.
    """

    data_class = TextData
    data: TextData
    # Built by `setup`:
    teacher: FrozenTarget  # not an nn.Module: neither trained, nor saved, nor wrapped by a strategy
    shape: TargetShape
    drafter: Drafter

    def __init__(
        self,
        target: str,
        drafter: Callable[[TargetShape], Drafter],
        divergence: ChunkedDivergence | None = None,
        depth: int = 5,
        target_dtype: Literal["float32", "bfloat16"] = "float32",
        target_shard: Literal["none", "fsdp"] = "none",
        teacher_cache: str | None = None,
        teacher_top_k: int | None = None,
        features: str | None = None,
        trust_remote_code: bool = False,
        **optim: Any,
    ) -> None:
        super().__init__(**optim)
        if depth < 1:
            raise UserError(f"model.depth is {depth}; it must be at least 1 draft token")
        if target_shard != "none" and teacher_cache is not None:
            raise UserError(
                "model.target_shard: all processes run the target together, but with teacher_cache each runs it alone; "
                "give one of the two"
            )
        if features is not None and (target_shard != "none" or teacher_cache is not None):
            raise UserError("model.features: the target is not run; leave target_shard and teacher_cache out")
        if not (Path(target) / "config.json").is_file():  # before its tokenizer is looked up on the hub
            raise UserError(f"model.target: {target}: no config.json there; give a Hugging Face model folder")
        self.target, self.target_shard, self._make_drafter = target, target_shard, drafter
        self.divergence, self.depth = divergence or ForwardKL(), depth
        self.teacher_cache, self.teacher_top_k, self.features = teacher_cache, teacher_top_k, features
        self._target_options = {"dtype": getattr(torch, target_dtype), "trust_remote_code": trust_remote_code}
        self.tokenizer_folder, self.needs_window = target, self.divergence.spans_batch

    def trained(self) -> list[tuple[nn.Module, float]]:
        return [(self.drafter, 1.0)]

    def setup(self, stage: str) -> None:
        # Not in configure_model: there ZeRO-3 would shard the target as if it were trained, would leave each drafter layer an
        # empty shard before it can be initialised from the target, and would create tensors on the GPU.
        if hasattr(self, "drafter"):
            return
        # Load the target, or only its ends for stored features.
        self.teacher = self.load_target()
        if self.target_shard == "fsdp":
            self.teacher.shard(self.device)
        self._reader: Teacher = (
            LiveTeacher(self.teacher, self.teacher_cache, self.teacher_top_k)
            if self.features is None
            else StoredTeacher(self.features, self.teacher, self.teacher_top_k)
        )
        self.shape = self.teacher.shape()
        self.data.check_fits(self.shape.decoder.vocab_size, self.shape.decoder.max_positions)
        if self.shape.undecodable:
            print(f"{self.target}: {self.shape.undecodable}; the drafter can be trained and exported for other programs")
        # Build the drafter.
        self.drafter = self._make_drafter(self.shape)
        if self.trainer.ckpt_path is None:
            self.drafter.initialise(self.teacher)
        if self.features is not None:  # report missing features now, not at the first validation
            for split in ("train", "validation") if self.trainer.state.fn == "fit" else ("validation",):
                self._store(split)

    def load_target(self) -> FrozenTarget:
        """Loads the target, from which the drafter learns."""
        return FrozenTarget(self.target, **self._target_options, layers=self.features is None)

    def describe(self) -> dict[str, Any]:
        return {"kind": kind_name(self.drafter), "config": self.drafter.config(), "target": self.shape.to_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[CHECKPOINT_KEY]["info"]["target"] = str(self.target)

    def loss(self, batch: Batch, micro: int | None) -> LossOutput:
        return self.draft_loss(self.draft_batch(batch), batch, micro)

    def draft_loss(self, draft_batch: DraftBatch, batch: Batch, micro: int | None) -> LossOutput:
        """Loss of the drafter; in validation (`micro` is None) the simulated rounds are measured too."""
        if micro is not None:
            return self.drafter(draft_batch, self._step_divergence(batch, micro))
        output = self.drafter(draft_batch, self.divergence.measuring(coupled=True))
        agreement_KBT = agreement_by_position(output, draft_batch, self.depth)
        if agreement_KBT is not None:  # the names are the same on every rank, even on one without rows in this batch
            label_BT = draft_batch.mask_BT & (draft_batch.document_BT >= 0)
            for name, value in rounds(agreement_KBT, label_BT, draft_batch.document_BT).items():
                self._validation.add(name, value)
        return output

    def draft_batch(self, batch: Batch) -> DraftBatch:
        """The batch together with the teacher's hidden states (or likeliest tokens) and taps."""
        if self.target_shard == "none":
            self.teacher.to(self.device)
        store = self._store("train" if self.trainer.training else "validation") if "rows_B" in batch else None
        return DraftBatch.read(self._reader, batch, self.drafter.taps, store)

    def _store(self, split: str) -> Any:
        """Stored teacher output for the rows of a split, `train` or `validation`; None if nothing is stored."""
        packed = self.data.rows[split == "validation"]
        return self._reader.open_store(f"{self.data.fingerprint} {split}", packed, self.drafter.taps)

    def _step_divergence(self, batch: Batch, micro: int) -> Divergence:
        """The divergence for a micro-batch; with statistics of the whole optimiser step over all ranks if it needs them."""
        if not self.divergence.spans_batch:
            return self.divergence
        assert isinstance(self.divergence, TVDpp)
        if micro == 0:
            first, sums = self.divergence.first_pass(), Meter()
            with torch.no_grad():
                for index, other in enumerate(batch["window"]):
                    self.key_randomness(index)  # the same random numbers as when this micro-batch is trained on
                    sums.add_output(self.drafter(self.draft_batch(other), first))
            self.key_randomness(0)
            totals = {k: torch.tensor(v, device=self.device) for k, v in sums.take(self._reduce, self.device).items()}
            self._statistics = self.divergence.with_statistics(totals, totals["count"])
        return self._statistics

    def validation_values(self, sums: dict[str, float]) -> dict[str, float]:
        counts = {name: value for name, value in sums.items() if name.startswith(("emitted", "rounds", "offered", "accepted"))}
        values = means(sums, exclude=tuple(counts))
        if counts.get("rounds"):
            values["tau"] = counts["emitted"] / counts["rounds"]
        for k in range(1, self.depth + 1):
            if offered := counts.get(f"offered_{k}"):
                values[f"alpha_{k}"] = counts[f"accepted_{k}"] / offered
        return values


def agreement_by_position(output: LossOutput, draft_batch: DraftBatch, depth: int) -> Tensor | None:
    """Whether the proposal at draft position k equals the target's argmax, for each label, [K, B, T].

    K is `depth`, or the number of heads if that is less. None if `output` does not hold the agreement of each token, as for a
    kind with several losses per position; no round can be simulated then.
    """
    if "agreement_HBT" in output.per_token:
        return output.per_token["agreement_HBT"][:depth].bool()
    counted_BT, agreement_N = draft_batch.label_mask(1), output.per_token.get("agreement")
    if agreement_N is None or agreement_N.numel() != int(counted_BT.sum()):
        return None
    agreement_BT = torch.zeros_like(counted_BT)
    agreement_BT[:, 1:][counted_BT[:, :-1]] = agreement_N.bool()
    return agreement_BT.expand(depth, -1, -1)


def rounds(agreement_KBT: Tensor, label_BT: Tensor, document_BT: Tensor) -> dict[str, int]:
    """Counts of greedy speculative decoding simulated along a text; tau is `emitted` / `rounds`.

    A round whose next label is at position p drafts K tokens, for positions p to p + K - 1. It accepts those before the first
    disagreement and emits one more token. A last round that the end of the labels cuts short is left out, as in serving.
    `offered_k` counts the rounds that reached draft position k, `accepted_k` those that accepted it. The simulation is
    teacher-forced, so it equals serving if the text is the target's own greedy continuation.

    Args:
        agreement_KBT: Whether the proposal at draft position k + 1 equals the target's argmax, for a label at this position.
        label_BT: True where a token is a label.
        document_BT: Document numbers.
    """
    depth = len(agreement_KBT)
    by_position = [f"{name}_{k + 1}" for k in range(depth) for name in ("offered", "accepted")]
    counts = dict.fromkeys(["emitted", "rounds", *by_position], 0)

    # All labels in text order, divided into runs of neighbouring positions of one document.
    rows_N, columns_N = label_BT.nonzero(as_tuple=True)
    agrees_NK = agreement_KBT[:, rows_N, columns_N].T.tolist()
    labels = list(zip(rows_N.tolist(), columns_N.tolist(), document_BT[rows_N, columns_N].tolist(), strict=True))
    ends = [i for i in range(1, len(labels)) if labels[i] != (labels[i - 1][0], labels[i - 1][1] + 1, labels[i - 1][2])]

    for start, end in zip([0, *ends], [*ends, len(labels)], strict=True):
        p = start
        while p < end:
            accepted = next((k for k in range(min(depth, end - p)) if not agrees_NK[p + k][k]), min(depth, end - p))
            if p + accepted == end:
                break  # the bonus token would lie after the text
            counts["emitted"] += accepted + 1
            counts["rounds"] += 1
            for k in range(min(accepted + 1, depth)):
                counts[f"offered_{k + 1}"] += 1
                counts[f"accepted_{k + 1}"] += k < accepted
            p += accepted + 1
    return counts
