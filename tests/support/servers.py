"""A live server in this process, and a session that emits scripted tokens."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from trainkit.runner.request import Request
from trainkit.runner.sampling import request_keys
from trainkit.runner.session import Event
from trainkit.serve.app import Api
from trainkit.serve.codec import Codec
from trainkit.serve.engine import Engine
from trainkit.serve.fields import Call
from trainkit.serve.metrics import Metrics
from trainkit.serve.server import Server, bind


@contextmanager
def running(api: Api, grace: float = 5.0, send_buffer: int | None = None) -> Iterator[tuple[str, Server]]:
    """Serves on a free port of 127.0.0.1; yields the base URL and the server, and stops it at the end.

    Args:
        api: The endpoints.
        grace: As in `Server`.
        send_buffer: Bytes that the system holds for a client that does not read; megabytes by default.
    """
    bound = bind("127.0.0.1", 0)
    if send_buffer is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = Server(api.app(), api.engine, grace=grace)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
    thread.start()
    wait_until(lambda: server.started, 10)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", server
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
        assert not api.engine._thread.is_alive()


@contextmanager
def launched(*words: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`trainkit serve` with these arguments on a free port; yields its URL and the process, and kills it at the end."""
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-m", "trainkit.cli", "serve", *words, "--port", "0"]
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths} | environment
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, "the server ended before it listened"
            found = re.search(r"^serving .* at (http://\S+)/v1", line)
        yield found[1], process
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def connect(url: str, key: str = "none") -> OpenAI:
    """A client without retries."""
    return OpenAI(base_url=f"{url}/v1", api_key=key, timeout=30, max_retries=0)


def wait_until(condition: Any, seconds: float) -> None:
    """Waits until the condition holds; fails after so many seconds."""
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end, f"not within {seconds} s"
        time.sleep(0.005)


class ScriptedSession:
    """Emits the tokens of a script for every text, `per_step` of them in a step.

    Args:
        script: Token ids; repeated if a text is longer.
        rows: Number of rows.
        per_step: Number of tokens that a text receives in a step.
        seconds: Duration of a step.
        end: Token id that ends a text.
    """

    def __init__(self, script: Sequence[int], rows: int = 4, per_step: int = 2, seconds: float = 0.0, end: int = 0) -> None:
        self.script, self.rows, self.per_step, self.seconds, self.end = list(script), rows, per_step, seconds, end
        self.waiting: deque[Request] = deque()
        self.live: list[Request] = []
        self.raises: Exception | None = None

    @property
    def idle(self) -> bool:
        return not self.live and not self.waiting

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        for requests in (self.live, self.waiting):
            if request in requests:
                requests.remove(request)

    def step(self) -> list[Event]:
        time.sleep(self.seconds)
        if self.raises is not None:
            raise self.raises
        while self.waiting and len(self.live) < self.rows:
            self.live.append(self.waiting.popleft())
            self.live[-1].admitted = time.perf_counter()
        events = []
        for request in list(self.live):
            new = []
            for _ in range(self.per_step if request.tokens else 1):
                token = self.script[len(request.tokens) % len(self.script)]
                request.tokens.append(token)
                request.logprobs.append(-0.5)
                new.append(token)
                stop_at = request.text.add(token) if request.text is not None else None
                if token == self.end:
                    request.finish = "end"
                elif stop_at is not None:
                    request.finish = "stop"
                elif len(request.prompt) + len(request.tokens) >= request.limit:
                    request.finish = "length"
                if request.finish:
                    self.live.remove(request)
                    break
            if len(request.tokens) > len(new):
                request.stats.add_round(len(new) - 1, self.per_step - 1)
            events.append(Event(request, new, request.finish))
        return events


def scripted_api(tokenizer: Any, session: ScriptedSession, capacity: int = 16, max_len: int = 512, **options: Any) -> Api:
    """The endpoints over a scripted session."""
    codec = Codec(tokenizer, max_len)

    def requests(call: Call, prompts: list[list[int]], seed: int) -> list[Request]:
        limits = [min(len(prompt) + (call.max_tokens or max_len), max_len) for prompt in prompts]
        return [
            Request(0, prompt, request_keys(seed, 0, sample), limit, text=codec.text(call.stop) if call.stop else None)
            for prompt, limit in zip(prompts, limits, strict=True)
            for sample in range(call.n)
        ]

    engine = Engine(session, capacity, Metrics())
    gauges = lambda: {"rows_live": len(session.live), "queue_length": len(session.waiting)}
    return Api(engine, codec, requests, gauges, "tiny", **options)
