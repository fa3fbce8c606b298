"""Decodes the texts of a call: divides them into groups of similar length, and runs a session over each.

The static tensors and the captured rounds are kept from call to call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from time import perf_counter

from trainkit.errors import UserError
from trainkit.runner.graphs import Graphs
from trainkit.runner.request import Request
from trainkit.runner.round import Plan, Rounds, RoundState
from trainkit.runner.session import Fetch, Session, slots_needed
from trainkit.runner.stats import Stats
from trainkit.runner.timing import synchronize

SPLIT_CACHE_BYTES = 1 << 30
"""Largest size of the target's cache with rows for the longest text; otherwise long texts are decoded after the others."""

DRAFT_SLOTS = 192
"""On a GPU every row has so many slots beside its text's, enough for the usual drafts, so that caches have few sizes."""


class Scheduler:
    """Decodes texts over at most `max_batch` rows.

    Args:
        rounds: Runs a round.
        max_batch: Largest number of rows.
        max_len: Largest number of tokens of a prompt and its text together.
        capture: Whether rounds are captured as CUDA graphs.
        grow: Size rows by the texts of each call instead of by `max_len`.

    Attributes:
        lag: Number of rounds that the host reads behind the device: none on a CPU, one on a GPU.
        fetch: As in `Session`.
        seconds: Where the last call's time went, in seconds: prefill, draft, target, verify (eager rounds only), host.
        rounds_run: Number of rounds of the last call, each over all of its rows.
        last: Counts of the last call.
    """

    def __init__(self, rounds: Rounds, max_batch: int, max_len: int, capture: bool, grow: bool = False) -> None:
        self.rounds, self.max_batch, self.max_len, self.grow = rounds, max_batch, max_len, grow
        self.device = rounds.device
        self.lag = 1 if self.device.type == "cuda" else 0
        self.fetch: Fetch | None = None
        self.graphs = Graphs(rounds.device) if capture else None
        self.seconds: dict[str, float] = {}
        self.rounds_run = 0
        self.last = Stats()
        self._call = 0
        self._state: RoundState | None = None

    def begin(self) -> int:
        """Takes the rows for a new call, and returns its number; a stream that is still open cannot continue after it."""
        self._call += 1
        return self._call

    def state(self, batch_size: int, slots: int, can_pause: bool = False) -> RoundState:
        """Static tensors with at least this many rows and slots; allocated again if the present ones have fewer."""
        old, size = self._state, -(-slots // 64) * 64
        rows, old_size, could_pause = (0, 0, False) if old is None else (len(old.done_B), old.cache.shape[3], bool(old.missed))
        if old is None or rows < batch_size or old_size < slots or can_pause > could_pause:
            if self.graphs is not None:
                synchronize(self.device)  # a replay may still run
                self.graphs.clear()
            needed, grown = (batch_size, size), (max(rows, batch_size), max(old_size, size))
            # keep both maxima, unless many short rows before and few long rows now would make that far too large
            rows, size = grown if prod(grown) <= 2 * max(prod(needed), rows * old_size) else needed
            self._state = old = None  # frees the old tensors first
            self.rounds.target.reserve_positions(size)
            self._state = self.rounds.new_state(rows, size, can_pause or could_pause)
        assert self._state is not None
        return self._state

    def decode(self, requests: Sequence[Request], plan: Plan) -> Iterator[tuple[Request, bool]]:
        """Decodes all requests; yields a request whenever it received tokens, and whether it is finished.

        Raises:
            UserError: the target's logits are not finite, or another call has used the rows meanwhile.
        """
        began, call = perf_counter(), self.begin()
        self.rounds.seconds = dict.fromkeys(self.rounds.seconds, 0.0)
        self.rounds_run, self.seconds = 0, {"prefill": 0.0}
        for group, batch, longest in self._groups(requests):
            yield from self._decode_group(group, batch, longest, plan, call)
        self.seconds |= self.rounds.seconds
        self.seconds["host"] = perf_counter() - began - sum(self.seconds.values())
        self.last = Stats.merge(request.stats for request in requests)

    def _groups(self, requests: Sequence[Request]) -> Iterator[tuple[Sequence[Request], int, int]]:
        """Splits the texts into groups; yields the texts, the number of rows, and the largest number of tokens of a row.

        Usually there is one group. If rows for the longest text would make the cache larger than `SPLIT_CACHE_BYTES`, texts
        longer than twice the median are decoded later, in fewer rows.
        """
        batch, weight, shape = min(self.max_batch, len(requests)), self.rounds.target.embed.weight, self.rounds.target.shape
        if not requests or not self.grow:
            yield requests, batch, self.max_len
            return
        token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * weight.element_size()
        slots = 0
        while requests:
            longest = max(request.limit for request in requests)
            if batch * longest * token_bytes > SPLIT_CACHE_BYTES:
                median = sorted(request.limit for request in requests)[len(requests) // 2]
                longest = max(request.limit for request in requests if request.limit <= 2 * median)
            group = [request for request in requests if request.limit <= longest]
            slots = (
                slots or min(batch, len(group)) * longest
            )  # of the first group; the later groups take no more, except that a single row may
            yield group, max(1, min(batch, len(group), slots // longest)), longest
            requests = [request for request in requests if request.limit > longest]

    def _decode_group(
        self, requests: Sequence[Request], batch: int, longest: int, plan: Plan, call: int
    ) -> Iterator[tuple[Request, bool]]:
        """Decodes texts of at most `longest` tokens in `batch` rows; yields as `decode` does."""
        if self.graphs is not None and self.grow:  # few sizes, because graphs are captured again for each size
            longest = min(max(256, 1 << (longest - 1).bit_length()), self.max_len)
        slots, options = slots_needed(longest, plan, self.lag), {"lag": self.lag, "prefill": None, "fetch": self.fetch}
        if self.device.type == "cuda":
            # In 16 bits a text is, bit for bit, that of plain decoding: attention's sums depend on the size of the cache, and a
            # prompt's on the rows that one call reads, so neither may depend on what is drafted.
            slots = max(slots, longest + DRAFT_SLOTS)
            if self.rounds.target.embed.weight.itemsize == 2:
                options |= {"together": 1, "sharing": "prompts"}
        session = Session(
            self.rounds, batch, longest, plan, self.graphs, state=self.state(batch, slots, plan.can_pause), **options
        )
        for request in requests:
            session.submit(request)
        while not session.idle:
            for event in session.step():
                if event.request.error:
                    raise UserError(event.request.error)
                yield event.request, bool(event.finish)
                self._check_call(call)
        self.rounds_run += session.rounds_run
        self.seconds["prefill"] += session.prefill_seconds

    def _check_call(self, call: int) -> None:
        """Raises UserError if another call has used the rows meanwhile: a stream was left open and is continued now."""
        if self._call != call:
            raise UserError(
                "this stream cannot continue: its runner has begun another generate, stream or score; finish one first"
            )
