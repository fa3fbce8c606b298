"""Continuous batching over the rows of a static cache: texts join and leave between rounds.

A text owns a row from its prompt to its end; then the next waiting text gets the row. Prompts are read in chunks between
rounds, so a long one does not stop the texts that are decoded (chunked prefill). A row keeps its text, and a prompt with the
same prefix reuses its cache entries (prefix sharing). The host reads the device's output `lag` calls later, so a GPU never
waits for the host.

Left out on purpose: paged caches and preemption. A text that is admitted has room to finish.
"""

# B rows  T positions  L layers  G key-value heads  S cache slots  E head width

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from trainkit.errors import UserError
from trainkit.runner.graphs import Graphs
from trainkit.runner.policy import Policy, RoundOutcome
from trainkit.runner.request import Request
from trainkit.runner.round import MISSED, PREFILL_CHUNK, Plan, RoundOutput, Rounds, RoundState
from trainkit.runner.sampling import Mixed

SHARED = 64
"""Shared prefixes have a multiple of this number of tokens; equal prompts share all."""

TOP = 5
"""Number of likeliest tokens that rounds return if any request asks for some; fixed, so that few graphs are captured."""

Fetch = Callable[[RoundOutput], Callable[[], RoundOutput]]
"""Starts copying a round's output to the host; the returned function waits for the copy."""


@dataclass(frozen=True)
class Event:
    """New tokens of one request from a step; a step may have two events of a request: its first token, then those of a round.

    Attributes:
        request: The request, as it was submitted; its fields hold all tokens so far.
        tokens: The new token ids; none if the request ended with an error.
        finish: Empty while the text continues; then as `Request.finish`.
    """

    request: Request
    tokens: Sequence[int]
    finish: str


@dataclass(frozen=True)
class Load:
    """The present load of a session.

    Attributes:
        live: Number of rows that are decoded.
        filling: Number of rows whose prompt is being read.
        waiting: Number of requests without a row.
        prefill_tokens: Number of prompt tokens in rows that are not read yet.
        cached_tokens: Number of tokens of the texts in rows.
    """

    live: int
    filling: int
    waiting: int
    prefill_tokens: int
    cached_tokens: int


@dataclass(eq=False)
class Row:
    """The host's record of a cache row.

    Attributes:
        request: The request that owns it; None for a free row.
        text: The request whose tokens are in the cache: the owner, or in a free row the last owner.
        filled: Number of tokens of the prompt that are read.
        prompt_T: The prompt on the device, until it is read.
        arrival: Sequence number of the admission.
        end: Upper bound of the device's position in a free row.
        drafter_read: Whether the drafter, if it drafts, has read the whole prompt.
        updates: `Rounds.updates` at the admission.
    """

    request: Request | None = None
    text: Request | None = None
    filled: int = 0
    prompt_T: Tensor | None = None
    arrival: int = 0
    end: int = 1
    drafter_read: bool = False
    updates: int = 0

    @property
    def is_owned(self) -> bool:
        """Whether it has a text that has not ended."""
        return self.request is not None and not self.request.finish

    @property
    def is_filling(self) -> bool:
        """Whether its prompt is being read."""
        return self.request is not None and self.prompt_T is not None

    @property
    def left(self) -> int:
        """Number of tokens of its prompt that are not read."""
        return 0 if self.prompt_T is None else len(self.prompt_T) - self.filled

    @property
    def is_live(self) -> bool:
        """Whether rounds decode it."""
        return self.request is not None and self.prompt_T is None


@dataclass
class Call:
    """A round or a prefill that the device may not have finished.

    Attributes:
        rows: Number of rows that it computed.
        members: Row within the call, and request, of each text that may get tokens from it.
        fetch: Waits for the output and returns it.
        prefill: Whether it read prompts.
    """

    rows: int
    members: Sequence[tuple[int, Request]]
    fetch: Callable[[], RoundOutput]
    prefill: bool = False


