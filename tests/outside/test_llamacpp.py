"""llama.cpp decodes exported targets with exported draft models and EAGLE-3 drafts: our texts, and our rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import outside
from tests.support.targets import make_target

pytestmark = pytest.mark.outside
DEPTH, NEW_TOKENS = 3, 40


def check(target: Path, drafter: Path | None, part: str, prompts: list[list[int]], scratch: Path) -> outside.Decoded:
    """Decodes in llama.cpp and in our runner, compares texts and accepted tokens, and returns ours."""
    request: dict[str, Any] = {"model": str(target), "prompts": prompts, "new_tokens": NEW_TOKENS, "scratch": str(scratch)}
    theirs = outside.ask("llamacpp", "llamacpp_server", request | ({part: str(drafter), "depth": DEPTH} if drafter else {}))
    ours = outside.decode(target, drafter, prompts, NEW_TOKENS, DEPTH if drafter else None)
    print(outside.check_decoded(target, prompts, ours, outside.Decoded(theirs["tokens"], theirs["accepted"]), exact=True))
    return ours


@pytest.mark.parametrize("rope", outside.ROPES)
def test_draft_model_decodes_as_in_ours(rope, seed, tmp_path):
    """For every rope type: the plain text, and with a draft model the text and the accepted tokens of each prompt."""
    target = make_target(tmp_path / "target", rope_parameters=outside.ROPES[rope])
    prompts = outside.tiny_prompts()
    check(target, None, "draft", prompts, tmp_path)
    ours = check(target, outside.near_draft(target, tmp_path / "draft"), "draft", prompts, tmp_path)
    assert 1.05 < ours.tau() < 3.9, "the draft is sometimes right and sometimes wrong"


@pytest.mark.parametrize(
    "options", [{}, {"draft_vocab": list(range(0, 320, 2))}, {"taps": [1, 3, 6]}], ids=["full", "trimmed", "taps"]
)
def test_eagle_decodes_as_in_ours(options, seed, tmp_path):
    """EAGLE-3 with a full and a trimmed vocabulary and with taps of its own: text and accepted tokens of each prompt."""
    target, prompts = make_target(tmp_path / "target", num_hidden_layers=8), outside.tiny_prompts()
    draft = outside.trained_eagle(target, tmp_path / "draft", prompts, NEW_TOKENS, drafter=options)
    assert check(target, draft, "eagle", prompts, tmp_path).tau() > 1.05
