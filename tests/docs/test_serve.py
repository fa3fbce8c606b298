"""docs/serve.md: its command starts a server, and its requests are answered."""

from __future__ import annotations

import json
import shlex
import subprocess

import httpx

from tests.docs.test_snippets import ROOT, blocks, commands
from tests.support.servers import launched
from tests.support.targets import make_target
from trainkit.drafters.base import load_kind
from trainkit.export.drafter import export_drafter
from trainkit.models.target import FrozenTarget, target_shape

PAGE = ROOT / "docs" / "serve.md"


def test_commands_and_snippet_of_the_page_run(tmp_path, monkeypatch):
    """The page's server starts, curl and the Python example get answers, and the server with a key requires it."""
    target = make_target(tmp_path / "TARGET")
    drafter = load_kind("lm")(target_shape(target))
    drafter.initialise(FrozenTarget(target))
    export_drafter(drafter, tmp_path / "my-draft", tokenizer=target, target=target)
    monkeypatch.chdir(tmp_path)
    first, keyed = (words for words in commands(PAGE) if words[0] == "serve")
    with launched(*first[1:]) as (url, _):
        assert url.startswith("http://127.0.0.1:")
        port = url.rpartition(":")[2]
        # The request of curl.
        (curl,) = (code for code in blocks(PAGE, "bash") if code.startswith("curl"))
        words = shlex.split(curl.replace("\\\n", " ").replace(":8000", f":{port}"))
        done = subprocess.run([*words, "--max-time", "60"], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
        # The Python example.
        (snippet,) = blocks(PAGE, "python")
        exec(compile(snippet.replace(":8000", f":{port}"), PAGE.name, "exec"), {})
    with launched(*keyed[1:], "--host", "127.0.0.1", SECRET="abc") as (url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer abc"}).status_code == 200