class Session:
    """Decodes requests over `rows` cache rows; texts join and leave between rounds.

    `submit` and `cancel` may be called between steps; `step` runs one iteration and returns the new tokens. A session has no
    thread and no lock: one thread makes all calls. A request gets the same text as when it is decoded alone, in float32 up to
    ties of rounding, because noise depends only on the request's keys and on positions.

    Args:
        rounds: Runs a round.
        rows: Number of rows.
        max_len: Largest number of tokens of a prompt and its text together.
        plan: What to draft and how to verify it, for all texts. Each request brings its own sampling.
        graphs: Captured rounds; None runs rounds eagerly.
        state: Static tensors with at least `slots_needed` slots and as many rows; allocated by default.
        lag: Number of calls by which the host reads behind the device; by default 0 on a CPU and 1 on a GPU.
        prefill: Largest number of prompt tokens that a step reads while texts are decoded; four times that while none is. None
            reads each prompt whole as soon as it has a row.
        together: Largest number of neighbouring rows whose prompts one call reads; by default 1 on a CPU, where more saves
            little, and 8 on a GPU. More than 1 requires a drafter that is `resumable`.
        sharing: Whether a prompt reuses a prefix in another row's cache; requires a drafter that is `resumable`. With `prompts`
            only a whole prompt that is equal is reused: its text is then, bit for bit, that of a prompt that is read.
        fetch: Copies a round's output to the host; by default as the device needs it.

    Attributes:
        rounds_run: Number of rounds, each over several rows.
        row_rounds: Sum over the rounds of the texts that each decoded.
        prefill_seconds: Seconds spent on reading prompts.
    """

    @torch.inference_mode()
    def __init__(
        self,
        rounds: Rounds,
        rows: int,
        max_len: int,
        plan: Plan,
        graphs: Graphs | None = None,
        *,
        state: RoundState | None = None,
        lag: int | None = None,
        prefill: int | None = PREFILL_CHUNK,
        together: int | None = None,
        sharing: bool | Literal["prompts"] = True,
        fetch: Fetch | None = None,
    ) -> None:
        self.rounds, self.rows, self.max_len = rounds, rows, max_len
        self.plan, self.graphs, self.prefill = plan, graphs, prefill
        self.device, drafter = rounds.device, rounds.drafter
        self.lag = (1 if self.device.type == "cuda" else 0) if lag is None else lag
        resumable = drafter is None or not plan.shape.depth or drafter.resumable
        self.sharing = sharing and resumable
        self.together = ((8 if self.device.type == "cuda" else 1) if together is None else together) if resumable else 1
        self.rounds_run, self.row_rounds, self.prefill_seconds = 0, 0, 0.0
        if state is None:
            slots = slots_needed(max_len, plan, self.lag)
            rounds.target.reserve_positions(slots)
            state = rounds.new_state(rows, slots, plan.can_pause)
        state.done_B.fill_(True)
        state.position_B.fill_(1)
        self._state, self._fetch = state, fetch or (lambda output: start_fetch(output, self.device))
        self._end_ids, self._step = rounds.end_key, plan.shape.depth + 1
        self._rows = [Row() for _ in range(rows)]
        self._waiting: deque[Request] = deque()
        self._flight: deque[Call] = deque()
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        """Whether every request has ended."""
        return not self._waiting and not any(row.is_owned for row in self._rows)

    @property
    def load(self) -> Load:
        """How much there is to do. Another thread may read it during a step: each field of a row is read once."""
        owned = [(row, request) for row in self._rows if (request := row.request) is not None and not request.finish]
        unread = [(row, prompt_T) for row, _ in owned if (prompt_T := row.prompt_T) is not None]
        live, left = len(owned) - len(unread), sum(len(prompt_T) - row.filled for row, prompt_T in unread)
        cached = sum(row.filled + len(request.tokens) for row, request in owned)
        return Load(live, len(unread), len(self._waiting), left, cached)

    def submit(self, request: Request) -> None:
        """Queues a request; requests get rows in the order in which they are submitted.

        Raises:
            UserError: the prompt is empty, prompt and text do not fit, or the sampling cannot be used with the session's
                verification.
        """
        length, new = len(request.prompt), request.limit - len(request.prompt)
        if not length:
            raise UserError(f"prompt {request.index} is empty; give at least one token")
        if new < 1 or request.limit > self.max_len:
            raise UserError(
                f"prompt {request.index} has {length} tokens and {max(new, 1)} new ones were requested: together more than "
                f"max_len {self.max_len}; shorten the prompt or request fewer tokens"
            )
        rule = self.plan.verification
        if request.sampling.greedy != self.plan.sampling.greedy and not rule.chooses_by_score:
            raise UserError(
                f"prompt {request.index}: temperature 0 and others cannot be mixed under {type(rule).__name__}; "
                "verify by coupled"
            )
        request.stats.lossy = rule.lossy
        self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Ends a request; no event follows, and its row is free in the next step. Does nothing if the request has ended."""
        if not request.finish:
            request.finish = "cancelled"
            if any(waiting is request for waiting in self._waiting):
                self._waiting = deque(waiting for waiting in self._waiting if waiting is not request)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Runs one iteration: frees rows, admits requests, reads prompts, runs a round; returns the events read on the host.

        A request that cannot be decoded, because the target's logits are not finite, ends with `error`; the others continue.
        """
        # Step 1: free the rows of texts that have ended.
        events: list[Event] = []
        self._retire()
        # Step 2: give free rows to waiting requests, and read their prompts.
        events += self._fill()
        # Step 3: run a round over the rows that are live.
        self._compact()
        if any(row.is_live for row in self._rows):
            began = perf_counter()
            self._round()
            events += self._deliver(began)
            self._retire()  # at once, so that nobody finds the NaN of a text that ended with `error`
        return events

    def _retire(self) -> None:
        """Frees the rows of requests that have ended; each keeps its tokens in the cache."""
        for index, row in enumerate(self._rows):
            if row.request is not None and row.request.finish:
                row.end = self._bound(row)
                if row.request.error:  # NaN in a cache would reach later texts even through masked slots
                    self._state.rows(index, index + 1).map(Tensor.zero_).position_B.fill_(1)
                    row.text, row.end = None, 1
                row.request = row.prompt_T = None
                self._state.done_B[index].fill_(True)

    # Prompts

    def _fill(self) -> list[Event]:
        """Admits requests and reads their prompts in order of arrival, as many tokens as the budget allows."""
        events: list[Event] = []
        live = any(row.is_live for row in self._rows)
        left = self.prefill and self.prefill * (1 if live else 4)
        while left is None or left > 0:
            self._admit()
            filling = [index for index, row in enumerate(self._rows) if row.is_filling]
            if not filling:
                break
            first = min(filling, key=lambda index: self._rows[index].arrival)
            count = self._read(first, PREFILL_CHUNK if left is None else min(left, PREFILL_CHUNK))
            left = left and left - count
            events += self._deliver()
            self._retire()
        events += self._deliver()
        self._retire()
        return events

    def _admit(self) -> None:
        """Gives free rows to waiting requests in order; a request whose prefix another row is reading waits for that row.

        A prompt that a row holds as a whole is not read again.
        """
        kept: deque[Request] = deque()
        while self._waiting and any(row.request is None for row in self._rows):
            request = self._waiting.popleft()
            donor, shared, later = self._donor(request)
            if later > shared:
                kept.append(request)
                if self.prefill is None:  # the row is read in this step: nobody takes the row of a prompt that others wait for
                    break
                continue
            free = next(index for index, row in enumerate(self._rows) if row.request is None)
            if donor is not None and self._rows[donor].request is None:
                free = donor
            elif donor is not None:
                self._state.copy_row(donor, free, shared)
            self._start(request, free, shared)
        self._waiting.extendleft(reversed(kept))

    def _donor(self, request: Request) -> tuple[int | None, int, int]:
        """The row with the longest common prefix, its length now, and its length once all prompts in rows are read."""
        donor, shared, later = None, 0, 0
        for index, row in enumerate(self._rows if self.sharing else ()):
            if row.text is None or row.updates != self.rounds.updates:
                continue
            if row.text.prompt == request.prompt and (row.is_filling or row.drafter_read):
                if not row.is_filling:
                    return index, len(request.prompt), 0
                later = len(request.prompt)
            if self.sharing == "prompts":
                continue
            known = row.text.prompt + row.text.tokens
            common = _common(request.prompt, known)
            # The root is not in the cache, and a drafter's entry of a position may hold the token after it.
            whole = min(common, len(known) - row.text.missed) - 1
            now = whole if row.filled == len(row.text.prompt) else min(whole, row.filled)
            if max(now, 0) // SHARED * SHARED > shared:
                donor, shared = index, now // SHARED * SHARED
            if row.is_owned:
                later = max(later, max(whole, 0) // SHARED * SHARED)
        return donor, shared, later

    def _start(self, request: Request, index: int, shared: int) -> None:
        """Gives a row to a request; `shared` tokens of its prompt are in the row's cache."""
        state = self._state.rows(index, index + 1)
        state.done_B.fill_(True)
        state.position_B.fill_(max(shared, 1))
        state.limit_B.fill_(request.limit)
        state.keys_B2[:, 0].fill_(request.keys[0])
        state.keys_B2[:, 1].fill_(request.keys[1])
        state.ignore_end_B.fill_(request.ignore_end)
        state.temperature_B.fill_(request.sampling.temperature)
        state.top_k_B.fill_(request.sampling.top_k)
        state.top_p_B.fill_(request.sampling.top_p)
        whole, prompt_T = shared == len(request.prompt), self.rounds.to_device(request.prompt)
        self._arrivals += 1
        request.missed, request.stats.shared, request.admitted = 0, shared, perf_counter()
        unread_T, updates = None if whole else prompt_T, self.rounds.updates
        self._rows[index] = Row(request, request, shared, unread_T, self._arrivals, drafter_read=whole, updates=updates)
        if whole:
            started = perf_counter()
            output = self.rounds.repeat(self._with_sampling([request]), state, prompt_T)
            self._flight.append(Call(1, [(0, request)], self._fetch(output), prefill=True))
            self.prefill_seconds += perf_counter() - started
        elif shared and self.rounds.drafter is not None:
            self.rounds.drafter.resume(state.draft, prompt_T[None, shared - 1 : shared])

    def _read(self, first: int, budget: int) -> int:
        """Reads the next tokens of a row's prompt; returns their number, padding included, which is at most `budget`.

        One call also reads the prompts of neighbouring rows, up to `together` rows.
        """
        started, rows = perf_counter(), self._rows
        owner = rows[first].request
        assert owner is not None
        # While drafting is paused the drafter may read a prompt later.
        policy, begin, length = self.plan.shape.policy, rows[first].filled, len(owner.prompt)
        coming = min(sum(row.request is not None for row in rows) + len(self._waiting), self.rows)
        later = policy is not None and policy.is_paused(coming) and begin == owner.stats.shared
        # Other samples of the prompt continue from what the drafter has read.
        later = later and length - begin <= min(budget, MISSED - 1) and all(owner.prompt != one.prompt for one in self._waiting)
        # The range of rows: neighbours that all start at position 0, or all later.
        low, high, longest = first, first + 1, min(length - begin, budget)
        while self.together > high - low and not later:
            near = [index for index in (low - 1, high) if 0 <= index < self.rows and rows[index].is_filling]
            near = [index for index in near if (rows[index].filled > 0) == (begin > 0)]
            wider = [max(longest, min(rows[index].left, budget)) for index in near]
            if not near or wider[0] * (high - low + 1) > budget:
                break
            low, high, longest = min(low, near[0]), max(high, near[0] + 1), wider[0]
        # Read them.
        requests = [row.request for row in rows[low:high] if row.request is not None]
        begins = [row.filled for row in rows[low:high]]
        ends = [row.filled + min(row.left, longest) for row in rows[low:high]]
        prompts = [row.prompt_T for row in rows[low:high] if row.prompt_T is not None]
        plan = self._with_sampling(requests)
        output = self.rounds.prefill(plan, self._state.rows(low, high), prompts, begins, ends, later)
        ended: list[tuple[int, Request]] = []
        for index, (request, row, end) in enumerate(zip(requests, rows[low:high], ends, strict=True)):
            request.missed = (length - begin) * later
            request.stats.prefilled += end - row.filled
            row.filled = end
            if end == len(request.prompt):
                row.prompt_T, row.drafter_read = None, not later
                ended.append((index, request))
        if output is not None:
            self._flight.append(Call(high - low, ended, self._fetch(output), prefill=True))
        self.prefill_seconds += perf_counter() - started
        return longest * (high - low)

    # Rounds

    def _compact(self) -> None:
        """Moves texts to lower rows if the round then computes fewer rows; only while no request waits for a row."""
        used = [index for index, row in enumerate(self._rows) if row.request is not None]
        if self._waiting or not used:
            return
        for free in range(len(used)):
            if self._rows[free].request is None and self._batch(used[-1] + 1) > self._batch(len(used)):
                last = used.pop()
                self._state.copy_row(last, free, self._bound(self._rows[last]))
                # The old row loses the text, which continues in the new one.
                self._rows[free], self._rows[last] = self._rows[last], Row(end=self._bound(self._rows[last]))
                self._state.done_B[last].fill_(True)
                used.insert(free, free)

    def _batch(self, rows: int) -> int:
        """Number of rows that a round over the first `rows` rows computes."""
        return rows if self.graphs is None else min(1 << (rows - 1).bit_length(), self.rows)

    def _bound(self, row: Row) -> int:
        """Upper bound of the device's position in a row."""
        if row.request is None:
            return row.end
        return row.filled + len(row.request.tokens) + len(self._flight) * self._step

    def _round(self) -> None:
        """Enqueues a round of the live rows."""
        live = [(index, row.request) for index, row in enumerate(self._rows) if row.is_live and row.request is not None]
        batch = self._batch(max(index for index, row in enumerate(self._rows) if row.request is not None) + 1)
        # Number of cache slots that an additive bias covers; all slots in a graph, which serves every length.
        size = self._state.cache.shape[3]
        needed = max(map(self._bound, self._rows[:batch])) + self._step + self.plan.shape.slots
        span = min(-(-needed // 64) * 64, size) if self.graphs is None else size
        requests = [request for _, request in live]
        plan, levels = self._next_round(self._with_sampling(requests), [index for index, _ in live], requests, batch)
        output = self._run(plan, batch, span, levels)
        self.rounds_run, self.row_rounds = self.rounds_run + 1, self.row_rounds + len(live)
        self._flight.append(Call(batch, live, self._fetch(output)))

    def _with_sampling(self, requests: Sequence[Request]) -> Plan:
        """The plan with the sampling and the log-probabilities that these requests need.

        Eager rounds on a CPU use one `Sampling` if all requests have the same: that is faster, and the result is equal. A graph
        would be captured again for each `Sampling`.
        """
        top = TOP if any(request.top for request in requests) else 0
        plan = replace(self.plan, logprobs=any(request.top is not None for request in requests), top=top)
        first = requests[0].sampling
        alike = all(request.sampling == first for request in requests)
        if alike and (self.plan.observe is not None or (self.graphs is None and self.device.type == "cpu")):
            return replace(plan, sampling=first)
        return replace(plan, sampling=Mixed.from_requests(request.sampling for request in requests))

    def _next_round(self, plan: Plan, rows: Sequence[int], requests: Sequence[Request], batch: int) -> tuple[Plan, int | None]:
        """The plan of the next round and the largest number of levels to draft; with a policy, as deep as it decides."""
        policy = plan.shape.policy
        if policy is None:
            return plan, None
        eager = self.graphs is None or plan.observe is not None
        policy.cached = sum(len(request.prompt) + len(request.tokens) for request in requests) / len(requests)
        levels, per_row = (policy.begin(batch), 0) if eager else policy.captured_size(batch)
        # After a pause the drafter reads what it missed.
        missed = max(request.missed for request in requests)
        if missed and (levels or missed >= MISSED):
            self.rounds.catch_up(self._state, rows)
            for row, request in zip(rows, requests, strict=True):
                request.missed, self._rows[row].drafter_read = 0, True
        if not levels:
            for request in requests:
                request.missed += 1
        if eager and levels:
            return plan, levels
        return replace(plan, shape=plan.shape.captured(levels, per_row)), None

    def _run(self, plan: Plan, batch: int, span: int, levels: int | None) -> RoundOutput:
        """Runs a round of the first `batch` rows: eagerly, or as the replay of a captured graph."""
        view = self._state.rows(0, batch)
        if self.graphs is None or plan.observe is not None:
            return self.rounds(plan, view, span, levels)
        options = plan.sampling, plan.verification, plan.logprobs, plan.top, plan.processed, plan.can_pause, plan.plain
        key = (plan.shape.key, options, batch, self._end_ids)
        modules = [module for module in (self.rounds.target, self.rounds.drafter) if module is not None]
        tables: list[Tensor] = []

        def captured() -> RoundOutput:
            # Keeps the rotary tables that the graph reads, since another runner may replace them by longer ones.
            tables[:] = [table for module in modules for table in module.buffers()]
            return self.rounds(plan, view, span)

        return self.graphs.run(key, captured, view.done_B)

    def _deliver(self, began: float | None = None) -> list[Event]:
        """Reads the oldest calls until `lag` are in flight; returns their events. `began` is when a round was enqueued."""
        events: list[Event] = []
        while len(self._flight) > self.lag:
            call = self._flight.popleft()
            output = call.fetch()
            if self.plan.shape.policy is not None and not call.prefill:
                self._learn(self.plan.shape.policy, call, output, 0.0 if began is None else perf_counter() - began)
            for row, request in call.members:
                if request.finish:
                    continue
                known = len(request.tokens)
                if (output.emitted_BP[row, : int(output.counts_B[row])] < 0).any():
                    dtype = str(self._state.cache.dtype).removeprefix("torch.")
                    request.finish = "error"
                    request.error = (
                        f"prompt {request.index}: the target's logits are NaN or infinite in {dtype}; decode in bfloat16 or "
                        "float32"
                    )
                else:
                    request.take(output, row, self._end_ids, call.prefill)
                events.append(Event(request, request.tokens[known:], request.finish))
        return events

    def _learn(self, policy: Policy, call: Call, output: RoundOutput, seconds: float) -> None:
        """Passes a round's acceptance and seconds (0 if unknown) to the policy, and adds the seconds to its texts' counts."""
        outcome = _outcome(output, call.rows, seconds)
        predicted, live = policy.predicted_seconds(outcome), [request for _, request in call.members if not request.finish]
        policy.learn(outcome)
        for request in live if seconds else ():
            request.stats.seconds += seconds / len(live)
            request.stats.predicted_seconds += predicted / len(live)


def slots_needed(length: int, plan: Plan, lag: int) -> int:
    """Number of cache slots of a row for texts of `length` tokens, those of rounds in flight included; a multiple of 64."""
    return -(-(length + plan.shape.slots + (lag + 1) * (plan.shape.depth + 1)) // 64) * 64


def start_fetch(output: RoundOutput, device: torch.device) -> Callable[[], RoundOutput]:
    """Starts copying a round's output to the host; the returned function waits for the copy."""
    if device.type != "cuda":
        return lambda: output
    with torch.cuda.device(device):  # whose stream copies, whatever GPU is the current one
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


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    length, start = min(len(one), len(other)), 0
    while start < length and one[start : start + SHARED] == other[start : start + SHARED]:
        start += SHARED
    start = min(start, length)
    while start < length and one[start] == other[start]:
        start += 1
    return start


def _outcome(output: RoundOutput, rows: int, seconds: float) -> RoundOutcome:
    """What a policy learns from a round of `rows` rows that took these seconds."""
    counts = output.counts_B[:rows].tolist()
    live = [row for row, count in enumerate(counts) if count]
    verified, accepted = [output.verified(row) for row in live], [counts[row] - 1 for row in live]
    predicted = (output.chances_BD, output.features_BD)
    chances, features = (() if value_BD is None else value_BD[live].T.tolist() for value_BD in predicted)
    return RoundOutcome(rows, output.levels, verified, accepted, chances, features, seconds)
