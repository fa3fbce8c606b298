"""Quantised weights in Hugging Face folders, in the formats of compressed-tensors: their tensors and config, and reading them.

It reads and writes weights of 4 or 8 bits, with floating-point activations: integers in the format pack-quantized, and
float8_e4m3fn in float-quantized. These are formats of compressed-tensors 0.18 to 0.20, which transformers and vLLM load. The
tensors of one linear layer of R outputs and K inputs in G groups:

| weights         | tensors                                                                                          |
|-----------------|--------------------------------------------------------------------------------------------------|
| int4, int8      | weight_packed int32 [R, K * bits / 32]; weight_scale [R, G]; weight_shape int64 [2]              |
| with zero point | and weight_zero_point int32 [R * bits / 32, G]                                                   |
| float8          | weight float8_e4m3fn [R, K]; weight_scale [R, G]                                                 |

A word holds 32 / bits codes, each plus 2^(bits - 1), the first in the lowest bits; zero points are packed along the outputs. A
last word may be partly filled. The dense weight is (code - zero) * scale in the dtype in which the model is loaded.
"""

# R outputs  K inputs  G groups of a row

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.bundle import read_json
from trainkit.errors import UserError
from trainkit.models.weights import read_tensors

Kind = Literal["int", "float"]
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
"""Tensors of a quantised linear layer beside its `weight`."""
_FORMATS = {"int": ("pack-quantized", "int-quantized", "naive-quantized"), "float": ("float-quantized", "naive-quantized")}
_LINEAR = re.compile(r"(.*_proj|lm_head)$")
_REMEDY = "give a folder whose weights alone are quantised, to 4 or 8 bits, or the dense folder"


