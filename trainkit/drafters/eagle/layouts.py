"""EAGLE-3 on disk: one flat folder that vLLM and SGLang both load, and the layout of vLLM's speculators library.

Names, shapes and configuration keys are those of vLLM 0.32, SGLang and speculators 0.9.0 (November 2026). Both layouts contain
the same tensors under other names. vLLM's loader leaves a missing tensor uninitialised without a warning; so `shapes` computes
from sizes alone what must be there, and the exporter compares.
"""

# H hidden  I intermediate  V target vocabulary  K draft vocabulary  A taps

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trainkit.bundle import read_json
from trainkit.errors import UserError
from trainkit.layers.shape import DecoderShape
from trainkit.models.load import hf_config
from trainkit.models.shape import TargetShape
from trainkit.models.target import FrozenTarget
from trainkit.models.weights import read_tensors

PREFIX = {"flat": "midlayer", "speculators": "layers.0"}
"""Layout -> its name of the decoder layer."""
_ARCHITECTURES = {"flat": "LlamaForCausalLMEagle3", "speculators": "Eagle3DraftModel"}
_UNSUPPORTED = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""Variants of EAGLE-3 that this kind does not compute; false in every file that it writes or reads."""


def default_taps(num_layers: int) -> tuple[int, ...]:
    """Hidden states 2, L/2 and L - 3, the default of vLLM and SGLang; with fewer than 7 layers up to three, spread."""
    if num_layers >= 7:
        return (2, num_layers // 2, num_layers - 3)
    return tuple(sorted({0, num_layers // 2, num_layers - 1}))


def shapes(layer: DecoderShape, taps: int, draft_vocab_size: int, layout: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the layout.

    Args:
        layer: Sizes of the decoder layer; its vocabulary is the target's.
        taps: Number of taps A.
        draft_vocab_size: Number of ids K that it may propose.
        layout: `flat` or `speculators`.
    """
    H, inner, V = layer.hidden_size, layer.intermediate_size, layer.vocab_size
    q, kv, at = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim, PREFIX[layout]
    return {
        "embed_tokens.weight": (V, H),
        "fc.weight": (H, taps * H),
        "norm.weight": (H,),
        "lm_head.weight": (draft_vocab_size, H),
        "d2t": (draft_vocab_size,),
        "t2d": (V,),
        **{f"{at}.{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        f"{at}.self_attn.q_proj.weight": (q, 2 * H),
        f"{at}.self_attn.k_proj.weight": (kv, 2 * H),
        f"{at}.self_attn.v_proj.weight": (kv, 2 * H),
        f"{at}.self_attn.o_proj.weight": (H, q),
        f"{at}.mlp.gate_proj.weight": (inner, H),
        f"{at}.mlp.up_proj.weight": (inner, H),
        f"{at}.mlp.down_proj.weight": (H, inner),
    }


def _names(at: str) -> dict[str, list[str]]:
    """Our name of each tensor -> the file's names of its parts, which are stacked by rows; `at` is from `PREFIX`."""
    return {
        **{name: [name] for name in ("fc.weight", "norm.weight", "lm_head.weight")},
        "layer.hidden_norm.weight": [f"{at}.hidden_norm.weight"],
        "layer.embedding_norm.weight": [f"{at}.input_layernorm.weight"],
        "layer.mlp_norm.weight": [f"{at}.post_attention_layernorm.weight"],
        "layer.attention.qkv.weight": [f"{at}.self_attn.{name}_proj.weight" for name in "qkv"],
        "layer.attention.out.weight": [f"{at}.self_attn.o_proj.weight"],
        "layer.mlp.gate_up.weight": [f"{at}.mlp.{name}_proj.weight" for name in ("gate", "up")],
        "layer.mlp.down.weight": [f"{at}.mlp.down_proj.weight"],
    }


def to_file(state: Mapping[str, Tensor], layer: DecoderShape, ids_K: Tensor | None, layout: str) -> dict[str, Tensor]:
    """The file's tensors, except the embedding, from the drafter's `state_dict`.

    The draft vocabulary becomes `d2t`, the offset id - row of each row of the head, and `t2d`, a mask over V.
    """
    sizes, V, tensors = shapes(layer, 1, 1, layout), layer.vocab_size, {}
    for ours, theirs in _names(PREFIX[layout]).items():
        rows = [sizes[name][0] for name in theirs] if len(theirs) > 1 else len(state[ours])
        tensors |= zip(theirs, state[ours].split(rows), strict=True)
    ids_K = torch.arange(V) if ids_K is None else ids_K.cpu()
    return tensors | {
        "d2t": ids_K - torch.arange(len(ids_K)),
        "t2d": torch.zeros(V, dtype=torch.bool).index_fill_(0, ids_K, True),
    }


def from_file(tensors: Mapping[str, Tensor], source: Path, vocab_size: int) -> tuple[dict[str, Tensor], Tensor]:
    """The drafter's `state_dict` and the token ids of its head's rows [K], from a file of either layout.

    Some published files have only one of the maps `d2t` and `t2d`, or an empty one. A head of all `vocab_size` ids needs
    neither. For a smaller head the ids are read from the map that exists; if both exist they must agree. With a wrong map the
    drafter would propose other tokens than it was trained on: the text would stay exact, but nearly no draft would be accepted.

    Raises:
        UserError: a tensor is missing, or both maps of a smaller vocabulary, or these disagree.
    """
    at = PREFIX["speculators" if any(name.startswith(PREFIX["speculators"]) for name in tensors) else "flat"]
    try:
        state = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in _names(at).items()}
    except KeyError as error:
        raise UserError(f"{source}: tensor {error.args[0]!r} is missing; give a whole EAGLE-3 checkpoint") from None
    rows = len(state["lm_head.weight"])
    found = [tensors["d2t"].long() + torch.arange(len(tensors["d2t"]))] if "d2t" in tensors else []
    if rows < vocab_size:
        found += [tensors["t2d"].nonzero()[:, 0]] if "t2d" in tensors else []
        if not found:
            raise UserError(f"{source}: has {rows} draft tokens but no d2t that names them; give a whole EAGLE-3 checkpoint")
        if any(not torch.equal(ids, found[0]) for ids in found):
            raise UserError(
                f"{source}: d2t and t2d name different draft tokens; give a checkpoint whose vocabulary map is filled"
            )
    return state, found[0] if found else torch.arange(rows)


