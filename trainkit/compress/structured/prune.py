"""Structured pruning: removes heads, neurons, hidden channels or blocks; the result is a smaller model of the same layout.

| method                 | removes                        | chosen by                                                          |
|------------------------|--------------------------------|--------------------------------------------------------------------|
| `flap`, `flap-plain`   | groups of heads, neurons       | fluctuation on calibration text (flap.py), heads' squared or not   |
| `structured-magnitude` | the same numbers of them       | sum of squared weights                                             |
| `structured-random`    | the same numbers of them       | seed                                                               |
| `width`                | neurons, heads, channels       | size of activations (width.py)                                     |
| `depth`                | blocks                         | KL to the dense model without the block (depth.py)                 |

Left out on purpose: sizes that differ between blocks, as FLAP's ranking over all blocks gives. No class of transformers holds
such a model.
"""

# K inputs  G key-value heads  U units: groups of heads, or neurons

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainkit.compress.blocks import Part, Sequences, Walked, walk
from trainkit.compress.layout import Layout, read_layout
from trainkit.compress.structured.cut import Cut
from trainkit.compress.structured.depth import drop_blocks
from trainkit.compress.structured.flap import fluctuation, group_scores, magnitudes, removed_bias, standardised
from trainkit.compress.structured.width import head_importance, heads_within_groups, highest, importance
from trainkit.compress.work import block_file
from trainkit.errors import UserError, note
from trainkit.models.load import decoder_shape
from trainkit.models.weights import read_tensors

FLAP = ("flap", "flap-plain")
METHODS = (*FLAP, "structured-magnitude", "structured-random", "width", "depth")
Dimension = Literal["neurons", "heads", "channels"]


def prune(
    folder: str | Path,
    calibration: Sequences | None,
    method: str,
    ratio: float,
    work: Path,
    *,
    bias: bool | None = None,
    dimensions: Sequence[Dimension] = ("neurons",),
    multiple: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, Any], dict[str, Any]]:
    """The smaller model: tensors of its files, its fields of config.json that change, and what to report.

    Continues after a kill if called again with the same `work`.

    Args:
        folder: A Llama, Mistral, Qwen2 or Qwen3 folder.
        calibration: Calibration text; may be None if neither the method nor a bias reads it.
        method: One of `METHODS`.
        ratio: Share to remove: of the weights of each block's linear layers; with `width` of each of `dimensions`; with `depth`
            of the blocks.
        work: Folder for the state; remove it when the tensors have been read.
        bias: Whether the mean contribution of removed heads and neurons becomes a bias. None: with FLAP, if the layout has it.
        dimensions: What is removed: neurons, heads, and with `width` channels. FLAP and its baselines always remove neurons.
        multiple: The kept numbers of neurons and channels are rounded to a multiple of this.
        seed: Seed of `structured-random`.
        dtype: Precision of the computation.
        device: Device of the computation.

    Raises:
        UserError: an architecture without these layers or biases, or a ratio that leaves or removes nothing.
    """
    layout = read_layout(folder)
    check_options(layout, method, ratio, bias, dimensions, multiple, calibration is not None)
    llama = layout.config.model_type == "llama"
    if bias is None and method in FLAP and not llama:
        note(f"{folder}: model_type {layout.config.model_type!r} has no biases for FLAP's compensation, which is left out")
    biased = bias if bias is not None else method in FLAP and llama

    # Choose
    key = {"method": method, "ratio": ratio, "bias": biased, "dimensions": [*dimensions], "multiple": multiple, "seed": seed}
    walked = partial(walk, layout.folder, work=work, gram=False, key=key, dense=True, dtype=dtype, device=device, title=method)
    biases, report = dict[str, Tensor](), dict[str, Any]()
    if method == "depth":
        assert calibration is not None
        count = _count(layout.blocks, layout.blocks * (1 - ratio), 1, "blocks", ratio)
        removed = drop_blocks(layout.folder, calibration, layout.blocks - count, work=work, key=key, dtype=dtype, device=device)
        gone, report = {entry["block"] for entry in removed}, {"removed_blocks": removed}
        cut = replace(Cut.whole(layout), blocks=[index for index in range(layout.blocks) if index not in gone])
    elif method == "width":
        cut = _width(layout, ratio, dimensions, multiple, partial(walked, calibration))
    else:
        rest = (multiple, seed, partial(walked, calibration))
        cut, biases = _heads_and_neurons(layout, method, ratio, biased, "heads" in dimensions, *rest)

    report |= {"method": method, "ratio": ratio, "bias": biased, "removed": cut.description()}
    return cut.tensors(read_tensors(layout.folder), biases), cut.config(), report


