"""The HTTP application over a scripted session: protocol, limits, disconnects, failures and shutdown, without a model."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import string
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.support.servers import ScriptedSession, connect, running, scripted_api, wait_until
from tests.support.targets import make_tokenizer
from trainkit.runner.session import Event

TEXT = "Hé😀 sold 48 clips; 日本語 text."
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "How many?"}]}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def script(tokenizer, text: str = TEXT) -> list[int]:
    """The tokens of a text and the end token."""
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def numbers(url: str) -> dict[str, float]:
    """Name and labels -> value of everything in /metrics."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("trainkit_"): float(value) for name, value in pairs}


@pytest.fixture(scope="module")
def server(tokenizer):
    """URL of a server whose every text is `TEXT`, three tokens a step."""
    end = tokenizer.eos_token_id
    with running(scripted_api(tokenizer, ScriptedSession(script(tokenizer), per_step=3, end=end))) as (url, _):
        yield url


def test_models_are_listed_and_retrieved(server):
    """The served model is listed, and retrieved by its name; another name is not found."""
    client = connect(server)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_is_the_same_whole_and_streamed(server):
    """A chat's text, whole and as the sum of its chunks; characters of several tokens are never cut."""
    client = connect(server)
    whole = client.chat.completions.create(**CHAT)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (TEXT, "stop")
    chunks = list(client.chat.completions.create(**CHAT, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == TEXT  # on a busy machine several steps may come in one chunk
    assert not any("\ufffd" in piece for piece in pieces)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_text_that_ends_inside_a_character_is_whole(server, tokenizer):
    """A text cut inside a character ends with U+FFFD, whole and streamed, as in `Runner.generate`."""
    client = connect(server)
    ids = script(tokenizer)
    count = next(n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd"))
    options = {"model": "tiny", "prompt": "a", "max_tokens": count}
    whole = client.completions.create(**options).choices[0]
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    assert whole.text == streamed == tokenizer.decode(ids[:count]) and whole.finish_reason == "length"


@pytest.mark.parametrize("stop", [" sold", "é", ["zzz", "8 cl"], "<|end|>", [TEXT[-3:], "nothing"], "日本"])
def test_stop_string_cuts_text_and_stream(server, stop):
    """The text ends before the stop string, also where chunks or tokens divide it; a stream shows no part of it."""
    client = connect(server)
    options = {"model": "tiny", "prompt": "a", "max_tokens": 100, "stop": stop}
    whole = client.completions.create(**options).choices[0]
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    stops = [stop] if isinstance(stop, str) else stop
    assert whole.text == streamed == TEXT[: min(TEXT.find(s) if s in TEXT else len(TEXT) for s in stops)]
    assert whole.finish_reason == "stop"


def test_prompts_and_samples_have_an_index_each(server):
    """Two prompts with n = 3 give six choices; the prompt's tokens count once, the new tokens all."""
    client = connect(server)
    options = {"model": "tiny", "prompt": ["a", [1, 2, 5]], "n": 3, "max_tokens": 5}
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (4, 30, 34)
    texts = [""] * 6
    stream = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    for chunk in (chunks := list(stream)):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_logprobs_have_the_form_of_each_endpoint(server, tokenizer):
    """One entry a token, the same whole and streamed, with the position of its text in completions."""
    client = connect(server)
    ids = script(tokenizer)
    whole = client.completions.create(model="tiny", prompt="a", max_tokens=100, logprobs=0).choices[0].logprobs
    assert whole.token_logprobs == [-0.5] * len(ids) and len(whole.tokens) == len(ids)
    assert [
        TEXT[at:].startswith(text) for at, text in zip(whole.text_offset, whole.tokens, strict=True) if "\ufffd" not in text
    ]
    stream = client.completions.create(model="tiny", prompt="a", max_tokens=100, logprobs=0, stream=True)
    parts = [part for chunk in stream if (part := chunk.choices[0].logprobs)]
    assert [text for part in parts for text in part.tokens or []] == whole.tokens
    assert [at for part in parts for at in part.text_offset or []] == whole.text_offset
    content = client.chat.completions.create(**CHAT, logprobs=True).choices[0].logprobs.content
    assert [entry.token for entry in content] == whole.tokens
    assert bytes(content[0].bytes).decode() == content[0].token
    assert client.chat.completions.create(**CHAT).choices[0].logprobs is None


REFUSED = [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"), ({"extra_body": {"top_k": -1}}, "top_k"), ({"n": 0}, "n"),
    ({"n": 1000}, "n"), ({"n": 100}, "n"), ({"seed": "one"}, "seed"), ({"seed": 2**64}, "seed"), ({"stop": ""}, "stop"),
    ({"stop": list("abcde")}, "stop"), ({"stop": [1]}, "stop"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"), ({"logprobs": True, "top_logprobs": 6}, "top_logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"), ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"), ({"extra_body": {"echo": True}}, "echo"),
    ({"extra_body": {"best_of": 3}}, "best_of"), ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"extra_body": {"temperatur": 1}}, "temperatur"), ({"extra_body": {"prompt": "a"}}, "prompt"),
    ({"extra_body": {"ignore_eos": 1}}, "ignore_eos"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"), ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"), ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "long " * 600}]}, "messages"), ({"max_tokens": 512}, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_field_is_named(server, fields, param):
    """A field that is wrong, unknown or not implemented gives status 400 and its name."""
    with pytest.raises(openai.BadRequestError) as caught:
        connect(server).chat.completions.create(**CHAT | fields)
    assert caught.value.param == param and param.split(".")[0].split("[")[0] in str(caught.value)


NEUTRAL = {
    "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "presence_penalty": 0.0, "tools": [],
    "logit_bias": {}, "response_format": {"type": "text"}, "frequency_penalty": None, "seed": None, "stop": None,
}  # fmt: skip


@pytest.mark.parametrize("body", ['{"\\ud800": 1}', '{"model": "tiny", "messages": [{"\\udfff": 1}]}', '{"model": "\\ud800"}'])
def test_name_that_is_no_unicode_is_refused(server, body):
    """A field or value with a lone surrogate gives status 400, with the surrogate as an escape."""
    response = httpx.post(f"{server}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and "\\ud" in response.json()["error"]["message"]


def test_fields_that_change_nothing_are_accepted(server):
    """Ignored fields, neutral values and null are accepted."""
    body = httpx.post(f"{server}/v1/chat/completions", json=CHAT | NEUTRAL).json()
    assert body["choices"][0]["message"]["content"] == TEXT


def test_contents_in_parts_and_developer_role_are_read(server):
    """A message's text may come in parts, and `developer` is the system role."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How"}, {"type": "text", "text": "many?"}]},
    ]
    same = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How\nmany?"}]
    client = connect(server)
    used = [client.chat.completions.create(model="tiny", messages=turns).usage for turns in (messages, same)]
    assert used[0] == used[1]


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/nothing", 404), ("/", 404), ("/v1/completions", 405), ("/v1/models/x/y", 404)]
)
def test_wrong_paths_have_openai_errors(server, path, status):
    """An unknown path or method gives an error in OpenAI's form."""
    response = httpx.get(server + path)
    assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_model_and_wrong_key_are_refused(tokenizer):
    """Another model gives 404; a wrong or missing key 401, except for /health and /metrics."""
    session = ScriptedSession(script(tokenizer), end=tokenizer.eos_token_id)
    with running(scripted_api(tokenizer, session, key="sécret")) as (url, _):
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer sécret".encode()}).status_code == 200
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "sécre".encode()}):
            for method, path in (("GET", "models"), ("POST", "completions"), ("POST", "chat/completions")):
                response = httpx.request(method, f"{url}/v1/{path}", headers=headers)
                assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/metrics").status_code == 200


