"""Quantised folders: packed words, configs and dense weights are those of compressed-tensors; unsupported ones are refused."""

# R outputs  K inputs  G groups

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file

from trainkit.errors import UserError
from trainkit.models.compressed import (
    codes_of,
    dense_tensors,
    dense_weight,
    pack,
    quantization_config,
    read_scheme,
    stored_tensors,
    stored_weights,
    unpack,
)

NAME = "model.layers.0.mlp.up_proj"


def random_layer(bits: int, kind: str, symmetric: bool, R: int, K: int, G: int, dtype: torch.dtype):
    """Codes, scales and zero points of a linear layer."""
    scale_RG = torch.rand(R, G).add(0.1).to(dtype)
    if kind == "float":
        return torch.randn(R, K).mul(40).to(torch.float8_e4m3fn), scale_RG, None
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    draw = lambda *size: torch.randint(low, high, size).to(torch.int8)
    return draw(R, K), scale_RG, None if symmetric else draw(R, G)


def as_words(values_RW: torch.Tensor) -> list[str]:
    return [f"{value & 0xFFFFFFFF:08x}" for value in values_RW.flatten().tolist()]


def test_packed_words_by_hand():
    """Each code plus half the range, the first in the lowest bits; zero points along the outputs; a row is padded."""
    row = lambda *codes: torch.tensor([codes], dtype=torch.int8)
    assert as_words(pack(row(-8, -7, -1, 0, 1, 2, 6, 7), 4)) == ["fea98710"]
    assert as_words(pack(row(-128, -1, 0, 127), 8)) == ["ff807f00"]
    assert as_words(pack(row(-8, 7, 1), 4)) == ["000009f0"]
    zero_RG = torch.arange(-8, 8, dtype=torch.int8).unsqueeze(1)
    stored = stored_tensors(NAME, torch.zeros(16, 8, dtype=torch.int8), torch.ones(16, 1), zero_RG, 4)
    assert as_words(stored[f"{NAME}.weight_zero_point"]) == ["76543210", "fedcba98"]


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_compressed_tensors(bits, seed):
    """Random codes of any width pack to the library's words, and both read each other's."""
    for columns in (1, 7, 8, 33, 64):
        codes_RK = random_layer(bits, "int", True, 5, columns, 1, torch.float32)[0]
        words = pack(codes_RK, bits)
        assert torch.equal(words, pack_to_int32(codes_RK, bits))
        assert torch.equal(unpack(words, bits, columns), codes_RK)
        assert torch.equal(unpack_from_int32(words, bits, codes_RK.shape), codes_RK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("bits", "kind", "symmetric", "group"),
    [(4, "int", True, 8), (4, "int", False, 8), (8, "int", True, None), (8, "int", False, None), (8, "float", True, None)],
)
def test_library_decompresses_to_our_weights(bits, kind, symmetric, group, dtype, seed):
    """The library reads the config and the tensors of a layer, and its dense weight equals ours bit for bit."""
    layer = random_layer(bits, kind, symmetric, 12, 24, 24 // (group or 24), dtype)
    config = {"quantization_config": quantization_config(bits, group, symmetric, kind)}
    tensors = stored_tensors(NAME, *layer, bits, kind)
    theirs = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    compressor = PackedQuantizationCompressor if kind == "int" else FloatQuantizationCompressor
    local = {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}
    assert set(local) == set(compressor.compression_param_names(theirs))
    dense_RK = dense_weight(*layer, dtype)
    assert torch.equal(compressor.decompress(local, theirs)["weight"], dense_RK)
    scheme = read_scheme(config)
    read = codes_of(tensors, NAME, scheme)
    assert torch.equal(dense_weight(*read, dtype), dense_RK)
    assert scheme.of("lm_head") is None and scheme.of(NAME).bits == bits


def test_layers_may_differ_in_bits_and_group():
    """Bits by layer give one config group for each pair of bits and group size; other layers stay dense."""
    bits, group = {"a.q_proj": 4, "b.q_proj": 8, "c.q_proj": 4}, {"a.q_proj": 32, "b.q_proj": None, "c.q_proj": 32}
    config = quantization_config(bits, group)
    assert [scheme["targets"] for scheme in config["config_groups"].values()] == [["a.q_proj", "c.q_proj"], ["b.q_proj"]]
    QuantizationConfig.model_validate(config)
    scheme = read_scheme({"quantization_config": config})
    assert [(scheme.of(name).bits, scheme.of(name).group) for name in bits] == [(4, 32), (8, None), (4, 32)]
    assert scheme.of("d.q_proj") is None


def test_exact_names_come_before_expressions_and_classes():
    """A layer that several groups name has the scheme of the most exact target, whatever the order of the groups."""
    config = quantization_config(
        {"Linear": 8, "re:.*q_proj": 4, "a.q_proj": 8}, {"Linear": 4, "re:.*q_proj": 8, "a.q_proj": 16}
    )
    scheme = read_scheme({"quantization_config": config})
    assert [scheme.of(name).group for name in ("a.q_proj", "b.q_proj", "b.k_proj")] == [16, 8, 4]


def write_folder(folder, config, *files):
    """A folder with this quantization_config, and its tensors in these files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    names = [f"part-{index}.safetensors" for index in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name)
    index = {"weight_map": {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_layer_split_over_files_is_read_whole(tmp_path, seed):
    """Tensors of a layer in several files give its dense weight; other tensors are cast."""
    layer = random_layer(4, "int", False, 8, 16, 2, torch.float32)
    tensors = stored_tensors(NAME, *layer, 4)
    norm = {"model.norm.weight": torch.rand(16)}
    packed = {name: tensors.pop(name) for name in (f"{NAME}.weight_packed", f"{NAME}.weight_zero_point")}
    folder = write_folder(tmp_path, quantization_config(4, 8, symmetric=False), packed, tensors | norm)
    read = dict(dense_tensors(folder, torch.bfloat16))
    assert read.keys() == {f"{NAME}.weight", "model.norm.weight"}
    assert torch.equal(read[f"{NAME}.weight"], dense_weight(*layer, torch.bfloat16))
    assert torch.equal(read["model.norm.weight"], norm["model.norm.weight"].bfloat16())
    assert dict(dense_tensors(folder, torch.bfloat16, only=[f"{NAME}.weight"])).keys() == {f"{NAME}.weight"}


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True, "dynamic": False}
BAD_CONFIGS = {
    "another program": ({"quant_method": "awq"}, {}, "quant_method 'awq' is not supported"),
    "sparse storage": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, {}, "sparsity_config is not supported"),
    "rotated weights": ({"transform_config": {"config_groups": {"u": {}}}}, {}, "transform_config is not supported"),
    "quantised cache": ({"kv_cache_scheme": {"num_bits": 8}}, {}, "kv_cache_scheme is not supported"),
    "calibrating": ({"quantization_status": "frozen"}, {}, "quantization_status 'frozen'"),
    "preset": ({"config_groups": {"W4A16": ["Linear"]}}, {}, "config_groups is empty, or names a preset"),
    "activations": ({}, {"input_activations": {"num_bits": 8}}, "group_0: input_activations are quantised"),
    "marlin": ({}, {"format": "marlin-24"}, "format 'marlin-24' is not supported"),
    "3 bits": ({}, {"weights": WEIGHTS | {"num_bits": 3}}, "with 3 bits are not supported"),
    "fp4": ({}, {"weights": WEIGHTS | {"type": "float"}}, "type 'float' with 4 bits are not supported"),
    "blocks": ({}, {"weights": WEIGHTS | {"strategy": "block"}}, "strategy 'block' is not supported"),
    "no weights": ({}, {"weights": None}, "group_0 is not readable"),
    "no targets": ({}, {"targets": None}, "group_0 is not readable"),
}


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_unsupported_configs_are_refused(fault):
    """What is not read is refused in one line, with the file, the reason and the remedy."""
    changes, group, message = BAD_CONFIGS[fault]
    config = quantization_config(4, 8)
    config["config_groups"]["group_0"] |= group
    with pytest.raises(UserError) as raised:
        read_scheme({"quantization_config": config | changes}, "folder/config.json")
    text = str(raised.value)
    assert message in text and text.startswith("folder/config.json: quantization_config: ") and "dense folder" in text
    assert "\n" not in text


def test_broken_tensors_are_refused(tmp_path, seed):
    """A layer with a tensor missing, of another size or dtype, or with no scheme is refused by name."""
    good = stored_tensors(NAME, *random_layer(4, "int", True, 8, 16, 2, torch.float32), 4)
    scale, packed = f"{NAME}.weight_scale", f"{NAME}.weight_packed"
    without = lambda part: {name: tensor for name, tensor in good.items() if name != part}
    cases = [
        (without(scale), quantization_config(4, 8), f"tensor '{scale}' is missing"),
        (without(packed), quantization_config(4, 8), f"tensor '{NAME}.weight' is missing"),
        ({f"{NAME}.weight": torch.rand(8, 16)}, quantization_config(4, 8), f"tensor '{NAME}.weight' is float32"),
        (good | {packed: good[packed][:, :1]}, quantization_config(4, 8), "the scheme requires"),
        (good, quantization_config(4, 4), f"tensor '{scale}' is [8, 2], the scheme requires [8, 4]"),
        (good, quantization_config(4, 5), "group_size 5 does not divide the 16 inputs"),
        (good, quantization_config(8, 8), f"tensor '{packed}' is [8, 2], the scheme requires [8, 4]"),
        (good, quantization_config(4, 8, symmetric=False), "weight_zero_point' is missing"),
        (good, quantization_config(4, 8, ignore=[NAME]), f"{NAME} is stored quantised, but no config group names it"),
    ]
    for tensors, config, message in cases:
        with pytest.raises(UserError) as raised:
            list(stored_weights(write_folder(tmp_path, config, {name: t.contiguous() for name, t in tensors.items()})))
        assert message in str(raised.value), str(raised.value)
