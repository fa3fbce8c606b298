"""Greedy text in llama.cpp (xllamacpp's server), alone or with a draft model or an EAGLE-3 draft.

Request: `model`, `prompts`, `new_tokens`; with a drafter `draft` or `eagle`, and `depth`; `scratch`, a folder for GGUF files.
Answer: `tokens`, and `accepted` as the server counts it.
"""

import json
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import xllamacpp
from gguf_file import convert


def parameters(model, longest, drafter, kind, depth):
    """Float32 everywhere, one slot, one thread (several wait for one another by spinning); drafts of `depth`, no threshold."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, longest, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.n_gpu_layers, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = 0, 1, 1
    params.fit_params, params.use_jinja, params.cache_prompt, params.cache_ram_mib = False, False, False, 0
    if drafter:
        draft = params.speculative.draft
        params.speculative.types = [getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_DRAFT_{kind}")]
        draft.mparams.path, draft.n_max, draft.n_min, draft.p_min, draft.n_gpu_layers = drafter, depth, 0, 0.0, 0
        draft.cache_type_k = draft.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = 1
    return params


def post(server, values):
    """The answer of llama.cpp's own completion endpoint, which returns token ids."""
    request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(values).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


def main(request):
    scratch, drafter, kind = Path(request["scratch"]), None, ""
    convert(request["model"], model := str(scratch / "model.gguf"))
    for name, kind_of in (("draft", "SIMPLE"), ("eagle", "EAGLE3")):
        if folder := request.get(name):
            drafter, kind = str(scratch / f"{name}.gguf"), kind_of
            convert(folder, drafter, request["model"] if name == "eagle" else None)
    longest = max(map(len, request["prompts"])) + request["new_tokens"] + 64
    server = xllamacpp.Server(parameters(model, longest, drafter, kind, request.get("depth", 0)))
    tokens, accepted = [], []
    for prompt in request["prompts"]:
        options = {"prompt": prompt, "n_predict": request["new_tokens"], "temperature": 0.0, "top_k": 1}
        found = post(server, {**options, "return_tokens": True, "cache_prompt": False})
        tokens.append(found["tokens"])
        accepted.append(found["timings"].get("draft_n_accepted", 0))
    print(json.dumps({"version": version("xllamacpp"), "tokens": tokens, "accepted": accepted}), flush=True)


main(json.load(sys.stdin))
