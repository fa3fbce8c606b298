"""Acceptance sets: training data of an acceptance predictor, one record for each draft position that was verified.

A set is a folder with the manifest `acceptance.json` and safetensors parts (`trainkit.data.sets.writer`), each with a block of
prompts at one temperature. Each part carries the set's id, a digest of everything that determines the records, so that a part
of another set is recognised.

The records are from real decoding: positions that verification reached, and no others. So they have the distribution that the
predictor meets when it serves. SpecDec++ (arXiv 2405.19715) approximates this without decoding: it passes once over the text,
with 85 % of the target's tokens replaced by the draft's own; that is not implemented here.
Left out on purpose: the tokens. A predictor does not read them, and they can be generated again from the prompts.

Tensors of a part, ordered by prompt, round and position:
- `hidden` [N, D]: the draft's hidden state from which the token was proposed
- `signals` [N, W, C] float32: signals of the W most probable proposals, most probable first; the last one is the temperature
- `depth` [N] int16: position in the round, 0 for the first
- `label` [N, W] float32: whether the target chose each proposal, or the probability of that; a chain drafts the first proposal
- `max_q` [N] float32: the draft's highest probability
- `prompt` [N] int32: the prompt's index, that of the first one if several are equal
W is 1 under `residual`.
"""

# N records of a part  R records of a set  B batch  W proposals of a position  D hidden  C signals

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainkit.bundle import Bundle
from trainkit.card import certified_files
from trainkit.data.manifest import ACCEPTANCE
from trainkit.data.sets.writer import SetJob, SetStats, SetWriter, comparable
from trainkit.errors import UserError

COLUMNS = ("hidden", "signals", "depth", "label", "max_q", "prompt")

Records = Mapping[str, Tensor]
"""Tensors by the names in `COLUMNS`."""
Record = Callable[[Sequence[int], float, Callable[[int, bool], None]], Records]
"""Decodes the prompts with these indices at a temperature; calls the function for each finished text.

The function takes the number of its tokens, and whether `max_len` cut it."""


@dataclass(frozen=True)
class AcceptanceLayout:
    """Which part has which records: ordered by block of prompts, then by temperature.

    Attributes:
        prompts: Number of prompts.
        temperatures: Sampling temperatures, all of which are used for each prompt.
        part_prompts: Prompts in a part.
    """

    prompts: int
    temperatures: tuple[float, ...]
    part_prompts: int = 64

    def parts(self) -> dict[str, tuple[range, float]]:
        """File name of each part, with the indices of its prompts, and its temperature."""
        blocks = [range(self.prompts)[start : start + self.part_prompts] for start in range(0, self.prompts, self.part_prompts)]
        pairs = [(block, temperature) for block in blocks for temperature in self.temperatures]
        return {ACCEPTANCE.part_name(number): pair for number, pair in enumerate(pairs)}


def drafter_fingerprint(drafter: Bundle) -> dict[str, Any]:
    """Kind of a drafter, hashes of the files that decide what it computes, and its name for messages."""
    return {"name": drafter.path.resolve().name, "kind": drafter.kind, "files": certified_files(drafter)}


def write_acceptance(job: SetJob, layout: AcceptanceLayout, record: Record) -> SetStats:
    """Writes this process's share of the parts; continues where an earlier call stopped.

    Args:
        job: Folder, provenance and process.
        layout: Parts of the set.
        record: Generates the records of a part; equal arguments must give equal records.

    Raises:
        UserError: the folder holds another set or something else, or another process writes there.
    """
    parts = layout.parts()
    manifest = {
        "format": ACCEPTANCE.format,
        **job.provenance,
        "prompt_count": layout.prompts,
        "temperatures": list(layout.temperatures),
        "part_prompts": layout.part_prompts,
        "parts": len(parts),
    }
    manifest["id"] = hashlib.sha256(json.dumps(comparable(manifest), sort_keys=True).encode()).hexdigest()
    sizes = {name: len(prompts) for name, (prompts, _) in parts.items()}
    with SetWriter(job, ACCEPTANCE, manifest, sizes, "texts") as writer:

        def on_text(tokens: int, cut: bool) -> None:
            writer.advance(1, tokens)
            writer.stats.cut += cut

        def tensors(name: str) -> Records:
            records = record(*parts[name], on_text)
            writer.stats.records += len(records["label"])
            writer.stats.accepted += float(records["label"][:, 0].sum())
            return {column: records[column].contiguous() for column in COLUMNS}

        writer.write_tensors(tensors)
    return writer.stats


