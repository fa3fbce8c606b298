"""Compressed linear layers with given weights, without a model; and a target with zeros."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainkit.compress.masks import Pattern, mask_from_scores
from trainkit.modules.compression.base import CompressedLinear, Compression, compress_linear


def layer(weight_RK: Tensor, compression: Compression, rank: int = 0, name: str = "a.q_proj.weight") -> CompressedLinear:
    """A layer with this weight, attached to a compression."""
    linear = nn.Linear(weight_RK.shape[1], weight_RK.shape[0], bias=False)
    linear.weight.data = weight_RK.clone()
    compressed = compress_linear(linear, rank, 2.0 * rank)
    compression.attach({name: compressed})
    return compressed


def effective(linear: CompressedLinear) -> Tensor:
    """The weight [R, K] that the layer computes with."""
    return linear(torch.eye(linear.in_features)).T


def gradient(linear: CompressedLinear, g_RK: Tensor) -> Tensor:
    """The gradient of the weight if that of the effective weight is `g_RK`."""
    linear.weight.grad = None
    (linear.transform(linear.merged()) * g_RK).sum().backward()
    assert linear.weight.grad is not None
    return linear.weight.grad


def prune(source: Path, folder: Path) -> Path:
    """A copy of a model whose linear layers keep the two largest of every four weights."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if name.endswith("_proj.weight"):
            tensors[name] = value * mask_from_scores(value.abs(), Pattern(0.5, 2, 4))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