def check_options(
    layout: Layout, method: str, ratio: float, bias: bool | None, dimensions: Sequence[str], multiple: int, calibrated: bool
) -> None:
    """Refuses what is impossible whatever the sizes; `calibrated`: whether there is calibration text.

    Raises:
        UserError: names the option.
    """
    kind = layout.config.model_type
    if method not in METHODS:
        raise UserError(f"--method {method}: is not a structured method; choose from {', '.join(METHODS)}")
    if not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio:g}: give the share to remove, above 0 and below 1")
    if not dimensions or set(dimensions) - set(get_args(Dimension)):
        raise UserError(f"--dimensions {' '.join(dimensions)}: give some of {', '.join(get_args(Dimension))}")
    if "channels" in dimensions and method != "width":
        raise UserError(f"--dimensions channels: --method {method} removes none; take --method width")
    if multiple < 1:
        raise UserError(f"--multiple {multiple}: must be at least 1")
    if bias and method in ("width", "depth"):
        raise UserError(f"--bias true: --method {method} has no bias compensation; leave it out, or use --method flap")
    if bias and kind != "llama":
        raise UserError(f"--bias true: model_type {kind!r} has no biases on o_proj and down_proj, Llama has; leave it out")
    if not calibrated and (bias or not method.startswith("structured")):
        raise UserError(f"--method {method}: needs calibration text; give --calibration FILE")
    if calibrated and method.startswith("structured") and not bias:
        raise UserError(f"--calibration: --method {method} without --bias true reads no text; leave it out")


def _count(total: int, wanted: float, multiple: int, what: str, ratio: float) -> int:
    """The number to keep of `total`: the multiple nearest to `wanted`.

    Raises:
        UserError: that is none, or all.
    """
    count = round(wanted / multiple) * multiple
    if not 0 < count < total:
        effect, remedy = ("leaves", "lower") if count < 1 else ("removes", "raise")
        step = f" in multiples of {multiple}; {remedy} it, or lower --multiple" if multiple > 1 else f"; {remedy} it"
        raise UserError(f"--ratio {ratio:g}: {effect} none of {total} {what}{step}")
    return count


