"""Which text owns which cache row, round after round, and how far the host reads behind the device.

A text owns one row of a static cache from its prompt to its end; the row of a finished one goes to the next that waits.
"""

# B rows  P path length  T positions

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from trainkit.drafters.base import State
from trainkit.errors import UserError
from trainkit.runner.graphs import Graphs
from trainkit.runner.policies.chain import Paced
from trainkit.runner.policy import RoundOutcome
from trainkit.runner.request import Request, Stopping
from trainkit.runner.round import MISSED, Plan, RoundOutput, Rounds
from trainkit.runner.stats import Stats


class Schedule:
    """Decodes texts over at most `max_batch` rows.

    Args:
        rounds: What a round does.
        max_batch: Rows.
        max_len: Tokens of a prompt and its text together, at most.
        capture: Capture rounds as CUDA graphs.

    Attributes:
        lag: Rounds the host reads behind the device: none on a CPU, one on a GPU.
        seconds: Where the last call's time went, as `Runner.seconds`.
        rounds_run: Rounds the last call ran, each over all of its rows.
        last: Counts of the last call.
    """

    def __init__(self, rounds: Rounds, max_batch: int, max_len: int, capture: bool) -> None:
        self.rounds, self.max_batch, self.max_len = rounds, max_batch, max_len
        self.device = rounds.target.embed.weight.device
        self.lag = 1 if self.device.type == "cuda" else 0
        self.graphs = Graphs() if capture else None
        self.seconds: dict[str, float] = {}
        self.rounds_run = 0
        self.last = Stats()
        self._turn = 0
        self._states: tuple[int, int, State, State] | None = None

    def begin(self) -> int:
        """Takes the rows for a new call; a stream left open cannot go on after it."""
        self._turn += 1
        return self._turn

    def state(self, batch_size: int, slots: int) -> tuple[State, State]:
        """Static tensors for at least this many rows and slots; made anew only when they must grow."""
        if self._states is None or self._states[0] < batch_size or self._states[1] < slots:
            if self.graphs is not None:
                self.graphs.clear()
            rows, size = batch_size, -(-slots // 64) * 64
            if self._states is not None:
                rows, size = max(rows, self._states[0]), max(size, self._states[1])
            self._states = None
            self.rounds.target.reserve_positions(size)
            weight = self.rounds.target.embed.weight
            draft = {} if self.rounds.drafter is None else self.rounds.drafter.init_state(rows, size, self.device, weight.dtype)
            self._states = (rows, size, self.rounds.new_state(rows, size), draft)
        return self._states[2], self._states[3]

    @torch.inference_mode()
    def decode(self, requests: Sequence[Request], plan: Plan, stopping: Stopping) -> Iterator[tuple[Request, bool]]:
        """Decodes over at most `max_batch` rows; yields a request whenever it got tokens, and whether it is finished.

        The host reads `lag` rounds behind the device, so that a GPU never waits for the host.
        """
        began = perf_counter()
        turn = self.begin()
        self.rounds.set_end_ids(stopping.end_ids)
        step = plan.tree.depth + 1
        slack = plan.tree.slots + (self.lag + 1) * step
        batch = min(self.max_batch, len(requests))
        state, draft_state = self.state(batch, self.max_len + slack)
        state["done"].fill_(True)
        waiting, rows = deque(requests), []
        flight: deque[tuple[list[Request], Callable[[], RoundOutput]]] = deque()
        seconds, rounds_run = {"prefill": 0.0}, 0

        while waiting or rows:
            while waiting and len(rows) < batch:
                coming = min(len(rows) + len(waiting), batch)
                request = waiting.popleft()
                mark = perf_counter()
                if isinstance(plan.tree, Paced) and plan.tree.policy.rests(coming) and len(request.prompt) < MISSED:
                    request.missed = len(request.prompt)
                first = self._start(request, len(rows), plan, state, draft_state)
                rows.append(request)
                request.take(first, 0, stopping, prefill=True)
                seconds["prefill"] += perf_counter() - mark
                yield request, bool(request.finish)
                self._check_turn(turn)
                if request.finish:
                    rows.pop()
            if not rows:
                continue
            ahead = (len(flight) + 1) * step
            longest = max(len(r.prompt) + len(r.tokens) for r in rows)
            span = self._span(longest + ahead + plan.tree.slots)
            output = self._round(self._paced(plan, rows, state, draft_state), state, draft_state, len(rows), span)
            rounds_run += 1
            flight.append((list(rows), self._fetch(output)))
            if len(flight) <= self.lag:
                continue
            members, fetch = flight.popleft()
            emitted = fetch()
            if isinstance(plan.tree, Paced):
                plan.tree.policy.learn(_came(emitted, len(members)))
            for slot, request in enumerate(members):
                if not request.finish:
                    request.take(emitted, slot, stopping)
                    yield request, bool(request.finish)
                    self._check_turn(turn)
            self._release(rows, state, draft_state)
        self.rounds_run, self.seconds = rounds_run, {**seconds, **plan.seconds}
        self.seconds["host"] = perf_counter() - began - sum(self.seconds.values())
        self.last = Stats.merge(request.stats for request in requests)

    def _check_turn(self, turn: int) -> None:
        """Raises UserError where another call has taken the rows since: a stream left open, then gone on with."""
        if self._turn != turn:
            raise UserError(
                "this stream cannot go on: its runner has begun another generate, stream or score; finish one first"
            )

    def _start(self, request: Request, slot: int, plan: Plan, state: State, draft_state: State) -> RoundOutput:
        """Prefills a free row and returns its first token."""
        row, draft_row = _rows(state, slot, slot + 1), _rows(draft_state, slot, slot + 1)
        row["keys"].copy_(torch.tensor([request.keys], dtype=torch.int32))
        row["limit"].fill_(request.limit)
        output = self.rounds.prefill(plan, row, draft_row, torch.tensor(request.prompt, device=self.device), request.missed > 0)
        logprobs = None if output.logprobs_BP is None else output.logprobs_BP.cpu()
        return RoundOutput(output.emitted_BP.cpu(), output.counts_B.cpu(), logprobs)

    def _span(self, needed: int) -> int:
        """Cache slots looked at: few sizes, so that few graphs are captured; no more than there are."""
        assert self._states is not None
        size = -(-needed // 64) * 64 if self.graphs is None else max(256, 1 << (needed - 1).bit_length())
        return min(size, self._states[1])

    def _paced(self, plan: Plan, requests: Sequence[Request], state: State, draft_state: State) -> Plan:
        """The plan of the coming round: where a policy decides, as deep as it says."""
        shape = plan.tree
        if not isinstance(shape, Paced):
            return plan
        within = self.graphs is None or plan.observe is not None
        rows, missed = len(requests), max(request.missed for request in requests)
        shape.most, each = (shape.policy.begin(rows), 0) if within else shape.policy.tier(rows)
        if missed and (shape.most or missed >= MISSED):
            self.rounds.catch_up(_rows(state, 0, rows), _rows(draft_state, 0, rows))
            for request in requests:
                request.missed = 0
        if not shape.most:
            for request in requests:
                request.missed += 1
        return plan if within and shape.most else replace(plan, tree=shape.captured(shape.most, each))

    def _round(self, plan: Plan, state: State, draft_state: State, active: int, span: int) -> RoundOutput:
        if self.graphs is None or plan.observe is not None:
            return self.rounds(plan, _rows(state, 0, active), _rows(draft_state, 0, active), span)
        batch = min(1 << (active - 1).bit_length(), state["done"].shape[0])
        state["done"][active:batch].fill_(True)
        # a padded row's old position may lie past this round's span
        state["position"][active:batch].fill_(1)
        views = _rows(state, 0, batch), _rows(draft_state, 0, batch)
        rule = (plan.sampling, plan.verify, plan.share, plan.typical, plan.logprobs, plan.pauses)
        key = (plan.tree.key, rule, batch, span, self.rounds.end_key)
        modules = [module for module in (self.rounds.target, self.rounds.drafter) if module is not None]
        read: list[torch.Tensor] = []

        def captured() -> RoundOutput:  # and what it reads stays, though another runner may make longer rotary tables
            read[:] = [table for module in modules for table in module.buffers()]
            return self.rounds(plan, *views, span)

        return self.graphs.run(key, captured, views[0]["done"])

    def _fetch(self, output: RoundOutput) -> Callable[[], RoundOutput]:
        """Starts the copy of a round's output to the host; the returned function waits for it."""
        if self.device.type != "cuda":
            return lambda: output
        copies = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for name, tensor in output.tensors.items()
        }
        event = torch.cuda.Event()
        event.record()

        def wait() -> RoundOutput:
            event.synchronize()
            return replace(output, **copies)

        return wait

    def _release(self, rows: list[Request], state: State, draft_state: State) -> None:
        """Gives the rows of finished requests back: the last active row moves into the hole."""
        for slot in reversed(range(len(rows))):
            if rows[slot].finish:
                last = len(rows) - 1
                if slot != last:
                    for tensors in (state, draft_state):
                        for tensor in tensors.values():
                            tensor[slot].copy_(tensor[last])
                rows[slot] = rows[last]
                rows.pop()
                state["done"][last].fill_(True)


def _came(output: RoundOutput, rows: int) -> RoundOutcome:
    """What a policy learns of a round of so many texts."""
    counts = output.counts_B[:rows].tolist()
    live = [row for row, count in enumerate(counts) if count]
    verified, accepted = [output.verified(row) for row in live], [counts[row] - 1 for row in live]
    chances = () if output.chances_BD is None else output.chances_BD[live].T.tolist()
    return RoundOutcome(rows, output.levels, verified, accepted, chances, output.nodes)


def _rows(state: State, start: int, stop: int) -> State:
    return {name: tensor[start:stop] for name, tensor in state.items()}