@dataclass(frozen=True)
class WeightScheme:
    """How the weight of a linear layer is stored.

    Attributes:
        bits: 4 or 8.
        group: Consecutive inputs that share a scale; None: all of a row.
        symmetric: Whether there are no zero points.
        kind: Integer codes, or float8_e4m3fn.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True
    kind: Kind = "int"


@dataclass(frozen=True)
class Scheme:
    """Which linear layers of a folder are quantised, and how.

    Attributes:
        groups: Targets (module names, class names, or regular expressions after `re:`), and the scheme of their weights.
        ignore: Targets that stay dense, though a group may name them.
        where: The config file, for errors.
    """

    groups: tuple[tuple[tuple[str, ...], WeightScheme], ...]
    ignore: tuple[str, ...] = ()
    where: str = "config.json"

    def of(self, name: str) -> WeightScheme | None:
        """The scheme of the linear layer of this module name; None if it is dense.

        Among targets that name a layer, exact names come first, then expressions, then the class; each in alphabetical order,
        as in compressed-tensors.
        """
        if any(_matches(target, name) for target in self.ignore):
            return None
        found = {target: scheme for targets, scheme in self.groups for target in targets if _matches(target, name)}
        order = lambda target: (target == "Linear", target.startswith("re:"), target)
        return found[min(found, key=order)] if found else None


def _matches(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in (name, "Linear")


def pack(codes_RK: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 8 bits, int8 [R, K], as words int32 [R, ceil(K * bits / 32)]."""
    assert bits in (4, 8) and codes_RK.dtype == torch.int8
    shifted = codes_RK.contiguous().view(torch.uint8) + (1 << bits - 1)  # modulo 256
    shifted = F.pad(shifted, (0, -shifted.shape[1] % (32 // bits)))
    if bits == 4:
        shifted = shifted[:, ::2] | shifted[:, 1::2] << 4
    return shifted.reshape(-1).view(torch.int32).view(len(codes_RK), -1)


def unpack(words_RW: Tensor, bits: int, columns: int) -> Tensor:
    """The codes, int8 [R, columns], that `pack` packed."""
    assert bits in (4, 8) and words_RW.dtype == torch.int32
    codes = words_RW.reshape(-1).view(torch.uint8).view(len(words_RW), -1)  # reshape: a single column has other strides
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
    return (codes[:, :columns] - (1 << bits - 1)).view(torch.int8)


def stored_tensors(
    name: str, codes_RK: Tensor, scale_RG: Tensor, zero_RG: Tensor | None, bits: int, kind: Kind = "int"
) -> dict[str, Tensor]:
    """The tensors of a quantised linear layer, by their names in the file.

    Args:
        name: Module name, without `.weight`.
        codes_RK: int8, or float8_e4m3fn for kind `float`.
        scale_RG: Scales; their dtype is that of the model.
        zero_RG: Zero points, int8; None if there are none.
        bits: 4 or 8.
        kind: Kind of the codes.
    """
    assert scale_RG.ndim == 2 and codes_RK.shape[1] % scale_RG.shape[1] == 0
    if kind == "float":
        assert codes_RK.dtype == torch.float8_e4m3fn and zero_RG is None and bits == 8
        return {f"{name}.weight": codes_RK.contiguous(), f"{name}.weight_scale": scale_RG.contiguous()}
    tensors = {"packed": pack(codes_RK, bits), "scale": scale_RG.contiguous(), "shape": torch.tensor(codes_RK.shape)}
    if zero_RG is not None:
        tensors["zero_point"] = pack(zero_RG.T.contiguous(), bits).T.contiguous()
    return {f"{name}.weight_{part}": tensor for part, tensor in tensors.items()}


def quantization_config(
    bits: int | Mapping[str, int],
    group: int | None | Mapping[str, int | None],
    symmetric: bool = True,
    kind: Kind = "int",
    ignore: Collection[str] = ("lm_head",),
) -> dict[str, Any]:
    """The value of `quantization_config` in config.json.

    Args:
        bits: 4 or 8 for all linear layers but those of `ignore`; or the number for each quantised layer, by module name.
        group: Consecutive inputs that share a scale, None for one scale per output; or by module name, if `bits` is.
        symmetric: Whether there are no zero points.
        kind: Kind of the codes.
        ignore: Module names that stay dense.
    """
    if isinstance(bits, int):
        assert not isinstance(group, Mapping)
        groups = {(bits, group): ["Linear"]}
    else:
        groups = dict[tuple[int, int | None], list[str]]()
        for name, count in bits.items():
            groups.setdefault((count, group[name] if isinstance(group, Mapping) else group), []).append(name)
    form = "pack-quantized" if kind == "int" else "float-quantized"
    weights = {"type": kind, "symmetric": symmetric, "dynamic": False}
    return {
        "config_groups": {
            f"group_{index}": {
                "targets": targets,
                "weights": weights
                | {"num_bits": count, "strategy": "group" if size else "channel"}
                | ({"group_size": size} if size else {}),
                "input_activations": None,
                "output_activations": None,
                "format": form,
            }
            for index, ((count, size), targets) in enumerate(groups.items())
        },
        "format": form,
        "ignore": list(ignore),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": metadata.version("compressed-tensors"),
    }


def read_scheme(config: Any, where: str = "config.json") -> Scheme | None:
    """The scheme of a folder, from the content of its config.json or a transformers config; None if nothing is quantised.

    Raises:
        UserError: it is quantised in a way that is not read here, such as quantised activations or another program's format.
    """
    mapping = isinstance(config, Mapping)
    values = config.get("quantization_config") if mapping else getattr(config, "quantization_config", None)
    if not values:
        return None
    values = values if isinstance(values, Mapping) else values.to_dict()
    refuse = lambda reason: UserError(f"{where}: quantization_config: {reason}; {_REMEDY}")
    if (method := values.get("quant_method")) != "compressed-tensors":
        raise refuse(f"quant_method {method!r} is not supported, only 'compressed-tensors'")
    for field in ("sparsity_config", "transform_config", "kv_cache_scheme"):
        if values.get(field):
            raise refuse(f"{field} is not supported")
    if (status := values.get("quantization_status", "compressed")) != "compressed":
        raise refuse(f"quantization_status {status!r} is not supported, only 'compressed'")
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(group, Mapping) for group in groups.values()):
        raise refuse("config_groups is empty, or names a preset in place of a scheme")
    read = []
    for title, group in groups.items():
        try:
            read.append((tuple(group["targets"]), _weight_scheme(group, group.get("format") or values.get("format"))))
        except (KeyError, TypeError, AttributeError) as error:
            raise refuse(f"{title} is not readable ({type(error).__name__}: {error})") from error
        except ValueError as error:
            raise refuse(f"{title}: {error}") from error
    return Scheme(tuple(read), tuple(values.get("ignore") or ()), where)


def _weight_scheme(group: Mapping[str, Any], form: str | None) -> WeightScheme:
    """The scheme of a config group; ValueError says why it cannot be read."""
    for field in ("input_activations", "output_activations"):
        if group.get(field):
            raise ValueError(f"{field} are quantised, which is not computed here")
    weights = group["weights"]
    bits, kind, strategy, size = (weights.get(key) for key in ("num_bits", "type", "strategy", "group_size"))
    kind, symmetric = kind or "int", weights.get("symmetric", True)
    if kind not in _FORMATS or bits not in ((4, 8) if kind == "int" else (8,)):
        raise ValueError(f"weights of type {kind!r} with {bits} bits are not supported, only int 4 and 8 and float 8")
    if form not in _FORMATS[kind] or (bits == 4 and form != "pack-quantized"):
        raise ValueError(f"format {form!r} is not supported for {kind}{bits} weights")
    strategy = strategy or ("group" if size and size > 0 else "channel" if size == -1 else "tensor")
    if strategy not in ("group", "channel") or weights.get("block_structure") or weights.get("dynamic"):
        raise ValueError(f"strategy {strategy!r} is not supported, only 'group' and 'channel' with stored scales")
    if not symmetric and (kind == "float" or form != "pack-quantized"):
        raise ValueError(f"zero points are not supported for format {form!r}")
    return WeightScheme(bits, size if strategy == "group" else None, symmetric, kind)


def codes_of(tensors: Mapping[str, Tensor], name: str, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes [R, K] (int8 or float8_e4m3fn), scales [R, G] and zero points int8 [R, G] of a linear layer (None if symmetric).

    Args:
        tensors: Tensors of the file, by name; at least those of this layer.
        name: Module name, without `.weight`.
        scheme: The folder's scheme, which must quantise the layer.

    Raises:
        UserError: a tensor is missing, or does not fit the scheme.
    """
    weight = scheme.of(name)
    if weight is None:
        raise UserError(f"{scheme.where}: {name} is stored quantised, but no config group names it; copy the folder again")

    def take(part: str, dtype: torch.dtype | None, *shape: int) -> Tensor:
        tensor = tensors.get(f"{name}.{part}")
        if tensor is None or (tensor.dtype != dtype if dtype else not tensor.is_floating_point()):
            fault = "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')}"
            raise UserError(f"{scheme.where}: tensor '{name}.{part}' is {fault}, which does not fit; copy the folder again")
        if shape and tuple(tensor.shape) != shape:
            raise UserError(
                f"{scheme.where}: tensor '{name}.{part}' is {list(tensor.shape)}, the scheme requires {list(shape)}; copy the "
                "folder again"
            )
        return tensor

    zero_RG = None
    if f"{name}.weight_packed" in tensors:
        R, K = take("weight_shape", torch.int64, 2).tolist()
        words = take("weight_packed", torch.int32, R, -(-K * weight.bits // 32))
        codes_RK = unpack(words, weight.bits, K)
    else:
        codes_RK = take("weight", torch.float8_e4m3fn if weight.kind == "float" else torch.int8)
        R, K = codes_RK.shape
    if K % (size := weight.group or K):
        raise UserError(f"{scheme.where}: group_size {size} does not divide the {K} inputs of {name}; give another folder")
    scale_RG = take("weight_scale", None, R, K // size)
    if not weight.symmetric:
        packed = take("weight_zero_point", torch.int32, -(-R * weight.bits // 32), K // size)
        zero_RG = unpack(packed.T, weight.bits, R).T.contiguous()
    return codes_RK, scale_RG, zero_RG


def dense_weight(codes_RK: Tensor, scale_RG: Tensor, zero_RG: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight [R, K] as transformers decompresses it when it loads in `dtype`: (code - zero) * scale, in that dtype."""
    R, K = codes_RK.shape
    grouped = codes_RK.to(dtype).view(R, scale_RG.shape[1], -1)
    if zero_RG is not None:
        grouped = grouped - zero_RG.to(dtype).unsqueeze(2)
    return (grouped * scale_RG.to(dtype).unsqueeze(2)).view(R, K)


Layer = tuple[Tensor, Tensor, Tensor | None]
"""Codes, scales and zero points of a linear layer."""


def stored_weights(folder: str | Path, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor | Layer]]:
    """Name and value of every weight of a folder, one at a time; those of quantised layers as codes, scales and zero points.

    Args:
        folder: Model folder, quantised or not.
        only: Names of the weights to read, such as `model.layers.0.mlp.up_proj.weight`; None: all.

    Raises:
        UserError: the folder is quantised in a way that is not read here, or a tensor of a layer is missing or does not fit.
    """
    where = Path(folder) / "config.json"
    scheme = read_scheme(read_json(where), str(where)) if where.is_file() else None
    if scheme is None:
        yield from read_tensors(folder, only)
        return
    wanted = None if only is None else {*only, *(f"{name.removesuffix('.weight')}.{part}" for name in only for part in PARTS)}
    waiting = dict[str, dict[str, Tensor]]()  # a layer's tensors may be in several files
    for name, tensor in read_tensors(folder, wanted):
        module, _, part = name.rpartition(".")
        weight = scheme.of(module) if part in PARTS or (part == "weight" and _LINEAR.match(module)) else None
        if weight is None and part not in PARTS:
            yield name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[name] = tensor
        packed = f"{module}.weight_packed" in parts
        needed = {"weight_packed", "weight_scale", "weight_shape"} if packed else {"weight", "weight_scale"}
        needed |= {"weight_zero_point"} if weight and not weight.symmetric else set()
        if {f"{module}.{part}" for part in needed} <= parts.keys():
            yield f"{module}.weight", codes_of(waiting.pop(module), module, scheme)
    for module, parts in waiting.items():
        codes_of(parts, module, scheme)  # raises: names the missing tensor
        raise UserError(f"{where}: the tensors of {module} do not fit its scheme; copy the folder again")


def dense_tensors(folder: str | Path, dtype: torch.dtype, only: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and dense value, in `dtype`, of every weight of a folder, quantised or not, one at a time; as `stored_weights`."""
    for name, value in stored_weights(folder, only):
        if isinstance(value, Tensor):
            yield name, value.to(dtype) if value.is_floating_point() else value
        else:
            yield name, dense_weight(*value, dtype)
