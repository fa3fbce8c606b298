"""compressed-tensors: transformers reads our quantised folders with our logits, and we read those of the library."""

from __future__ import annotations

import pytest
import torch

from tests.support import outside
from tests.support.compressed import export_tiny
from tests.support.targets import make_target
from trainkit.eval.bench.identity import logits
from trainkit.export.model import export_model
from trainkit.models.load import load_decoder
from trainkit.models.target import load_model

pytestmark = pytest.mark.outside
IDS = [7 * index % 320 for index in range(32)]
TOLERANCE = {"atol": 2e-4, "rtol": 0}
"""Of float32 logits up to 20, whose sums another version of torch or transformers may order in another way."""


def test_plain_export_has_no_quantization(tmp_path):
    """A plain export has no quantization_config, and loads dense beside the library with our logits."""
    source = make_target(tmp_path / "source")
    out = export_model(load_model(source, torch.float32), tmp_path / "out", tokenizer=source).path
    theirs = outside.ask("compressed", "compressed_model", {"folder": str(out), "ids": IDS})
    assert theirs["quantization_config"] is None
    ours = logits(load_decoder(out, dtype=torch.float32), IDS)
    torch.testing.assert_close(torch.tensor(theirs["logits"]), ours, **TOLERANCE)


def test_folder_quantised_by_the_library_is_read(tmp_path):
    """An int8 folder that the library wrote has the same logits in the runner, which keeps its weights packed."""
    out = str(tmp_path / "int8")
    theirs = outside.ask("compressed", "compressed_model", {"folder": str(make_target(tmp_path / "source")), "out": out})
    assert theirs["quantization_config"]["quant_method"] == "compressed-tensors"
    theirs = outside.ask("compressed", "compressed_model", {"folder": out, "ids": IDS})
    decoder = load_decoder(out, dtype=torch.float32)
    assert decoder.layers[0].mlp.down.packed is not None
    torch.testing.assert_close(torch.tensor(theirs["logits"]), logits(decoder, IDS), **TOLERANCE)


@pytest.mark.parametrize("environment", ["compressed", "transformers4"])
def test_quantised_exports_load_elsewhere(tmp_path, environment):
    """int4, int8 and float8 exports have our logits in other environments; transformers 4.57 refuses zero points by a size."""
    source = make_target(tmp_path / "source")
    grids = {"int4": {}, "zero": {"symmetric": False}, "int8": {"bits": 8, "group": None}}
    grids["fp8"] = grids["int8"] | {"kind": "float"}
    if environment == "transformers4":
        del grids["zero"]
    folders = [export_tiny(source, tmp_path / name, **options).path for name, options in grids.items()]
    jobs = [{"model": str(folder), "ids": IDS} for folder in folders]
    answers = outside.ask(environment, "transformers_model", {"jobs": jobs})["answers"]
    for folder, theirs in zip(folders, answers, strict=True):
        torch.testing.assert_close(torch.tensor(theirs["logits"]), logits(load_decoder(folder), IDS), **TOLERANCE)
