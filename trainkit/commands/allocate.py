"""`trainkit allocate`: how much to prune or quantise each layer, so that the output changes least under one budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch

from trainkit.commands.compress import calibration_text, start_processes
from trainkit.compress.allocation.evolution import Candidate, Search, Space, Stage
from trainkit.compress.allocation.fitness import KLToDense
from trainkit.compress.allocation.levels import Levels, bit_levels, build, sparsity_levels
from trainkit.compress.layout import INPUTS, Layout, read_layout
from trainkit.compress.masks import parse_pattern
from trainkit.compress.oneshot import METHODS
from trainkit.compress.work import rank
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.writer import check_positive, local_device, quiet_libraries
from trainkit.data.text.calibration import Calibration
from trainkit.errors import UserError
from trainkit.files import write_json
from trainkit.models.target import FrozenTarget

RANDOM = 5
"""Random allocations of the same budget that are measured where no uniform one exists."""


def allocate(
    target: str,
    out: str,
    *,
    calibration: list[str],
    sparsity: str | None = None,
    bits: float | None = None,
    bytes: int | None = None,
    method: str | None = None,
    group: int | None = None,
    levels: int = 8,
    step: int | None = None,
    samples: int = 128,
    search: int = 64,
    heldout: int = 32,
    length: int | None = None,
    generations: int = 100,
    offspring: int = 16,
    survivors: list[int] = [4, 1],  # noqa: B006  never changed; a tuple has another syntax on the command line
    tokens: list[int] = [2048, 8192],  # noqa: B006
    seed: int = 0,
    work: str | None = None,
    columns: dict[str, str] | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Searches how a budget of weights or bytes is best spread over layers, and writes the allocation for `trainkit compress`.

    EvoPress (arXiv 2410.14649): every linear layer is compressed alone at several levels; an evolutionary search then combines
    levels, and keeps the combination with the lowest KL divergence from the dense model on search text. With --sparsity, all
    allocations prune exactly as many weights as the uniform one. With --bits or --bytes, layers get 4 or 8 bits, and the budget
    includes scales and packing. The output head, embeddings and norms are not in the budget.

    Calibration, search and held-out windows are taken one after the other from the same text; give training text, not what the
    model will be evaluated on. The last two lines compare KL on the held-out windows with the uniform allocation. The defaults
    suit a small model on a CPU; those published are --generations 400 --offspring 64 --survivors [8,2,1] --tokens
    [2048,16384,65536] --search 256 for sparsity, and --generations 150 --offspring 128 --survivors [16,4,1] --tokens
    [2048,16384,131072] for bits.

    After a kill, the same command continues from the folder of --work and gives the same result. Commands with another budget
    of --bits or --bytes, seed or search setting use the same levels again. Under torchrun, processes share the candidates.

    Examples:
        trainkit allocate models/target sparse.json --sparsity 0.6 --calibration data/train.jsonl
        trainkit allocate models/target bits.json --bits 5 --calibration data/train.jsonl
        trainkit compress models/target models/sparse --method sparsegpt --allocation sparse.json --calibration data/train.jsonl

    Args:
        target: Folder of a Llama, Mistral, Qwen2 or Qwen3 model, or the bundle of a draft model.
        out: JSON file to write.
        calibration: Files, folders or hub names of text, in any format of training text.
        sparsity: Mean share of the weights to prune, such as 0.6.
        bits: Mean bits per weight, scales included, such as 5.
        bytes: Total bytes of all linear layers of the blocks, instead of --bits.
        method: sparsegpt (default), wanda or magnitude to prune; gptq (default) or rtn to quantise.
        group: Consecutive weights that share a scale; by default 128 with 4 bits, all of an output with 8.
        levels: Number of levels of sparsity below, and also above, the uniform one.
        step: Number of weights between two levels; by default --levels steps are half of the weights that a square matrix
            prunes or keeps, whichever are fewer.
        samples: Number of windows on which layers are compressed.
        search: Number of windows from which the search draws.
        heldout: Number of windows of the final comparison.
        length: Tokens in a window; by default 2048, or as many as the model covers.
        generations: Number of generations.
        offspring: Candidates in a generation.
        survivors: Candidates that survive each stage of a generation; the last is 1.
        tokens: Tokens on which the candidates of each stage are measured.
        seed: Seed of the order of rows, of mutations and of the windows of stages.
        work: Folder of the levels and the state of the search; by default OUT.work beside OUT.
        columns: Column mapping, from trainkit's names to the files'.
        device: Torch device; `auto` uses a GPU if there is one, under torchrun each process its own.
        dtype: Precision of the model: float32, bfloat16 or float16.
    """
    quiet_libraries()
    # Check every option before anything is computed
    check_positive(group=group, levels=levels, step=step, samples=samples, search=search, heldout=heldout, length=length)
    check_positive(generations=generations, offspring=offspring)
    if sum(value is not None for value in (sparsity, bits, bytes)) != 1:
        raise UserError("--sparsity, --bits, --bytes: give exactly one of them, the budget")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose from float32, bfloat16, float16")
    if sparsity is not None and group is not None:
        raise UserError("--group: only for quantised weights; give --bits or --bytes, or leave it out")
    if sparsity is None and step is not None:
        raise UserError("--step: only for levels of --sparsity; leave it out")
    if Path(out).is_dir():
        raise UserError(f"{out}: is a folder; name a JSON file to write")
    if len(survivors) != len(tokens) or not survivors or survivors[-1] != 1 or min(*survivors, *tokens) < 1:
        pairs = f"--survivors {survivors}, --tokens {tokens}"
        raise UserError(f"{pairs}: give two lists of the same length, of numbers from 1, with 1 as the last survivor")
    prunes = sparsity is not None
    method = method or ("sparsegpt" if prunes else "gptq")
    if method not in METHODS or METHODS[method].prunes is not prunes:
        known = ", ".join(name for name, known in METHODS.items() if known.prunes is prunes)
        raise UserError(f"--method {method}: cannot be used with this budget; choose from {known}")
    layout = read_layout(target)
    # Levels and budget
    if sparsity is not None:
        pattern = parse_pattern(sparsity)
        if pattern.group:
            raise UserError(f"--sparsity {sparsity}: N:M is the same in all layers, so give a share, such as 0.6")
        several, start = sparsity_levels(layout, pattern.share, method, levels, step)
        space = _space(several, None)
        space = Space(space.costs, space.cost(start))
    else:
        several, start = bit_levels(layout, group), None
        weights = sum(outputs * inputs for outputs, inputs in layout.shapes().values())
        space = _space(several, bytes if bits is None else int(bits / 8 * weights))
        _check_bytes(space, weights, f"--bits {bits:g}" if bits is not None else f"--bytes {bytes}")
    # Text and stages
    placed = start_processes(local_device(device))
    windows = samples + search + heldout
    try:
        text = calibration_text(layout, calibration, windows, length, seed, columns)
    except UserError as error:  # it knows only their sum
        options = f"--samples {samples}, --search {search}, --heldout {heldout}:"
        raise UserError(
            str(error).replace(f"--samples {windows}:", options).replace("lower --samples or", "lower them or")
        ) from None
    length = text.tokens_ST.shape[1]
    if max(tokens) > search * length:
        raise UserError(f"--tokens {max(tokens)}: --search {search} windows of {length} have fewer; raise --search")
    stages = [Stage(count, max(1, size // length)) for count, size in zip(survivors, tokens, strict=True)]
    # Compress every layer at its levels, search, compare
    folder = Path(work or f"{out}.work")
    precision = getattr(torch, dtype)
    database = build(layout, _Part(text, slice(samples)), several, method, work=folder, dtype=precision, device=placed)
    fitness = KLToDense(FrozenTarget(target, precision).to(placed), database, text.tokens_ST[samples:])
    settings = Search(generations, offspring, stages, search, seed)
    identity = [weights_digest(target), text.digest, samples, method, dtype]
    value, found = settings.run(space, fitness, start, folder, identity)[-1]
    if rank() > 0:
        return ""
    others = [start] if start else [space.fill([0] * len(several), Random(f"{seed} baseline {i}")) for i in range(RANDOM)]
    unseen = range(search, search + heldout)
    baseline = sum(fitness(other, unseen) for other in others) / len(others)
    kl = {"uniform" if start else "random": baseline, "allocated": fitness(found, unseen), "search": value}
    write_json(
        out,
        {
            "target": weights_digest(target),
            "method": method,
            "group": group,
            "layers": {name: several[name][level].setting() for name, level in zip(several, found, strict=True)},
            "budget": {"weights" if prunes else "bytes": space.budget, "cost": space.cost(found)},
            "kl": kl,
            "calibration": {"digest": text.digest, "samples": samples, "length": length, "seed": seed},
            "search": {"generations": generations, "offspring": offspring, "survivors": survivors, "tokens": tokens},
        },
    )
    return "\n".join([_table(layout, several, found), "", *_summary(kl, space, found, prunes, heldout), f"written to {out}"])


class _Part:
    """Some windows of a text."""

    def __init__(self, text: Calibration, windows: slice) -> None:
        self.tokens_ST, self.counted_ST = text.tokens_ST[windows], text.counted_ST[windows]


def _space(several: Levels, budget: int | None) -> Space:
    return Space([[level.cost for level in levels] for levels in several.values()], budget or 0)


def _check_bytes(space: Space, weights: int, option: str) -> None:
    """Refuses a budget of bytes below 4 bits everywhere, or one that leaves nothing to choose."""
    low, high = (sum(costs[end] for costs in space.costs) for end in (0, -1))
    if space.budget < low or space.budget >= high:
        least, most = (8 * size / weights for size in (low, high))
        raise UserError(
            f"{option}: 4 bits everywhere take {low} bytes, 8 bits {high} ({least:.3f} and {most:.3f} bits per weight with "
            "scales); give a budget between the two"
        )


def _table(layout: Layout, several: Levels, found: Candidate) -> str:
    """The setting of every layer: a row for each block."""
    settings = {name: several[name][level].setting() for name, level in zip(several, found, strict=True)}
    kinds = [name for names in INPUTS.values() for name in names]
    rows = [["block", *(kind.rpartition(".")[2].removesuffix("_proj") for kind in kinds)]]
    for block in range(layout.blocks):
        values = [next(iter(settings[f"{layout.block(block)}.{kind}"].values())) for kind in kinds]
        rows.append([str(block), *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _summary(kl: Mapping[str, float], space: Space, found: Candidate, prunes: bool, heldout: int) -> list[str]:
    name: Any = "uniform" if prunes else "random"
    unit = "weights kept" if prunes else "bytes"
    others = "the uniform allocation" if prunes else f"mean of {RANDOM} random allocations"
    return [
        f"{space.cost(found):,} {unit}, budget {space.budget:,}",
        f"KL to the dense model on {heldout} held-out windows, nats per token: {kl['allocated']:.5f}; {others} {kl[name]:.5f}",
    ]
