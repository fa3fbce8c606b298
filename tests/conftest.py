"""What every test may use: a printed seed, a tiny target, and the `gpu` marker."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import sys
from pathlib import Path

import pytest

from tests.support.targets import make_target

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell leaves it for what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = int(os.environ.get("TRAINKIT_TEST_SEED") or secrets.randbelow(2**31))
os.environ["TRAINKIT_TEST_SEED"] = str(SEED)  # pytest-xdist's workers draw the same
if not Path("/dev/nvidiactl").exists():  # Triton's kernels run in its interpreter where there is no GPU
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _seed_line() -> str:
    return f"random inputs: TRAINKIT_TEST_SEED={SEED} draws the same again"


def pytest_configure() -> None:
    import hypothesis.core

    hypothesis.core.global_force_seed = SEED  # so that the printed seed repeats its examples too


def pytest_report_header() -> str:
    return _seed_line()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(_seed_line())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def seed() -> int:
    """This session's seed, fresh unless TRAINKIT_TEST_SEED names it; Python's and torch's generators start from it."""
    random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)
    return SEED


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (4 layers, 64 wide, 4 heads, 2 KV heads, V 320, tied, float32) with its tokenizer; read only."""
    return make_target(tmp_path_factory.mktemp("targets") / "tiny-llama")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 64 prompts and responses to train on."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    answers = [f"In May she sold {n} / 2 = {n / 2} clips. " * (1 + n % 3) for n in range(64)]
    path.write_text("".join(json.dumps({"prompt": f"How many of {n}?", "response": a}) + "\n" for n, a in enumerate(answers)))
    return path
