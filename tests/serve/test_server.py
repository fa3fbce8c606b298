"""The server over a real session, with the official client: its texts are those of `Runner.generate`."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from pathlib import Path

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.support.models import lm_draft, near
from tests.support.servers import connect, launched, running, wait_until
from trainkit import cli
from trainkit.data.openai_client import CompletionClient, request_seed
from trainkit.data.text.chat_template import Encoder
from trainkit.runner import Runner
from trainkit.runner.options import GenerateOptions
from trainkit.serve.app import build_api

PROMPTS = ["How many clips?", "In May she sold", "altogether é 48", "and then half as many"]
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.7, "top_p": 0.8, "seed": -4},
    {"temperature": 1.2, "top_k": 7, "seed": 5},
]


def load(folder: Path, drafts: bool = True, device: str = "cpu") -> Runner:
    """The tiny target, with a draft near it."""
    plain = Runner.load(folder, device=device, max_len=512)
    if not drafts:
        return plain
    draft = lm_draft(plain.shape, near(plain.rounds.target, 0.02)).to(device)
    return Runner(plain.rounds.target, draft, plain.shape, folder, max_batch=8, max_len=512)


@pytest.fixture(scope="module")
def alone(tiny_target):
    """A runner of its own that decodes plainly, for the expected texts."""
    return load(tiny_target, drafts=False)


def serve(folder, rows: int, queue: int = 256, device: str = "cpu", **options):
    runner = load(folder, device=device)
    return build_api(runner, runner.session(rows, GenerateOptions(**options)), queue, "tiny")


@pytest.fixture(scope="module")
def server(tiny_target):
    """URL of a server that drafts trees over four rows."""
    with running(serve(tiny_target, 4, tree="dynamic:3,2,5")) as (url, _):
        yield url


def fields(sampling: dict) -> dict:
    """The sampling as arguments of OpenAI's client, which does not know `top_k`."""
    known = {name: value for name, value in sampling.items() if name != "top_k"}
    return known | {"extra_body": {"top_k": sampling.get("top_k", 0)}}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_texts_are_those_of_generate(server, alone, sampling):
    """Whole and streamed texts equal those of `Runner.generate`: for texts and token ids, with n = 2, and for a chat."""
    client, options = connect(server), {"model": "tiny", "max_tokens": 40, "n": 2}
    expected = [alone.generate([prompt], 40, n=2, **sampling) for prompt in PROMPTS]
    texts = [output.text for outputs in expected for output in outputs]
    ids = [alone.tokenizer.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    for prompt in (PROMPTS, ids):
        whole = client.completions.create(prompt=prompt, **options, **fields(sampling))
        assert [choice.text for choice in whole.choices] == texts
        ends = [{"end": "stop"}.get(output.finish, output.finish) for outputs in expected for output in outputs]
        assert [choice.finish_reason for choice in whole.choices] == ends
        assert whole.usage.completion_tokens == sum(len(output.tokens) for outputs in expected for output in outputs)
    assert streamed(client.completions.create(prompt=PROMPTS, **options, **fields(sampling), stream=True)) == texts
    turns = [{"role": "system", "content": "Count."}, {"role": "user", "content": PROMPTS[0]}]
    chat = [output.text for output in alone.generate([Encoder(alone.tokenizer).prompt_ids(turns)], 40, n=2, **sampling)]
    whole = client.chat.completions.create(messages=turns, **options, **fields(sampling))
    assert [choice.message.content for choice in whole.choices] == chat
    assert streamed(client.chat.completions.create(messages=turns, **options, **fields(sampling), stream=True)) == chat


def streamed(stream) -> list[str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for chunk in stream:
        for choice in chunk.choices:
            piece = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (piece or "")
    return [texts[index] for index in sorted(texts)]


def test_stop_and_ignore_eos_are_those_of_generate(server, alone):
    """Stop strings and `ignore_eos` act as in `generate`."""
    client, options = connect(server), {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 60, "temperature": 1.0, "seed": 3}
    whole = alone.generate([PROMPTS[1]], 60, 1.0, seed=3, ignore_end=True)[0].text
    assert client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0].text == whole
    for stop in (whole[9:11], whole[20:24]):
        expected = alone.generate([PROMPTS[1]], 60, 1.0, seed=3, stop=stop, ignore_end=True)[0]
        choice = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True}).choices[0]
        assert (choice.text, choice.finish_reason) == (expected.text, "stop") and expected.finish == "stop"


