"""What the parts of a bench exchange: its checked arguments, its methods and prompts, its measurements. Light to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.eval.bench.hardware import Machine
    from trainkit.eval.bench.identity import Identity
    from trainkit.eval.bench.timing import Method
    from trainkit.runner import Runner
    from trainkit.runner.timing import RoundCost
    from trainkit.runner.trees.shape import RankPath


@dataclass(frozen=True)
class BenchArguments:
    """The checked arguments of `bench`, whose docstring explains them; `drafters` and `policies` hold its repeatable flags."""

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
            raise UserError(f"depths {list(self.depths)}: must differ and be at least 1; plain decoding is always measured")
        for flag, values in (("drafter", self.drafters), ("policy", self.policies)):
            for value in values:
                if values.count(value) > 1:
                    raise UserError(f"{flag} {value}: given twice; name it once")
        if self.synthetic is None and (self.target is None or self.prompts is None):
            raise UserError("bench needs --target and --prompts (a file), or --synthetic with the name of a shape")
        if self.synthetic is not None and (self.target or self.drafters or self.prompts or self.temperature):
            raise UserError("synthetic: takes no target, drafter or prompts, and decodes at temperature 0")
        if self.trees and not self.drafters:
            raise UserError("trees: only a drafter can draft them; add --drafter")
        if self.policies and not (self.drafters or self.synthetic):
            raise UserError("policy: needs a --drafter whose depth it chooses")
        if self.verify not in ("coupled", "residual"):
            raise UserError(f"verify {self.verify!r}: must be one of coupled, residual")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype {self.dtype!r}: must be float32, bfloat16 or float16")

    @property
    def options(self) -> dict[str, Any]:
        """Options for `Runner.generate`."""
        return {"temperature": self.temperature, "verify": self.verify, "seed": self.seed}

    def must_match_plain(self, method: Method) -> bool:
        """Whether this method must emit the same tokens as plain decoding in trainkit."""
        return self.temperature == 0 or (method.family == "trainkit" and self.verify == "coupled")


@dataclass(frozen=True)
class BenchDrafter:
    """A drafter in a bench: its name in tables, and a runner that joins it to the bench's target."""

    name: str
    runner: Runner


@dataclass
class BenchSetup:
    """What a bench measures.

    Attributes:
        runner: Runner of the target alone; the drafters' runners share its target.
        prompts: Token ids of each prompt.
        target_name: Name of the target in tables.
        drafters: Drafters that some methods use.
        methods: Ways to decode, in the order of the table; plain decoding in trainkit is one of them.
        notes: A line for each thing that was left out, with the reason.
    """

    runner: Runner
    prompts: list[list[int]]
    target_name: str
    drafters: list[BenchDrafter] = field(default_factory=list)
    methods: list[Method] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def plain(self) -> Method:
        """Plain decoding in trainkit: the baseline of every speed-up."""
        return next(method for method in self.methods if method.family == "trainkit" and not method.drafter)

    @property
    def mean_length(self) -> int:
        """Mean number of cached tokens halfway through an answer; known once plain decoding has run."""
        texts = self.plain.last.tokens
        return sum(len(p) + len(t) // 2 for p, t in zip(self.prompts, texts, strict=True)) // len(texts)


@dataclass
class BenchResult:
    """Everything that a bench measured.

    Attributes:
        arguments: Arguments of the bench.
        setup: Methods with their times and outputs, drafters and prompts.
        machine: Hardware and library versions.
        date: UTC time of the end, ISO 8601.
        identity: Comparison with plain decoding, by method name; only of methods that must match it.
        costs: Drafting and verifying times by (threads, drafter name, tree); the empty tree is plain decoding.
        tolerance: Largest score gap that counts as a tie.
    """

    arguments: BenchArguments
    setup: BenchSetup
    machine: Machine
    date: str
    identity: dict[str, Identity]
    costs: dict[tuple[int, str, Any], RoundCost]
    tolerance: float

    @property
    def mismatches(self) -> int:
        """Number of texts that had to match plain decoding and do not, rounding excluded."""
        return sum(identity.mismatches for identity in self.identity.values())
