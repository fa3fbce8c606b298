"""The HTTP client: one completion for each prompt despite all faults, no request too many, and stopping at any moment."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from tenacity import RetryCallState

from tests.support.fake_server import END, Served, one_then_more, prompts, reply, serve
from trainkit.data import openai_client
from trainkit.data.openai_client import CompletionClient, request_seed, retry_after
from trainkit.errors import UserError

SOON = 100.0  # seconds, for what takes milliseconds on an idle machine; what is cancelled would take 600 s or more
HOT = {"temperature": 0.7, "seed": 5, "max_new_tokens": 12}


@pytest.fixture
def end_id(tokenizer: Any) -> int:
    return tokenizer.convert_tokens_to_ids(END)


@pytest.fixture
def ask(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes clients; options in capitals replace constants of the client's module."""

    def make(served: Served | str, **options: Any) -> CompletionClient:
        for name, value in {"BACKOFF": 0.01, "TIMEOUT": 60.0, "ATTEMPTS": 8}.items():
            monkeypatch.setattr(openai_client, name, options.pop(name, value))
        base_url = served if isinstance(served, str) else served.base_url
        return CompletionClient(base_url, tokenizer=tokenizer, **options)

    return make


def expected(asked: Sequence[tuple[int, list[int]]], seed: int, temperature: float, max_new_tokens: int) -> dict[int, Any]:
    """The model's completion of each prompt: text, tokens, finish."""
    answers = {}
    for number, tokens in asked:
        text, ids, finish = reply(tokens, seed=request_seed(seed, number), temperature=temperature, max_tokens=max_new_tokens)
        answers[number] = (text, ids, {"stop": "end", "length": "length"}[finish])
    return answers


def test_every_prompt_is_answered_once_under_faults(ask: Any, seed: int) -> None:
    """Under all faults together every prompt is answered exactly once, with one more request per fault."""
    asked = prompts(150, seed)
    shares = {"429": 0.1, "500": 0.05, "503": 0.05, "408": 0.05, "409": 0.05, "425": 0.05}
    with serve(
        drop=0.1, cut=0.1, garbage=0.1, statuses=shares, headers={"Retry-After": "0.01"}, delay=0.01, refuse_ids=True, seed=seed
    ) as served:
        answers = list(ask(served, concurrency=16).complete(asked, **HOT))
        stats = served.stats
    assert Counter(answer.id for answer in answers) == Counter(number for number, _ in asked)
    wanted = expected(asked, **HOT)
    assert {answer.id: (answer.text, answer.finish) for answer in answers} == {n: (w[0], w[2]) for n, w in wanted.items()}
    assert {answer.finish for answer in answers} == {"end", "length"}
    assert set(stats.faults) == {"drop", "cut", "garbage", "refused ids", *shares}
    assert set(stats.answered.values()) == {1}, "a prompt that was answered is not sent again"
    assert stats.peak <= 16
    assert len(stats.requests) == len(asked) + stats.faults.total(), "one more request for each fault, and no others"


def test_server_token_ids_are_used(ask: Any, end_id: int) -> None:
    """Where the server returns token ids they are used."""
    asked = prompts(12)
    for end_in_ids in (True, False):
        with serve(end_in_ids=end_in_ids) as served:
            server = ask(served)
            answers = {answer.id: answer.tokens for answer in server.complete(asked, **HOT)}
        assert answers == {number: tokens for number, (_, tokens, _) in expected(asked, **HOT).items()}
        assert server.encoded == 0


@pytest.mark.parametrize("refuse", [False, True])
def test_text_is_encoded_if_server_gives_no_ids(refuse: bool, ask: Any, tokenizer: Any, end_id: int) -> None:
    """Where the server returns no token ids the text is encoded."""
    asked = prompts(12)
    with serve(give_ids=False, refuse_ids=refuse) as served:
        server = ask(served, concurrency=1)
        answers = {answer.id: answer.tokens for answer in server.complete(asked, **HOT)}
        stats = served.stats
    for number, (text, _, finish) in expected(asked, **HOT).items():
        end = [end_id] if finish == "end" else []
        assert answers[number] == tokenizer.encode(text, add_special_tokens=False) + end
    assert server.encoded == 12
    with_ids = sum("return_token_ids" in body for body in stats.requests)
    assert with_ids == (1 if refuse else 12), "refused once, then no longer requested"


