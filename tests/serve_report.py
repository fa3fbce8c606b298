"""Measures `trainkit serve` beside `Runner.generate`: tokens/s and time to first token with several clients, as a table.

python tests/serve_report.py --target DIR [--drafter DIR] --prompts FILE [--clients 1,4,16] [--tokens 48] [--count 16]

The server runs in a process of its own. Every request streams `--tokens` tokens greedily past end tokens. `generate` decodes
the same prompts with as many rows as there are clients, while the server is idle; both alternate `--repeats` times.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from pathlib import Path
from time import perf_counter

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.support.servers import launched
from trainkit.data.sets.writer import quiet_libraries
from trainkit.data.text.prompts import read_prompts
from trainkit.eval.bench.hardware import examine
from trainkit.runner import Runner


async def ask(url: str, prompts: list[list[int]], tokens: int, clients: int) -> tuple[float, list[float], int]:
    """Seconds for all prompts over so many clients, the time to the first token of each, and the number of tokens."""
    waiting, first, generated = list(prompts), [], 0

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal generated
        while waiting:
            body = {"model": "model", "prompt": waiting.pop(0), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            body |= {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
            began, seen = perf_counter(), False
            async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if not seen and line.startswith("data:"):
                        seen = True
                        first.append(perf_counter() - began)
                    if '"completion_tokens"' in line:
                        generated += int(line.partition('"completion_tokens": ')[2].partition(",")[0])

    async with httpx.AsyncClient(timeout=600) as http:
        began = perf_counter()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return perf_counter() - began, first, generated


def main() -> None:
    """Prints the machine and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--clients", default="1,4,16", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--tokens", default=48, type=int)
    parser.add_argument("--count", default=16, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    quiet_libraries()
    prompts = read_prompts(options.prompts, options.target, options.count)
    length = max(map(len, prompts)) + options.tokens
    runner = Runner.load(options.target, options.drafter, options.device, max_batch=max(options.clients), max_len=length)
    words = ["--target", options.target, *(["--drafter", options.drafter] if options.drafter else [])]
    words += ["--rows", str(max(options.clients)), "--max_len", str(length), "--served_name", "model", "--sharing", "false"]
    rates: dict[tuple[str, int], list[float]] = {}
    firsts: dict[int, list[float]] = {clients: [] for clients in options.clients}
    expected = len(prompts) * options.tokens
    with launched(*words, "--device", options.device) as (url, _):
        asyncio.run(ask(url, prompts[:1], 4, 1))
        runner.generate(prompts[:1], 4)
        for _ in range(options.repeats):
            for clients in options.clients:
                seconds, first, generated = asyncio.run(ask(url, prompts, options.tokens, clients))
                assert generated == expected, f"{generated} tokens, expected {expected}"
                rates.setdefault(("serve", clients), []).append(generated / seconds)
                firsts[clients] += first
                runner.scheduler.max_batch, began = clients, perf_counter()
                runner.generate(prompts, options.tokens, ignore_end=True)
                rates.setdefault(("generate", clients), []).append(expected / (perf_counter() - began))
    machine = examine(runner.device)
    print(f"{machine.processor}, {machine.threads} threads, {machine.versions}")
    print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {options.tokens} new each")
    print(
        "\n| clients | serve, tokens/s | `generate`, tokens/s | serve / generate | first token, median (95 %) |"
        "\n|---|---|---|---|---|"
    )
    for clients in options.clients:
        serve, alone = (statistics.median(rates[name, clients]) for name in ("serve", "generate"))
        ratio = statistics.median(a / b for a, b in zip(rates["serve", clients], rates["generate", clients], strict=True))
        waits = sorted(firsts[clients])
        late = waits[min(len(waits) - 1, int(0.95 * len(waits)))]
        print(f"| {clients} | {serve:.1f} | {alone:.1f} | {ratio:.2f} | {statistics.median(waits):.2f} s ({late:.2f} s) |")


if __name__ == "__main__":
    main()
