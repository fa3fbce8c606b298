"""Counters, gauges and histograms in Prometheus' text format (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from trainkit.runner.stats import Stats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


class Histogram:
    """Counts of values at most each bound, their sum and their number."""

    def __init__(self, help: str, bounds: Sequence[float]) -> None:
        self.help, self.bounds = help, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """The lines of /metrics."""
        yield from (f"# HELP {name} {self.help}", f"# TYPE {name} histogram")
        total = 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield from (f"{name}_sum {self.sum:.9g}", f"{name}_count {total}")


class Metrics:
    """Counters since the server started; used by the event loop only.

    Attributes:
        requests: Number of requests by outcome: ok, invalid (4xx), refused (queue full or stopping), cancelled, failed.
        prompt_tokens: Tokens of the prompts of all accepted requests, each prompt once.
        generated: Tokens emitted.
        rounds: Number of rounds, each over all rows.
        row_rounds: Number of rounds summed over rows.
        cancelled: Number of texts whose client disconnected before they ended.
        ended: Counts of all texts that have ended, from which the drafted and accepted tokens follow.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.prompt_tokens = self.generated = self.rounds = self.row_rounds = self.cancelled = 0
        self.ended = Stats()
        self.first_token = Histogram("From a request's arrival to its first token.", SECONDS)
        self.per_token = Histogram("Mean time between tokens of a text after its first.", TOKEN_SECONDS)
        self.request = Histogram("From a request's arrival to its end.", SECONDS)
        self.tokens_per_round = Histogram("Tokens that a row emitted in a round; the mean is tau.", TOKENS)

    def text(self, gauges: Mapping[str, int]) -> str:
        """The body of /metrics, with the current values of these gauges."""
        accepted, offered = self.ended.accepted, self.ended.offered
        positions = range(1, len(offered))
        counters: dict[str, tuple[str, Mapping[str, int]]] = {
            "requests": ("Requests by outcome.", {f'{{outcome="{name}"}}': n for name, n in sorted(self.requests.items())}),
            "prompt_tokens": ("Prompt tokens of accepted requests.", {"": self.prompt_tokens}),
            "generated_tokens": ("Tokens emitted.", {"": self.generated}),
            "rounds": ("Rounds, each over all rows.", {"": self.rounds}),
            "row_rounds": ("Rounds summed over rows.", {"": self.row_rounds}),
            "drafted_tokens": ("Tokens drafted for texts that have ended.", {"": self.ended.drafted}),
            "accepted_tokens": ("Drafted tokens accepted.", {"": sum(k * n for k, n in enumerate(accepted))}),
            "offered_at": ("Rounds that reached a draft position.", {f'{{position="{k}"}}': offered[k] for k in positions}),
            "accepted_at": (
                "Rounds that accepted a draft position; divided by offered_at this is alpha_k.",
                {f'{{position="{k}"}}': sum(accepted[k:]) for k in positions},
            ),
            "cancelled": ("Texts whose client disconnected.", {"": self.cancelled}),
        }
        lines = []
        for name, (help, values) in counters.items():
            lines += [f"# HELP trainkit_{name}_total {help}", f"# TYPE trainkit_{name}_total counter"]
            lines += [f"trainkit_{name}_total{labels} {value}" for labels, value in values.items()]
        for name, value in gauges.items():
            lines += [f"# TYPE trainkit_{name} gauge", f"trainkit_{name} {value}"]
        lines += self.first_token.lines("trainkit_time_to_first_token_seconds")
        lines += self.per_token.lines("trainkit_time_per_output_token_seconds")
        lines += self.request.lines("trainkit_request_seconds")
        lines += self.tokens_per_round.lines("trainkit_tokens_per_round")
        return "\n".join(lines) + "\n"
