"""`trainkit serve`: loads the models and answers OpenAI clients until it is stopped."""

from __future__ import annotations

import asyncio
import ipaddress
import os
from importlib.util import find_spec
from pathlib import Path

from trainkit.data.sets.writer import quiet_libraries
from trainkit.errors import UserError, note
from trainkit.models.load import covered_positions
from trainkit.runner.engine import Runner
from trainkit.runner.options import GenerateOptions
from trainkit.runner.round import PREFILL_CHUNK

MAX_LEN = 4096
"""Default of `--max_len`, or fewer if the target covers fewer positions."""


def serve(
    *,
    target: str,
    drafter: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    rows: int = 8,
    max_len: int | None = None,
    queue: int = 256,
    prefill: int = PREFILL_CHUNK,
    depth: int | None = None,
    tree: str | None = None,
    policy: str | None = None,
    sharing: bool = True,
    served_name: str | None = None,
    api_key_env: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> None:
    """Serves a target to OpenAI clients at http://HOST:PORT/v1; with a drafter the texts are the same and come sooner.

    Endpoints: /v1/completions, /v1/chat/completions and /v1/models as OpenAI documents them, /health, and /metrics for
    Prometheus. A request with a field that is not implemented (penalties, tools, JSON schemas, ...) gets an error that names
    it. The server runs one model on one device in one process; it is for trying a drafter with real clients and for measuring
    it under load.

    SIGTERM or Ctrl-C stops the server; texts that are being decoded have 30 s to end.

    Examples:
        trainkit serve --target models/target --drafter models/draft
        trainkit serve --target models/target --drafter models/draft --rows 16 --policy cost --served_name mymodel
        SECRET=abc trainkit serve --target models/target --host 0.0.0.0 --api_key_env SECRET

    Args:
        target: Hugging Face folder of the target.
        drafter: Drafter bundle, or a plain folder of a small model with the same tokenizer.
        host: Address to listen on; by default only programs on this machine can connect. 0.0.0.0 is every IPv4 address.
        port: Port to listen on; 0 takes any free one.
        rows: Number of texts decoded together; further ones wait.
        max_len: Largest number of tokens of prompt and text together; each row has room for them. By default 4096, or as
            many as the target covers if these are fewer.
        queue: Number of texts that may wait for a row; if it is full, requests are refused with status 429.
        prefill: Largest number of prompt tokens read between two rounds while texts are decoded.
        depth: Number of tokens drafted in a round, as a chain; 0 decodes plainly. By default the tree that the drafter's bundle
            recommends, or a chain of 4.
        tree: Draft a tree instead of a chain, as in `generate`.
        policy: Choose the depth in every round, as in `generate`.
        sharing: Whether a prompt reuses the cached prefix that it has in common with an earlier text.
        served_name: Name of the model for clients; by default that of the target's folder.
        api_key_env: Name of an environment variable that holds the API key; /v1 then requires it.
        device: Torch device; `auto` uses a GPU if there is one.
        dtype: float32, bfloat16 or float16.

    Raises:
        UserError: a wrong argument, the packages of the extra `serve` are missing, or the port is in use.
    """
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise UserError("serve needs starlette and uvicorn; pip install -e '.[serve]' in the checkout installs them")
    from trainkit.serve.app import build_api
    from trainkit.serve.server import Server, bind

    # Check what can be checked before the models are loaded.
    for name, value in (("rows", rows), ("prefill", prefill)):
        if value < 1:
            raise UserError(f"{name} {value}: must be at least 1")
    if queue < 0:
        raise UserError(f"queue {queue}: must be at least 0")
    options = GenerateOptions(depth=depth, tree=tree, policy=policy)
    key = None if api_key_env is None else os.environ.get(api_key_env)
    if api_key_env is not None and not key:
        raise UserError(f"api_key_env {api_key_env}: this environment variable is not set; put the key into it")
    socket = bind(host, port)
    if key is None and not ipaddress.ip_address(socket.getsockname()[0]).is_loopback:
        note(f"{host} can be reached from other machines, and no API key is required; --api_key_env sets one")
    # Load, and serve.
    quiet_libraries()
    if max_len is None and Path(target).is_dir():
        max_len = min(MAX_LEN, covered_positions(Path(target)))
    runner = Runner.load(target, drafter, device=device, dtype=dtype, max_batch=rows, max_len=max_len)
    api = build_api(
        runner, runner.session(rows, options, prefill, sharing), queue, served_name or Path(target).resolve().name, key
    )
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{socket.getsockname()[1]}/v1"
    ready = f"serving {api.model} at {url}: {rows} rows of {runner.max_len} tokens, {queue} may wait"
    asyncio.run(Server(api.app(), api.engine, ready).serve([socket]))