@pytest.mark.parametrize("give_ids", [True, False])
def test_what_ended_a_text_is_what_the_server_says(give_ids: bool, ask: Any, tokenizer: Any, end_id: int) -> None:
    """The end token is the one that the server names, else the chat template's; a stop string is none."""
    other, text = tokenizer.convert_tokens_to_ids("<|bos|>"), "the box"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for said, end, finish in (
        ({"matched_stop": other}, [other], "end"),
        ({"matched_stop": 9}, [9], "end"),
        ({"stop_reason": other}, [other], "end"),
        ({"stop_reason": None}, [end_id], "end"),  # vLLM: the end token of the tokenizer
        ({"matched_stop": "<|bos|>"}, [other], "end"),
        ({"matched_stop": "Question:"}, [], "stop"),
        ({"stop_reason": "Question:"}, [], "stop"),
        ({}, [other], "end"),
        ({"matched_stop": None}, [other], "end"),
        ({"matched_stop": None, "finish_reason": "length"}, [], "length"),
    ):
        choice = {"text": text, "finish_reason": "stop"} | ({"token_ids": ids} if give_ids else {}) | said
        answer = ask("http://127.0.0.1:1/v1", end_ids=[other], end_id=other)._completion(0, choice)
        assert (answer.tokens, answer.finish) == (ids + end, finish), said


def test_other_end_token_is_not_followed_by_eos(ask: Any, end_id: int) -> None:
    """A reply that ends in another end token gets no second one."""
    for patch, tokens in (
        ({"token_ids": [5, 9], "finish_reason": "stop", "stop_reason": 9}, [5, 9]),
        ({"token_ids": [5, 9], "finish_reason": "stop", "stop_reason": None}, [5, 9, end_id]),
        ({"token_ids": [5, 9], "finish_reason": "length"}, [5, 9]),
        ({"token_ids": [], "text": "", "finish_reason": "stop"}, [end_id]),
    ):
        with serve(patch=patch) as served:
            (answer,) = ask(served).complete([(0, [7])], temperature=0)
        assert answer.tokens == tokens


def test_character_cut_by_length_is_dropped(ask: Any, tokenizer: Any) -> None:
    """A character that the length limit cut is dropped."""
    with serve(patch={"text": "ab\ufffd", "finish_reason": "length"}, give_ids=False) as served:
        (answer,) = ask(served).complete([(0, [7])], temperature=0)
    assert tokenizer.decode(answer.tokens) == "ab"


def test_concurrency_is_reached_and_not_exceeded(ask: Any) -> None:
    """As many requests as `concurrency` are in flight, and never more."""
    with serve(hold=7, delay=0.02) as served:
        assert len(list(ask(served, concurrency=7).complete(prompts(40), **HOT))) == 40
        assert served.stats.peak == 7


def test_prompts_are_read_lazily(ask: Any) -> None:
    """Prompts are read only as they are needed."""
    drawn = 0

    def endless() -> Iterator[tuple[int, list[int]]]:
        nonlocal drawn
        while True:
            drawn += 1
            yield drawn, [7, drawn % 900]

    with serve() as served:
        answers = ask(served, concurrency=3).complete(endless(), **HOT)
        for taken in range(1, 20):
            next(answers)
            assert drawn <= taken + 6
        answers.close()


def test_retry_after_is_respected(ask: Any) -> None:
    """The client waits for the time in Retry-After."""
    asked = prompts(4)
    with serve(first=["429"], headers={"Retry-After": "1"}) as served:
        assert len(list(ask(served).complete(asked, **HOT))) == 4
        bodies = served.stats.requests
    for _, prompt in asked:
        first, second = (body["at"] for body in bodies if body["prompt"] == prompt)
        assert 0.95 < second - first < 1 + SOON


