"""The HTTP application: OpenAI's completions, chat completions and models, /health, and /metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from trainkit.runner.engine import Runner
from trainkit.runner.options import GenerateOptions
from trainkit.runner.request import Request as TextRequest
from trainkit.runner.session import Session
from trainkit.runner.stats import Stats
from trainkit.serve.codec import Codec
from trainkit.serve.engine import Batch, Engine, Update
from trainkit.serve.fields import ApiError, Call, parse_call, read_json
from trainkit.serve.metrics import Metrics
from trainkit.serve.reply import Reply

log = logging.getLogger("trainkit.serve")
T = TypeVar("T")
MAX_BODY = 4 << 20
"""Largest request body in bytes."""
MakeRequests = Callable[[Call, list[list[int]], int], Sequence[TextRequest]]


class Events(StreamingResponse):
    """Server-sent events; `finish` is called when the response has ended for any reason, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], finish: Callable[[], None], headers: dict[str, str]) -> None:
        super().__init__(content, headers={"cache-control": "no-cache", **headers})
        self.finish = finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.finish()


class Api:
    """The endpoints over one engine.

    Args:
        engine: Runs the decoding session.
        codec: Encodes prompts and decodes tokens.
        requests: Builds the requests for a call's texts from the call, its prompts and its seed.
        gauges: Returns the current gauge values for /metrics.
        model: Name of the model.
        key: API key that /v1 requires; None means that none is required.
    """

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        requests: MakeRequests,
        gauges: Callable[[], dict[str, int]],
        model: str,
        key: str | None = None,
    ) -> None:
        self.engine, self.codec, self.requests, self.gauges = engine, codec, requests, gauges
        self.model, self.key, self.created = model, key, int(time.time())
        self.pool = ThreadPoolExecutor(2, "trainkit-encode")  # tokenising takes long for long prompts, and releases the GIL

    def app(self) -> Starlette:
        """The ASGI application; its lifespan starts and ends the engine thread."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            yield
            self.engine.stop(0)
            await self.engine.join()
            self.pool.shutdown(wait=False)

        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: Any = {ApiError: _on_api_error, HTTPException: _on_http_error, Exception: _on_bug}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """Status 200 while requests are accepted; 503 after an engine error and while the server stops."""
        status = "failed" if self.engine.failed else "stopping" if self.engine.stopping else "ok"
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    async def metrics(self, request: Request) -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return PlainTextResponse(self.engine.metrics.text(self.gauges()), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """The served model, as a list or by name."""
        self._authorise(request)
        name = request.path_params.get("name", self.model)
        if name != self.model:
            raise ApiError(404, f"the model {name[:200]!r} does not exist", "model", "model_not_found")
        model = {"id": self.model, "object": "model", "created": self.created, "owned_by": "trainkit"}
        model["max_model_len"] = self.codec.max_len
        return JSONResponse(model if "name" in request.path_params else {"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        """Continues texts or token ids."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answers a chat."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        metrics = self.engine.metrics
        try:
            return await self._decode(request, chat)
        except ClientDisconnect:
            metrics.requests["cancelled"] += 1
            return Response(status_code=499)  # nobody reads it
        except ApiError as error:
            metrics.requests[_outcome(error)] += 1
            raise

    async def _decode(self, request: Request, chat: bool) -> Response:
        """Decodes the texts of a request; returns the whole response, or a stream once its first token exists."""
        # Read and check the request.
        arrived = perf_counter()
        self._authorise(request)
        self.engine.check()
        body = await _body(request)
        run = asyncio.get_running_loop().run_in_executor
        call, prompts = await run(self.pool, self._parse, body, chat)
        # Queue its texts.
        self.engine.check(len(prompts) * call.n)
        seed = secrets.randbelow(2**31) if call.seed is None else call.seed
        prompt_tokens = sum(map(len, prompts))
        reply = Reply(call, self.codec, self.model, seed, prompt_tokens)
        batch = self.engine.submit(self.requests(call, prompts, seed))
        self.engine.metrics.prompt_tokens += prompt_tokens
        # Answer.
        headers, streaming = {"x-request-id": reply.id}, False
        try:
            if call.stream:
                first = await _while_connected(request, batch.updates.get())
                if isinstance(first, ApiError):
                    raise first
                streaming = True  # from here on the response closes the batch
                return Events(self._stream(reply, batch, first), partial(self._finish, batch, arrived), headers)
            await _while_connected(request, self._collect(reply, batch))
            self._finish(batch, arrived)
            return JSONResponse(reply.body(_measures(reply, batch)), headers=headers)
        except ApiError as error:
            if error.status >= 500:
                log.error("%s: %s", reply.id, error.message)
            raise
        finally:
            if not streaming:
                self.engine.close(batch)

    def _parse(self, body: bytes, chat: bool) -> tuple[Call, list[list[int]]]:
        call = parse_call(read_json(body), chat, self.model)
        return call, self.codec.prompts(call)

    async def _collect(self, reply: Reply, batch: Batch) -> None:
        while not reply.ended:
            update = await batch.updates.get()
            if isinstance(update, ApiError):
                raise update
            reply.choices[update.index].add(update)

    async def _stream(self, reply: Reply, batch: Batch, first: Update) -> AsyncIterator[str]:
        """The events of a stream; updates that arrive while the client is slow are merged into one chunk."""
        for chunk in reply.first_chunks():
            yield _event(chunk)
        updates, error = [first], None
        while True:
            while error is None and not batch.updates.empty():
                update = batch.updates.get_nowait()
                if isinstance(update, ApiError):
                    error = update
                else:
                    updates.append(update)
            chunk = reply.chunk(updates)
            if chunk is not None:
                if reply.ended and not reply.call.include_usage:
                    chunk["trainkit"] = _measures(reply, batch)
                yield _event(chunk)
            if reply.ended:
                break
            if error is not None:
                log.error("%s: %s", reply.id, error.message)
                yield _event(error.body())
                return
            update = await batch.updates.get()
            updates, error = ([], update) if isinstance(update, ApiError) else ([update], None)
        if reply.call.include_usage:
            yield _event(reply.last_chunk(_measures(reply, batch)))
        yield "data: [DONE]\n\n"

    def _finish(self, batch: Batch, arrived: float) -> None:
        """Counts a request that was answered, or whose client disconnected during a stream."""
        metrics, cancelled = self.engine.metrics, self.engine.close(batch)
        outcome = _outcome(batch.error) if batch.error is not None else "cancelled" if cancelled else "ok"
        metrics.requests[outcome] += 1
        if outcome == "ok":
            metrics.request.observe(perf_counter() - arrived)

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # the header's bytes
        if self.key is not None and not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            raise ApiError(401, "wrong or missing API key; send Authorization: Bearer KEY", code="invalid_api_key")


