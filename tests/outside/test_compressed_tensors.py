"""compressed-tensors: our exports carry no quantisation yet, and what it writes is refused by the runner, by name.

When compressed exports exist, they belong here: reloaded by this library with equal logits.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import outside
from tests.support.targets import make_target
from trainkit.errors import UserError
from trainkit.eval.bench.identity import logits
from trainkit.export.model import export_model
from trainkit.models.load import load_decoder
from trainkit.models.target import load_model
from trainkit.runner import Runner

pytestmark = pytest.mark.outside
IDS = [7 * index % 320 for index in range(32)]


def test_plain_export_has_no_quantization(tmp_path):
    """A plain export has no quantization_config, and loads dense beside the library with our logits."""
    source = make_target(tmp_path / "source")
    out = export_model(load_model(source, torch.float32), tmp_path / "out", tokenizer=source).path
    theirs = outside.ask("compressed", "compressed_model", {"folder": str(out), "ids": IDS})
    assert theirs["quantization_config"] is None
    ours = logits(load_decoder(out, dtype=torch.float32), IDS)
    torch.testing.assert_close(torch.tensor(theirs["logits"]), ours, atol=2e-4, rtol=0)


def test_quantised_target_is_refused_by_name(tmp_path):
    """The runner refuses a target that the library quantised, in one line that names the folder."""
    out = str(tmp_path / "int8")
    theirs = outside.ask("compressed", "compressed_model", {"folder": str(make_target(tmp_path / "source")), "out": out})
    assert theirs["quantization_config"]["quant_method"] == "compressed-tensors"
    with pytest.raises(UserError, match=rf"{out}/config.json: quantised weights are not supported by the runner"):
        Runner.load(out)
