"""What the parts of a bench exchange: its checked arguments, its methods and prompts, its measurements. Light to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.errors import UserError

if TYPE_CHECKING:
    from trainkit.eval.bench.hardware import Machine
    from trainkit.eval.bench.identity import Identity
    from trainkit.eval.bench.timing import Method
    from trainkit.runner import Runner
    from trainkit.runner.timing import RoundCost


@dataclass(frozen=True)
class BenchArguments:
    """Arguments of `trainkit bench`, checked. The command adds the flags for drafters, trees, policies and output files.

    Args:
        target: Hugging Face folder of the target.
        drafters: Folders of the drafters.
        prompts: File of prompts or chats; the tokenizer's chat template is applied, if it has one.
        depths: Draft depths to measure, as a JSON list; those above a drafter's own limit are left out. The tree in a drafter's
            bundle is measured too.
        trees: Rank paths of each additional tree.
        policies: Policies that choose the depth during decoding.
        max_new_tokens: Maximum number of new tokens for each prompt.
        max_len: Prompts that need more positions, new tokens included, are left out, with a note; by default none may.
        temperature: Sampling temperature; 0 is greedy. Above 0 transformers samples other texts, and only trainkit's outputs
            are compared with plain decoding.
        verify: Verification method, coupled or residual.
        limit: Number of prompts to use, from the start of the file.
        repeats: Number of runs of each method; the table shows medians.
        batch: Number of prompts decoded together.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: Precision: float32, bfloat16 or float16.
        baselines: Whether to measure transformers too.
        seed: Seed of all sampling.
        max_seconds: Time limit; if the whole load would take longer, fewer prompts and then fewer repeats are run, with a note.
        synthetic: Shape of a random target with scripted drafters, instead of a target folder: tiny, llama3-1b or llama3-8b.
        synthetic_tau: Tokens per round that the scripted drafter reaches, as far as the depth allows.
        synthetic_kinds: Drafter kinds whose cost is measured, with default settings and at most 32,000 draft tokens; by default
            all kinds. Repeat the flag for several.
        prompt_length: Number of tokens of the synthetic prompt.
    """

    target: str | None = None
    drafters: tuple[str, ...] = ()
    prompts: str | None = None
    depths: tuple[int, ...] = (1, 2, 3, 4, 6)
    trees: tuple[tuple[tuple[int, ...], ...], ...] = ()
    policies: tuple[str, ...] = ()
    max_new_tokens: int = 128
    max_len: int | None = None
    temperature: float = 0.0
    verify: str = "coupled"
    limit: int = 16
    repeats: int = 3
    batch: int = 1
    device: str = "auto"
    dtype: str = "float32"
    baselines: bool = True
    seed: int = 0
    max_seconds: float = 900.0
    synthetic: str | None = None
    synthetic_tau: float = 3.0
    synthetic_kinds: tuple[str, ...] = ()
    prompt_length: int = 64

    def __post_init__(self) -> None:
        from trainkit.runner.sampling import Sampling

        object.__setattr__(self, "temperature", Sampling(self.temperature).temperature)
        for name in ("max_new_tokens", "limit", "repeats", "batch", "prompt_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1")
        if self.max_new_tokens == 1:
            raise UserError("max_new_tokens 1: the first token comes from prefill, so no round would be measured")
        if any(depth < 1 for depth in self.depths) or len(set(self.depths)) != len(self.depths):
            raise UserError(f"depths {list(self.depths)}: must differ and be at least 1; plain decoding is always measured")
        folders = [str(Path(folder).resolve()) for folder in self.drafters]
        for flag, values in (("drafter", folders), ("policy", self.policies)):
            if repeated := next((value for value in values if values.count(value) > 1), None):
                raise UserError(f"{flag} {repeated}: given twice; name it once")
        if self.synthetic is None and (self.target is None or self.prompts is None):
            raise UserError("bench needs --target and --prompts (a file), or --synthetic with the name of a shape")
        if self.synthetic is not None and (self.target or self.drafters or self.prompts or self.temperature):
            raise UserError("synthetic: takes no target, drafter or prompts, and decodes at temperature 0")
        if self.synthetic is not None and self.max_len is not None:
            raise UserError(
                "max_len: leaves out long prompts, but synthetic prompts all have the same length; set prompt_length"
            )
        if self.trees and not (self.drafters or self.synthetic):
            raise UserError("trees: only a drafter can draft them; add --drafter")
        if self.policies and not (self.drafters or self.synthetic):
            raise UserError("policy: needs a --drafter whose depth it chooses")
        for name, choices in {"verify": ("coupled", "residual"), "dtype": ("float32", "bfloat16", "float16")}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} {getattr(self, name)!r}: must be one of {', '.join(choices)}")


@dataclass
class BenchSetup:
    """What a bench measures.

    Attributes:
        runner: Runner of the target alone.
        prompts: Token ids of each prompt.
        target_name: Name of the target in tables.
        drafters: Name in tables -> runner that joins the drafter to the target of `runner`.
        methods: Ways to decode, in the order of the table; plain decoding in trainkit is one of them.
        notes: A line for each method that was left out, with the reason, and for each limit that was reached.
    """

    runner: Runner
    prompts: list[list[int]]
    target_name: str
    drafters: dict[str, Runner] = field(default_factory=dict)
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


@dataclass(frozen=True)
class BenchResult:
    """Everything that a bench measured.

    Attributes:
        arguments: Arguments of the bench.
        setup: Methods with their outputs and times, drafters and prompts.
        machine: Hardware and library versions.
        identity: Comparison with plain decoding, by method name; only of methods that must match it.
        costs: Drafting and verifying times by (threads, drafter name, tree); the empty tree is plain decoding.
        tolerance: Largest score gap that counts as a tie.
    """

    arguments: BenchArguments
    setup: BenchSetup
    machine: Machine
    identity: dict[str, Identity]
    costs: dict[tuple[int, str, Any], RoundCost]
    tolerance: float

    @property
    def mismatches(self) -> int:
        """Number of texts that had to match plain decoding and do not, rounding excluded."""
        return sum(identity.mismatches for identity in self.identity.values())