def build_api(runner: Runner, session: Session, queue: int, model: str, key: str | None = None) -> Api:
    """The endpoints over a session of a runner.

    Args:
        runner: Builds requests; its tokenizer is used.
        session: Decodes the requests.
        queue: Number of texts that may wait for a row.
        model: Name of the model.
        key: As in `Api`.
    """

    def requests(call: Call, prompts: list[list[int]], seed: int) -> list[TextRequest]:
        made = []
        for prompt in prompts:
            limit = call.max_tokens or runner.max_len - len(prompt)
            options = GenerateOptions(
                limit, call.temperature, call.top_p, call.top_k, seed, stop=call.stop, ignore_end=call.ignore_end
            )
            made += [runner.request(prompt, options, 0, (0, sample)) for sample in range(call.n)]
        for request in made:
            request.top = call.logprobs
        return made

    def gauges() -> dict[str, int]:
        load = session.load
        return {
            "rows_live": load.live,
            "rows_filling": load.filling,
            "queue_length": load.waiting,
            "prefill_tokens": load.prefill_tokens,
            "cache_tokens": load.cached_tokens,
        }

    device = session.device
    prepare = partial(torch.cuda.set_device, device) if device.type == "cuda" else lambda: None
    codec = Codec(runner.tokenizer, runner.max_len)
    return Api(Engine(session, session.rows + queue, Metrics(), prepare), codec, requests, gauges, model, key)


async def _body(request: Request) -> bytes:
    """The body of a request; raises ApiError if it is too large or not declared as JSON."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON with Content-Type: application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body exceeds {MAX_BODY >> 20} MiB")
    return bytes(body)


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; if the client disconnects first, cancels it and raises ClientDisconnect."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _measures(reply: Reply, batch: Batch) -> dict[str, Any]:
    return reply.measures(Stats.merge(text.request.stats for text in batch.texts), batch.seconds())


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _outcome(error: ApiError) -> str:
    return "refused" if error.status in (429, 503) else "invalid" if error.status < 500 else "failed"


async def _on_api_error(request: Request, error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body(), error.status, headers)


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    api_error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(api_error.body(), error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "internal server error; the server's log has the reason").body(), 500)
