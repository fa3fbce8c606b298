"""A server of the completions API that fails on demand, in a process of its own: `serve(**faults)`, or this file as a script.

Its model is the function `reply`, which gives the completion of a prompt for a seed.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

TOKENIZER = Path(__file__).parents[2] / "data" / "tiny" / "tokenizer" / "tokenizer.json"
END = "<|end|>"
WORDS = "the sum of seven and two is nine so there are twelve apples left in every box.".split()


@dataclass
class Faults:
    """What goes wrong. A share is the probability that a request fails in this way.

    Attributes:
        drop: Share of requests whose connection is closed without a reply.
        cut: Share of requests whose reply ends in the middle.
        garbage: Share of requests whose reply is not JSON.
        statuses: Share of requests that get an error status, by status.
        max_faults: Maximum number of such random faults for one prompt; then it is answered.
        first: Faults of each prompt's first requests, by name or status.
        headers: Headers of every error status.
        delay: Maximum delay of a reply in seconds, drawn for each reply.
        hold: Number of requests that must be in flight before any reply is sent, unless 20 s have passed.
        always: Fault of every request: `drop`, `cut`, `garbage`, `hang` or a status.
        after: Number of requests answered before `always` begins.
        message: Error message of an error status.
        refuse_ids: Whether to answer 400 to requests with return_token_ids.
        give_ids: Whether replies have token ids when they are requested.
        end_in_ids: Whether these contain the end token.
        patch: Values that replace fields of the choice in every reply.
        key: The only API key that is accepted; None accepts all.
        models: Names of the models listed.
        seed: Seed for drawing the faults.
    """

    drop: float = 0
    cut: float = 0
    garbage: float = 0
    statuses: dict[str, float] = field(default_factory=dict)
    max_faults: int = 3
    first: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0
    hold: int = 0
    always: str | None = None
    after: int = 0
    message: str = "something is wrong"
    refuse_ids: bool = False
    give_ids: bool = True
    end_in_ids: bool = True
    patch: dict[str, Any] = field(default_factory=dict)
    key: str | None = None
    models: list[str] = field(default_factory=lambda: ["tiny"])
    seed: int = 0


@dataclass
class Stats:
    """What the server received and sent.

    Attributes:
        peak: Maximum number of requests in flight at the same time.
        requests: Bodies of all requests in order of arrival, with `at`, the time of arrival in seconds, and `authorization`.
        answered: Number of complete replies, by JSON of the prompt.
        faults: Number of faults, by name.
        hung_up: Number of clients that closed the connection while their request hung.
    """

    peak: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    hung_up: int = 0


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TOKENIZER))


def reply(prompt: Sequence[int], *, seed: int = 0, temperature: float = 0, max_tokens: int = 128) -> tuple[str, list[int], str]:
    """The model: text, token ids with the end token, and finish_reason of the completion of `prompt`."""
    draw = random.Random(json.dumps([list(prompt), seed if temperature else None]))
    ids = _tokenizer().encode(" ".join(draw.choices(WORDS, k=draw.randint(1, 12)))).ids + [_tokenizer().token_to_id(END)]
    finish = "stop" if len(ids) <= max_tokens else "length"
    return _tokenizer().decode(ids[:max_tokens], skip_special_tokens=True), ids[:max_tokens], finish


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.stats, self.in_flight = faults, Stats(), 0
        self.tries, self.failures = Counter[str](), Counter[str]()
        self.change = threading.Condition()

    def fault(self, prompt: str) -> str | None:
        """The fault of this request, or None."""
        faults = self.faults
        if faults.always:
            return faults.always if self.stats.answered.total() >= faults.after else None
        self.tries[prompt] += 1
        if self.tries[prompt] <= len(faults.first):
            return faults.first[self.tries[prompt] - 1]
        if self.failures[prompt] == faults.max_faults:
            return None
        draw = random.Random(f"{faults.seed} {prompt} {self.tries[prompt]}").random()
        shares = {"drop": faults.drop, "cut": faults.cut, "garbage": faults.garbage} | faults.statuses
        for name, share in shares.items():
            draw -= share
            if draw < 0:
                self.failures[prompt] += 1
                return name
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # tests close connections on purpose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # 40 ms a reply otherwise
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/stats":
            with self.server.change:
                self.send(200, vars(self.server.stats))
        elif self.path == "/v1/models":
            self.send(200, {"data": [{"id": name} for name in self.server.faults.models]})
        else:
            self.send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        server, faults, stats = self.server, self.server.faults, self.server.stats
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = json.dumps(body["prompt"])
        with server.change:
            server.in_flight += 1
            stats.peak = max(stats.peak, server.in_flight)
            stats.requests.append(body | {"at": time.monotonic(), "authorization": self.headers["Authorization"]})
            server.change.notify_all()
            server.change.wait_for(lambda: stats.peak >= faults.hold, timeout=20)
        try:
            time.sleep(faults.delay * random.random())
            with server.change:
                fault = self.refusal(body) or server.fault(prompt)
                if fault:
                    stats.faults[fault] += 1
            if fault == "hang":
                self.hang()
        finally:
            with server.change:
                server.in_flight -= 1  # before the client can receive the reply
        if self.close_connection:
            return
        self.respond(body, prompt, fault)

    def refusal(self, body: dict[str, Any]) -> str | None:
        faults = self.server.faults
        if self.path != "/v1/completions":
            return "404"
        if faults.key and self.headers["Authorization"] != f"Bearer {faults.key}":
            return "401"
        return "refused ids" if faults.refuse_ids and "return_token_ids" in body else None

    def respond(self, body: dict[str, Any], prompt: str, fault: str | None) -> None:
        faults = self.server.faults
        text, ids, finish = reply(
            body["prompt"], seed=body["seed"], temperature=body["temperature"], max_tokens=body["max_tokens"]
        )
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": finish}
        if faults.give_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids if faults.end_in_ids or finish == "length" else ids[:-1]
        whole = {"object": "text_completion", "model": body["model"], "choices": [choice | faults.patch]}
        if fault is None:
            with self.server.change:
                self.server.stats.answered[prompt] += 1
            self.send(200, whole)
        elif fault == "refused ids":
            self.send(400, {"error": {"message": "Unrecognized request argument supplied: return_token_ids"}})
        elif fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "cut":
            self.send(200, whole, sent=0.5)
        elif fault == "garbage":
            self.send(200, "<html>502 Bad Gateway</html>")
        else:
            self.send(int(fault), {"error": {"message": faults.message}}, **faults.headers)

    def hang(self) -> None:
        """Waits, without a reply, until the client hangs up."""
        with suppress(ConnectionError):  # a client may also reset the connection
            self.connection.recv(1)
        with self.server.change:
            self.server.stats.hung_up += 1
        self.close_connection = True

    def send(self, status: int, body: Any, sent: float = 1, **headers: str) -> None:
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw[: int(len(raw) * sent)])
        self.close_connection |= sent < 1


@dataclass
class Served:
    """A running server: `base_url` ends in /v1."""

    base_url: str

    @property
    def stats(self) -> Stats:
        """Its statistics so far."""
        with urllib.request.urlopen(self.base_url.removesuffix("/v1") + "/stats") as answer:
            values = json.load(answer)
        return Stats(**values | {"answered": Counter(values["answered"]), "faults": Counter(values["faults"])})


@contextmanager
def serve(**faults: Any) -> Iterator[Served]:
    """A new server with these `Faults`, in a process that ends with the block."""
    asdict(Faults(**faults))  # raises for a misspelt fault
    process = subprocess.Popen([sys.executable, __file__, json.dumps(faults)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}):
            yield Served(f"http://127.0.0.1:{port}/v1")
    finally:
        process.kill()
        process.communicate()


def prompts(count: int, seed: int = 0) -> list[tuple[int, list[int]]]:
    """Numbered prompts of 2 to 21 token ids, no two alike, in a random order of their numbers."""
    draw = random.Random(seed)
    return [(n, [n, *draw.choices(range(4, 900), k=draw.randint(1, 20))]) for n in draw.sample(range(1, 1000), count)]


def one_then_more(served: Served) -> Iterator[tuple[int, list[int]]]:
    """One prompt; then, once it has been answered, 50 more."""
    yield 0, [7]
    deadline = time.monotonic() + 60
    while served.stats.answered.total() != 1:
        assert time.monotonic() < deadline, "the first prompt was not answered within 60 s"
        time.sleep(0.02)
    yield from prompts(50)


if __name__ == "__main__":
    served = _Server(Faults(**json.loads(sys.argv[1])))
    print(served.server_port, flush=True)
    served.serve_forever()
