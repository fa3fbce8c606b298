"""Assigns texts to cache rows and runs rounds; the host may read a round's output while the device runs the next one.

A text owns one row of a static cache from its prompt to its end; then the next waiting text gets the row.
"""

# B rows  P path length  T positions

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from time import perf_counter

import torch

from trainkit.errors import UserError
from trainkit.runner.graphs import Graphs
from trainkit.runner.policy import RoundOutcome
from trainkit.runner.request import Request
from trainkit.runner.round import MISSED, Plan, RoundOutput, Rounds, RoundState
from trainkit.runner.stats import Stats
from trainkit.runner.timing import synchronize

SPLIT_CACHE_BYTES = 1 << 30
"""Largest size of the target's cache with rows for the longest text; otherwise long texts are decoded after the others."""


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
        seconds: Where the last call's time went, in seconds: prefill, draft, target, verify (eager rounds only), host.
        rounds_run: Number of rounds of the last call, each over all of its rows.
        last: Counts of the last call.
    """

    def __init__(self, rounds: Rounds, max_batch: int, max_len: int, capture: bool, grow: bool = False) -> None:
        self.rounds, self.max_batch, self.max_len, self.grow = rounds, max_batch, max_len, grow
        self.device = rounds.device
        self.lag = 1 if self.device.type == "cuda" else 0
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

    @torch.inference_mode()
    def decode(self, requests: Sequence[Request], plan: Plan, end_ids: tuple[int, ...]) -> Iterator[tuple[Request, bool]]:
        """Decodes all requests; yields a request whenever it received tokens, and whether it is finished.

        The host reads `lag` rounds behind the device, so a GPU never waits for the host.
        """
        began, call = perf_counter(), self.begin()
        self.rounds.set_end_ids(end_ids)
        self.rounds.seconds = dict.fromkeys(self.rounds.seconds, 0.0)
        self.rounds_run, self.seconds = 0, {"prefill": 0.0}
        for group, batch, longest in self._groups(requests):
            yield from self._decode_group(group, batch, longest, plan, end_ids, call)
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
        self, requests: Sequence[Request], batch: int, longest: int, plan: Plan, end_ids: tuple[int, ...], call: int
    ) -> Iterator[tuple[Request, bool]]:
        """Decodes texts of at most `longest` tokens in `batch` rows; yields as `decode` does."""
        # Prepare: static tensors for the largest round, all rows free.
        step = plan.shape.depth + 1
        if self.graphs is not None and self.grow:  # few sizes, because graphs are captured again for each size
            longest = min(max(256, 1 << (longest - 1).bit_length()), self.max_len)
        state = self.state(batch, longest + plan.shape.slots + (self.lag + 1) * step, plan.can_pause)
        state.done_B.fill_(True)
        waiting, rows = deque(requests), []
        flight: deque[tuple[list[Request], Callable[[], RoundOutput]]] = deque()

        while waiting or rows:
            # Give free rows to waiting texts, whose first token comes from prefill.
            while waiting and len(rows) < batch:
                coming = min(len(rows) + len(waiting), batch)
                request = waiting.popleft()
                started = perf_counter()
                policy = plan.shape.policy
                if policy is not None and policy.is_paused(coming) and len(request.prompt) < MISSED:
                    request.missed = len(request.prompt)
                request.stats.lossy = plan.verification.lossy
                first = self._prefill(request, plan, state.rows(len(rows), len(rows) + 1))
                rows.append(request)
                request.take(first, 0, end_ids, prefill=True)
                self.seconds["prefill"] += perf_counter() - started
                yield request, bool(request.finish)
                self._check_call(call)
                if request.finish:
                    rows.pop()
            if not rows:
                continue
            # Run a round of all rows.
            ahead = (len(flight) + 1) * step
            needed = max(len(r.prompt) + len(r.tokens) for r in rows)
            span = self._span(needed + ahead + plan.shape.slots, state)
            started = perf_counter()
            round_plan, levels = self._next_round(plan, rows, state)
            output = self._run(round_plan, state, len(rows), span, levels)
            self.rounds_run += 1
            flight.append((list(rows), self._fetch(output)))
            # Read the oldest round in flight.
            if len(flight) <= self.lag:
                continue
            members, fetch = flight.popleft()
            emitted = fetch()
            if plan.shape.policy is not None:
                outcome = _outcome(emitted, len(members), perf_counter() - started)
                predicted, live = plan.shape.policy.predicted_seconds(outcome), [one for one in members if not one.finish]
                plan.shape.policy.learn(outcome)
                for request in live:
                    request.stats.seconds += outcome.seconds / len(live)
                    request.stats.predicted_seconds += predicted / len(live)
            for slot, request in enumerate(members):
                if not request.finish:
                    request.take(emitted, slot, end_ids)
                    yield request, bool(request.finish)
                    self._check_call(call)
            self._release(rows, state)

    def _check_call(self, call: int) -> None:
        """Raises UserError if another call has used the rows meanwhile: a stream was left open and is continued now."""
        if self._call != call:
            raise UserError(
                "this stream cannot continue: its runner has begun another generate, stream or score; finish one first"
            )

    def _prefill(self, request: Request, plan: Plan, row: RoundState) -> RoundOutput:
        """Reads a prompt into a free row and returns its first token.

        Raises:
            UserError: the target's logits are not finite.
        """
        row.keys_B2.copy_(torch.tensor([request.keys], dtype=torch.int32))
        row.limit_B.fill_(request.limit)
        output = self.rounds.prefill(plan, row, torch.tensor(request.prompt, device=self.device), later=request.missed > 0)
        output = replace(output, **{name: tensor.cpu() for name, tensor in output.tensors.items()})
        if int(output.emitted_BP) < 0:
            dtype = str(row.cache.dtype).removeprefix("torch.")
            raise UserError(
                f"prompt {request.index}: the target's logits are NaN or infinite in {dtype}; decode in bfloat16 or float32"
            )
        return output

    def _span(self, needed: int, state: RoundState) -> int:
        """Number of cache slots that a bias covers, where attention needs one; all in a graph, which serves every length."""
        slots = state.cache.shape[3]
        return slots if self.graphs is not None else min(-(-needed // 64) * 64, slots)

    def _next_round(self, plan: Plan, requests: Sequence[Request], state: RoundState) -> tuple[Plan, int | None]:
        """The plan of the next round and the largest number of levels to draft; with a policy, as deep as it decides."""
        policy, rows = plan.shape.policy, len(requests)
        if policy is None:
            return plan, None
        eager = self.graphs is None or plan.observe is not None
        policy.cached = sum(len(request.prompt) + len(request.tokens) for request in requests) / rows
        levels, per_row = (policy.begin(rows), 0) if eager else policy.captured_size(rows)
        # After a pause the drafter reads what it missed.
        missed = max(request.missed for request in requests)
        if missed and (levels or missed >= MISSED):
            self.rounds.catch_up(state.rows(0, rows))
            for request in requests:
                request.missed = 0
        if not levels:
            for request in requests:
                request.missed += 1
        if eager and levels:
            return plan, levels
        return replace(plan, shape=plan.shape.captured(levels, per_row)), None

    def _run(self, plan: Plan, state: RoundState, active: int, span: int, levels: int | None) -> RoundOutput:
        """Runs a round of the first `active` rows: eagerly, or as the replay of a captured graph."""
        if self.graphs is None or plan.observe is not None:
            return self.rounds(plan, state.rows(0, active), span, levels)
        batch = min(1 << (active - 1).bit_length(), len(state.done_B))
        state.done_B[active:batch].fill_(True)
        state.position_B[active:batch].fill_(1)  # a padded row's old position may leave no room for this tree
        view, end_key = state.rows(0, batch), self.rounds.end_key
        options = plan.sampling, plan.verification, plan.logprobs, plan.can_pause, plan.plain
        key = (plan.shape.key, options, batch, end_key)
        modules = [module for module in (self.rounds.target, self.rounds.drafter) if module is not None]
        tables: list[torch.Tensor] = []

        def captured() -> RoundOutput:
            # Keeps the rotary tables that the graph reads, since another runner may replace them by longer ones.
            tables[:] = [table for module in modules for table in module.buffers()]
            return self.rounds(plan, view, span)

        return self.graphs.run(key, captured, view.done_B)

    def _fetch(self, output: RoundOutput) -> Callable[[], RoundOutput]:
        """Starts copying a round's output to the host; the returned function waits for the copy."""
        if self.device.type != "cuda":
            return lambda: output
        with torch.cuda.device(self.device):  # whose stream copies, whatever GPU is the current one
            copies = {
                name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
                for name, tensor in output.tensors.items()
            }
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream())

        def wait() -> RoundOutput:
            event.synchronize()
            return replace(output, **copies)

        return wait

    def _release(self, rows: list[Request], state: RoundState) -> None:
        """Frees the rows of finished requests: the last active row moves into the gap."""
        for slot in reversed(range(len(rows))):
            if rows[slot].finish:
                last = len(rows) - 1
                if slot != last:
                    state.map(lambda tensor, slot=slot, last=last: tensor[slot].copy_(tensor[last]))
                rows[slot] = rows[last]
                rows.pop()
                state.done_B[last].fill_(True)


def _outcome(output: RoundOutput, rows: int, seconds: float) -> RoundOutcome:
    """What a policy learns from a round of `rows` texts that took these seconds."""
    counts = output.counts_B[:rows].tolist()
    live = [row for row, count in enumerate(counts) if count]
    verified, accepted = [output.verified(row) for row in live], [counts[row] - 1 for row in live]
    predicted = (output.chances_BD, output.features_BD)
    chances, features = (() if value_BD is None else value_BD[live].T.tolist() for value_BD in predicted)
    return RoundOutcome(rows, output.levels, verified, accepted, chances, features, seconds)
