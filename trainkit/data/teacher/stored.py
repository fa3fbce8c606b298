"""A teacher that reads a feature set of `trainkit features`; features of other data or of another target are refused."""

# B batch rows  T positions  D hidden  A taps  k stored tokens

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainkit.bundle import fingerprint
from trainkit.data.manifest import FEATURES, weights_digest
from trainkit.data.teacher.live import Teacher
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError
from trainkit.models.target import FrozenTarget

OPEN_SHARDS = 64
"""Maximum number of shards that are memory-mapped at the same time."""


class StoredRows:
    """Stored tensors of one packed set, by row index.

    Args:
        folder: Folder of the feature set.
        shards: (file, first row, end) of each of the packed set's shards, in order.
        set_id: Id of the feature set.
    """

    def __init__(self, folder: Path, shards: Sequence[Sequence[Any]], set_id: str) -> None:
        self.folder, self.shards, self.set_id = folder, shards, set_id
        self._step: int = shards[0][2] if shards else 1
        self._open: OrderedDict[str, Any] = OrderedDict()

    def get(self, name: str, rows_B: Tensor) -> Tensor:
        """[B, T, ...] of the tensor called `name`, on the CPU; row index -1 (padding) gives zeros."""
        values = []
        for row in rows_B.tolist():
            file, first, _ = self.shards[max(row, 0) // self._step]
            value = self._shard(file).get_slice(name)[max(row, 0) - first]
            values.append(value if row >= 0 else torch.zeros_like(value))
        return torch.stack(values)

    def _shard(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = FEATURES.open_part(self.folder / file, self.set_id)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(file)
        return self._open[file]


class StoredTeacher(Teacher):
    """Stored hidden states of a target for packed rows; the target's layers are not needed.

    If the folder has top-k rows, those are the teacher, otherwise the last hidden states are.

    Args:
        folder: Folder that `trainkit features` wrote.
        target: The target, of which only embedding, final norm and output head are used.
        top_k: Requested number of stored tokens; None takes what the folder has.

    Raises:
        UserError: the folder has no complete feature set, or one of another target or top-k.
    """

    def __init__(self, folder: str | Path, target: FrozenTarget, top_k: int | None = None) -> None:
        self.folder, self.target = Path(folder), target
        self._name = f"model.features {self.folder}"
        manifest = FEATURES.read(self.folder)
        if manifest is None:
            raise UserError(f"{self._name}: has no {FEATURES.manifest}; use a folder that {FEATURES.command} wrote")
        self.manifest = manifest
        for name, digest in (("weights", weights_digest(target.folder)), ("config", fingerprint(target.folder)["config"])):
            if digest != (manifest["target"] | manifest)[name]:
                raise UserError(
                    f"{self._name}: made from another target, its {name} differ from those of {target.folder}; "
                    "use that target as model.target, or make features from this one"
                )
        self.top_k = manifest["top_k"]
        if top_k not in (None, self.top_k):
            stored = "hidden states" if self.top_k is None else f"top_k {self.top_k}"
            raise UserError(f"{self._name}: holds {stored}, but model.teacher_top_k is {top_k}; leave teacher_top_k out")
        FEATURES.part_files(self.folder, [shard[0] for packed in manifest["sets"].values() for shard in packed["shards"]])
        self._stores: dict[tuple[str, tuple[int, ...]], StoredRows] = {}

    def open_store(self, name: str, packed: PackedSet, taps: Sequence[int]) -> StoredRows:
        """The stored rows of a packed set, found by its content; `name` is for messages.

        Raises:
            UserError: the features are of other data or another packing, or lack a tap.
        """
        key = packed.content, tuple(taps)
        if key not in self._stores:
            manifest, states = self.manifest, self.manifest["states"]
            if packed.length != manifest["length"]:
                raise UserError(
                    f"{self._name}: packed to rows of {manifest['length']} tokens, data.length is {packed.length}; "
                    "make them equal"
                )
            stored = next((entry for entry in manifest["sets"].values() if entry["content"] == packed.content), None)
            if stored is None:
                settings = ", ".join(
                    f"{key} {value}" for key, value in manifest["data"].items() if key != "fingerprint" and value is not None
                )
                raise UserError(
                    f"{self._name}: made from other data than the rows of {name}, namely with {settings}; set these under "
                    "data, or make features of this run's data"
                )
            if missing := [tap for tap in taps if self.target.layer(tap) not in states]:
                raise UserError(
                    f"{self._name}: holds the states after layers {states}, but the drafter also reads tap {missing[0]}; make "
                    f"features with --taps {sorted(self.target.layer(tap) for tap in taps)}"
                )
            self._stores[key] = StoredRows(self.folder, stored["shards"], manifest["id"])
        return self._stores[key]

    def read(
        self, batch: Mapping[str, Tensor], taps: Sequence[int] = (), store: StoredRows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Last hidden states [B, T, D] (or top-k rows) and taps [B, T, A, D] of a batch, states in the target's dtype.

        Raises:
            UserError: the batch is from a set that was not known before training.
        """
        if store is None:
            raise UserError(f"{self._name}: this run mixes or generates its rows while it trains; leave model.features out")
        rows_B, device, last = batch["rows_B"].cpu(), batch["tokens_BT"].device, self.target.num_layers
        layers = {self.target.layer(tap) for tap in taps} | ({last} if self.top_k is None else set())
        states = {
            layer: store.get(f"hidden.{layer}", rows_B).to(device, non_blocking=True).to(self.target.dtype) for layer in layers
        }
        taps_BTAD = torch.stack([states[self.target.layer(tap)] for tap in taps], 2) if taps else None
        return (states[last] if self.top_k is None else _top_rows(store, rows_B).to(device)), taps_BTAD


def _top_rows(store: StoredRows, rows_B: Tensor) -> Tensor:
    """[B, T, 2k + 1] rows of `losses.topk.compress`; rounded probabilities are normalised again so that they sum to 1."""
    ids, log_p, log_rest = (store.get(name, rows_B) for name in ("top_ids", "top_log_p", "log_rest"))
    logs = torch.cat([log_p, log_rest[..., None]], -1)
    if logs.dtype != torch.float32:
        logs = logs.float().log_softmax(-1)
    return torch.cat([ids.float(), logs], -1)
