"""Plain greedy decoding on a CPU by trainkit, transformers and OpenVINO GenAI, in turn: tokens per second of one prompt each.

    OMP_NUM_THREADS=2 TRAINKIT_OUTSIDE=$PWD/.outside python -m tests.outside.cpu_speed TARGET [--dtype bfloat16] [--batch 8]
        [--quantised FOLDER [--drafter FOLDER --depth 4]]

Every program decodes the same prompts with as many threads as torch has, ignoring end tokens, prompt included in the time. The
processor time of all threads is shown too: it says more than seconds where other programs need the cores. OpenVINO GenAI runs
in float32 and alone in batch 1. With a quantised folder of the target, trainkit decodes it too, also with the drafter, and
OpenVINO GenAI decodes the target with weights that it has rounded to int8 itself.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import GenerationConfig

from tests.support import outside
from trainkit.eval.bench.transformers import load_model
from trainkit.runner import Runner

Times = tuple[list[list[int]], list[float], list[float]]
"""The texts, and the seconds and processor seconds of each."""


def timed(decode: Callable[[list[int]], list[list[int]]], prompts: Sequence[list[int]]) -> Times:
    """Decodes one prompt after the other; `decode` returns the texts of a batch of copies."""
    texts, seconds, cpu_seconds = [], [], []
    for prompt in prompts:
        started = time.perf_counter(), time.process_time()
        texts.append(decode(prompt)[0])
        seconds.append(time.perf_counter() - started[0])
        cpu_seconds.append(time.process_time() - started[1])
    return texts, seconds, cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--batch", type=int, default=1, help="copies of each prompt that trainkit and transformers decode together"
    )
    parser.add_argument("--quantised", help="a quantised folder of the target")
    parser.add_argument("--drafter", help="a drafter for the quantised folder")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    threads, batch, new_tokens = torch.get_num_threads(), options.batch, options.new_tokens
    runner = Runner.load(options.target, dtype=options.dtype, max_batch=batch)
    questions = ["Tom has 3 boxes of 12 pencils and gives 7 away. How many are left?", "Why is the sky blue?"]
    prompts = [runner.tokenizer.encode(question) for question in questions]
    model = load_model(options.target, torch.device("cpu"), getattr(torch, options.dtype))
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    def decoding(runner: Runner, depth: int = 0) -> Callable[[Sequence[list[int]]], Times]:
        def ours(prompt: list[int]) -> list[list[int]]:
            outputs = runner.generate([prompt] * batch, max_new_tokens=new_tokens, ignore_end=True, depth=depth)
            return [output.tokens for output in outputs]

        return lambda prompts: timed(ours, prompts)

    @torch.inference_mode()
    def theirs(prompt: list[int]) -> list[list[int]]:
        ids = torch.tensor([prompt] * batch)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
        return found[:, len(prompt) :].tolist()

    with tempfile.TemporaryDirectory() as scratch:

        def openvino(prompts: Sequence[list[int]], int8: bool = False) -> Times:
            request = {"model": options.target, "prompts": [prompts[0], *prompts], "new_tokens": new_tokens, "int8": int8}
            answer = outside.ask("openvino", "openvino_pipeline", request | {"scratch": scratch, "threads": threads})
            return answer["tokens"][1:], answer["seconds"][1:], answer["cpu_seconds"][1:]  # the first is a warm-up

        programs: dict[str, Callable[[Sequence[list[int]]], Times]] = {
            "trainkit": decoding(runner),
            "transformers": lambda prompts: timed(theirs, prompts),
        }
        if batch == 1 and options.dtype == "float32":
            programs["OpenVINO GenAI"] = openvino
        if options.quantised:
            quantised = Runner.load(options.quantised, options.drafter, dtype=options.dtype, max_batch=batch)
            programs["trainkit, quantised"] = decoding(quantised)
            if options.drafter:
                programs["the same, drafted"] = decoding(quantised, options.depth)
            if batch == 1:
                programs["OpenVINO, int8"] = partial(openvino, int8=True)
        texts = {name: program(prompts)[0] for name, program in programs.items()}
        runs: dict[str, list[Times]] = {name: [] for name in programs}
        for _ in range(options.repeats):
            for name, program in programs.items():
                runs[name].append(program(prompts))
    print(
        f"{options.target} {options.dtype} batch {batch}, {threads} threads, {new_tokens} new tokens, {options.repeats} repeats"
    )
    for name, times in runs.items():
        tokens = batch * new_tokens * len(prompts)
        speed, cpu = (statistics.median(tokens / sum(run[part]) for run in times) for part in (1, 2))
        equal = sum(text == own for text, own in zip(texts[name], texts["trainkit"], strict=True))
        print(
            f"{name:20s} {speed:8.1f} tokens/s {cpu:8.1f} tokens per processor second, {equal} of {len(prompts)} texts as ours"
        )


if __name__ == "__main__":
    main()
