"""A text being decoded, as the host knows it: its prompt, its tokens so far, and when it ends."""

# B rows  P path length

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from trainkit.runner.round import RoundOutput
from trainkit.runner.sampling import Sampling
from trainkit.runner.stats import Stats
from trainkit.runner.text import IncrementalText


@dataclass
class Output:
    """One generated continuation.

    Attributes:
        tokens: The new token ids, the end token included.
        text: Their text without special tokens, cut before a stop string.
        finish: `end` (end token), `stop` (stop string), `length` (`max_new_tokens`), or `max_len` (prompt and text fill the
            runner's `max_len`).
        stats: Rounds and accepted lengths.
        logprobs: Log-probability of each token under the target at temperature 1, or as `processed_logprobs` asks; or None.
    """

    tokens: list[int]
    text: str
    finish: str
    stats: Stats
    logprobs: list[float] | None = None


@dataclass
class Request:
    """A text being decoded. The host is behind the device by the rounds in flight.

    Attributes:
        index: Index of its prompt in the call.
        prompt: Token ids of the prompt.
        keys: Noise keys.
        limit: Number of tokens, prompt included, at which it ends.
        cut: Whether `max_len`, and not `max_new_tokens`, sets the limit.
        sampling: Temperature, top-k and top-p.
        ignore_end: Whether it continues past end tokens.
        top: Number of likeliest tokens to return at each position; None if no log-probabilities are requested.
        text: Its text so far; None if neither stop strings nor a stream need it.
        tokens: New token ids so far.
        logprobs: Their log-probabilities, if requested.
        likeliest: For each token the `top` likeliest tokens at its position, as (id, log-probability).
        stats: Counts so far.
        finish: Empty until it ends; then as `Output.finish`, or `cancelled`, or `error`.
        error: Why it cannot be decoded, if it ended with `error`.
        admitted: When it got a row, on the clock of `perf_counter`.
        text_end: Number of characters of the text before a stop string.
        missed: Number of its tokens that the drafter has not read because drafting is paused; an upper bound.
    """

    index: int
    prompt: list[int]
    keys: tuple[int, int]
    limit: int
    cut: bool = False
    sampling: Sampling = Sampling()
    ignore_end: bool = False
    top: int | None = None
    text: IncrementalText | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    finish: str = ""
    error: str = ""
    admitted: float = 0.0
    text_end: int | None = None
    missed: int = 0

    def take(self, output: RoundOutput, slot: int, end_ids: Collection[int], prefill: bool = False) -> None:
        """Appends the tokens of a round, ends the text inside them where it ends, and counts the round."""
        count, end_ids = int(output.counts_B[slot]), () if self.ignore_end else end_ids
        taken = 0
        for token in output.emitted_BP[slot].tolist()[:count]:
            self.tokens.append(token)
            taken += 1
            stop_at = None if self.text is None else self.text.add(token)
            # if an end token completes a stop string, that string is the reason only if it begins before the token
            if token in end_ids and (self.text is None or stop_at in (None, len(self.text.shown))):
                self.finish = "end"
            elif stop_at is not None:
                self.finish, self.text_end = "stop", stop_at
            elif len(self.prompt) + len(self.tokens) >= self.limit:
                self.finish = "max_len" if self.cut else "length"
                self.stats.cut_texts += self.cut
            if self.finish:
                break
        if self.top is not None and output.logprobs_BP is not None:
            self.logprobs.extend(output.logprobs_BP[slot].tolist()[:taken])
        if self.top and output.top_BPK is not None and output.top_logprobs_BPK is not None:
            ids, logprobs = output.top_BPK[slot, :taken].tolist(), output.top_logprobs_BPK[slot, :taken].tolist()
            self.likeliest += [list(zip(*pair, strict=True))[: self.top] for pair in zip(ids, logprobs, strict=True)]
        self.stats.tokens += taken
        if not prefill and taken < count:
            self.stats.cut_rounds += 1
        elif not prefill and count:
            self.stats.add_round(count - 1, output.verified(slot), output.drafted, output.paused)