def configuration(
    layer: DecoderShape,
    taps: Sequence[int],
    target: TargetShape,
    target_folder: Path,
    draft_vocab_size: int,
    layout: str,
    dtype: torch.dtype,
    verifier: str | None = None,
) -> dict[str, Any]:
    """The layout's config.json.

    `norm_before_residual` is written although it is false, because readers assume different defaults. The flat layout has tap
    ids only if they are not the default: SGLang adds 1 to the ids that it finds, vLLM does not. It has `num_aux_hidden_states`,
    the number of taps, if that is not 3. vLLM and SGLang read this field since they support EAGLE-3.1 (summer 2026); versions
    before that assume 3, and fail to load other numbers.

    Args:
        layer: Sizes of the decoder layer.
        taps: Indices of the hidden states that it reads.
        target: Sizes and fingerprint of the target.
        target_folder: Folder of the target, whose config.json has its architecture.
        draft_vocab_size: Number of ids K that it may propose.
        layout: `flat` or `speculators`.
        dtype: Dtype of the weights.
        verifier: Folder or hub name where other programs find the target (speculators layout).
    """
    # What both layouts contain.
    theirs = read_json(target_folder / "config.json")
    plain = hf_config(layer, target.end_ids, None, dtype, theirs.get("bos_token_id"))
    layers = target.decoder.num_layers
    if layout == "flat":
        config = plain | {
            "architectures": [_ARCHITECTURES[layout]],
            "draft_vocab_size": draft_vocab_size,
            "tie_word_embeddings": False,
            "norm_before_residual": False,
        }
        if len(taps) != 3:  # without this field readers expect 3
            config["num_aux_hidden_states"] = len(taps)
        if layers < 7 or tuple(taps) != default_taps(layers):
            config["eagle_aux_hidden_state_layer_ids"] = list(taps)
            config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in taps]}
        return config
    # The speculators layout.
    other = (
        "architectures",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
        "use_cache",
    )  # these do not describe the layer
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    if is_eagle(target_folder):  # a folder with the target's embedding but not its config: the architecture of these sizes
        architectures = hf_config(target.decoder, (), None, torch.float32)["architectures"]
    else:
        architectures = theirs.get("architectures") or []
    return {
        "architectures": [_ARCHITECTURES[layout]],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(taps),
        **dict.fromkeys(_UNSUPPORTED, False),
        "embed_requires_grad": False,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "dtype": plain["dtype"],
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": verifier, "architectures": architectures},
        },
        "transformer_layer_config": {name: value for name, value in plain.items() if name not in other},
    }