def test_other_model_is_not_found(server):
    """The name of the model must match."""
    with pytest.raises(openai.NotFoundError) as caught:
        connect(server).chat.completions.create(**CHAT | {"model": "gpt"})
    assert caught.value.code == "model_not_found"


def test_malformed_requests_never_fail_the_server(server, seed):
    """200 random bodies: mutated requests, wrong types and random bytes give 4xx or an answer, and the server continues."""
    draw = random.Random(seed)
    with httpx.Client(base_url=f"{server}/v1", timeout=20) as client:
        for _ in range(200):
            path = draw.choice(["/completions", "/chat/completions"])
            kind = draw.choice(["application/json"] * 9 + ["text/plain"])
            response = client.post(path, content=_malformed(draw), headers={"content-type": kind})
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.json()["error"]["message"]
    assert httpx.get(f"{server}/health").status_code == 200


def _malformed(draw: random.Random) -> bytes:
    body = draw.choice([{"model": "tiny", "prompt": "a", "max_tokens": 3}, {**CHAT, "max_tokens": 3}])
    text = json.dumps(body).encode()
    kind = draw.randrange(6)
    if kind == 0:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    if kind == 1:
        position = draw.randrange(len(text))
        return text[:position] + bytes([draw.randrange(256)]) + text[position + draw.randrange(3) :]
    if kind == 2:
        return text[: draw.randrange(len(text))]
    if kind == 3:
        return draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000, b"null", b"NaN", b'"\\ud800"', b"\xff\xfe{}"])
    names = [*body, "temperature", "top_p", "top_k", "n", "seed", "stop", "logprobs", "stream", "stream_options", "echo"]
    name = draw.choice([*names, "".join(draw.choices(string.printable, k=5))])
    return json.dumps(body | {name: _value(draw, 3)}).encode()


