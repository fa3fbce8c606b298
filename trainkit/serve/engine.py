"""The engine thread: only it uses the device and the session; it passes the tokens of each step to the event loop.

Requests and cancellations reach it through a queue. All other state (which texts are open, what has been counted) belongs to
the event loop, so there are no locks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any

from trainkit.runner.request import Request
from trainkit.runner.session import Event, Session
from trainkit.runner.stats import Stats
from trainkit.serve.fields import ApiError
from trainkit.serve.metrics import Metrics

log = logging.getLogger("trainkit.serve")


@dataclass(frozen=True)
class Update:
    """New tokens of one text of a batch, from one step.

    Attributes:
        index: Index of the text in its batch.
        tokens: New token ids.
        logprobs: Their log-probabilities, if requested.
        likeliest: The likeliest tokens at each position as (id, log-probability), if requested.
        finish: As in `Output.finish`, or empty.
    """

    index: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    likeliest: Sequence[Sequence[tuple[int, float]]]
    finish: str


@dataclass
class Text:
    """The event loop's record of an open text.

    Attributes:
        first: When its first token arrived, on the clock of `perf_counter`; None before.
        last: When its last token so far arrived.
        tokens: Number of tokens so far.
    """

    batch: Batch
    index: int
    request: Request
    first: float | None = None
    last: float = 0.0
    tokens: int = 0


class Batch:
    """The texts of one HTTP request.

    Attributes:
        updates: Receives an `Update` for each step of each text, or an `ApiError` after which nothing follows.
        texts: The texts.
        began: When it was submitted, on the clock of `perf_counter`.
        error: Why its texts were ended before their end, or None.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()
        self.texts = [Text(self, index, request) for index, request in enumerate(requests)]
        self.began = perf_counter()
        self.error: ApiError | None = None

    def seconds(self) -> dict[str, float]:
        """Seconds in the queue, of prefill and of decoding; the largest of all texts."""
        spans = [(text.request.admitted, text.first or 0.0, text.last) for text in self.texts]
        return {
            "queue_s": max(admitted - self.began for admitted, _, _ in spans),
            "prefill_s": max(first - admitted for admitted, first, _ in spans),
            "decode_s": max(last - first for _, first, last in spans),
        }


class Engine:
    """Runs a session in a thread of its own.

    Args:
        session: The session; after `start` only the thread uses it.
        capacity: Largest number of open texts, live and waiting.
        metrics: Counts what happens.
        prepare: Called first in the thread; selects its device.

    Attributes:
        failed: Whether the session has raised an exception; then every request is answered with status 500.
        stopping: Whether new requests are refused with status 503.
    """

    def __init__(self, session: Session, capacity: int, metrics: Metrics, prepare: Callable[[], object] = lambda: None) -> None:
        self.session, self.capacity, self.metrics, self.prepare = session, capacity, metrics, prepare
        self.failed = self.stopping = False
        self._commands: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._open: dict[int, Text] = {}  # by id of the request
        self._thread = threading.Thread(target=self._run, name="trainkit-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; called on the event loop that will receive the tokens."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def open(self) -> int:
        """Number of texts that are live, filling or waiting."""
        return len(self._open)

    def check(self, texts: int = 0) -> None:
        """Raises ApiError if this many more texts cannot be accepted now."""
        if self.failed:
            raise ApiError(500, "the engine has failed; the server's log has the reason, restart it", code="engine_failed")
        if self.stopping:
            raise ApiError(503, "the server is stopping", code="stopping")
        if texts > self.capacity:
            raise ApiError(400, f"{texts} texts in one request; this server holds {self.capacity}", "n")
        if self.open + texts > self.capacity:
            raise ApiError(429, f"{self.open} texts are decoded or wait, and there is room for {self.capacity}; try later")

    def submit(self, requests: Sequence[Request]) -> Batch:
        """Queues the texts of one HTTP request, all or none.

        Raises:
            ApiError: the queue is full, the server is stopping, or the engine has failed.
        """
        self.check(len(requests))
        batch = Batch(requests)
        self._open |= {id(text.request): text for text in batch.texts}
        for request in requests:
            self._commands.put(partial(self.session.submit, request))
        return batch

    def close(self, batch: Batch) -> int:
        """Cancels the texts of a batch that have not ended; returns their number."""
        left = [text.request for text in batch.texts if self._open.pop(id(text.request), None) is not None]
        if left and not self.failed:
            self.metrics.cancelled += len(left)
            self._commands.put(partial(self._cancel, left))
        return len(left)

    def stop(self, grace: float) -> None:
        """Refuses new requests; texts that have not ended in `grace` seconds are cancelled, and their clients get an error."""
        if not self.stopping:
            self.stopping = True
            error = ApiError(503, "the server is stopping, and this text did not end in time", code="stopping")
            self._loop.call_later(grace, self._end_all, error)

    async def join(self) -> None:
        """Ends the thread after its current step."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, 30)

    def _end_all(self, error: ApiError) -> None:
        self._end(list({id(text.batch): text.batch for text in self._open.values()}.values()), error)

    def _end(self, batches: Iterable[Batch], error: ApiError) -> None:
        for batch in batches:
            batch.error = error
            batch.updates.put_nowait(error)
            self.close(batch)

    # On the engine thread.

    def _run(self) -> None:
        try:
            self.prepare()
            while self._run_commands():
                events = self.session.step()
                if events:
                    self._post(self._deliver, events, perf_counter())
        except BaseException as error:
            log.exception("the engine has failed")
            self._post(self._fail, error)

    def _run_commands(self) -> bool:
        """Runs the queued commands, and waits for one while the session is idle; returns False to stop."""
        while True:
            try:
                command = self._commands.get(block=self.session.idle)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _cancel(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.session.cancel(request)
        self._post(self._count_ended, [request.stats for request in requests])

    def _post(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the server has stopped
            log.debug("the event loop is closed")

    # On the event loop.

    def _deliver(self, events: Sequence[Event], now: float) -> None:
        """Passes the tokens of a step to their batches, and counts them."""
        metrics, rounds = self.metrics, 0
        for event in events:
            request, count = event.request, len(event.tokens)
            text = self._open.get(id(request))
            if text is None:  # cancelled meanwhile
                continue
            if event.finish == "error":
                self._end([text.batch], ApiError(500, request.error, code="undecodable"))
                continue
            new = slice(text.tokens, text.tokens + count)  # the thread only appends
            metrics.generated += count
            text.tokens, text.last = text.tokens + count, now
            if text.first is None:
                text.first = now
                metrics.first_token.observe(now - text.batch.began)
            else:
                rounds += 1
                metrics.tokens_per_round.observe(count)
            if event.finish:
                del self._open[id(request)]
                self._count_ended([request.stats])
                if text.tokens > 1:
                    metrics.per_token.observe((now - text.first) / (text.tokens - 1))
            text.batch.updates.put_nowait(
                Update(text.index, event.tokens, request.logprobs[new], request.likeliest[new], event.finish)
            )
        metrics.row_rounds += rounds
        metrics.rounds += rounds > 0

    def _count_ended(self, stats: Iterable[Stats]) -> None:
        self.metrics.ended = Stats.merge([self.metrics.ended, *stats])

    def _fail(self, error: BaseException) -> None:
        self.failed = True
        self._end_all(ApiError(500, "the engine has failed; the server's log has the reason", code="engine_failed"))
