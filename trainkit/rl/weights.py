"""The current weights of a transformers model, whole and with its adapters merged, one tensor at a time.

Left out on purpose: DeepSpeed ZeRO-3, which trainkit refuses; ZeRO-2 and DDP hold whole parameters on each rank.
"""

# O outputs  I inputs

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from trainkit.errors import UserError

_WRAPPERS = re.compile(r"(^base_model\.model\.)|(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
"""Parts of names that peft, FSDP, activation checkpoints and `torch.compile` add."""


@torch.no_grad()
def policy_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face name and value of each tensor of a model, for `Rollouts.update`.

    A projection with active LoRA adapters (peft) gives W + sum of scaling B A, computed in float32; one whose adapters are
    switched off or merged gives W. Parameters that FSDP shards (`fully_shard` or `FullyShardedDataParallel`) are gathered, so
    every rank must iterate to the end. A tensor is valid until the next one is drawn.

    Raises:
        UserError: an adapter that is not plain LoRA on linear layers.
    """
    units: list[nn.Module] = [*FullyShardedDataParallel.fsdp_modules(model)]
    outside = [] if model in units else [model]  # what lies outside of all units is whole
    seen = set[int]()  # a tied head is the embedding
    for root in outside:
        yield from _own_tensors(model, root, units, seen)
    for unit in units:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            yield from _own_tensors(model, unit, units, seen)


def _own_tensors(model: nn.Module, root: nn.Module, units: list[nn.Module], seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `root`, without those of the FSDP units inside it, under their names in `model`."""
    names = {id(module): name for name, module in model.named_modules()}

    def visit(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
        name = _WRAPPERS.sub("", names[id(module)] + ".").removesuffix(".")
        if hasattr(module, "lora_A"):
            weight_OI, bias = _merged(name, module)
            yield f"{name}.weight", weight_OI
            if bias is not None:
                yield f"{name}.bias", _whole(bias)
            return
        for part, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{part}" if name else part, _whole(parameter)
        for child in module.children():
            if child not in units:
                yield from visit(child)

    return visit(root)


def _merged(name: str, layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a projection with its adapters; the weight is float32 if one is active."""
    base = layer.get_base_layer()
    unusual = layer.lora_embedding_A or layer.lora_variant or any(layer.lora_bias.values()) or layer.fan_in_fan_out
    if unusual or not isinstance(base, nn.Linear):
        raise UserError(f"{name}: only plain LoRA on linear layers can be merged; leave out DoRA, biases and embeddings")
    weight_OI = _whole(base.weight)
    active = [] if layer.disable_adapters or layer.merged else [one for one in layer.active_adapters if one in layer.lora_A]
    for adapter in active:
        down, up = (_whole(part[adapter].weight).float() for part in (layer.lora_A, layer.lora_B))
        weight_OI = weight_OI.float() + layer.scaling[adapter] * (up @ down)
    return weight_OI, base.bias


def _whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
