"""Acceptance sets: what an acceptance predictor is trained on, one record for each draft position that serving came to.

A folder with `acceptance.json`, which says what made it, and parts, each with a block of prompts at one temperature. A part is
written under another name, synced and renamed: under its own it is whole. So resuming makes the parts that are not there, and
any number of ranks share them out. Each bears the digest of what determines it, so that none is taken for another set's.

The records are those of decoding itself, so they have the distribution that is served: the predictor is asked where the round
came to, and nowhere else. What SpecDec++ (arXiv 2405.19715) does instead, one pass over the text with the draft's own token put
in for 85 of 100 of the target's, is an approximation of that which needs no decoding; nothing is left of it here.
Left out on purpose: the tokens. A predictor does not read them, and the prompts' file has them.

Tensors of a part, prompt by prompt, round by round, position by position: `hidden` [N, D], the state that proposed; `signals`
[N, W, C] float32 of its W likeliest proposals, likeliest first, the last of them the temperature; `depth` [N] int16, 0 for the
round's first; `label` [N, W] float32, whether each was what the target chose, or how likely that was; `max_q` [N] float32, the
draft's highest probability there; `prompt` [N] int32, its number. A chain drafts the first proposal; W is 1 under `residual`.
"""

# N records of a part  R records of a set  W proposals of a position  D hidden  C signals

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainkit.bundle import Bundle
from trainkit.data.manifest import read_manifest
from trainkit.data.sets.writer import begin, write_part
from trainkit.errors import UserError
from trainkit.models.predictor import FILE

ACCEPTANCE = "acceptance.json"
FORMAT = 2
COLUMNS = ("hidden", "signals", "depth", "label", "max_q", "prompt")
_COMMAND = "trainkit features --acceptance"

Records = Mapping[str, Tensor]
"""`COLUMNS` by name."""
Make = Callable[[Sequence[int], float, Callable[[int], None]], Records]
"""Decodes the prompts of these numbers at a temperature, tells the function it is given the tokens of each text that ended, and
returns the records."""


