"""The target in training, read from the folder that `trainkit features` wrote; what was made for other data is refused."""

# B batch rows  T positions  D hidden  A taps  k stored tokens

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainkit.bundle import fingerprint
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.features import FEATURES, read_features
from trainkit.data.text.packing import PackedSet
from trainkit.errors import UserError
from trainkit.losses.topk import TopKHead
from trainkit.models.shape import TargetHandle
from trainkit.models.target import FrozenTarget

OPEN = 64
"""Shards mapped at once."""


class StoredRows:
    """Rows of one packed set by their number, read from its shards as they are asked for."""

    def __init__(self, folder: Path, described: Mapping[str, Any], mark: str) -> None:
        self.folder, self.mark = folder, mark
        self.shards: list[tuple[str, int, int]] = [tuple(shard) for shard in described["shards"]]
        self._step = self.shards[0][2] if self.shards else 1
        self._open: OrderedDict[str, Any] = OrderedDict()

    def get(self, name: str, rows_B: Tensor) -> Tensor:
        """[B, T, ...] of the tensor called `name`, on the CPU; a row number of -1 (padding) gives zeros."""
        found: list[Tensor | None] = []
        for row in rows_B.tolist():
            file, first, _ = self.shards[max(row, 0) // self._step]
            found.append(None if row < 0 else self._shard(file).get_slice(name)[row - first])
        like = next((value for value in found if value is not None), None)
        if like is None:
            file, first, _ = self.shards[0]
            like = self._shard(file).get_slice(name)[0]
        return torch.stack([torch.zeros_like(like) if value is None else value for value in found])

    def _shard(self, file: str) -> Any:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        path = self.folder / file
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            mend = "remove the file and run the same trainkit features again"
            raise UserError(f"{path}: not a whole safetensors file ({error}); {mend}") from None
        if (opened.metadata() or {}).get("features") != self.mark:
            raise UserError(f"{path}: of other features than {FEATURES} beside it; run trainkit features into a new folder")
        self._open[file] = opened
        if len(self._open) > OPEN:
            self._open.popitem(last=False)
        return opened


class FeatureReader:
    """What a target said of packed rows, from a folder of features; the target's layers are not needed.

    With top-k in the folder that is the teacher, otherwise the last hidden states are.

    Args:
        folder: As `trainkit features` wrote it.
        target: The target, of which embedding, final norm and head are used.
        top_k: That the run asks for; None takes what is there.

    Raises:
        UserError: no whole features there, or of another target or top-k.
    """

    def __init__(self, folder: str | Path, target: FrozenTarget, top_k: int | None = None) -> None:
        self.folder, self.target = Path(folder), target
        values = read_features(self.folder)
        if values is None:
            raise UserError(f"{self._me}: no {FEATURES} there; give a folder that trainkit features wrote")
        self.values = values
        for name, now in (("weights", weights_digest(target.folder)), ("config", fingerprint(target.folder)["config"])):
            if now != (values["target"] | values)[name]:
                raise UserError(
                    f"{self._me}: made from another target, its {name} differ from those of {target.folder}; "
                    "give that one as model.target, or make features from this one"
                )
        self.top_k: int | None = values["top_k"]
        if top_k not in (None, self.top_k):
            have = "hidden states" if self.top_k is None else f"top_k {self.top_k}"
            raise UserError(f"{self._me}: holds {have}, model.teacher_top_k asks for {top_k}; leave teacher_top_k out")
        files = [shard[0] for described in values["sets"].values() for shard in described["shards"]]
        if missing := sum(not (self.folder / file).is_file() for file in files):
            raise UserError(f"{self._me}: {missing} of {len(files)} shards are not done; run the same trainkit features again")
        self._stores: dict[tuple[str, tuple[int, ...]], StoredRows] = {}

    @property
    def _me(self) -> str:
        return f"model.features {self.folder}"

    def handle(self) -> TargetHandle:
        return self.target.handle()

    def stored_head(self) -> TopKHead | None:
        return None if self.top_k is None else TopKHead(self.top_k, self.target.handle().vocab_size)

    def store(self, name: str, packed: PackedSet, taps: Sequence[int]) -> StoredRows:
        """The rows of a packed set, whatever it is called here.

        Raises:
            UserError: the features are of other data, another packing, or without a tap.
        """
        key = packed.content, tuple(taps)
        if key not in self._stores:
            values, have = self.values, self.values["states"]
            if packed.length != values["length"]:
                raise UserError(
                    f"{self._me}: packed to rows of {values['length']} tokens, data.length is {packed.length}; make them equal"
                )
            described = next((one for one in values["sets"].values() if one["content"] == packed.content), None)
            if described is None:
                given = values["data"].items()
                made = ", ".join(f"{key} {value}" for key, value in given if key != "fingerprint" and value is not None)
                raise UserError(
                    f"{self._me}: other data than the rows of {name}; it was made with {made}: give these under data, or make "
                    "features of this run's data"
                )
            if lacking := [tap for tap in taps if self.target.layer(tap) not in have]:
                raise UserError(
                    f"{self._me}: holds the states after layers {have}, the drafter also reads tap {lacking[0]}; make features "
                    f"with --taps {sorted(self.target.layer(tap) for tap in taps)}"
                )
            self._stores[key] = StoredRows(self.folder, described, values["id"])
        return self._stores[key]

    def read(
        self, batch: Mapping[str, Tensor], taps: Sequence[int] = (), store: StoredRows | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What the target said of a batch: last hidden states [B, T, D] (or top-k rows), and its taps; states in its dtype.

        Raises:
            UserError: the batch is of no set known beforehand.
        """
        if store is None:
            raise UserError(f"{self._me}: this run's rows are mixed or written while it trains; leave model.features out")
        rows_B, device, last = batch["rows_B"].cpu(), batch["tokens_BT"].device, self.target.num_layers
        wanted = {self.target.layer(tap) for tap in taps} | ({last} if self.top_k is None else set())
        states = {
            layer: store.get(f"hidden.{layer}", rows_B).to(device, non_blocking=True).to(self.target.dtype) for layer in wanted
        }
        taps_BTAD = torch.stack([states[self.target.layer(tap)] for tap in taps], 2) if taps else None
        return (states[last] if self.top_k is None else _top_rows(store, rows_B).to(device)), taps_BTAD


def _top_rows(store: StoredRows, rows_B: Tensor) -> Tensor:
    """[B, T, 2k + 1] rows of `losses.topk.compress`; rounded probabilities are made to add up to 1 again."""
    ids, log_p, log_rest = (store.get(name, rows_B) for name in ("top_ids", "top_log_p", "log_rest"))
    logs = torch.cat([log_p, log_rest[..., None]], -1)
    if logs.dtype != torch.float32:
        logs = logs.float().log_softmax(-1)
    return torch.cat([ids.float(), logs], -1)
