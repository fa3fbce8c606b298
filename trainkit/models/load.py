"""Reads and writes Hugging Face folders: configs, tokenizers, tensor names, and the fused storage of a `Decoder`.

`weights.py` lists and reads the weight files.
"""

# D hidden

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor

from trainkit.bundle import VOCABULARY_FILES, tokenizer_digest
from trainkit.errors import UserError, first_lines, note
from trainkit.files import write_json
from trainkit.layers.attention import rotary_table
from trainkit.layers.blocks import Decoder
from trainkit.layers.linear import Linear
from trainkit.layers.shape import DecoderShape
from trainkit.models.compressed import dense_tensors, read_scheme, stored_weights
from trainkit.models.packed import PackedLayers
from trainkit.models.weights import EMBEDDING, HEAD, check_finite, has_own_head

LAYOUTS = {"llama", "mistral", "qwen2", "qwen3"}
_BIASES = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
"""Switches of a config.json that give biases, by layout. Others have no such switch; Qwen2 always has them on q, k and v."""
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
MODEL_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, RuntimeError, AssertionError),
    *(AttributeError, ArithmeticError, ImportError, StrictDataclassError),
)
"""Errors that transformers raises for a config.json with odd values."""
SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
}
"""Field of a config.json -> field of `DecoderShape`; those after the fourth are optional."""


