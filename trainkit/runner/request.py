"""A text being decoded, as the host knows it: what was asked, what has come, and when it ends."""

# B rows  P path length

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trainkit.errors import UserError
from trainkit.runner.round import RoundOutput
from trainkit.runner.stats import Stats
from trainkit.runner.trees.shape import RankPath, Shape
from trainkit.runner.verify import Typical


@dataclass
class Output:
    """One generated continuation.

    Attributes:
        tokens: The new tokens, the end token included.
        text: Their text without special tokens, cut before a stop string.
        finish: `end` (end token), `stop` (stop string) or `length`.
        stats: Rounds and accepted lengths.
        logprobs: Log-probability of each token under the target at temperature 1, or None.
    """

    tokens: list[int]
    text: str
    finish: str
    stats: Stats
    logprobs: list[float] | None = None

    @property
    def lossy(self) -> bool:
        """Verification let tokens pass that the target would not have chosen."""
        return self.stats.lossy


@dataclass(frozen=True)
class Options:
    """What `Runner.generate` takes for all prompts alike; explained there."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    depth: int | None = None
    verify: str = "coupled"
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    tree: Sequence[RankPath] | Shape | None = None
    policy: str | None = None
    ignore_end: bool = False
    typical_epsilon: float = Typical.epsilon
    typical_scale: float = Typical.scale
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if any(not s for s in self.stop):
            raise UserError("stop: an empty string would end every text at once")

    @property
    def lossy(self) -> bool:
        """Whether what is written is not the target's own; `typical` at temperature 0 is `coupled`."""
        return self.verify == "mixed" or (self.verify == "typical" and self.temperature > 0)

    @staticmethod
    def of(caller: str, options: dict[str, Any]) -> Options:
        known = {item.name for item in fields(Options)}
        for name in options:
            if name not in known:
                raise UserError(f"{caller} has no option {name!r}")
        return Options(**{**options, "stop": strings(options.get("stop", ()))})


def strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string, or several, as a tuple."""
    return (stop,) if isinstance(stop, str) else tuple(stop)


@dataclass(frozen=True)
class Stopping:
    """When a request's text ends."""

    end_ids: tuple[int, ...]
    stop: tuple[str, ...]
    decode: Callable[[Sequence[int]], str] | None


@dataclass
class Request:
    """A text and what ends it. What the host holds lags the device by the rounds in flight.

    Attributes:
        place: Its prompt's place in the call.
        prompt: Token ids.
        keys: Of its noise.
        limit: Tokens at which prompt and text together end.
        tokens: The new ones so far.
        logprobs: Theirs, if asked for.
        stats: Rounds so far.
        finish: Empty until it ends; then as `Output.finish`.
        text_end: Characters of the text before a stop string.
        missed: Its tokens that the drafter has not read because a policy drafts nothing; at most so many.
    """

    place: int
    prompt: list[int]
    keys: tuple[int, int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish: str = ""
    text_end: int | None = None
    missed: int = 0

    def take(self, output: RoundOutput, slot: int, stopping: Stopping, prefill: bool = False) -> None:
        """Appends a round's tokens to a request, ends it inside the block where it ends, and counts the round."""
        count = int(output.counts_B[slot])
        emitted = output.emitted_BP[slot].tolist()[:count]
        kept = 0
        for token in emitted:
            self.tokens.append(token)
            kept += 1
            if token in stopping.end_ids:
                self.finish = "end"
            elif stopping.stop and stopping.decode is not None:
                text = stopping.decode(self.tokens)
                found = [at for at in map(text.find, stopping.stop) if at >= 0]
                if found:
                    self.finish, self.text_end = "stop", min(found)
            if not self.finish and len(self.prompt) + len(self.tokens) >= self.limit:
                self.finish = "length"
            if self.finish:
                break
        if output.logprobs_BP is not None:
            self.logprobs.extend(output.logprobs_BP[slot].tolist()[:kept])
        self.stats.tokens += kept
        if not prefill and kept < count:
            self.stats.cut_rounds += 1
        elif not prefill and count:
            self.stats.add_round(count - 1, output.verified(slot), output.drafted, output.paused)
