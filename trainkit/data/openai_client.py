"""Responses from any server that speaks the OpenAI completions API (vLLM, SGLang, llama.cpp, ...) to prompts as token ids.

The requests run in an event loop of their own thread, so that stopping cancels what is in flight and the server sees us hang
up; prompts are drawn and texts encoded in the caller's thread, since a tokenizer need not bear two. What a request does not
say the server fills in from defaults of its own: vLLM's are those of the model's generation_config.json, unless it was
started with `--generation-config vllm`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from hashlib import sha256
from itertools import islice
from math import isfinite
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio
import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal

from trainkit.data.answer import Answer
from trainkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
Slots = asyncio.LifoQueue[httpx.AsyncClient]
"""A client for each request that may be in flight; each keeps one connection."""

LONGEST_PAUSE = 60.0  # seconds, where the server does not say how long
CONNECT_SECONDS = 10.0
FIRST_ATTEMPTS = 3  # where no connection comes about and the server has never answered
TRANSIENT = {408, 409, 425, 429}  # and every 5xx


class Server:
    """One server and how to ask it.

    Args:
        base_url: Address that ends in /v1, as `http://localhost:8000/v1`; a slash behind it changes nothing.
        model: Name to ask for; None takes the first that the server lists.
        tokenizer: Encodes the text where the server does not give token ids.
        end_id: Token that ends a text; None adds none.
        concurrency: Most requests in flight.
        api_key: Bearer token; None reads OPENAI_API_KEY. It appears in no message and no description.
        attempts: Times that a request is sent before the run ends.
        timeout: Seconds without a byte before a request counts as lost.
        backoff: Seconds before the second attempt; every further one waits up to twice as long, with jitter.

    Attributes:
        encoded: Answers whose tokens were encoded from the text, which need not be the tokens that the model drew.

    Raises:
        UserError: an argument is out of range or no address.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        end_id: int | None,
        concurrency: int = 32,
        api_key: str | None = None,
        attempts: int = 8,
        timeout: float = 600.0,
        backoff: float = 0.5,
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("attempts", attempts, 1), ("backoff", backoff, 0)):
            if value < least:
                raise UserError(f"{name} {value}: give at least {least}")
        if not timeout > 0:
            raise UserError(f"timeout {timeout}: give more than 0 seconds")
        key = (api_key if api_key is not None else os.environ.get("OPENAI_API_KEY", "")).strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("the API key (OPENAI_API_KEY) has characters that no key has: set it again")
        self._url = _address(base_url)
        self.base_url = str(httpx.URL(self._url).copy_with(userinfo=b""))  # what is recorded holds no password
        self.tokenizer, self.end_id = tokenizer, end_id
        self.attempts, self.backoff, self.concurrency = attempts, backoff, concurrency
        self.encoded = 0
        self._model, self._key, self._seconds = model, key, timeout
        self._asks_ids = True
        self._answered = False
        self._random = random.Random()  # jitter must not move the caller's generator

    def describe(self) -> dict[str, str]:
        """Model and address, for provenance; asks the server for its model where none was named.

        Raises:
            UserError: as `complete`.
        """
        if self._model is None:
            with self._open() as (portal, slots):
                portal.call(self._find_model, slots)
        assert self._model is not None
        return {"model": self._model, "base_url": self.base_url}

    def complete(
        self,
        prompts: Iterable[tuple[int, Sequence[int]]],
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> Iterator[Answer]:
        """Answers in order of completion, one to each prompt; closing the iterator cancels what is in flight.

        At most twice `concurrency` prompts are drawn ahead of the answers taken, so that the server has work while the
        caller has some too. Each request has a seed of its own, a function of `seed` and its number alone.

        Args:
            prompts: Number and token ids of each; no number twice.
            temperature: 0 takes the likeliest token.
            top_p: Nucleus mass.
            top_k: Likeliest tokens kept; 0 is not sent.
            max_new_tokens: Most tokens of an answer, the end token included.
            seed: Fixes every draw, as far as the server keeps to it.

        Raises:
            UserError: the server refused a request, or did not answer it in all attempts.
        """
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        if top_k:
            sampling["top_k"] = top_k
        waiting, seen = iter(prompts), set()
        done: SimpleQueue[Future[_Reply]] = SimpleQueue()
        pending: dict[Future[_Reply], int] = {}
        with self._open(pending) as (portal, slots):
            while True:
                for number, tokens in islice(waiting, 2 * self.concurrency - len(pending)):
                    assert number not in seen, f"request {number} is asked twice"
                    seen.add(number)
                    if self._model is None:  # not before there is something to ask
                        portal.call(self._find_model, slots)
                    own = {"model": self._model, "prompt": [int(t) for t in tokens], "seed": request_seed(seed, number)}
                    future = portal.start_task_soon(self._ask, slots, number, own | sampling)
                    pending[future] = number
                    future.add_done_callback(done.put)
                if not pending:
                    return
                future = done.get()
                yield self._answer(pending.pop(future), future.result())

    @contextmanager
    def _open(self, pending: dict[Future[_Reply], int] | None = None) -> Iterator[tuple[BlockingPortal, Slots]]:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            slots = stack.enter_context(portal.wrap_async_context_manager(self._slots()))
            stack.callback(lambda: [future.cancel() for future in list(pending or ())])
            # An iterator left open would be closed once the loop's thread is frozen, and wait for it without end.
            atexit.register(stack.close)
            stack.callback(atexit.unregister, stack.close)
            yield portal, slots

    @asynccontextmanager
    async def _slots(self) -> AsyncIterator[Slots]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
        timeout = httpx.Timeout(self._seconds, connect=min(CONNECT_SECONDS, self._seconds))
        trusted = httpx.create_ssl_context()  # too slow to make for each
        slots = Slots()
        async with AsyncExitStack() as stack:
            for _ in range(self.concurrency):  # one client for all would look through all its connections at each request
                client = httpx.AsyncClient(headers=headers, timeout=timeout, verify=trusted)
                slots.put_nowait(await stack.enter_async_context(client))
            yield slots

    async def _find_model(self, slots: Slots) -> None:
        async def once(client: httpx.AsyncClient) -> str:
            data = _json(self._checked(await client.get(f"{self._url}/models"), "the list of models")).get("data")
            if not isinstance(data, list) or not data:
                raise UserError(f"{self.base_url}/models: lists no model; name one with --model")
            name = data[0].get("id") if isinstance(data[0], dict) else None
            if not isinstance(name, str):
                raise _Fault("the list of models has no id")
            return name

        self._model = await self._until_answered(f"{self.base_url}/models", slots, once)

    async def _ask(self, slots: Slots, number: int, body: dict[str, Any]) -> _Reply:
        url = f"{self._url}/completions"

        async def once(client: httpx.AsyncClient) -> _Reply:
            asks_ids = self._asks_ids
            response = await client.post(url, json=body | {"return_token_ids": True} if asks_ids else body)
            if asks_ids and response.status_code in (400, 422) and "return_token_ids" in response.text:
                self._asks_ids = False  # an extension of vLLM that a strict server refuses by name
                response = await client.post(url, json=body)
            return _reply(_json(self._checked(response, f"prompt {number}")))

        return await self._until_answered(f"{self.base_url}/completions", slots, once)

    async def _until_answered(self, url: str, slots: Slots, once: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        reason = tried = ""
        for attempt in range(self.attempts):
            refused = False
            told, client = None, await slots.get()
            try:
                answer = await once(client)
                self._answered = True
                return answer
            except httpx.RequestError as error:
                refused = isinstance(error, httpx.ConnectError)
                reason = f"{type(error).__name__} {self._one_line(str(error))}".strip()
            except _Fault as fault:
                reason, told = self._one_line(fault.reason), fault.pause
            finally:
                slots.put_nowait(client)
            tried = f"{attempt + 1} attempts" if attempt else "1 attempt"
            if refused and not self._answered and attempt + 1 >= FIRST_ATTEMPTS:
                break  # nobody listens there; a server that answered before may be starting anew
            if attempt + 1 < self.attempts:
                await anyio.sleep(self._pause(attempt, told))
        raise UserError(f"{url}: no answer in {tried}, at last {reason}; see that the server runs and has this address")

    def _pause(self, attempt: int, told: float | None) -> float:
        if told is not None:
            return told + self._random.uniform(0, self.backoff)  # not all of them at the same instant
        return min(LONGEST_PAUSE, self.backoff * 2 ** min(attempt, 30)) * self._random.uniform(0.5, 1)

    def _checked(self, response: httpx.Response, asked: str) -> httpx.Response:
        """The response if it is a success; a fault to be tried again or a user's mistake otherwise."""
        status = response.status_code
        if response.is_success:
            return response
        said = self._one_line(_message(response)) or response.reason_phrase
        if status >= 500 or status in TRANSIENT:
            raise _Fault(f"status {status} ({said})", retry_after(response.headers.get("Retry-After")))
        mend = "mend the request or the server's settings"
        if response.has_redirect_location:
            mend = f"give the address it points to, {self._one_line(response.headers['Location'])}"
        elif status in (401, 403):
            mend = "the key is read from OPENAI_API_KEY in the environment"
        elif status == 404:
            mend = "the address ends in /v1, and the model is one that the server lists"
        raise UserError(f"{self.base_url}: status {status} to {asked} ({said}); {mend}")

    def _one_line(self, text: str) -> str:
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= 300 else f"{text[:300]}..."

    def _answer(self, number: int, reply: _Reply) -> Answer:
        tokens = reply.tokens
        if not tokens:
            # A text cut within a character ends in U+FFFD, which the model did not write.
            text = reply.text if reply.ended else reply.text.rstrip("\ufffd")
            tokens = self.tokenizer.encode(text, add_special_tokens=False) if text else []
            self.encoded += 1
        # vLLM names by `stop_reason` an end token other than the tokenizer's.
        ends = (self.end_id, self.tokenizer.eos_token_id, reply.stop_reason)
        if reply.ended and self.end_id is not None and not (tokens and tokens[-1] in ends):
            tokens = [*tokens, self.end_id]
        return Answer(number, tokens, reply.text, "end" if reply.ended else "length")


class _Reply(NamedTuple):
    text: str
    tokens: list[int] | None
    ended: bool
    stop_reason: Any


class _Fault(Exception):
    """What another attempt may mend, and the seconds that the server asked to wait before it."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.pause = reason, pause


def request_seed(seed: int, number: int) -> int:
    """31-bit seed of one request, the same whatever was asked before it."""
    return int.from_bytes(sha256(f"{seed}/{number}".encode()).digest()[:4], "big") & 0x7FFFFFFF


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, in seconds or as an HTTP date (RFC 9110, 10.2.3); None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    return seconds if isfinite(seconds) and seconds >= 0 else None


def _address(base_url: str) -> str:
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UserError(f"base URL {base_url}: is no address; give it as http://HOST:PORT/v1")
    return str(url).rstrip("/")


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        values = response.json()
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise _Fault(f"a body that is no JSON object ({response.text[:80]!r})")
    return values


def _reply(values: dict[str, Any]) -> _Reply:
    choices = values.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(text := choice.get("text"), str):
        raise _Fault("a reply without text")
    tokens, finish = choice.get("token_ids"), choice.get("finish_reason")
    if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int for t in tokens)):
        raise _Fault("a reply whose token_ids are no token ids")
    if finish not in ("stop", "length"):
        raise _Fault(f"a reply with finish_reason {finish!r}")
    return _Reply(text, tokens, finish == "stop", choice.get("stop_reason"))


def _message(response: httpx.Response) -> str:
    """What the server said: OpenAI's `error.message`, older servers' `message`, FastAPI's `detail`, or the body as it is."""
    try:
        values = response.json()
    except ValueError:
        return response.text
    if isinstance(values, dict):
        error = values.get("error", values)
        if isinstance(error, dict):
            error = error.get("message", error.get("detail", error))
        return str(error)
    return str(values)