def test_logprobs_are_the_targets(server, alone):
    """Log-probabilities equal those of `generate`, and the five likeliest tokens are sorted and contain a greedy choice."""
    client = connect(server)
    expected = alone.generate([PROMPTS[0]], 30, 1.0, seed=7, logprobs=True)[0]
    options = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 30, "temperature": 1.0, "seed": 7}
    found = client.completions.create(**options, logprobs=5).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert found.tokens == [alone.tokenizer.decode([token]) for token in expected.tokens]
    turns = [{"role": "user", "content": PROMPTS[0]}]
    options = {"model": "tiny", "messages": turns, "max_tokens": 20, "temperature": 0.0, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**options).choices[0].logprobs.content
    stream = client.chat.completions.create(**options, stream=True)
    assert [entry for chunk in stream if (part := chunk.choices[0].logprobs) for entry in part.content or []] == pytest.approx(
        whole
    )
    for entry in whole:
        likeliest = [other.logprob for other in entry.top_logprobs]
        assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
        assert entry.top_logprobs[0].token == entry.token and likeliest[0] == entry.logprob


def test_distillation_client_gets_the_tokens_of_generate(server, alone):
    """The client of `trainkit distill` gets token ids, end tokens included, that equal those of `generate`."""
    tokenizer, ids = alone.tokenizer, [alone.tokenizer.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    client = CompletionClient(f"{server}/v1", tokenizer=tokenizer, end_ids=alone.shape.end_ids)
    done = client.complete(enumerate(ids), temperature=1.0, max_new_tokens=40, seed=9)
    found = {completion.id: completion.tokens for completion in done}
    assert client.encoded == 0
    for index, prompt in enumerate(ids):
        assert found[index] == alone.generate([prompt], 40, 1.0, seed=request_seed(9, index))[0].tokens
    options = {
        "model": "tiny",
        "prompt": ids[0],
        "max_tokens": 20,
        "temperature": 0.0,
        "extra_body": {"return_token_ids": True},
    }
    stream = connect(server).completions.create(**options, stream=True)
    assert [id for chunk in stream for id in chunk.choices[0].token_ids] == alone.generate([ids[0]], 20)[0].tokens


def test_seed_repeats_a_text(server):
    """The same seed gives the same text; without one, the response names the seed that repeats it."""
    client, options = connect(server), {"model": "tiny", "prompt": PROMPTS[2], "max_tokens": 30, "temperature": 1.0}
    one, other = (client.completions.create(**options) for _ in range(2))
    assert one.trainkit["seed"] != other.trainkit["seed"] and one.choices[0].text != other.choices[0].text
    again = [client.completions.create(**options, seed=one.trainkit["seed"]) for _ in range(2)]
    assert [response.choices[0].text for response in again] == [one.choices[0].text] * 2


def test_measures_are_in_body_and_last_chunk(server):
    """The field `trainkit` has the counts of decoding, in a whole response and in a stream's last chunk."""
    client, options = connect(server), {"model": "tiny", "prompt": "clips " * 70, "max_tokens": 40, "temperature": 0.0}
    whole = client.completions.create(**options)
    measures = whole.trainkit
    counted = measures["rounds"] + measures["accepted"]
    assert 0 < counted <= whole.usage.completion_tokens - 1 and measures["tau"] == pytest.approx(
        counted / measures["rounds"], abs=1e-4
    )
    assert min(measures["queue_s"], measures["prefill_s"], measures["decode_s"]) >= 0
    assert measures["prefilled"] + measures["shared"] == whole.usage.prompt_tokens
    for more in ({}, {"stream_options": {"include_usage": True}}):
        chunks = list(client.completions.create(**options, stream=True, **more))
        assert chunks[-1].trainkit["rounds"] == measures["rounds"] and chunks[-1].trainkit["shared"] > 0
        assert not any(hasattr(chunk, "trainkit") for chunk in chunks[:-1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_concurrent_requests_get_their_own_texts(tiny_target, device):
    """64 concurrent requests of four samplings over 8 rows, half of them streamed: each text is that of `generate`."""
    alone = load(tiny_target, drafts=False, device=device)
    jobs = [(PROMPTS[i % 4] + str(i), 5 + i % 30, SAMPLINGS[i // 4 % 4], i % 2 == 1) for i in range(64)]
    expected = [alone.generate([prompt], length, **sampling)[0].text for prompt, length, sampling, _ in jobs]
    api = serve(tiny_target, 8, device=device, depth=3)

    async def ask(url):
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=50, max_retries=0) as client:

            async def one(prompt, length, sampling, stream):
                options = {"model": "tiny", "prompt": prompt, "max_tokens": length, **fields(sampling)}
                if not stream:
                    return (await client.completions.create(**options)).choices[0].text
                chunks = await client.completions.create(**options, stream=True)
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*(one(*job) for job in jobs))

    with running(api) as (url, _):
        assert asyncio.run(ask(url)) == expected
        assert api.engine.session.idle and api.engine.open == 0


def test_closed_stream_frees_the_row_of_a_session(tiny_target, alone):
    """Closing a stream frees its row within a second, and the neighbour's text is unchanged."""
    api = serve(tiny_target, 2, depth=3)
    options = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 450, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    expected = alone.generate([PROMPTS[1]], 450, 0.0, ignore_end=True)[0].text
    with running(api) as (url, _):
        client = connect(url)
        neighbour = client.completions.create(**options, stream=True)
        first = next(neighbour)
        closed = client.completions.create(**options | {"prompt": PROMPTS[0]}, stream=True)
        next(closed)
        assert api.engine.session.load.live == 2
        closed.close()
        wait_until(lambda: api.engine.session.load.live == 1, 1)
        assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in neighbour) == expected
        wait_until(lambda: api.engine.session.load.live == 0, 1)


def test_command_serves_until_sigterm(tiny_target):
    """The command serves, requires its key, and completes a stream after SIGTERM."""
    words = [
        "--target",
        str(tiny_target),
        "--rows",
        "2",
        "--served_name",
        "tiny",
        "--max_len",
        "512",
        "--api_key_env",
        "SECRET",
    ]
    with launched(*words, SECRET="abc") as (url, process):
        with pytest.raises(openai.AuthenticationError):
            connect(url).models.list()
        client = connect(url, "abc")
        options = {"model": "tiny", "prompt": "a", "max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**options, stream=True)
        text = "".join(next(stream).choices[0].text for _ in range(3))
        process.send_signal(signal.SIGTERM)
        chunks = list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len(text + "".join(chunk.choices[0].text for chunk in chunks)) > 400
        assert process.wait(20) == -signal.SIGTERM
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "rows 0: must be at least 1"),
        (["--queue", "-1"], "queue -1: must be at least 0"),
        (["--port", "70000"], "port 70000: must be from 0 to 65535; 0 takes any free port"),
        (["--host", "1.2.3.4"], "host 1.2.3.4, port 8000: Cannot assign requested address; choose another port, or an address"),
        (["--api_key_env", "NO_SUCH"], "api_key_env NO_SUCH: this environment variable is not set; put the key into it"),
        (["--depth", "2", "--tree", "[[0]]"], "give depth or tree, not both"),
        (["--depth", "2", "--port", "0"], "depth or tree given, but this runner was loaded without a drafter"),
        (["--max_len", "9000", "--port", "0"], "max_len"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_argument_of_serve_is_one_line(tiny_target, capsys, words, message):
    """A wrong argument gives one line and exit code 2, most of them before the models are loaded."""
    assert cli.main(["serve", "--target", str(tiny_target), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_memory_is_flat_over_2000_requests(tiny_target):
    """After a warm-up, 2,000 requests of all kinds, some abandoned, add nothing to the memory of the process."""
    api = serve(tiny_target, 4, depth=3)

    async def ask(url, count):
        async with httpx.AsyncClient(base_url=f"{url}/v1", timeout=30) as client:
            gate = asyncio.Semaphore(8)

            async def one(i):
                body = {
                    "model": "tiny",
                    "prompt": PROMPTS[i % 4],
                    "max_tokens": 4 + i % 9,
                    "stream": i % 2 == 0,
                    "logprobs": i % 3,
                }
                async with gate:
                    if i % 10:
                        assert (await client.post("/completions", json=body)).status_code == 200
                        return
                    async with client.stream("POST", "/completions", json=body | {"max_tokens": 400}) as response:
                        await anext(response.aiter_bytes())

            await asyncio.gather(*(one(i) for i in range(count)))

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    with running(api) as (url, _):
        asyncio.run(ask(url, 500))
        before = resident()
        asyncio.run(ask(url, 2000))
        grown = resident() - before
        assert api.engine.open == 0 and not asyncio.run(asyncio.sleep(0))
    assert grown < 8, f"{grown:.1f} MiB"
