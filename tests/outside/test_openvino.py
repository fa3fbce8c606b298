"""OpenVINO GenAI decodes exported targets with exported draft models and EAGLE-3 drafts: our texts, and our rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import outside
from tests.support.targets import make_target

pytestmark = pytest.mark.outside
DEPTH, NEW_TOKENS, LAYERS = 3, 40, 10  # with fewer than 10 layers it asks for EAGLE-3's taps


@pytest.mark.parametrize("kind", ["draft", "eagle"])
def test_decodes_as_in_ours(kind, seed, tmp_path: Path):
    """Plain text, and with a drafter the text and the accepted tokens of each prompt.

    Its counter leaves out the round that ends a text. For EAGLE-3 it takes the hidden states after layers 3, L/2 + 1 and L - 2,
    one further than the paper's and our default, whatever the draft's config.json says; the draft here is trained with those.
    """
    target, prompts = make_target(tmp_path / "target", num_hidden_layers=LAYERS), outside.tiny_prompts()
    if kind == "draft":
        draft = outside.near_draft(target, tmp_path / "draft", num_layers=LAYERS, noise=0.006)
    else:
        taps = [3, LAYERS // 2 + 1, LAYERS - 2]
        draft = outside.trained_eagle(target, tmp_path / "draft", prompts, NEW_TOKENS, steps=30, drafter={"taps": taps})
    for drafter in (None, draft):
        request = {"model": str(target), "prompts": prompts, "new_tokens": NEW_TOKENS, "scratch": str(tmp_path / "scratch")}
        extra = {"draft": str(draft), "eagle": kind == "eagle", "depth": DEPTH} if drafter else {}
        theirs = outside.ask("openvino", "openvino_pipeline", request | extra)
        ours = outside.decode(target, drafter, prompts, NEW_TOKENS, DEPTH if drafter else None)
        last = ours.last if drafter else [0] * len(prompts)
        accepted = [count + end for count, end in zip(theirs["accepted"], last, strict=True)]
        print(outside.check_decoded(target, prompts, ours, outside.Decoded(theirs["tokens"], accepted), exact=True))
    assert 1.05 < ours.tau() < 3.9, "the draft is sometimes right and sometimes wrong"