@dataclass(frozen=True)
class AcceptanceLayout:
    """Which part holds which records: block of prompts by block, temperature by temperature.

    Attributes:
        prompts: Prompts of the set.
        temperatures: Each is decoded at each.
        part_prompts: Prompts of a part.
    """

    prompts: int
    temperatures: tuple[float, ...]
    part_prompts: int = 64

    @property
    def parts(self) -> int:
        """Files of the whole set."""
        return -(-self.prompts // self.part_prompts) * len(self.temperatures)

    def part(self, number: int) -> tuple[range, float]:
        """A part's prompts and its temperature."""
        block, place = divmod(number, len(self.temperatures))
        first = block * self.part_prompts
        return range(first, min(first + self.part_prompts, self.prompts)), self.temperatures[place]


@dataclass
class Written:
    """What a call of `write_acceptance` did: parts made by it and found there, records, accepted ones, tokens, seconds."""

    parts: int = 0
    found: int = 0
    records: int = 0
    accepted: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


def drafter_fingerprint(made: Bundle) -> dict[str, Any]:
    """Which drafter a bundle holds: its kind and the hashes of its files but a predictor's; and its name, to be told by."""
    files = {name: digest for name, digest in made.files.items() if name != FILE}
    return {"name": made.path.resolve().name, "kind": made.kind, "files": files}


def part_file(number: int) -> str:
    """The file name of a whole part."""
    return f"part-{number:05d}.safetensors"


def read_acceptance(folder: Path) -> dict[str, Any] | None:
    """What `acceptance.json` says, or None where there is none.

    Raises:
        UserError: it is not readable.
    """
    return read_manifest(folder / ACCEPTANCE, FORMAT, "parts", int, "an acceptance set")


def write_acceptance(
    out: Path,
    layout: AcceptanceLayout,
    make: Make,
    provenance: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> Written:
    """Writes this rank's share of the parts into `out`, going on where an earlier call stopped.

    Args:
        out: Folder of the set.
        layout: Its parts.
        make: Where records come from; the same arguments give the same records.
        provenance: What else determines them, JSON-able, `versions` apart; names and places are in it under `name` and `path`.
        rank: This process's number; it makes every `world_size`-th part.
        world_size: Processes that share the work.
        progress: Show a bar over texts, with tokens per second.

    Raises:
        UserError: `out` holds another set or something else, or another process writes there.
    """
    values = {
        "format": FORMAT,
        **provenance,
        "prompt_count": layout.prompts,
        "temperatures": list(layout.temperatures),
        "part_prompts": layout.part_prompts,
        "parts": layout.parts,
    }
    values["id"] = _digest(values)
    begun = begin(out, ACCEPTANCE, values, read_acceptance, _COMMAND)
    shared = range(rank, layout.parts, world_size)
    mine = [number for number in shared if not (out / part_file(number)).exists()]
    written, began = Written(found=len(shared) - len(mine)), perf_counter()
    texts = {number: len(layout.part(number)[0]) for number in shared}
    bar = _bar(sum(texts.values()), sum(texts.values()) - sum(texts[number] for number in mine)) if progress else None

    def told(tokens: int) -> None:
        written.tokens += tokens
        if bar is not None:
            bar.set_postfix_str(f"{written.tokens / (perf_counter() - began):,.0f} tokens/s", refresh=False)
            bar.update()

    def content(number: int) -> bytes:
        records = make(*layout.part(number), told)
        written.records += len(records["label"])
        written.accepted += float(records["label"][:, 0].sum())
        return safetensors.torch.save({name: records[name].contiguous() for name in COLUMNS}, {"acceptance": values["id"]})

    try:
        for number in mine:
            write_part(out / part_file(number), lambda number=number: content(number))
            written.parts += 1
    except BaseException:
        if begun and not written.parts and world_size == 1:  # nothing in it to go on with
            (out / ACCEPTANCE).unlink(missing_ok=True)
            with suppress(OSError):  # something else lies there
                out.rmdir()
        raise
    finally:
        written.seconds = perf_counter() - began
        if bar is not None:
            bar.close()
    return written


def _digest(values: Mapping[str, Any]) -> str:
    """Of what determines the records: library versions, names and places do not."""
    kept = {
        key: {k: v for k, v in value.items() if k not in ("name", "path")} if isinstance(value, dict) else value
        for key, value in values.items()
        if key != "versions"
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="acceptance", unit=" texts", smoothing=0.05, disable=None)


# ------------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class AcceptanceSet:
    """Records in memory, or some of them: what `PackedLoader` makes batches of.

    Attributes:
        tensors: `COLUMNS` of the whole set, shared with every part of it.
        rows_R: Which of them these are.
        about: What `acceptance.json` says.
        fingerprint: Digest of what determines the records, and of how they were chosen.
    """

    tensors: Records
    rows_R: np.ndarray
    about: Mapping[str, Any]
    fingerprint: str

    @staticmethod
    def read(folder: str | Path) -> AcceptanceSet:
        """All records of a complete set.

        Raises:
            UserError: no such set, parts that are missing, broken or another set's, or no record in any.
        """
        folder = Path(folder)
        about = read_acceptance(folder)
        if about is None:
            raise UserError(f"{folder}: no acceptance set (no {ACCEPTANCE}); make one with `{_COMMAND} BUNDLE`")
        files = [folder / part_file(number) for number in range(about["parts"])]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise UserError(f"{folder}: {missing} of {len(files)} parts are not done; run the same {_COMMAND} again")
        parts = [part for file in files if len((part := _read_part(file, about["id"]))["label"])]
        if not parts:
            raise UserError(f"{folder}: holds no record, as no text was longer than one token; give other prompts")
        tensors = {name: torch.cat([part[name] for part in parts]) for name in COLUMNS}
        return AcceptanceSet(tensors, np.arange(len(tensors["label"])), about, about["id"])

    def __len__(self) -> int:
        return len(self.rows_R)

    @property
    def labels_R(self) -> np.ndarray:
        """Of each record how many labels count: one."""
        return np.ones(len(self), np.int64)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.tensors["hidden"].shape[1]

    @property
    def prompts(self) -> int:
        """Prompts that have a record here."""
        return len(self.column("prompt").unique())

    def column(self, name: str) -> Tensor:
        """One of `COLUMNS`, of these records."""
        return self.tensors[name][torch.from_numpy(self.rows_R)]

    @property
    def temperature(self) -> Tensor:
        """[R] temperatures."""
        return self.tensors["signals"][:, 0, -1][torch.from_numpy(self.rows_R)]

    @property
    def accepted(self) -> Tensor:
        """[R] labels of the first proposals, which a chain drafts."""
        return self.tensors["label"][:, 0][torch.from_numpy(self.rows_R)]

    def split(self, share: float, seed: int) -> tuple[AcceptanceSet, AcceptanceSet]:
        """The records of most prompts, and those of a share drawn under `seed`: no prompt has records in both.

        Raises:
            UserError: a share that leaves one of them empty.
        """
        numbers = np.unique(self.column("prompt").numpy())
        count = round(share * len(numbers))
        if not 0 < count < len(numbers):
            raise UserError(
                f"validation_share: {share} of {len(numbers)} prompts leaves {'training' if count else 'validation'} without "
                "any; give another share, or a set of more prompts"
            )
        held = np.random.default_rng(seed).permutation(numbers)[:count]
        is_held_R = np.isin(self.column("prompt").numpy(), held)
        parts = (("train", ~is_held_R), ("validation", is_held_R))
        train, validation = (
            replace(self, rows_R=self.rows_R[chosen_R], fingerprint=f"{self.fingerprint} {share} {seed} {name}")
            for name, chosen_R in parts
        )
        return train, validation

    def batch(self, rows: Sequence[int], size: int) -> dict[str, Tensor]:
        """Tensors of `size` records: those given, then padding of zeros.

        Returns:
            hidden_BD, signals_BWC, depth_B int64, label_BW, max_q_B; document_BT [B, 1], 0 and on padding -1.
        """
        chosen_R = torch.from_numpy(self.rows_R[np.asarray(rows, np.int64)])
        lacking = size - len(chosen_R)

        def padded(name: str) -> Tensor:
            values = self.tensors[name][chosen_R]
            return torch.cat([values, values.new_zeros(lacking, *values.shape[1:])]) if lacking else values

        document_B = torch.zeros(size, dtype=torch.long)
        document_B[len(chosen_R) :] = -1
        return {
            "hidden_BD": padded("hidden"),
            "signals_BWC": padded("signals"),
            "depth_B": padded("depth").long(),
            "label_BW": padded("label"),
            "max_q_B": padded("max_q"),
            "document_BT": document_B[:, None],
        }


def _read_part(file: Path, mark: str) -> dict[str, Tensor]:
    mend = f"remove it and run the same {_COMMAND} again"
    try:
        with safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("acceptance") != mark:
                raise UserError(f"{file}: a part of another set; {mend}")
            return {name: opened.get_tensor(name) for name in COLUMNS}
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); {mend}") from None