def _heads_and_neurons(
    layout: Layout, method: str, ratio: float, biased: bool, heads: bool, multiple: int, seed: int, walked: Any
) -> tuple[Cut, dict[str, Tensor]]:
    """The cut of groups of heads and neurons, and the new biases.

    With `heads`, whole groups are removed up to the ratio; then neurons until it is reached. Where there are few groups,
    neurons alone lose far less.
    """
    # How many: a group is a key-value head and its query heads. transformers' Llama needs heads that divide the hidden size.
    whole, shape = Cut.whole(layout), decoder_shape(layout.config)
    D, G, each = shape.hidden_size, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    most = math.floor(ratio * G + 1e-9) if heads else 0
    fits = [n for n in range(most + 1) if layout.config.model_type != "llama" or D % (each * (G - n)) == 0]
    groups, cost = fits[-1], (2 * each + 2) * shape.head_dim * D
    neurons = shape.intermediate_size - (ratio * (G * cost + 3 * D * shape.intermediate_size) - groups * cost) / (3 * D)
    neurons = _count(shape.intermediate_size, neurons, multiple, "neurons", ratio)

    def visit(part: Part) -> dict[str, Any]:
        # Scores of the groups and of the neurons
        prefix = f"{part.name}."
        linears = {name.removeprefix(prefix): linear for name, linear in part.linears.items()}
        out, down = linears["self_attn.o_proj"], linears["mlp.down_proj"]
        if method in FLAP:
            group_U = group_scores(fluctuation(part.by_input["out"], out.weight), G, squared=method == "flap")
            neuron_U = standardised(fluctuation(part.by_input["down"], down.weight))
        elif method == "structured-magnitude":
            q, *kv = (linears[f"self_attn.{name}_proj"] for name in "qkv")
            group_U = magnitudes([q, *kv], out, G)
            neuron_U = magnitudes([linears["mlp.gate_proj"], linears["mlp.up_proj"]], down, shape.intermediate_size)
        else:
            generator = torch.Generator().manual_seed(seed * layout.blocks + part.index)
            group_U, neuron_U = (torch.rand(n, generator=generator) for n in (G, shape.intermediate_size))
        kept = {"groups": highest(group_U, G - groups), "neurons": highest(neuron_U, neurons)}
        # The mean contribution of the others
        for source, linear, units in (("out", out, kept["groups"]), ("down", down, kept["neurons"])) if biased else ():
            removed_U = torch.ones(G if source == "out" else shape.intermediate_size, dtype=torch.bool)
            removed_U[units] = False
            if removed_U.any():
                removed_K = removed_U.repeat_interleave(linear.in_features // len(removed_U)).to(linear.weight.device)
                bias_R = removed_bias(part.by_input[source], linear.weight, removed_K)
                name = next(name for name, value in part.linears.items() if value is linear)
                bias_R = bias_R if linear.bias is None else bias_R + linear.bias
                part.replaced[f"{name}.bias"] = bias_R.to(part.dtypes[name])
        return kept

    result: Walked = walked(visit)
    kept_groups = [report["groups"] for report in result.reports]
    cut = replace(
        whole,
        heads=[[group * each + head for group in groups for head in range(each)] for groups in kept_groups],
        kv_heads=kept_groups,
        neurons=[report["neurons"] for report in result.reports],
        biases=whole.biases | ({"mlp_bias"} | ({"attention_bias"} if groups else set()) if biased else set()),
    )
    biases = dict[str, Tensor]()
    for index in range(layout.blocks):
        biases |= load_file(block_file(result.work, index))
    return cut, biases


def _width(layout: Layout, ratio: float, dimensions: Sequence[Dimension], multiple: int, walked: Any) -> Cut:
    """The cut of the least important neurons, query heads within their group, and channels of the residual stream.

    Raises:
        UserError: a dimension that this model cannot lose, or sizes that its config cannot have.
    """
    # How many
    whole, shape = Cut.whole(layout), decoder_shape(layout.config)
    heads, each, channels = shape.num_heads, shape.num_heads // shape.num_kv_heads, shape.hidden_size
    neurons = shape.intermediate_size
    if "neurons" in dimensions:
        neurons = _count(neurons, neurons * (1 - ratio), multiple, "neurons", ratio)
    if "heads" in dimensions:
        if each == 1:
            raise UserError("--dimensions heads: every key-value head has one query head here; use --method flap")
        heads = shape.num_kv_heads * _count(each, each * (1 - ratio), 1, "query heads of each key-value head", ratio)
    llama = layout.config.model_type == "llama"
    if "channels" in dimensions:
        step = math.lcm(multiple, heads) if llama else multiple
        channels = _count(channels, channels * (1 - ratio), step, "channels", ratio)
    if llama and channels % heads:
        raise UserError(
            f"--ratio {ratio:g}: transformers' Llama needs heads that divide the hidden size, {heads} and {channels}"
        )

    def visit(part: Part) -> dict[str, Any]:
        head_GQ = head_importance(part.by_input["out"], shape.num_kv_heads, shape.head_dim)
        # both norms' outputs are in the residual stream's channels
        channel_K = importance(part.by_input["attention"]) + importance(part.by_input["mlp"])
        return {
            "neurons": highest(importance(part.by_input["down"]), neurons),
            "heads": heads_within_groups(head_GQ, heads // shape.num_kv_heads),
            "channels": channel_K.tolist(),
        }

    reports = walked(visit).reports
    channel_K = torch.tensor([report["channels"] for report in reports], dtype=torch.float64).sum(0)
    kept = {name: [report[name] for report in reports] for name in ("neurons", "heads")}
    return replace(whole, neurons=kept["neurons"], heads=kept["heads"], channels=highest(channel_K, channels))
