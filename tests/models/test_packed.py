"""Quantised folders in the runner: it holds their bytes, computes their dense weights, and refuses to replace them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.compressed import export_tiny, is_linear
from tests.support.targets import make_target
from trainkit.compress.quantise import Grid, quantise
from trainkit.drafters.lm import LMDraft
from trainkit.errors import UserError
from trainkit.eval.bench.identity import logits
from trainkit.export.drafter import export_drafter
from trainkit.layers.linear import Linear
from trainkit.models.compressed import quantization_config, stored_tensors
from trainkit.models.load import hf_tensors, load_decoder
from trainkit.models.target import FrozenTarget, load_model, target_shape
from trainkit.models.weights import read_tensors
from trainkit.runner import Runner

IDS = [7 * index % 320 for index in range(32)]


def resident(decoder) -> int:
    """Bytes that the decoder's weights take."""
    packed = sum(part.packed.nbytes for part in decoder.modules() if isinstance(part, Linear) and part.packed is not None)
    return packed + sum(weight.nbytes for weight in decoder.parameters())


GRIDS = [Grid(4, 32), Grid(4, 16, symmetric=False), Grid(8), Grid(8, 32, symmetric=False), Grid(8, kind="float")]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A target with biases on q, k and v and a head of its own."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    return make_target(tmp_path_factory.mktemp("wide"), "qwen2", tie_word_embeddings=False, **sizes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_decoder_holds_the_stored_bytes(wide, tmp_path, grid):
    """Packed weights take the bytes of the file to 10 %, with every grid, and compute what the dense ones compute."""
    fields = {name: getattr(grid, name) for name in ("bits", "group", "symmetric", "kind")}
    out = export_tiny(wide, tmp_path / "out", **fields).path
    packed, dense = load_decoder(out), load_decoder(out, packed=False)
    assert resident(packed) <= 1.1 * (out / "model.safetensors").stat().st_size
    assert resident(dense) == sum(weight.nbytes for _, weight in read_tensors(wide))
    torch.testing.assert_close(logits(packed, IDS), logits(dense, IDS), rtol=0, atol=1e-4)  # the order of sums may differ
    ours, theirs = hf_tensors(packed), dict(load_model(out, torch.float32).named_parameters())
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bits_that_differ_within_a_fused_layer(wide, tmp_path, seed):
    """q, k and v of other bits and groups are packed without changing a weight; beside a dense one they become dense."""
    grids = {"q_proj": Grid(4, 32), "k_proj": Grid(8), "v_proj": Grid(8, 16, symmetric=True), "up_proj": Grid(4, 16)}
    bits, group, tensors = {}, {}, []
    for name, value in read_tensors(wide):
        grid = grids.get(name.split(".")[-2]) if is_linear(name) else None
        if grid is None:
            tensors.append((name, value))
            continue
        module, found = name.removesuffix(".weight"), quantise(value, grid)
        bits[module], group[module] = grid.bits, grid.group
        tensors += stored_tensors(module, found.codes_RK, found.scale_RG, None, grid.bits).items()
    config = {"dtype": "float32", "quantization_config": quantization_config(bits, group)}
    out = export_tiny(wide, tmp_path / "out", config=config, tensors=tensors, compression={"method": "rtn", "layers": {}}).path
    decoder = load_decoder(out)
    layer = decoder.layers[1]
    assert layer.attention.qkv.packed.kind == "int8" and layer.attention.qkv.packed.group == 16
    assert layer.mlp.gate_up.packed is None and layer.mlp.down.packed is None
    ours, theirs = hf_tensors(decoder), dict(load_model(out, torch.float32).named_parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_scales_take_the_dtype_of_the_load(wide, tmp_path):
    """Loaded in bfloat16, weights are those of transformers in bfloat16, also when the decoder is converted afterwards."""
    out = export_tiny(wide, tmp_path / "out").path
    theirs = dict(load_model(out, torch.bfloat16).named_parameters())
    for decoder in (load_decoder(out, dtype=torch.bfloat16), load_decoder(out).to(torch.bfloat16)):
        ours = hf_tensors(decoder)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    widened = hf_tensors(load_decoder(out, dtype=torch.bfloat16).to(torch.float32))
    assert widened["model.layers.0.mlp.up_proj.weight"].dtype == torch.float32


def test_packed_weights_cannot_be_replaced(wide, tmp_path):
    """New values for a quantised weight are refused by name; other weights are replaced."""
    runner = Runner.load(export_tiny(wide, tmp_path / "out").path)
    runner.update([("model.norm.weight", torch.ones(64))])
    with pytest.raises(
        UserError, match="'model.layers.0.mlp.up_proj.weight' is quantised in this model and cannot be replaced"
    ):
        runner.update([("model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64))])


def test_packed_layers_of_wrong_size_are_refused(tiny_target, tmp_path):
    """A quantised weight that does not fit the config, or is missing, is refused by name."""
    out = export_tiny(tiny_target, tmp_path / "out").path
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    with pytest.raises(UserError, match=r"_proj.weight' is \[\d+, \d+\], but the config requires"):
        load_decoder(out)
    (out / "config.json").write_text(text.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(UserError, match="is missing; copy all weight files"):
        load_decoder(out)


def test_quantised_target_decodes_and_trains(tiny_target, tmp_path):
    """Speculative decoding of a quantised target gives its own plain text; a drafter may start from it and be quantised too."""
    out = export_tiny(tiny_target, tmp_path / "out", bits=8, group=None).path
    teacher = FrozenTarget(out)
    draft = LMDraft(target_shape(out), num_layers=4)
    draft.initialise(teacher)
    bundle = export_drafter(draft, tmp_path / "draft", tokenizer=out).path
    small = export_tiny(bundle, tmp_path / "small").path
    plain = Runner.load(out).generate([IDS[:8]], max_new_tokens=24)[0]
    found = [Runner.load(out, drafter).generate([IDS[:8]], max_new_tokens=24)[0] for drafter in (bundle, small)]
    assert [output.tokens for output in found] == [plain.tokens] * 2
    assert found[0].stats.tau > 4  # the whole target, with its quantised weights