def _value(draw: random.Random, depth: int):
    """A random JSON value, some of them not valid Unicode or far too large."""
    simple = [None, True, 0, -1, 1.5, 10**400, float("inf"), float("nan"), "", "a", "\ud800", "\x00", 2**63, "\u2028"]
    kind = draw.randrange(4 if depth else 2)
    if kind == 2:
        return [_value(draw, depth - 1) for _ in range(draw.randrange(4))]
    if kind == 3:
        keys = ["role", "content", "type", "text", "include_usage", "\ud800"]
        return {draw.choice(keys): _value(draw, depth - 1) for _ in range(draw.randrange(4))}
    return draw.choice(simple)


def test_body_too_large_is_refused(server):
    """A body over the limit gives 413."""
    body = {"model": "tiny", "prompt": "a" * (5 << 20)}
    assert httpx.post(f"{server}/v1/completions", json=body).status_code == 413


def test_full_queue_gives_429_and_recovers(tokenizer):
    """More texts than rows and queue hold give 429 with Retry-After; once they have ended there is room again."""
    session = ScriptedSession([5], rows=1, per_step=1, seconds=0.01)
    with running(scripted_api(tokenizer, session, capacity=3)) as (url, _):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 30}

        async def flood():
            async with httpx.AsyncClient(timeout=20) as client:
                return await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(8)))

        responses = asyncio.run(flood())
        refused = [response for response in responses if response.status_code == 429]
        assert len(refused) == 5 and [response.status_code for response in responses].count(200) == 3
        assert all(response.headers["retry-after"] == "1" for response in refused)
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
        assert numbers(url)['requests_total{outcome="refused"}'] == 5


def test_closed_stream_frees_its_row(tokenizer):
    """A client that closes a stream after 4 chunks frees its row within a second."""
    session = ScriptedSession([5], rows=1, per_step=1, seconds=0.005)
    with running(scripted_api(tokenizer, session, max_len=100_000)) as (url, _):
        stream = connect(url).completions.create(model="tiny", prompt="a", max_tokens=90_000, stream=True)
        for _ in range(4):
            next(stream)
        assert numbers(url)["rows_live"] == 1
        stream.close()
        wait_until(lambda: not session.live, 1)
        found = numbers(url)
        assert found["cancelled_total"] == found['requests_total{outcome="cancelled"}'] == 1
        assert connect(url).completions.create(model="tiny", prompt="a", max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("rows", [1, 0], ids=["live", "waiting"])
def test_dropped_call_frees_its_row(tokenizer, stream, rows):
    """A client that drops a call, live or waiting, before its first byte frees its row within a second."""
    session = ScriptedSession([5], rows=rows, per_step=1, seconds=0.005)
    if rows and stream:
        session.seconds = 0.3  # the client leaves before the first token
    with running(scripted_api(tokenizer, session, max_len=100_000)) as (url, _):
        body = {"model": "tiny", "prompt": "a", "max_tokens": 90_000, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.2))
        wait_until(lambda: session.idle, 1)
        wait_until(lambda: numbers(url)['requests_total{outcome="cancelled"}'] == 1, 1)


def test_client_that_stops_reading_stalls_nobody(tokenizer):
    """A client that reads nothing holds its row only until its text ends, and other clients are served meanwhile."""
    session = ScriptedSession([5], rows=2, per_step=10)
    with running(scripted_api(tokenizer, session, max_len=300_000), send_buffer=4096) as (url, _):
        with silent_client(url, 30_000):
            wait_until(lambda: session.live, 5)
            others = 0
            while session.live or others < 3:
                began, others = time.perf_counter(), others + 1
                connect(url).completions.create(model="tiny", prompt="a", max_tokens=4)
                assert time.perf_counter() - began < 5
            assert numbers(url)['requests_total{outcome="ok"}'] == others  # its response has not ended
        wait_until(lambda: numbers(url)['requests_total{outcome="ok"}'] == others + 1, 5)


def test_client_that_stops_reading_is_dropped(tokenizer, monkeypatch):
    """A connection whose client reads nothing for the time limit is closed, and its text is cancelled."""
    monkeypatch.setattr("trainkit.serve.server.STALLED_MS", 500)
    session = ScriptedSession([5], rows=1, per_step=10, seconds=0.001)
    api = scripted_api(tokenizer, session, max_len=1_000_000)
    with running(api, send_buffer=4096) as (url, server), silent_client(url, 900_000):
        wait_until(lambda: session.live, 5)
        wait_until(lambda: not server.server_state.connections and session.idle, 10)


