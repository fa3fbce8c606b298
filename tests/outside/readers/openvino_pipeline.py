"""Greedy text in OpenVINO GenAI on the CPU in float32, or with int8 weights, alone or with a draft model or an EAGLE-3 draft.

Request: `model`, `prompts`, `new_tokens`; with a drafter `draft`, `depth`, and `eagle` if it is EAGLE-3; `scratch`, a folder
for the converted models; `threads`, 1 by default; `int8`, whether the model's weights are rounded to int8, a scale per row.
Answer: `tokens`; `accepted` as the pipeline counts it; for each prompt `seconds`, and `cpu_seconds`, the time of all threads.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig

PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def convert(folder, out, eagle, int8=False):
    """Writes the folder `out` in OpenVINO's format with float32 weights, or int8 ones, unless it exists."""
    if not out.exists():
        options = {"task": "text-generation-with-past", "trust_remote_code": eagle, "convert_tokenizer": True}
        if int8:
            options["ov_config"] = OVConfig(quantization_config={"bits": 8, "sym": True})
        main_export(folder, out, **options)
    return str(out)


def main(request):
    scratch, extra, int8 = Path(request["scratch"]), {}, request.get("int8", False)
    properties = PRECISION | {"INFERENCE_NUM_THREADS": request.get("threads", 1)}
    scratch.mkdir(exist_ok=True)
    model = convert(request["model"], scratch / ("int8" if int8 else "model"), False, int8)
    if folder := request.get("draft"):
        draft = convert(folder, scratch / "draft", request.get("eagle", False))
        extra["draft_model"] = openvino_genai.draft_model(draft, "CPU", **properties)
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, **properties, **extra)
    tokens, accepted, seconds, cpu_seconds = [], [], [], []
    for prompt in request["prompts"]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = request["new_tokens"], False, True
        if extra:
            config.num_assistant_tokens = request["depth"]
        ids = np.array([prompt], dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        started = time.perf_counter(), time.process_time()
        found = pipeline.generate(inputs, config)
        seconds.append(time.perf_counter() - started[0])
        cpu_seconds.append(time.process_time() - started[1])
        tokens.append(list(found.tokens[0]))
        accepted.append(found.extended_perf_metrics.get_num_accepted_tokens() if extra else 0)
    answer = {"version": version("openvino_genai"), "tokens": tokens, "accepted": accepted}
    print(json.dumps(answer | {"seconds": seconds, "cpu_seconds": cpu_seconds}), flush=True)


main(json.load(sys.stdin))