def arguments(folder: Path, target_layers: int) -> dict[str, Any]:
    """The drafter's constructor arguments, read from the config.json of another program; without the draft vocabulary.

    Raises:
        UserError: a variant that this kind does not compute, or a size that is missing or not a positive number.
    """
    config = read_json(folder / "config.json")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise UserError(f"{folder}/config.json: {name} is not supported, only EAGLE-3 as published; train a new one")
    layer = config.get("transformer_layer_config", config)
    for name in ("intermediate_size", "num_attention_heads"):
        if not isinstance(layer, dict) or type(layer.get(name)) is not int or layer[name] < 1:
            raise UserError(f"{folder}/config.json: {name} must be a number, at least 1; copy the folder again")
    if layer.get("num_hidden_layers", 1) != 1:
        raise UserError(f"{folder}/config.json: {layer['num_hidden_layers']} draft layers are not supported, only 1")
    if layer.get("hidden_act", "silu") != "silu":
        raise UserError(f"{folder}/config.json: hidden_act {layer['hidden_act']!r} is not supported, only 'silu'")
    taps = config.get("eagle_aux_hidden_state_layer_ids")
    if taps is None and (shifted := (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")):
        taps = [tap + 1 for tap in shifted]
    # a missing field means the default of transformers' LlamaConfig, not the target's value
    rope = {"rope_type": "default", "rope_theta": layer.get("rope_theta", 10000.0)}
    for values in (layer.get("rope_scaling"), layer.get("rope_parameters")):
        rope |= {"rope_type" if name == "type" else name: value for name, value in (values or {}).items()}
    heads = layer["num_attention_heads"]
    return {
        "taps": list(taps or default_taps(target_layers)),
        "intermediate_size": layer["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": layer.get("num_key_value_heads", heads),
        "rope": rope,
        "norm_eps": layer.get("rms_norm_eps", 1e-6),
    }


def is_eagle(folder: Path) -> bool:
    """Whether a folder's config.json names an EAGLE-3 draft."""
    if not (folder / "config.json").is_file():
        return False
    names = read_json(folder / "config.json").get("architectures")
    return isinstance(names, list) and str([*names, ""][0]) in _ARCHITECTURES.values()


def embedding(folder: Path) -> Tensor:
    """The token embedding [V, H] of a target, or of an EAGLE-3 draft for it.

    Raises:
        UserError: the folder has none.
    """
    for _, value in read_tensors(folder, only=("model.embed_tokens.weight", "embed_tokens.weight")):
        return value
    if not is_eagle(folder):  # a target whose embedding has another name
        return FrozenTarget(folder, layers=False).embedding_weight
    raise UserError(f"{folder}: has no embed_tokens.weight, which an EAGLE-3 export copies; name the target's folder")


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Writes config.json and model.safetensors, with floating-point tensors in `dtype`."""
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    separate = {name: value.contiguous().clone() for name, value in cast.items()}  # safetensors refuses views of one storage
    save_file(separate, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