@contextmanager
def silent_client(url: str, tokens: int) -> Iterator[None]:
    """A client that requests a stream of this many tokens and never reads."""
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": tokens, "stream": True, "logprobs": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        silent.sendall(head.encode() + body)
        yield


def test_engine_failure_answers_all_and_health_is_503(tokenizer, caplog):
    """A session that raises gives every open request, stream or not, an error; later ones 500; /health 503; nothing hangs."""
    session = ScriptedSession([5], rows=1, per_step=1, seconds=0.01)
    with running(scripted_api(tokenizer, session)) as (url, _):
        client, errors = connect(url), []

        def ask() -> None:
            try:
                client.completions.create(model="tiny", prompt="a", max_tokens=400)
            except openai.InternalServerError as error:
                errors.append(error)

        stream = client.completions.create(model="tiny", prompt="a", max_tokens=400, stream=True)
        next(stream)
        waiting = [threading.Thread(target=ask) for _ in range(3)]
        [thread.start() for thread in waiting]
        wait_until(lambda: len(session.waiting) == 3, 5)
        session.raises = RuntimeError("out of memory")
        with pytest.raises(openai.APIError, match="the engine has failed"):
            list(stream)
        [thread.join(5) for thread in waiting]
        assert len(errors) == 3 and all(error.code == "engine_failed" for error in errors)
        assert httpx.get(f"{url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError):
            client.completions.create(model="tiny", prompt="a")
        assert "out of memory" in caplog.text
        assert numbers(url)['requests_total{outcome="failed"}'] == 5


def test_text_that_cannot_be_decoded_fails_alone(tokenizer):
    """A text that the session ends with an error gives 500 with the reason; the server continues."""

    class Broken(ScriptedSession):
        def step(self):
            events = super().step()
            for n, event in enumerate(events):
                if event.request.prompt == [7]:
                    self.live.remove(event.request)
                    event.request.error = "the target's logits are NaN"
                    events[n] = Event(event.request, [], "error")
            return events

    with running(scripted_api(tokenizer, Broken([5]))) as (url, _):
        client = connect(url)
        with pytest.raises(openai.InternalServerError, match="logits are NaN"):
            client.completions.create(model="tiny", prompt=[7])
        assert client.completions.create(model="tiny", prompt=[8]).usage.completion_tokens == 16


@pytest.mark.parametrize(("grace", "cut"), [(10.0, False), (0.2, True)], ids=["ends", "cut"])
def test_stopping_server_lets_streams_end(tokenizer, grace, cut):
    """A stopping server refuses new requests and lets a stream end; after the grace period the client gets an error."""
    session = ScriptedSession([5], rows=1, per_step=1, seconds=0.005)
    with running(scripted_api(tokenizer, session), grace) as (url, server):
        stream = connect(url).completions.create(model="tiny", prompt="a", max_tokens=200, stream=True)
        next(stream)
        server.should_exit = True
        if cut:
            with pytest.raises(openai.APIError, match="did not end in time"):
                list(stream)
            wait_until(lambda: session.idle, 1)
        else:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        with pytest.raises((httpx.ConnectError, httpx.ReadError)):
            httpx.get(f"{url}/health")


def test_metrics_equal_the_sum_of_usages(tokenizer):
    """Counters equal the sums of usages over concurrent requests; histograms count each text; alpha_k follows."""
    session = ScriptedSession(script(tokenizer), rows=4, per_step=3, end=tokenizer.eos_token_id)
    with running(scripted_api(tokenizer, session, capacity=100)) as (url, _):

        async def ask():
            async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=20) as client:
                calls = [client.chat.completions.create(**CHAT, n=1 + i % 3, max_tokens=3 + i) for i in range(32)]
                return [response.usage for response in await asyncio.gather(*calls)]

        usages = asyncio.run(ask())
        found = numbers(url)
        generated = sum(usage.completion_tokens for usage in usages)
        assert found["prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
        assert found["generated_tokens_total"] == generated
        assert found['requests_total{outcome="ok"}'] == found["request_seconds_count"] == 32
        texts = sum(1 + i % 3 for i in range(32))
        assert found["time_to_first_token_seconds_count"] == texts
        assert found["tokens_per_round_sum"] == generated - texts
        assert found["tokens_per_round_count"] == found["row_rounds_total"] >= found["rounds_total"] > 0
        accepted = found["generated_tokens_total"] - texts - found["row_rounds_total"]
        assert found["accepted_tokens_total"] == accepted == sum(found[f'accepted_at_total{{position="{k}"}}'] for k in (1, 2))
        assert found["rows_live"] == found["queue_length"] == 0
        types = re.findall(r"# TYPE (\w+) (\w+)", httpx.get(f"{url}/metrics").text)
        assert len(types) == len(dict(types)) and {kind for _, kind in types} == {"counter", "gauge", "histogram"}
