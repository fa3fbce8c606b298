"""`trainkit compress`: a pruned or quantised variant of a model or a draft model, as a bundle that other programs load."""

from __future__ import annotations

import os
import resource
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from trainkit import bundle
from trainkit.bundle import read_json
from trainkit.compress.blocks import Walked
from trainkit.compress.layout import INPUTS, Layout, read_layout
from trainkit.compress.masks import Pattern, parse_pattern
from trainkit.compress.oneshot import METHODS, Goal, Plan, check_plan, oneshot
from trainkit.compress.quantise import Grid
from trainkit.compress.work import rank
from trainkit.data.sets.writer import check_positive, local_device, quiet_libraries
from trainkit.data.text.calibration import Calibration
from trainkit.data.text.calibration import calibration as read_calibration
from trainkit.errors import UserError
from trainkit.export.compressed import export_compressed
from trainkit.models.compressed import quantization_config
from trainkit.models.load import find_device


def compress(
    target: str,
    out: str,
    *,
    method: str,
    sparsity: str | None = None,
    bits: int | None = None,
    group: int | None = None,
    zero_points: bool | None = None,
    refine: Literal["swaps", "dsnot", "none"] | None = None,
    scope: Literal["matrix", "row"] | None = None,
    order: Literal["stored", "activation"] | None = None,
    static_scales: bool | None = None,
    sequential: bool | None = None,
    allocation: str | None = None,
    calibration: list[str] | None = None,
    samples: int = 128,
    length: int | None = None,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Prunes or quantises the linear layers of a model's blocks without training, and writes the result as a bundle.

    Embeddings, norms and the output head stay as they are. Methods that prune: `magnitude`, `wanda` (arXiv 2306.11695) and
    `sparsegpt` (arXiv 2301.00774), which also changes the weights that stay. Methods that quantise: `rtn` (round to nearest)
    and `gptq` (arXiv 2210.17323). With --bits, a method that prunes also quantises. All but `magnitude` and `rtn` need
    calibration text, which should resemble what the model will read and must not be the text that it is evaluated on.

    One block is in memory at a time. After a kill or an interrupt, the same command continues where it stopped, from the folder
    OUT.work beside OUT, which it removes at the end. Under torchrun, each process reads its share of the calibration text. The
    model may be a draft model's bundle; then the result is one too.

    Examples:
        trainkit compress models/target models/sparse --method wanda --sparsity 2:4 --calibration data/train.jsonl
        trainkit compress models/target models/int4 --method gptq --bits 4 --calibration data/train.jsonl
        trainkit compress models/target models/both --method sparsegpt --sparsity 0.5 --bits 8 --calibration data/train.jsonl
        trainkit compress models/target models/int8 --method rtn --bits 8

    Args:
        target: Folder of a Llama, Mistral, Qwen2 or Qwen3 model, or the bundle of a draft model.
        out: Bundle to write.
        method: magnitude, wanda, sparsegpt, rtn or gptq.
        sparsity: Share of the weights to prune, such as 0.6, or N:M to keep N of every M consecutive weights, such as 2:4.
        bits: Bits of a quantised weight, 4 or 8.
        group: Consecutive weights that share a scale; by default 128 with 4 bits, all of an output with 8.
        zero_points: Whether groups have zero points, for weights that are not symmetric around 0.
        refine: What moves the mask of magnitude or wanda afterwards: `swaps` lowers the squared error of each output swap by
            swap, `dsnot` its mean error (arXiv 2310.08915); by default swaps where there is calibration text.
        scope: What magnitude and sparsegpt compare when they prune a share: the weights of a whole matrix (for sparsegpt those
            of 128 inputs), by default, or of each output.
        order: Order in which gptq and sparsegpt quantise inputs: as stored, by default, or by activation, largest first.
        static_scales: Whether gptq and sparsegpt take scales from the weights before the pass; by default, during it.
        sequential: Whether layers of a block are measured after its earlier layers were changed; four times the forward passes.
        allocation: File of `trainkit allocate`, in place of --sparsity or --bits.
        calibration: Files, folders or hub names of calibration text, in any format of training text.
        samples: Number of calibration windows.
        length: Tokens in a window; by default 2048, or as many as the model covers.
        seed: Seed of the order of calibration rows.
        columns: Column mapping, from trainkit's names to the files'.
        device: Torch device; `auto` uses a GPU if there is one, under torchrun each process its own.
        dtype: Precision of the computation: float32, bfloat16 or float16. Files keep the model's own.
    """
    start = perf_counter()
    quiet_libraries()
    # Check every option before anything is computed
    options = {name: value for name, value in locals().items() if name not in ("start", "target", "out")}
    given = {name for name, value in options.items() if value is not None}
    check_positive(samples=samples, length=length, group=group)
    layout = check_folders(target, out)
    plan = _plan(layout, method, given, options)
    check_plan(layout, plan)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose from float32, bfloat16, float16")
    placed = start_processes(local_device(device))
    # Read the calibration text, compress block by block, export
    text = calibration_text(layout, calibration, samples, length, seed, columns) if calibration else None
    work = Path(out).resolve().with_name(f"{Path(out).resolve().name}.work")
    walked = oneshot(target, text, plan, work=work, dtype=getattr(torch, dtype), device=placed)
    if rank() > 0:
        return ""
    exported = export_compressed(
        out,
        source=layout.folder,
        tensors=walked.tensors(),
        config=_quantisation(layout, plan),
        compression=_description(plan, walked, text, target, out, options),
        calibration_fingerprints=text.fingerprints if text else None,
        seed=seed if text else None,
        data={"calibration": text.digest} if text else None,
    )
    walked.remove()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [_table(layout, walked.reports), "", _summary(exported)]
    lines += [f"written to {exported.path} in {perf_counter() - start:.0f} s; peak memory {peak:.1f} GiB"]
    return "\n".join(lines)


def check_folders(target: str, out: str) -> Layout:
    """The layout of a model to compress, and a check that `out` can be written.

    Raises:
        UserError: it cannot be compressed, or `out` is the model's folder, inside it, around it, or holds something else.
    """
    layout = read_layout(target)
    source, destination = Path(target).resolve(), Path(out).resolve()
    if source == destination or source in destination.parents or destination in source.parents:
        raise UserError(f"{out}: is the folder of the model, inside it or around it; choose another OUT")
    bundle.check_replaceable(destination)
    if bundle.is_bundle(source) and (kind := bundle.read(source, checksums=False).kind) not in ("model", "lm"):
        raise UserError(f"{target}: a drafter of kind {kind!r} cannot be compressed; give a model or a draft model (kind lm)")
    return layout


def _plan(layout: Layout, name: str, given: set[str], options: Mapping[str, Any]) -> Plan:
    """The plan that the options ask for.

    Raises:
        UserError: an option is missing, does not fit the method, or has a bad value.
    """
    if name not in METHODS:
        raise UserError(f"--method {name}: unknown method; choose from {', '.join(METHODS)}")
    method = METHODS[name]
    # Which options the method has
    allowed = {"bits", "group", "zero_points", "sequential", "allocation", "order", "static_scales"}
    allowed |= ({"sparsity", "scope"} if method.prunes else set()) | ({"refine"} if method.scores else set())
    allowed -= {"wanda": {"scope"}, "rtn": {"order", "static_scales", "sequential"}}.get(name, set())
    specific = {"sparsity", "refine", "scope", *allowed}
    if wrong := sorted(given & specific - allowed):
        remedy = "prune by magnitude, wanda or sparsegpt, with --bits to quantise as well" if wrong[0] == "sparsity" else ""
        raise UserError(f"--{wrong[0]}: --method {name} has no such option; {remedy or 'leave it out'}")
    # What each layer becomes
    bits, group, allocation = options["bits"], options["group"], options["allocation"]
    if bits not in (None, 4, 8):
        raise UserError(f"--bits {bits}: weights are stored with 4 or 8 bits; give one of these")
    pattern = parse_pattern(options["sparsity"]) if "sparsity" in given else None
    if allocation is None and method.prunes and pattern is None:
        raise UserError(f"--method {name}: prunes, so give --sparsity, such as 2:4 or 0.5")
    if allocation is None and not method.prunes and bits is None:
        raise UserError(f"--method {name}: quantises, so give --bits 4 or 8")
    symmetric = not options["zero_points"]

    def grid(count: int | None) -> Grid | None:
        return Grid(count, group or (128 if count == 4 else None), symmetric) if count else None

    goals = {layer: Goal(pattern, grid(bits)) for layer in layout.all_linears()}
    if allocation is not None:
        goals = {
            layer: Goal(Pattern(share) if share else None, grid(count or bits))
            for layer, (share, count) in _allocated(allocation, name, given).items()
            if share or count or bits
        }
    if not any(goal.grid for goal in goals.values()):
        if wrong := sorted(given & {"group", "zero_points", "static_scales"}):
            raise UserError(f"--{wrong[0]}: only for quantised weights; give --bits, or leave it out")
        if options["order"] and not method.gram:
            raise UserError("--order: only for a pass that changes weights; give --bits, or leave it out")
    if options["order"] == "activation" and any(goal.pattern and goal.pattern.group for goal in goals.values()) and method.gram:
        raise UserError("--order activation: N:M groups are pruned in stored order; leave it out")
    # What calibration text is for
    calibrated = "calibration" in given
    if method.calibrated and not calibrated:
        raise UserError(f"--method {name}: needs calibration text; give --calibration FILE")
    refine = options["refine"] or ("swaps" if method.scores and calibrated else "none")
    if refine != "none" and not calibrated:
        raise UserError(f"--refine {refine}: needs calibration text; give --calibration FILE")
    if calibrated and not method.calibrated and refine == "none":
        raise UserError(f"--calibration: --method {name} without --refine reads no text; leave it out")
    chosen = {key: options[key] for key in ("scope", "order", "static_scales", "sequential") if options[key] is not None}
    return Plan(name, goals, refine, **chosen)


def _allocated(file: str, method: str, given: set[str]) -> dict[str, tuple[float | None, int | None]]:
    """Layer -> share to prune and bits, from a file of `trainkit allocate`.

    Raises:
        UserError: it is not such a file, or does not fit the method or the options.
    """
    prunes, layers = METHODS[method].prunes, read_json(Path(file)).get("layers")
    field, option = ("sparsity", "sparsity") if prunes else ("bits", "bits")
    if option in given:
        raise UserError(f"--{option}: is given for each layer by --allocation; leave one of them out")
    if not isinstance(layers, dict) or not layers or not all(isinstance(values, dict) for values in layers.values()):
        raise UserError(f"{file}: has no layers; give a file of trainkit allocate")
    found: dict[str, tuple[float | None, int | None]] = {}
    for layer, values in layers.items():
        value = values.get(field)
        fits = isinstance(value, (int, float)) and (0 <= value < 1 if prunes else value in (4, 8))
        if not fits:
            raise UserError(f"{file}: {layer} has {field} {value!r}, which --method {method} cannot give; allocate again")
        found[layer.removesuffix(".weight")] = (float(value), None) if prunes else (None, int(value))
    return found


def calibration_text(
    layout: Layout, files: Sequence[str], samples: int, length: int | None, seed: int, columns: Mapping[str, str] | None
) -> Calibration:
    """Windows of calibration text of a length that the model covers; by default 2048 tokens, or as many as it covers."""
    covered = layout.config.max_position_embeddings
    if length is not None and length > covered:
        raise UserError(f"--length {length}: {layout.folder} covers {covered} positions; give at most that")
    return read_calibration(files, str(layout.folder), samples, length or min(2048, covered), seed, columns)


def start_processes(device: str) -> torch.device:
    """The device of this process; under torchrun, joins the others."""
    placed = find_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        if placed.type == "cuda":
            torch.cuda.set_device(placed)
        torch.distributed.init_process_group("nccl" if placed.type == "cuda" else "gloo")
    return placed


def _quantisation(layout: Layout, plan: Plan) -> dict[str, Any]:
    """Fields of config.json that a plan changes."""
    grids = {name: goal.grid for name, goal in plan.goals.items() if goal.grid}
    if not grids:
        return {}
    first = next(iter(grids.values()))
    sizes: tuple[Any, Any] = first.bits, first.group
    if len(grids) < len(layout.all_linears()) or len(set(grids.values())) > 1:
        sizes = {name: grid.bits for name, grid in grids.items()}, {name: grid.group for name, grid in grids.items()}
    return {"quantization_config": quantization_config(*sizes, first.symmetric, first.kind)}


def _description(
    plan: Plan, walked: Walked, text: Calibration | None, target: str, out: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """What was done, for the card."""
    patterns, grids = ({getattr(goal, part) for goal in plan.goals.values()} for part in ("pattern", "grid"))
    flags = {name: value for name, value in options.items() if value is not None}
    grid = next(iter(grids)) if len(grids) == 1 else None
    description = {
        "method": plan.method,
        "pattern": str(next(iter(patterns))) if patterns != {None} and len(patterns) == 1 else None,
        "grid": {name: getattr(grid, name) for name in ("bits", "group", "symmetric", "kind")} if grid else None,
        **{name: getattr(plan, name) for name in ("refine", "scope", "order", "static_scales", "sequential")},
        "layers": {f"{name}.weight": values for report in walked.reports for name, values in report.items()},
        "commands": [shlex.join(["trainkit", "compress", target, out, *_as_flags(flags)])],
    }
    if text is not None:
        S, T = text.tokens_ST.shape
        files = [{"name": Path(file).name, "sha256": digest} for file, digest in zip(text.files, text.contents, strict=True)]
        described = {"files": files, "digest": text.digest, "seed": text.seed, "samples": S, "length": T}
        description["calibration"] = described | {"tokens": int(text.counted_ST.sum())}
    return description


def _as_flags(values: Mapping[str, Any]) -> Iterable[str]:
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            yield from (f"--{name}", str(item))


def _table(layout: Layout, reports: Sequence[Mapping[str, Any]]) -> str:
    """Means over the blocks of what was measured, for each kind of layer."""
    rows = [("layers", "sparsity", "bits", "output error", "weight error")]
    for names in INPUTS.values():
        for name in names:
            found = [report[key] for index, report in enumerate(reports) if (key := f"{layout.block(index)}.{name}") in report]
            if not found:
                continue
            mean = lambda field, found=found: sum(values[field] for values in found) / len(found)
            error = "not measured" if any(values["error"] is None for values in found) else f"{mean('error'):.3g}"
            kind = name.rpartition(".")[2]
            rows.append((kind, f"{mean('sparsity'):.4f}", f"{mean('bits'):g}", error, f"{mean('weight_error'):.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _summary(exported: bundle.Bundle) -> str:
    found = exported.extra["compression"]
    shares, sizes = found["sparsity"], found["bytes"]
    return (
        f"sparsity {shares['matrices']:.4f} of the compressed matrices, {shares['parameters']:.4f} of all parameters; "
        f"{sizes['disk'] / 2**20:.1f} MiB of weights on disk, before {sizes['dense'] / 2**20:.1f}"
    )
