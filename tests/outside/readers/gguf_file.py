"""Writes a Llama-layout folder, or an EAGLE-3 folder of the flat layout, as a float32 GGUF file for llama.cpp.

Names and keys are llama.cpp's of autumn 2026 (architectures `llama` and `eagle3`). llama.cpp's converter is in no package. Left
out: the tokenizer, because the tests give and compare token ids.
"""

# H hidden

import json
from pathlib import Path

import gguf
import numpy as np

_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "fc": "fc"}


def convert(folder, out, target=None):
    """Writes the file `out`; `target` is the folder of an EAGLE-3 draft's target."""
    folder = Path(folder)
    config, tensors = json.loads((folder / "config.json").read_text()), _tensors(folder)
    eagle, heads = target is not None, {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(out, "eagle3" if eagle else "llama")
    _write_sizes(writer, config)
    _write_tokenizer(writer, config["vocab_size"])
    if eagle:
        layers = json.loads((Path(target) / "config.json").read_text())["num_hidden_layers"]
        taps = config.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]
        writer.add_array("eagle3.target_layers", taps)
        writer.add_uint32("eagle3.target_hidden_size", config["hidden_size"])
        writer.add_bool("eagle3.norm_before_residual", config["norm_before_residual"])
        d2t = tensors.pop("d2t").astype(np.int64)  # offsets here, target ids there
        if len(d2t) < config["vocab_size"]:
            writer.add_tensor("d2t", d2t + np.arange(len(d2t)))
        del tensors["t2d"]
    if (rope := config["rope_parameters"])["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, config["head_dim"]))
    for name, value in tensors.items():
        kind = next((kind for kind in heads if name.endswith(f".{kind}_proj.weight")), None)
        writer.add_tensor(_name(name), value if kind is None else _interleaved(value, heads[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(folder):
    """Name -> float32 or integer array of every tensor in the folder; numpy has no bfloat16, so the files are read here."""
    kinds, tensors = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "BOOL": "?"}, {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            value = np.frombuffer(data[start + first : start + end], kinds[entry["dtype"]])
            if entry["dtype"] == "BF16":
                value = (value.astype(np.uint32) << 16).view(np.float32)
            value = value.reshape(entry["shape"])
            tensors[name] = value if value.dtype.kind in "ib" else value.astype(np.float32)
    return tensors


def _name(name):
    """llama.cpp's name of a tensor; the layer is `model.layers.N`, in EAGLE-3 `midlayer`."""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    if parts[0] == "midlayer":
        parts = ["layers", "0", *parts[1:]]
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{_LAYER['.'.join(parts[2:])]}.weight"
    return f"{_OUTSIDE[parts[0]]}.weight"


def _interleaved(weight, heads):
    """Rows of each head reordered from (first half, second half) to pairs: the rotary layout of llama.cpp's `llama`."""
    return np.ascontiguousarray(weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape))


def _llama3_factors(rope, head_dim):
    """What each rotary frequency is divided by under rope_type llama3 (transformers' modeling_rope_utils)."""
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    old, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((old / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def _write_sizes(writer, config):
    rope = config["rope_parameters"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_tokenizer(writer, vocab_size):
    """A tokenizer of a kind that has no end of text: prompts and answers are token ids, and no token ends an answer."""
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list([f"[{index}]" for index in range(vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab_size)