def read_config(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a local model folder.

    Its `tie_word_embeddings` is false if the files hold a head that differs from the embedding. transformers then uses both
    tensors even if config.json calls them tied, and so does trainkit.

    Raises:
        UserError: the folder or its config.json is missing or unreadable.
    """
    from transformers import AutoConfig

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json there; give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except MODEL_ERRORS as error:
        raise UserError(f"{path}/config.json: {first_lines(error)}; fix it or copy it again") from error
    if getattr(config, "tie_word_embeddings", False) and has_own_head(path):
        config.tie_word_embeddings = False
    return config


def read_tokenizer(folder: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, or of a hub name written owner/name.

    Raises:
        UserError: it is missing or cannot be loaded.
    """
    from transformers import AutoTokenizer  # seconds to import

    remedy = "give a folder with tokenizer.json"
    if not Path(folder).is_dir() and not is_hub_name(str(folder)):
        raise UserError(f"tokenizer {folder}: no such folder; {remedy}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # the Rust library raises plain Exceptions for files it cannot read
        raise UserError(f"tokenizer {folder}: cannot be loaded ({first_lines(error, 1)}); {remedy}") from error


def is_hub_name(name: str) -> bool:
    """Whether the text has the form owner/name of a model on the Hugging Face hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", *VOCABULARY_FILES))


def note_other_tokenizer(drafter: str | Path, target: str | Path) -> None:
    """Prints a note if the tokenizer of a draft model assigns token ids to other tokens than the target's tokenizer does.

    The output is exact with any drafter, so such a draft is not refused. A folder without a tokenizer cannot be compared.
    """
    folders = Path(drafter), Path(target)
    if not all(map(has_tokenizer, folders)) or len(set(map(tokenizer_digest, folders))) == 1:
        return
    try:
        ours, theirs = ({(id, token) for token, id in read_tokenizer(folder).get_vocab().items()} for folder in folders)
    except UserError as error:
        note(f"{drafter}: its tokenizer cannot be compared with the target's ({error})")
        return
    if ids := {id for id, _ in ours ^ theirs}:
        known = len({id for id, _ in ours | theirs})
        note(
            f"{drafter}: {len(ids):,} of {known:,} token ids have other tokens in its tokenizer than in that of {target}; the "
            "output stays exact, but drafts with these ids are hardly ever accepted"
        )


def find_device(name: str) -> torch.device:
    """The torch device of this name; `auto` is a GPU if there is one, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: unknown device; use cpu, cuda or auto") from None
    present = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device.type != "cpu" and (present is None or present.type != device.type):
        raise UserError(f"device {name!r}: no {device.type.upper()} device is available here; use device cpu")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise UserError(f"device {name!r}: there are only {torch.accelerator.device_count()} here; use a lower number")
    return device


def check_text_only(config: Any, folder: str | Path) -> None:
    """Raises UserError for a model of text and images or sound, whose config describes several models."""
    if getattr(config, "text_config", None) is not None:
        raise UserError(
            f"{folder}/config.json: model_type {config.model_type!r} is a model of text and other inputs (text_config); save "
            "its language model in a folder of its own and give that"
        )


def decoder_shape(config: Any) -> DecoderShape:
    """The sizes of any Llama-like config; does not check whether `Decoder` supports it.

    Raises:
        UserError: a size is missing or not a positive integer.
    """
    check_text_only(config, config._name_or_path or config.model_type)
    where = f"{config._name_or_path or config.model_type}/config.json"
    sizes: dict[str, Any] = {name: getattr(config, name, None) for name in SIZES}
    for name, value in sizes.items():
        optional = name in tuple(SIZES)[4:] and value is None
        if not optional and (type(value) is not int or value < 1):
            raise UserError(f"{where}: {name} is {value!r}; give a model of attention layers, where it is at least 1")
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = sizes["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads {kv_heads} must divide num_attention_heads {heads}")
    defaults = {"intermediate_size": 4 * hidden, "num_kv_heads": heads, "head_dim": hidden // heads, "max_positions": 2048}
    rope = {name: value for name, value in (getattr(config, "rope_parameters", None) or {}).items() if name != "type"}
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    biases = {field for field in _BIASES.get(config.model_type, ()) if getattr(config, field, False)}
    return DecoderShape(
        **{ours: sizes[theirs] or defaults[ours] for theirs, ours in SIZES.items()},
        norm_eps=getattr(config, "rms_norm_eps", None) or 1e-5,
        rope=rope,
        qkv_bias=config.model_type == "qwen2" or "attention_bias" in biases,
        qk_norm=config.model_type == "qwen3",
        tied=bool(config.tie_word_embeddings),
        out_bias="attention_bias" in biases,
        mlp_bias="mlp_bias" in biases,
    )


def covered_positions(folder: str | Path) -> int:
    """Maximum number of positions that the runner can decode with the model in `folder`; at most its sliding window.

    Raises:
        UserError: no readable config.json there, or the runner does not support this model.
    """
    config = read_config(folder)
    check_covered(config, folder, 0)
    return min(config.max_position_embeddings, _window(config) or config.max_position_embeddings)


def check_covered(config: Any, folder: str | Path, max_len: int) -> None:
    """Refuses models that the runner's decoder does not compute exactly.

    Raises:
        UserError: another architecture, activation, bias, quantisation or rotary type, or a sliding window shorter than
            `max_len`.
    """
    where = f"{folder}/config.json"
    # Architecture and switches.
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(f"{where}: model_type {config.model_type!r} is not supported by the runner; give one of {known}")
    if config.hidden_act != "silu":
        raise UserError(f"{where}: hidden_act {config.hidden_act!r} is not supported by the runner, only 'silu'")
    for field in ("attention_bias", "mlp_bias"):
        if getattr(config, field, False) and field not in _BIASES.get(config.model_type, ()):
            raise UserError(f"{where}: {field} is not supported by the runner for {config.model_type}")
    read_scheme(config, where)
    # Rotary positions.
    if fault := rope_fault(decoder_shape(config)):
        raise UserError(f"{where}: {fault}")
    # Length.
    window = _window(config)
    if window and type(window) is not int:
        raise UserError(f"{where}: sliding_window is {window!r}; make it a number or null")
    if window and max_len > window:
        raise UserError(f"{where}: sliding_window {window} is shorter than max_len {max_len}; load with max_len <= {window}")
    if max_len > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise UserError(f"{where}: max_position_embeddings {limit} is shorter than max_len {max_len}; lower max_len")


def _window(config: Any) -> Any:
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None


def rope_fault(shape: DecoderShape) -> str:
    """Why `Decoder` cannot compute these rotary parameters, with the remedy; empty if it can."""
    rope, rope_type = shape.rope, shape.rope["rope_type"]
    if rope_type not in ROPE_TYPES:
        return f"rope_type {rope_type!r} is not supported by the runner; give one of {', '.join(sorted(ROPE_TYPES))}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "partial_rotary_factor is not supported by the runner"
    if any(isinstance(value, Mapping) for value in rope.values()):
        return "rotary parameters that differ between types of layers are not supported by the runner"
    try:
        rotary_table(shape, 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__} {first_lines(error, 1)}"
        return f"rope_parameters give no rotary table ({reason}); fix them"
    return ""


def with_supported_rope(shape: DecoderShape) -> DecoderShape:
    """The shape, with plain rotary positions if its own are not supported; a note then names the reason.

    The base (rope_theta) stays. If it differs between types of layers, it is that of the layers with full attention.
    """
    if not (fault := rope_fault(shape)):
        return shape
    theta = shape.rope.get("full_attention", shape.rope).get("rope_theta", shape.rope["rope_theta"])
    note(f"the target's {fault.partition(';')[0]}; the drafter gets plain rotary positions with rope_theta {theta:g}")
    return replace(shape, rope={"rope_type": "default", "rope_theta": theta})


def _layer_parts(shape: DecoderShape) -> dict[str, tuple[list[str], list[int]]]:
    """Within a layer: our name of a tensor -> the Hugging Face tensors in it, and the rows of each if there are several."""
    q, kv, inner = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    layer: dict[str, tuple[list[str], list[int]]] = {
        "attention_norm.weight": (["input_layernorm.weight"], []),
        "mlp_norm.weight": (["post_attention_layernorm.weight"], []),
        **{f"attention.{name}.weight": ([f"self_attn.{name}.weight"], []) for name in ("q_norm", "k_norm")},
    }
    for part in ("weight", "bias"):
        layer |= {
            f"mlp.gate_up.{part}": ([f"mlp.gate_proj.{part}", f"mlp.up_proj.{part}"], [inner, inner]),
            f"mlp.down.{part}": ([f"mlp.down_proj.{part}"], []),
            f"attention.out.{part}": ([f"self_attn.o_proj.{part}"], []),
            f"attention.qkv.{part}": ([f"self_attn.{x}_proj.{part}" for x in "qkv"], [q, kv, kv]),
        }
    return layer


def _fused_weights(decoder: Decoder) -> dict[str, dict[str, int]]:
    """Name of each linear layer -> the Hugging Face weights in it, and the rows of each."""
    linear = {f"{name}.weight": part.weight for name, part in decoder.named_modules() if isinstance(part, Linear)}
    split = {ours: _split(decoder.shape, {ours: weight}) for ours, weight in linear.items()}
    return {ours.removesuffix(".weight"): {name: len(view) for name, view in views.items()} for ours, views in split.items()}


def hf_views(decoder: Decoder) -> dict[str, Tensor]:
    """Hugging Face name -> view, without gradient, of the part of the decoder's fused storage that holds the tensor.

    Packed weights have no views.
    """
    return _split(decoder.shape, {name: weight.detach() for name, weight in decoder.named_parameters() if weight.numel()})


def hf_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """As `hf_views`, and the packed weights as dense tensors."""
    dtype = decoder.embed.weight.dtype
    packed = {
        f"{name}.weight": part.packed.dense(dtype)
        for name, part in decoder.named_modules()
        if isinstance(part, Linear) and part.packed is not None
    }
    return hf_views(decoder) | _split(decoder.shape, packed)


def _split(shape: DecoderShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face name -> part of the tensor that holds it, for tensors under our names."""
    views, layer = {}, _layer_parts(shape)
    for ours, weight in weights.items():
        if not ours.startswith("layers."):
            views[ours if ours == "lm_head.weight" else f"model.{ours.replace('embed.', 'embed_tokens.')}"] = weight
            continue
        _, index, part = ours.split(".", 2)
        names, rows = layer[part]
        views |= zip((f"model.layers.{index}.{name}" for name in names), weight.split(rows or len(weight)), strict=True)
    return views


def hf_shapes(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face name and size of every tensor of this shape; independent of `hf_views`, so that exports can be checked."""
    D, inner, V, width = shape.hidden_size, shape.intermediate_size, shape.vocab_size, shape.head_dim
    q, kv = shape.num_heads * width, shape.num_kv_heads * width
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (q, D),
        "self_attn.k_proj.weight": (kv, D),
        "self_attn.v_proj.weight": (kv, D),
        "self_attn.o_proj.weight": (D, q),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (inner, D),
        "mlp.up_proj.weight": (inner, D),
        "mlp.down_proj.weight": (D, inner),
    }
    if shape.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if shape.out_bias:
        layer |= {"self_attn.o_proj.bias": (D,)}
    if shape.mlp_bias:
        layer |= {"mlp.gate_proj.bias": (inner,), "mlp.up_proj.bias": (inner,), "mlp.down_proj.bias": (D,)}
    if shape.qk_norm:
        layer |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    ends = {EMBEDDING: (V, D), "model.norm.weight": (D,)} | ({} if shape.tied else {HEAD: (V, D)})
    layers = range(shape.num_layers)
    return ends | {f"model.layers.{index}.{name}": size for index in layers for name, size in layer.items()}


def copy_weights(decoder: Decoder, tensors: Iterable[tuple[str, Tensor]], source: str, complete: bool = True) -> None:
    """Copies Hugging Face tensors into the decoder's fused storage, in place, casting to its dtype.

    A decoder with a tied head takes embedding or head, or both if they are equal.

    Raises:
        UserError: a tensor is unknown, of another size, not finite, or (with `complete`) missing; or a head differs from the
            embedding, and the decoder's head is tied.
    """
    views, copied = hf_views(decoder), dict[str, Tensor]()
    for name, value in tensors:
        if name.endswith("rotary_emb.inv_freq"):
            continue
        place = EMBEDDING if name == HEAD and decoder.shape.tied else name
        if place not in views and place in hf_shapes(decoder.shape):
            raise UserError(f"{source}: tensor {name!r} is quantised in this model and cannot be replaced; load a dense folder")
        if place not in views:
            raise UserError(f"{source}: tensor {name!r} has no place in this model; give weights that fit config.json")
        if views[place].shape != value.shape:
            sizes = f"{list(value.shape)}, but the config requires {list(views[place].shape)}"
            raise UserError(f"{source}: tensor {name!r} is {sizes}; give weights that fit config.json")
        if place in copied and not torch.equal(copied[place], value.detach().to(copied[place])):
            raise UserError(
                f"{source}: {HEAD} and {EMBEDDING} differ, but this model has one tensor for both; give one of them"
            )
        copied[place] = views[place].copy_(value.detach())
    missing = sorted(views.keys() - copied.keys())
    if complete and missing:
        raise UserError(f"{source}: {len(missing)} tensors are missing, the first is {missing[0]!r}; copy all weight files")
    check_finite(copied.items(), source)


def load_decoder(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_len: int | None = None,
    layers: bool = True,
    packed: bool = True,
) -> Decoder:
    """A decoder with the weights of a Hugging Face folder, without gradient.

    Weights that the folder quantises stay packed, unless another weight of their fused layer is dense. They are then only for
    decoding: they have no gradient, and are not parameters.

    Args:
        folder: Folder of the model.
        device: Device of the weights.
        dtype: Precision of the weights; None: as stored.
        max_len: Number of positions that must be supported.
        layers: Whether to load decoder layers; without them only embedding, final norm and head are read.
        packed: Whether quantised weights stay packed; otherwise they become dense.

    Raises:
        UserError: the runner does not support this model (`check_covered`), or its weights do not fit its config.
    """
    config = read_config(folder)
    check_covered(config, folder, max_len or 0)
    if dtype is None:
        stored = getattr(config, "dtype", None) or torch.float32
        dtype = getattr(torch, stored, None) if isinstance(stored, str) else stored
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"{folder}/config.json: dtype {stored!r} is not a floating-point type; make it float32 or bfloat16")
    with torch.device("meta"):
        shape = decoder_shape(config)
        decoder = Decoder(shape if layers else replace(shape, num_layers=0))
    scheme = read_scheme(config, f"{folder}/config.json") if packed else None
    stays = None if scheme is None else PackedLayers(decoder, _fused_weights(decoder), scheme)
    decoder = decoder.to(dtype).to_empty(device=device)
    only = None if layers else {*hf_views(decoder), HEAD}
    read = dense_tensors(folder, dtype, only) if stays is None else stays.take(stored_weights(folder, only), device, dtype)
    copy_weights(decoder, read, str(folder))
    return decoder.requires_grad_(False).eval()


def transformers4_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in the fields of transformers 4, for readers that ignore `rope_parameters`.

    These are `rope_theta` and other fields outside `rope_scaling`, and `rope_scaling`, which has the type under its newer and
    its older name (`rope_type`, `type`) and is null for the default type.
    """
    outside = ("rope_theta", "partial_rotary_factor")
    scaling = {name: value for name, value in rope.items() if name not in (*outside, "type")}
    if rope["rope_type"] == "longrope":
        outside += ("original_max_position_embeddings",)
    fields = {name: rope[name] for name in outside if name in rope}
    default = rope["rope_type"] == "default"
    return fields | {"rope_scaling": None if default else scaling | {"type": rope["rope_type"]}}


def hf_config(
    shape: DecoderShape, end_ids: Iterable[int], pad_id: int | None, dtype: torch.dtype, start_id: int | None = None
) -> dict[str, Any]:
    """A config.json that loads this shape as Llama, Qwen2 or Qwen3, depending on its biases and norms.

    The start id is written even if there is none: transformers' default for Llama is 1, and OpenVINO refuses a draft model
    whose start id is not the target's.
    """
    attention_bias = shape.qkv_bias and shape.out_bias
    model_type = "qwen3" if shape.qk_norm else "qwen2" if shape.qkv_bias and not attention_bias else "llama"
    assert shape.out_bias <= shape.qkv_bias and shape.mlp_bias <= (model_type == "llama"), "no model has such biases"
    ends = list(end_ids)
    return {
        "architectures": [f"{model_type.title()}ForCausalLM"],
        "model_type": model_type,
        **{theirs: getattr(shape, ours) for theirs, ours in SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": dict(shape.rope),
        **transformers4_rope(shape.rope),
        "tie_word_embeddings": shape.tied,
        "attention_bias": attention_bias,
        "mlp_bias": shape.mlp_bias,
        "bos_token_id": start_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad_id,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }


def save_decoder(
    decoder: Decoder,
    folder: Path,
    dtype: torch.dtype,
    end_ids: Iterable[int] = (),
    pad_id: int | None = None,
    start_id: int | None = None,
) -> None:
    """Writes config.json and model.safetensors as transformers, vLLM and SGLang load them."""
    write_json(folder / "config.json", hf_config(decoder.shape, end_ids, pad_id, dtype, start_id))
    tensors = {name: view.to("cpu", dtype).clone() for name, view in hf_tensors(decoder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
