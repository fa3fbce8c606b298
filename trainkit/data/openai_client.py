"""Completions from any server with the OpenAI completions API (vLLM, SGLang, llama.cpp, ...), for prompts as token ids.

The requests run in an event loop in a thread of its own, so that stopping cancels the requests in flight and the server sees
closed connections. Prompts are read and texts are encoded in the caller's thread, because a tokenizer need not be thread-safe.
The server fills in what a request leaves out: vLLM uses the model's generation_config.json for that, unless it was started with
`--generation-config vllm`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from hashlib import sha256
from itertools import islice
from math import isfinite
from queue import SimpleQueue
from types import NoneType
from typing import Any, TypeVar

import anyio
import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from tenacity import AsyncRetrying, RetryCallState, RetryError, retry_if_exception_type, wait_exponential

from trainkit.data.text.chat_template import Tokenizer
from trainkit.data.text.prompts import Completion
from trainkit.errors import UserError

T = TypeVar("T")
_Choice = dict[str, Any]
"""Checked `choices[0]` of a reply: `text`, `finish_reason` (stop or length), and perhaps `token_ids` and what ended the text:
`stop_reason` of vLLM or `matched_stop` of SGLang."""
ClientPool = asyncio.LifoQueue[httpx.AsyncClient]
"""One client, which keeps one connection, for each request that may be in flight."""

ATTEMPTS = 8  # how often a request is sent before the run stops
CONNECT_ATTEMPTS = 3  # ... while connections are refused and the server has never replied
BACKOFF = 0.5  # seconds before the second attempt, doubled for each further attempt; half of each pause is random jitter
MAX_PAUSE = 60.0  # seconds between attempts, unless the server asks for more
TIMEOUT = 600.0  # seconds without a byte after which a request counts as lost
CONNECT_TIMEOUT = 10.0
TRANSIENT_STATUSES = {408, 409, 425, 429}  # and every 5xx


class CompletionClient:
    """A client of one server.

    Args:
        base_url: URL that ends in /v1, such as `http://localhost:8000/v1`; a trailing slash is allowed.
        model: Name of the model to request; None uses the first model that the server lists.
        tokenizer: Tokenizer of the model; encodes the text if the server returns no token ids.
        end_ids: Ids that end a text of the model.
        end_id: End token to add if the server does not report what ended a text; None takes the tokenizer's.
        concurrency: Maximum number of requests in flight.

    Attributes:
        encoded: Completions whose tokens were encoded from the text, which need not be the tokens that the model sampled.

    Raises:
        UserError: the URL or the API key, which is read from OPENAI_API_KEY, is invalid.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        *,
        tokenizer: Tokenizer,
        end_ids: Collection[int] = (),
        end_id: int | None = None,
        concurrency: int = 32,
    ) -> None:
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()  # it appears in no message and in no provenance
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError("the API key (OPENAI_API_KEY) has characters that are not allowed in a key; set it again")
        self._url = _check_url(base_url)
        self.base_url = str(httpx.URL(self._url).copy_with(userinfo=b""))  # messages and provenance show no password
        self.tokenizer, self.concurrency = tokenizer, concurrency
        self._eos: Any = tokenizer.eos_token_id
        self._end_id = self._eos if end_id is None else end_id
        self._end_ids = {*end_ids, self._eos, self._end_id} - {None}
        if model is not None:
            self.model = model
        self.encoded = 0
        self._request_ids = True  # whether to request token ids
        self._has_replied = False
        self._random = random.Random()  # jitter must not change the caller's random state
        self._exponential = wait_exponential(multiplier=BACKOFF, max=MAX_PAUSE)

    @cached_property
    def model(self) -> str:
        """Name of the model; if none was given, the first that the server lists.

        Raises:
            UserError: as in `complete`.
        """
        with self._open() as (portal, pool):
            return portal.call(self._find_model, pool)

    def complete(
        self,
        prompts: Iterable[tuple[int, Sequence[int]]],
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        max_new_tokens: int = 128,
        seed: int = 0,
    ) -> Iterator[Completion]:
        """Yields one completion for each prompt, in order of arrival; closing the iterator cancels the requests in flight.

        At most twice `concurrency` prompts are read ahead of the completions taken, so that the server has work while the
        caller is busy. Each request has its own seed, which depends only on `seed` and its id.

        Args:
            prompts: Id and token ids of each prompt; ids must be unique.
            temperature: Sampling temperature; 0 takes the most probable token.
            top_p: Nucleus sampling: probability mass to sample from.
            top_k: Number of most probable tokens to sample from; 0 is not sent.
            max_new_tokens: Maximum length of a completion in tokens, with the end token.
            seed: Seed for all sampling, as far as the server respects it.

        Raises:
            UserError: the server refused a request, or did not reply in any attempt.
        """
        sampling = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        if top_k:
            sampling["top_k"] = top_k
        waiting, seen = iter(prompts), set()
        done: SimpleQueue[Future[_Choice]] = SimpleQueue()
        pending: dict[Future[_Choice], int] = {}
        with self._open(pending) as (portal, pool):
            while True:
                for id, tokens in islice(waiting, 2 * self.concurrency - len(pending)):
                    assert id not in seen, f"request {id} is sent twice"
                    seen.add(id)
                    body = {"model": self.model, "prompt": [int(t) for t in tokens], "seed": request_seed(seed, id)}
                    future = portal.start_task_soon(self._request, pool, id, body | sampling)
                    pending[future] = id
                    future.add_done_callback(done.put)
                if not pending:
                    return
                future = done.get()
                yield self._completion(pending.pop(future), future.result())

    @contextmanager
    def _open(self, pending: dict[Future[_Choice], int] | None = None) -> Iterator[tuple[BlockingPortal, ClientPool]]:
        """The event loop's thread and the clients; leaving cancels the `pending` requests."""
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            pool = stack.enter_context(portal.wrap_async_context_manager(self._clients()))
            stack.callback(lambda: [future.cancel() for future in list(pending or ())])
            # At exit, Python would close an unfinished iterator only after it has stopped the loop's thread, and wait forever.
            atexit.register(stack.close)
            stack.callback(atexit.unregister, stack.close)
            yield portal, pool

    @asynccontextmanager
    async def _clients(self) -> AsyncIterator[ClientPool]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else None
        timeout = httpx.Timeout(TIMEOUT, connect=CONNECT_TIMEOUT)
        certificates = httpx.create_ssl_context()  # slow to make, so all clients share it
        pool = ClientPool()
        async with AsyncExitStack() as stack:
            for _ in range(self.concurrency):  # measured: a single client searches all its connections, 3 times the CPU time
                client = httpx.AsyncClient(headers=headers, timeout=timeout, verify=certificates)
                pool.put_nowait(await stack.enter_async_context(client))
            yield pool

    async def _find_model(self, pool: ClientPool) -> str:
        async def attempt(client: httpx.AsyncClient) -> str:
            models = _json(self._check(await client.get(f"{self._url}/models"), "the list of models")).get("data")
            if not isinstance(models, list) or not models:
                raise UserError(f"{self.base_url}/models: lists no model; name one with --model")
            name = models[0].get("id") if isinstance(models[0], dict) else None
            if not isinstance(name, str):
                raise _TransientError("a list of models without an id")
            return name

        return await self._retry(f"{self.base_url}/models", pool, attempt)

    async def _request(self, pool: ClientPool, id: int, body: dict[str, Any]) -> _Choice:
        url = f"{self._url}/completions"

        async def attempt(client: httpx.AsyncClient) -> _Choice:
            request_ids = self._request_ids
            response = await client.post(url, json=body | {"return_token_ids": True} if request_ids else body)
            if request_ids and response.status_code in (400, 422) and "return_token_ids" in response.text:
                self._request_ids = False  # an extension of vLLM that a strict server rejects by name
                response = await client.post(url, json=body)
            return _check_choice(_json(self._check(response, f"prompt {id}")))

        return await self._retry(f"{self.base_url}/completions", pool, attempt)

    async def _retry(self, url: str, pool: ClientPool, attempt: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
        """The result of `attempt`, which is repeated after connection errors and transient faults."""

        async def use_client() -> T:
            client = await pool.get()
            try:
                result = await attempt(client)
            finally:
                pool.put_nowait(client)
            self._has_replied = True
            return result

        retry = retry_if_exception_type((httpx.RequestError, _TransientError))
        try:
            return await AsyncRetrying(sleep=anyio.sleep, stop=self._stop, wait=self._wait, retry=retry)(use_client)
        except RetryError as failure:
            error, count = failure.last_attempt.exception(), failure.last_attempt.attempt_number
            name = "" if isinstance(error, _TransientError) else type(error).__name__
            raise UserError(
                f"{url}: no answer in {count} attempt{'s' if count > 1 else ''}, the last one failed with "
                f"{f'{name} {self._one_line(str(error))}'.strip()}; check that the server runs at this address"
            ) from None

    def _stop(self, state: RetryCallState) -> bool:
        # nobody listens at that address, unless the server has replied before and is just restarting
        refused = isinstance(state.outcome and state.outcome.exception(), httpx.ConnectError) and not self._has_replied
        return state.attempt_number >= (CONNECT_ATTEMPTS if refused else ATTEMPTS)

    def _wait(self, state: RetryCallState) -> float:
        """Seconds before the next attempt: what the server asked for, or exponential; with jitter, to spread the requests."""
        seconds = getattr(state.outcome and state.outcome.exception(), "retry_after", None)
        if seconds is not None:
            return seconds + self._random.uniform(0, BACKOFF)
        return self._exponential(state) * self._random.uniform(0.5, 1)

    def _check(self, response: httpx.Response, subject: str) -> httpx.Response:
        """The response if it is a success; raises _TransientError if another attempt may help, otherwise UserError."""
        status = response.status_code
        if response.is_success:
            return response
        reason = self._one_line(_error_message(response)) or response.reason_phrase
        if status >= 500 or status in TRANSIENT_STATUSES:
            raise _TransientError(f"status {status} ({reason})", retry_after(response.headers.get("Retry-After")))
        fix = "change the request or the server's settings"
        if response.has_redirect_location:
            fix = f"use the address that it redirects to, {self._one_line(response.headers['Location'])}"
        elif status in (401, 403):
            fix = "set the key in the environment variable OPENAI_API_KEY"
        elif status == 404:
            fix = "give an address that ends in /v1, and a model that the server lists"
        raise UserError(f"{self.base_url}: status {status} for {subject} ({reason}); {fix}")

    def _one_line(self, text: str) -> str:
        text = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return text if len(text) <= 300 else f"{text[:300]}..."

    def _completion(self, id: int, choice: _Choice) -> Completion:
        tokens, text, ended = choice.get("token_ids"), choice["text"], choice["finish_reason"] == "stop"
        if not tokens:
            # A text that is cut inside a character ends in U+FFFD, which the model did not write.
            written = text if ended else text.rstrip("\ufffd")
            tokens = self.tokenizer.encode(written, add_special_tokens=False) if written else []
            self.encoded += 1
        if not ended:
            return Completion(id, tokens, text, "length")
        end = self._end_of(choice)
        if isinstance(end, str):
            return Completion(id, tokens, text, "stop")
        if end is not None and not (tokens and (tokens[-1] == end or tokens[-1] in self._end_ids)):
            tokens = [*tokens, end]
        return Completion(id, tokens, text, "end")

    def _end_of(self, choice: _Choice) -> int | str | None:
        """What ended the text: the id of an end token, or a stop string that is not the text of an end token.

        SGLang reports the id or string as `matched_stop`. vLLM reports it as `stop_reason`, which is null for the tokenizer's
        end token. Other servers report nothing.
        """
        reason = choice.get("matched_stop")
        if reason is None and "stop_reason" in choice:
            reason = self._eos if choice["stop_reason"] is None else choice["stop_reason"]
        if isinstance(reason, str):
            ids = self.tokenizer.encode(reason, add_special_tokens=False)
            return ids[0] if len(ids) == 1 and ids[0] in self._end_ids else reason
        return self._end_id if reason is None else reason


class _TransientError(Exception):
    """A fault that may be gone at the next attempt.

    Args:
        reason: Description of the fault.
        retry_after: Seconds that the server asked to wait, or None.
    """

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def request_seed(seed: int, id: int) -> int:
    """31-bit seed of one request, which depends on nothing else."""
    return int.from_bytes(sha256(f"{seed}/{id}".encode()).digest()[:4], "big") & 0x7FFFFFFF


def retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which has seconds or an HTTP date (RFC 9110, 10.2.3); None if it is invalid."""
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


def _check_url(base_url: str) -> str:
    try:
        url = httpx.URL(base_url.strip())
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UserError(f"base URL {base_url}: not a valid address; give it as http://HOST:PORT/v1")
    return str(url).rstrip("/")


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        values = response.json()
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise _TransientError(f"a body that is not a JSON object ({response.text[:80]!r})")
    return values


def _check_choice(values: dict[str, Any]) -> _Choice:
    choices = values.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict) or not isinstance(choice.get("text"), str):
        raise _TransientError("a reply without text")
    tokens, finish = choice.get("token_ids"), choice.get("finish_reason")
    if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int for t in tokens)):
        raise _TransientError("a reply with invalid token_ids")
    for name in ("matched_stop", "stop_reason"):
        if not isinstance(choice.get(name), (int, str, NoneType)):
            raise _TransientError(f"a reply with {name} {choice[name]!r}")
    if finish not in ("stop", "length"):
        raise _TransientError(f"a reply with finish_reason {finish!r}")
    return choice


def _error_message(response: httpx.Response) -> str:
    """The server's message: OpenAI's `error.message`, older servers' `message`, FastAPI's `detail`, or the whole body."""
    try:
        values = response.json()
    except ValueError:
        return response.text
    error = values.get("error", values) if isinstance(values, dict) else values
    return str(error.get("message", error.get("detail", error)) if isinstance(error, dict) else error)
