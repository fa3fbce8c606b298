"""What passes between the parts of a bench: what was asked, who takes part, what was measured. Light to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.eval.bench.hardware import Machine
    from trainkit.eval.bench.identity import Identity
    from trainkit.eval.bench.timing import Contender
    from trainkit.runner import Runner
    from trainkit.runner.timing import RoundCost
    from trainkit.runner.trees.shape import RankPath


@dataclass(frozen=True)
class Request:
    """The arguments of `bench`, whose docstring explains them, once they are checked."""

    target: str | None
    drafters: tuple[str, ...]
    prompts: str | None
    depths: tuple[int, ...]
    trees: tuple[tuple[RankPath, ...], ...]
    policies: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    verify: str
    limit: int
    repeats: int
    batch: int
    device: str
    dtype: str
    baselines: bool
    seed: int
    max_seconds: float
    synthetic: str | None
    synthetic_tau: float
    synthetic_kinds: tuple[str, ...]
    prompt_length: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "limit", "repeats", "batch", "prompt_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if any(depth < 1 for depth in self.depths) or len(set(self.depths)) != len(self.depths):
            raise UserError(f"depths {list(self.depths)}: must be different and at least 1; plain decoding is always measured")
        for folder in self.drafters:
            if self.drafters.count(folder) > 1:
                raise UserError(f"drafter {folder}: given twice; name each once")
        if self.synthetic is None and (self.target is None or self.prompts is None):
            raise UserError("bench needs --target and --prompts (a file), or --synthetic with the name of a shape")
        if self.synthetic is not None and (self.target or self.drafters or self.prompts or self.temperature):
            raise UserError("synthetic: takes no target, drafter or prompts, and decodes at temperature 0")
        if self.trees and not self.drafters:
            raise UserError("trees: need a --drafter to draft them")
        if self.policies and not (self.drafters or self.synthetic):
            raise UserError("policy: needs a --drafter to pace")
        for name in self.policies:
            if self.policies.count(name) > 1:
                raise UserError(f"policy {name}: given twice; name each once")
        if self.verify not in ("coupled", "residual"):
            raise UserError(f"verify {self.verify!r}: must be one of coupled, residual")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r}: must be float32, bfloat16 or float16")

    @property
    def options(self) -> dict[str, Any]:
        """Options for `Runner.generate`."""
        return {"temperature": self.temperature, "verify": self.verify, "seed": self.seed}

    def has_same_draw(self, contender: Contender) -> bool:
        """Whether this contender has to give the very tokens of our plain decoding."""
        return self.temperature == 0 or (contender.family == "trainkit" and self.verify == "coupled")


@dataclass(frozen=True)
class Draft:
    """A drafter that takes part: its name, and a runner of it with the field's target."""

    name: str
    runner: Runner


@dataclass
class Field:
    """Who takes part.

    Attributes:
        runner: Of the target alone; the drafts' runners hold the same one.
        prompts: Token ids.
        target: Its name.
        drafts: The drafters.
        contenders: In the order of the table, plain decoding among them.
        notes: What was left out, and why.
    """

    runner: Runner
    prompts: list[list[int]]
    target: str
    drafts: list[Draft] = field(default_factory=list)
    contenders: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def plain(self) -> Contender:
        """Our decoding without a draft."""
        return next(one for one in self.contenders if one.family == "trainkit" and not one.drafter)

    @property
    def mean_length(self) -> int:
        """Tokens in the cache half-way through the average text, once plain decoding has run."""
        texts = self.plain.last.tokens
        return sum(len(p) + len(t) // 2 for p, t in zip(self.prompts, texts, strict=True)) // len(texts)


@dataclass
class Result:
    """Everything measured.

    Attributes:
        request: What was asked.
        field: Who took part, each contender with its times and outputs.
        machine: Where.
        date: When, UTC, ISO 8601.
        identity: By contender's name, its output against plain decoding; absent where it is another draw.
        costs: By (threads, drafter's name, tree), what drafting and verifying takes; the empty tree is plain decoding.
        tolerance: Score gap below which a difference is a tie.
    """

    request: Request
    field: Field
    machine: Machine
    date: str
    identity: dict[str, Identity]
    costs: dict[tuple[int, str, Any], RoundCost]
    tolerance: float

    @property
    def mismatches(self) -> int:
        """Texts that differ from plain decoding though they must not, and not by rounding."""
        return sum(one.mismatches for one in self.identity.values())