@dataclass(frozen=True)
class AcceptanceSet:
    """All records of a set, or a selection of them, in memory; `PackedLoader` makes batches of it.

    Attributes:
        tensors: All records of the set by `COLUMNS`, shared by every selection.
        rows_R: Indices of the selected records.
        manifest: Contents of `acceptance.json`.
        fingerprint: Digest of everything that determines the records, and of how they were selected.
    """

    tensors: Records
    rows_R: np.ndarray
    manifest: Mapping[str, Any]
    fingerprint: str

    @staticmethod
    def read(folder: str | Path) -> AcceptanceSet:
        """All records of a complete set.

        Raises:
            UserError: there is no such set, parts are missing, damaged or of another set, or no part has a record.
        """
        folder = Path(folder)
        manifest = ACCEPTANCE.read(folder)
        if manifest is None:
            raise UserError(f"{folder}: no acceptance set (no {ACCEPTANCE.manifest}); make one with `{ACCEPTANCE.command}`")
        parts = []
        for file in ACCEPTANCE.part_files(folder, map(ACCEPTANCE.part_name, range(manifest["parts"]))):
            with ACCEPTANCE.open_part(file, manifest["id"]) as opened:
                if len(opened.get_tensor("label")):
                    parts.append({name: opened.get_tensor(name) for name in COLUMNS})
        if not parts:
            raise UserError(f"{folder}: has no record, because no text was longer than one token; use other prompts")
        tensors = {name: torch.cat([part[name] for part in parts]) for name in COLUMNS}
        return AcceptanceSet(tensors, np.arange(len(tensors["label"])), manifest, manifest["id"])

    def __len__(self) -> int:
        return len(self.rows_R)

    @property
    def labels_R(self) -> np.ndarray:
        """Number of labels of each record, which is one; int64."""
        return np.ones(len(self), np.int64)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states (D)."""
        return self.tensors["hidden"].shape[1]

    @property
    def prompts(self) -> int:
        """Number of prompts that have a selected record."""
        return len(self.column("prompt").unique())

    def column(self, name: str) -> Tensor:
        """One of `COLUMNS` for the selected records."""
        return self.tensors[name][torch.from_numpy(self.rows_R)]

    @property
    def temperature(self) -> Tensor:
        """[R] sampling temperatures."""
        return self.tensors["signals"][:, 0, -1][torch.from_numpy(self.rows_R)]

    @property
    def accepted(self) -> Tensor:
        """[R] labels of the first proposals, which a chain drafts."""
        return self.tensors["label"][:, 0][torch.from_numpy(self.rows_R)]

    def split(self, share: float, seed: int) -> tuple[AcceptanceSet, AcceptanceSet]:
        """Training and validation records; no prompt has records in both.

        Args:
            share: Share of the prompts that are for validation.
            seed: Seed for drawing them.

        Raises:
            UserError: the share leaves training or validation without a prompt.
        """
        prompt_R = self.column("prompt").numpy()
        numbers = np.unique(prompt_R)
        count = round(share * len(numbers))
        if not 0 < count < len(numbers):
            raise UserError(
                f"validation_share: {share} of {len(numbers)} prompts leaves {'training' if count else 'validation'} without "
                "any; use another share, or a set with more prompts"
            )
        is_validation_R = np.isin(prompt_R, np.random.default_rng(seed).permutation(numbers)[:count])
        train, validation = (
            replace(self, rows_R=self.rows_R[chosen_R], fingerprint=f"{self.fingerprint} {share} {seed} {name}")
            for name, chosen_R in (("train", ~is_validation_R), ("validation", is_validation_R))
        )
        return train, validation

    def batch(self, rows: Sequence[int], size: int) -> dict[str, Tensor]:
        """Tensors of `size` records: those at `rows`, then zeros as padding.

        Returns:
            hidden_BD, signals_BWC, depth_B int64, label_BW, max_q_B; document_BT [B, 1], which is 0, and -1 on padding.
        """
        chosen_R = torch.from_numpy(self.rows_R[np.asarray(rows, np.int64)])
        document_B = torch.where(torch.arange(size) < len(chosen_R), 0, -1)
        batch = {"document_BT": document_B[:, None]}
        for key in ("hidden_BD", "signals_BWC", "depth_B", "label_BW", "max_q_B"):
            name, _ = key.rsplit("_", 1)  # without the axes
            values = self.tensors[name][chosen_R]
            batch[key] = torch.cat([values, values.new_zeros(size - len(values), *values.shape[1:])])
        return batch | {"depth_B": batch["depth_B"].long()}
