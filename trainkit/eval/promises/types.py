"""What the checks of `trainkit verify` share: the validated arguments, the loaded models, and the result of a check."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from trainkit.bundle import Bundle
from trainkit.drafters.base import Drafter
from trainkit.errors import UserError
from trainkit.eval.bench.identity import IdentityChecker, tie_tolerance
from trainkit.models.target import FrozenTarget
from trainkit.runner import Runner
from trainkit.runner.sampling import Sampling

Status = Literal["kept", "BROKEN", "measured"]


@dataclass(frozen=True)
class VerifyArguments:
    """Validated arguments of `trainkit verify`.

    Args:
        target: Hugging Face folder of the target that the bundle drafts for.
        prompts: File of prompts or chats, as in `trainkit bench`; by default eight built-in prompts.
        limit: Number of prompts to use, from the start of the file.
        max_new_tokens: Maximum number of new tokens for each prompt.
        depth: Number of tokens drafted per round in a chain; by default 4, or as many as the drafter has heads for.
        samples: Number of texts that the distribution test of residual verification samples, for chains and for trees.
        seed: Seed of all sampling.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: Precision: float32, bfloat16 or float16. In half precision texts are compared, and the share of differing texts
            is reported, but equality is not promised.
    """

    target: str
    prompts: str | None = None
    limit: int = 8
    max_new_tokens: int = 64
    depth: int | None = None
    samples: int = 2000
    seed: int = 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        for name, minimum in (("limit", 1), ("max_new_tokens", 8), ("samples", 100)):
            if getattr(self, name) < minimum:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {minimum}")
        if self.depth is not None and self.depth < 1:
            raise UserError(f"depth {self.depth}: must be at least 1")

    @property
    def exact(self) -> bool:
        """Whether token equality is promised; in half precision, rounding depends on the number of rows."""
        return self.dtype == "float32"


@dataclass
class Check:
    """The result of checking one promise.

    Attributes:
        name: Name in the table.
        promise: What was checked, as a sentence.
        status: `kept`, `BROKEN`, or `measured` for what is reported without a promise.
        figure: The result in one line.
        details: A line for each tie, difference or format.
        counts: Measured numbers, JSON-able.
        seconds: Wall-clock seconds.
    """

    name: str
    promise: str
    status: Status
    figure: str
    details: list[str] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All attributes, JSON-able."""
        return asdict(self)


@dataclass
class Subject:
    """What is verified: a drafter with its target, both loaded as for decoding.

    Attributes:
        folder: The drafter's folder.
        bundle: Its trainkit.json; None for a folder that another program wrote.
        runner: Runner of target and drafter.
        prompts: Token ids of each prompt.
        arguments: The arguments of the command.
    """

    folder: Path
    bundle: Bundle | None
    runner: Runner
    prompts: list[list[int]]
    arguments: VerifyArguments

    @property
    def drafter(self) -> Drafter:
        """The drafter, as the runner loaded it."""
        assert self.runner.drafter is not None
        return self.runner.drafter

    @property
    def target_folder(self) -> Path:
        """Folder of the target."""
        return Path(self.arguments.target)

    @property
    def depth(self) -> int:
        """Number of tokens drafted per round in a chain."""
        limit = self.drafter.max_depth
        return min(self.arguments.depth or 4, limit) if limit else self.arguments.depth or 4

    @property
    def tree(self) -> tuple[tuple[int, ...], ...]:
        """A small static tree that the drafter can draft: three children of the root, and some below them."""
        deepest = min(self.depth, 3)
        widest = min(3, self.drafter.draft_vocab_size)
        paths = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (1, 0, 0))
        return tuple(path for path in paths if len(path) <= deepest and max(path) < widest)

    @cached_property
    def reference(self) -> FrozenTarget:
        """The target in transformers, in the same precision and on the same device."""
        dtype = getattr(torch, self.arguments.dtype)
        return FrozenTarget(self.target_folder, dtype).to(self.runner.device)

    @cached_property
    def tolerance(self) -> float:
        """Difference of scores below which two tokens are a tie, so that rounding may decide between them."""
        return tie_tolerance(self.runner.rounds.target, self.prompts[0])

    def checker(self, sampling: Sampling) -> IdentityChecker:
        """Compares texts that were sampled with these settings."""
        return IdentityChecker(self.runner.rounds.target, sampling, self.arguments.seed, self.tolerance)


def dynamic_tree(depth: int, top_k: int, nodes: int) -> str:
    """A dynamic tree of `nodes` nodes, or of all that it proposes if these are fewer, as the command line writes it."""
    return f"dynamic:{depth},{top_k},{min(nodes, 1 + top_k + (depth - 1) * top_k**2)}"