def test_retry_after_is_parsed_as_seconds_or_date() -> None:
    """Retry-After is read as seconds or as a date; anything else is ignored."""
    assert [retry_after(value) for value in ("3", "0", None, "soon", "-1", "inf", "nan", "")] == [3, 0] + [None] * 6
    soon = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True))
    assert soon is not None and 85 < soon <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_retry_pauses_grow_up_to_60_seconds(ask: Any) -> None:
    """Pauses double up to 60 seconds, half of each is jitter."""
    client, state = ask("http://localhost:1/v1", BACKOFF=0.5), RetryCallState(None, None, (), {})
    for attempt, longest in ((1, 0.5), (2, 1), (4, 4), (7, 32), (8, 60), (5000, 60)):
        state.attempt_number = attempt
        pauses = [client._wait(state) for _ in range(200)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest, "half of a pause is jitter"


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ("400", "status 400 for prompt"),
        ("401", "OPENAI_API_KEY"),
        ("404", "ends in /v1"),
        ("307", "redirects to, https://b.example/v1"),
    ],
)
def test_refused_request_ends_with_one_line(status: str, says: str, ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused request ends the run at once with a one-line error that does not show the key."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    message = "the context has 2048 tokens,\n  key sk-secret " + "and so on " * 100
    with serve(always=status, message=message, headers={"Location": "https://b.example/v1"}) as served:
        with pytest.raises(UserError, match=says) as raised:
            list(ask(served, concurrency=4).complete(prompts(100), **HOT))
        stats = served.stats
    line = str(raised.value)
    assert "the context has 2048 tokens, key *** and" in line and served.base_url in line
    assert "\n" not in line and len(line) < 600
    assert len(stats.requests) <= 8, "queued prompts are not sent"
    assert {body["authorization"] for body in stats.requests} == {"Bearer sk-secret"}


def test_url_without_v1_is_explained(ask: Any) -> None:
    """An address without /v1 gives an error that explains it."""
    with serve() as served, pytest.raises(UserError, match=r"status 404 for .*Not Found.*ends in /v1"):
        list(ask(served.base_url.removesuffix("/v1")).complete(prompts(3), **HOT))


def test_api_key_from_environment_is_not_recorded(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The API key is read from the environment and is not recorded."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    with serve(key="sk-mine") as served:
        server = ask(served.base_url + "/")
        assert len(list(server.complete(prompts(2), **HOT))) == 2
        assert (server.model, server.base_url) == ("tiny", served.base_url)
    assert ask("http://me:pass@localhost:1/v1", model="tiny").base_url == "http://localhost:1/v1"


def test_model_is_the_named_or_first_listed(ask: Any) -> None:
    """The model is the one named, else the first that the server lists."""
    with serve(models=["first", "second"]) as served:
        for name, wanted in ((None, "first"), ("mine", "mine")):
            server = ask(served, model=name)
            list(server.complete(prompts(2), **HOT))
            assert {body["model"] for body in served.stats.requests[-2:]} == {wanted}
            assert server.model == wanted
    with serve(models=[]) as served, pytest.raises(UserError, match="lists no model; name one"):
        _ = ask(served).model


@pytest.mark.parametrize("always", ["drop", "garbage", "503"])
def test_persistent_fault_ends_after_all_attempts(always: str, ask: Any) -> None:
    """A fault that persists ends the run after all attempts."""
    with serve(always=always) as served:
        with pytest.raises(
            UserError, match=r"/v1/completions: no answer in 3 attempts, the last one failed with .+; check that"
        ) as raised:
            list(ask(served, ATTEMPTS=3, concurrency=1).complete([(4, [7])], **HOT))
        assert len(served.stats.requests) == 3
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("patch", [{"finish_reason": "abort"}, {"text": None}, {"token_ids": ["a"]}, {"matched_stop": [1]}])
def test_malformed_reply_is_not_accepted(patch: dict[str, Any], ask: Any) -> None:
    """A malformed reply is not accepted."""
    with (
        serve(patch=patch) as served,
        pytest.raises(UserError, match="no answer in 2 attempts, the last one failed with a reply w"),
    ):
        list(ask(served, ATTEMPTS=2).complete([(4, [7])], **HOT))


def test_unreachable_server_gives_one_line(ask: Any) -> None:
    """A server that cannot be reached gives a one-line error."""
    with socket.socket() as taken:  # bound but not listening, so connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        for model in (None, "tiny"):
            with pytest.raises(UserError, match="no answer in 3 attempts, the last one failed with ConnectError") as raised:
                list(ask(url, model=model).complete(prompts(9), **HOT))
            assert url in str(raised.value) and "\n" not in str(raised.value)


def test_hanging_server_times_out(ask: Any) -> None:
    """A server that never answers ends in a timeout after all attempts."""
    with serve(always="hang") as served:
        with pytest.raises(UserError, match="no answer in 2 attempts, the last one failed with ReadTimeout"):
            list(ask(served, ATTEMPTS=2, TIMEOUT=0.2).complete([(0, [7])], **HOT))
        assert len(served.stats.requests) == 2


def wait_until(condition: Any) -> None:
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("always", ["hang", "429"])
def test_close_does_not_wait_for_requests(always: str, ask: Any) -> None:
    """Closing ends at once, whatever is in flight, and leaves no thread."""
    # The other requests hang on the server, or wait for the 1000 s that it asked for.
    with serve(always=always, after=1, headers={"Retry-After": "1000"}) as served:
        threads = threading.active_count()
        answers = ask(served, concurrency=4, TIMEOUT=600).complete(one_then_more(served), **HOT)
        next(answers)
        wait_until(lambda: len(served.stats.requests) >= 5)
        began = time.monotonic()
        answers.close()
        assert time.monotonic() - began < SOON
        wait_until(lambda: threading.active_count() <= threads)
        if always == "hang":
            wait_until(lambda: served.stats.hung_up >= 4)  # a real server then stops decoding
        assert len(served.stats.requests) <= 9


def test_error_in_prompts_stops_the_requests(ask: Any) -> None:
    """An error of the prompt iterator stops the requests in flight."""

    def broken() -> Iterator[tuple[int, list[int]]]:
        yield from prompts(3)
        raise OSError("the disk is gone")

    with serve(always="hang") as served:
        began = time.monotonic()
        with pytest.raises(OSError, match="the disk is gone"):
            list(ask(served, TIMEOUT=600).complete(broken(), **HOT))
        assert time.monotonic() - began < SOON


def test_interrupt_ends_at_once(ask: Any) -> None:
    """An interrupt ends at once although the server hangs."""
    with serve(always="hang") as served:

        def interrupt() -> None:
            wait_until(lambda: served.stats.requests)
            os.kill(os.getpid(), signal.SIGINT)

        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            threading.Thread(target=interrupt).start()
            list(ask(served, TIMEOUT=600).complete(prompts(50), **HOT))
        assert time.monotonic() - began < 2 * SOON


def test_program_with_open_iterator_still_ends() -> None:
    """A program that leaves the iterator open still ends."""
    script = (
        "import sys\nfrom types import SimpleNamespace\nfrom trainkit.data.openai_client import CompletionClient\n"
        "from tests.support.fake_server import Served, one_then_more\n"
        "server = CompletionClient(sys.argv[1], concurrency=2, tokenizer=SimpleNamespace(eos_token_id=None))\n"
        "answers = server.complete(one_then_more(Served(sys.argv[1])), temperature=0)\n"
        "print(next(answers).id)\n"
    )
    with serve(always="429", after=1, headers={"Retry-After": "1000"}) as served:
        done = subprocess.run(
            [sys.executable, "-c", script, served.base_url],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=Path(__file__).parents[2],
            check=False,
        )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_request_seed_depends_on_seed_and_number_only(ask: Any) -> None:
    """The seed of a request depends only on the run's seed and the prompt's number."""
    asked = prompts(30)
    seeds, texts = [], []
    with serve(delay=0.01) as served:
        for order, concurrency in ((asked, 1), (asked[::-1], 8)):
            before = len(served.stats.requests)
            texts.append({answer.id: answer.text for answer in ask(served, concurrency=concurrency).complete(order, **HOT)})
            seeds.append({json.dumps(body["prompt"]): body["seed"] for body in served.stats.requests[before:]})
        list(ask(served).complete(asked[:1], **HOT | {"seed": 6}))
        other = served.stats.requests[-1]["seed"]
    assert seeds[0] == seeds[1] and texts[0] == texts[1]
    assert len(set(seeds[0].values())) == 30 and all(0 <= value < 2**31 for value in seeds[0].values())
    assert other != seeds[0][json.dumps(asked[0][1])]


def test_request_body(ask: Any) -> None:
    """The body of a request has exactly the documented fields."""
    with serve() as served:
        list(ask(served).complete([(3, [7, 8])], temperature=0.5, top_p=0.9, max_new_tokens=6, seed=1))
        list(ask(served).complete([(3, [7, 8])], temperature=0.5, top_k=20, max_new_tokens=6, seed=1))
        without, with_k = (
            {k: v for k, v in body.items() if k not in ("at", "authorization")} for body in served.stats.requests
        )
    own = {"model": "tiny", "prompt": [7, 8], "seed": request_seed(1, 3), "return_token_ids": True}
    assert without == own | {"max_tokens": 6, "temperature": 0.5, "top_p": 0.9}
    assert with_k == own | {"max_tokens": 6, "temperature": 0.5, "top_p": 1.0, "top_k": 20}


def test_duplicate_prompt_number_is_an_error(ask: Any) -> None:
    """Two prompts with one number are an error."""
    with serve() as served, pytest.raises(AssertionError, match="request 3 is sent twice"):
        list(ask(served).complete([(3, [7]), (3, [8])], temperature=0))


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "/v1", "", "ftp://host/v1", "http://", "http://host/v1?a=1", "http://h:p/v1"]
)
def test_invalid_url_is_refused(url: str, ask: Any) -> None:
    """An invalid address is refused."""
    with pytest.raises(UserError, match="give it as http://HOST:PORT/v1"):
        ask(url)


def test_a_key_with_a_line_break_is_refused(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that no HTTP header can carry is refused before any request."""
    monkeypatch.setenv("OPENAI_API_KEY", "a\nb")
    with pytest.raises(UserError, match="API key"):
        ask("http://localhost:1/v1")
