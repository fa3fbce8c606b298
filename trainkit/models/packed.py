"""Puts the quantised layers of a folder into a network as they are stored, so that the runner holds only their stored bytes."""

# R outputs  K inputs  G groups of a row

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import lcm
from pathlib import Path

import torch
from torch import Tensor, nn

from trainkit.errors import UserError, first_lines
from trainkit.layers.blocks import Decoder
from trainkit.layers.linear import Linear
from trainkit.layers.packed import Packed
from trainkit.models.compressed import PARTS, Layer, Scheme, WeightScheme, codes_of, dense_weight
from trainkit.models.weights import tensors_in


class PackedLayers:
    """The linear layers of a decoder whose weights stay packed; made before storage is allocated for its parameters.

    A layer that holds several weights, such as q, k and v, is packed if the folder quantises all of them, with codes of one
    kind. If their bits or groups differ, all have the largest number of bits and the smallest groups; no code changes.

    Args:
        decoder: Decoder on the meta device; the weights of its packed layers become empty.
        parts: Names of Hugging Face weights in each linear layer, by module name, with the number of rows of each.
        scheme: How the folder stores them.
    """

    def __init__(self, decoder: Decoder, parts: dict[str, dict[str, int]], scheme: Scheme) -> None:
        self.where, self._layers = scheme.where, dict[str, tuple[Linear, dict[str, int], int, str]]()
        self._waiting = dict[str, dict[str, Layer]]()
        for module, rows in parts.items():
            schemes = [scheme.of(name.removesuffix(".weight")) for name in rows]
            found = [weight for weight in schemes if weight is not None]
            if len(found) == len(schemes) and len({weight.kind for weight in found}) == 1:
                linear = decoder.get_submodule(module)
                assert isinstance(linear, Linear)
                linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
                for name in rows:
                    self._layers[name] = linear, rows, max(weight.bits for weight in found), found[0].kind

    def take(
        self, tensors: Iterable[tuple[str, Tensor | Layer]], device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Packs the weights of these layers on `device`, and yields the others, dense in `dtype`.

        Scales wider than `dtype` are rounded to it, as transformers does when it loads in that dtype.

        Raises:
            UserError: a weight has another shape, or scales that are not finite; or one of a packed layer is missing.
        """
        for name, value in tensors:
            if name not in self._layers:
                yield name, value if isinstance(value, Tensor) else dense_weight(*value, dtype)
                continue
            linear, rows, bits, kind = self._layers[name]
            size = [rows[name], linear.in_features]
            if isinstance(value, Tensor) or list(value[0].shape) != size:
                sizes = list(value.shape if isinstance(value, Tensor) else value[0].shape)
                raise UserError(
                    f"{self.where}: tensor {name!r} is {sizes}, but the config requires {size}; copy the folder again"
                )
            if not value[1].isfinite().all():
                raise UserError(f"{self.where}: the scales of {name!r} are not finite; copy the folder again")
            waiting = self._waiting.setdefault(next(iter(rows)), {})
            waiting[name] = value
            if waiting.keys() == rows.keys():
                codes_RK, scale_RG, zero_RG = stacked([waiting[name] for name in rows])
                if scale_RG.element_size() > dtype.itemsize:
                    scale_RG = scale_RG.to(dtype)
                linear.set_packed(Packed.from_codes(codes_RK, scale_RG, zero_RG, bits, kind, device))
                del self._waiting[next(iter(rows))]
        missing = [name for name, (linear, *_) in self._layers.items() if linear.packed is None]
        if missing:
            raise UserError(f"{self.where}: the weight {missing[0]!r} or one beside it is missing; copy all weight files")


def stacked(layers: list[Layer]) -> Layer:
    """The codes, scales and zero points of several weights with the same inputs, one below the other."""
    groups = lcm(*(scale_RG.shape[1] for _, scale_RG, _ in layers))
    spread = lambda values_RG: values_RG.repeat_interleave(groups // values_RG.shape[1], 1)
    zero_RG = None
    if any(zero_RG is not None for *_, zero_RG in layers):
        zeros = (torch.zeros_like(scale_RG, dtype=torch.int8) if zero is None else zero for _, scale_RG, zero in layers)
        zero_RG = torch.cat([spread(zero) for zero in zeros])
    return torch.cat([layer[0] for layer in layers]), torch.cat([spread(layer[1]) for layer in layers]), zero_RG


def load_network(network: nn.Module, file: Path, weights: WeightScheme, packed: bool) -> None:
    """Loads a network's `state_dict` from a file that has the tensors of quantised layers in place of some weights.

    The network takes the dtype of the scales.

    Args:
        network: Its linear layers are `layers.linear.Linear`.
        file: A safetensors file; quantised layers have the tensors of models/compressed.py.
        weights: How these layers are stored.
        packed: Whether their weights stay packed, for decoding; otherwise they become dense, for training.

    Raises:
        UserError: tensors are missing, unknown, or do not fit the network.
    """
    tensors, scheme = dict(tensors_in(file)), Scheme(((("Linear",), weights),), where=str(file))
    names = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    if not names:
        raise UserError(f"{file}: has no quantised layers; copy the folder again")
    network.to(tensors[f"{names[0]}.weight_scale"].dtype)
    for name in names:
        codes_RK, scale_RG, zero_RG = codes_of(tensors, name, scheme)
        linear = dict(network.named_modules()).get(name)
        if not isinstance(linear, Linear) or linear.weight.shape != codes_RK.shape:
            raise UserError(f"{file}: {name} {list(codes_RK.shape)} does not fit this drafter; copy the folder again")
        tensors = {key: value for key, value in tensors.items() if key not in {f"{name}.{part}" for part in PARTS}}
        if packed:
            linear.set_packed(Packed.from_codes(codes_RK, scale_RG, zero_RG, weights.bits, weights.kind))
            tensors[f"{name}.weight"] = linear.weight
        else:
            tensors[f"{name}.weight"] = dense_weight(codes_RK, scale_RG, zero_RG, scale_RG.dtype)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{file}: {first_lines(error, 2)}; copy the folder again") from error
