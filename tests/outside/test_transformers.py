"""transformers 4.57, two major versions' readers of one folder: exported draft models and targets compute what ours compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SEED
from tests.support import outside
from tests.support.targets import make_target
from trainkit.eval.bench.identity import logits
from trainkit.export.model import export_model
from trainkit.models.load import load_decoder
from trainkit.models.target import load_model

pytestmark = pytest.mark.outside
DEPTH, NEW_TOKENS = 3, 48
IDS = [7 * index % 320 for index in range(96)]  # beyond the original length of llama3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Rope type -> an exported target and an exported draft model for it."""
    root, made = tmp_path_factory.mktemp("ropes"), {}
    torch.manual_seed(SEED)
    for name, rope in outside.ROPES.items():
        source = make_target(root / f"{name}-source", rope_parameters=rope)
        target = export_model(load_model(source, torch.float32), root / name, tokenizer=source).path
        made[name] = (target, outside.near_draft(target, root / f"{name}-draft"))
    return made


@pytest.fixture(scope="module")
def answers(folders) -> dict[str, Any]:
    """What transformers 4.57 computes for all folders, in one process: logits of target and draft, plain and assisted text."""
    prompts = outside.tiny_prompts()
    jobs: list[dict[str, Any]] = []
    for target, draft in folders.values():
        texts = {"model": str(target), "prompts": prompts, "new_tokens": NEW_TOKENS}
        jobs += [{"model": str(folder), "ids": IDS} for folder in (target, draft)]
        jobs += [texts, texts | {"assistant": str(draft), "depth": DEPTH}]
    found = outside.ask("transformers4", "transformers_model", {"jobs": jobs})
    assert found["version"].startswith("4.57.")
    names = ("target", "draft", "plain", "assisted")
    rows = [dict(zip(names, found["answers"][4 * i : 4 * i + 4], strict=True)) for i in range(len(outside.ROPES))]
    return {"prompts": prompts, **dict(zip(outside.ROPES, rows, strict=True))}


@pytest.mark.parametrize("rope", outside.ROPES)
@pytest.mark.parametrize("part", ["target", "draft"])
def test_logits_equal_ours_for_every_rope(rope, part, folders, answers):
    """Exported targets and draft models of every rope type give our logits in transformers 4.57."""
    folder = folders[rope][part == "draft"]
    ours = logits(load_decoder(folder, dtype=torch.float32), IDS)
    theirs = torch.tensor(answers[rope][part]["logits"])
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)  # logits of size 10; float32, other kernels


@pytest.mark.parametrize("rope", outside.ROPES)
def test_assisted_text_and_rounds_equal_ours(rope, folders, answers):
    """As assistant_model a draft gives our greedy text, and as many accepted tokens as in our runner, for each prompt."""
    target, draft = folders[rope]
    prompts = answers["prompts"]
    for name, drafter in (("plain", None), ("assisted", draft)):
        ours = outside.decode(target, drafter, prompts, NEW_TOKENS, DEPTH if drafter else None)
        print(name, rope, outside.check_decoded(target, prompts, ours, outside.Decoded(**answers[rope][name]), exact=True))
    assert 0.1 < sum(ours.accepted) / sum(map(len, ours.tokens)) < 0.74, "the draft is sometimes right and sometimes wrong"
