"""`trainkit compress`: a pruned or quantised variant of a model or a draft model, as a bundle that other programs load."""

from __future__ import annotations

import json
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
from trainkit.compress.awq import awq
from trainkit.compress.layout import Layout, read_layout
from trainkit.compress.oneshot import METHODS, oneshot
from trainkit.compress.plan import awq_grid, check_options, described, make_goal, make_plan, quantisation
from trainkit.compress.structured import prune as structured
from trainkit.compress.work import rank
from trainkit.data.manifest import weights_digest
from trainkit.data.sets.writer import check_positive, local_device, quiet_libraries
from trainkit.data.text.calibration import Calibration
from trainkit.data.text.calibration import calibration as read_calibration
from trainkit.errors import UserError
from trainkit.export.compressed import export_compressed
from trainkit.export.compressed_drafter import compress_drafter
from trainkit.files import remove
from trainkit.models.load import find_device

STRUCTURED_OPTIONS = {"ratio", "bias", "dimensions", "multiple"}


def compress(
    target: str,
    out: str,
    *,
    method: str,
    sparsity: str | None = None,
    bits: int | None = None,
    kind: Literal["int", "float"] | None = None,
    group: int | None = None,
    zero_points: bool | None = None,
    refine: Literal["swaps", "dsnot", "none"] | None = None,
    scope: Literal["matrix", "row"] | None = None,
    order: Literal["stored", "activation"] | None = None,
    static_scales: bool | None = None,
    sequential: bool | None = None,
    allocation: str | None = None,
    python: str | None = None,
    ratio: float | None = None,
    bias: bool | None = None,
    dimensions: list[str] | None = None,
    multiple: int | None = None,
    calibration: list[str] | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    columns: dict[str, str] | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Prunes or quantises the linear layers of a model's blocks without training, or makes the model smaller; writes a bundle.

    Embeddings and output head stay as they are. Methods that prune: `magnitude`, `wanda` (arXiv 2306.11695) and
    `sparsegpt` (arXiv 2301.00774), which also changes the remaining weights. Methods that quantise: `rtn` (round to nearest),
    `gptq` (arXiv 2210.17323), and `awq` (arXiv 2306.00978), which needs llmcompressor. With --bits, a method that prunes also
    quantises. Structured methods give a smaller model: `flap` (arXiv 2312.11983), `flap-plain`, `structured-magnitude` and
    `structured-random` remove heads and neurons, `width` (arXiv 2407.14679) neurons, heads or channels, `depth` blocks. All but
    `magnitude`, `rtn`, `structured-magnitude` and `structured-random` need calibration text, which should resemble what the
    model will read and must not be the text that it is evaluated on.

    One block is in memory at a time. After a kill or an interrupt, the same command continues where it stopped, from the folder
    OUT.work beside OUT, which it removes at the end. Under torchrun, each process reads its share of the calibration text.
    TARGET may be a draft model's bundle; then the result is one too. Drafters of other kinds, such as medusa and eagle, are
    compressed by `magnitude` and `rtn`, without calibration text and including their own output heads.

    Examples:
        trainkit compress models/target models/sparse --method wanda --sparsity 2:4 --calibration data/train.jsonl
        trainkit compress models/target models/int4 --method gptq --bits 4 --calibration data/train.jsonl
        trainkit compress models/target models/both --method sparsegpt --sparsity 0.5 --bits 8 --calibration data/train.jsonl
        trainkit compress models/target models/int8 --method rtn --bits 8
        trainkit compress models/target models/float8 --method rtn --bits 8 --kind float
        trainkit compress models/target models/smaller --method flap --ratio 0.2 --calibration data/train.jsonl

    Args:
        target: Folder of a Llama, Mistral, Qwen2 or Qwen3 model, or the bundle of a drafter.
        out: Bundle to write.
        method: One of the methods above.
        sparsity: Share of the weights to prune, such as 0.6, or N:M to keep N of every M consecutive weights, such as 2:4.
        bits: Bits of a quantised weight, 4 or 8.
        kind: With 8 bits: integers, the default, or `float` for float8 (e4m3), one scale for each output.
        group: Consecutive weights that share a scale; by default that of --allocation, else 128 with 4 bits, all of an output
            with 8.
        zero_points: Whether groups have zero points, for weights that are not symmetric around 0.
        refine: How the mask of magnitude or wanda is refined afterwards: `swaps` exchanges weights to lower the squared error
            of each output, `dsnot` to lower its mean error (arXiv 2310.08915); by default swaps if there is calibration text.
        scope: Which weights magnitude and sparsegpt compare when they prune a share: those of a whole matrix (sparsegpt: of 128
            inputs), the default, or those of each output.
        order: Order in which gptq and sparsegpt quantise inputs: `stored`, the default, or `activation`, largest first.
        static_scales: Whether gptq and sparsegpt take scales from the weights before the pass; by default, during it.
        sequential: Whether the inputs of a block's layers are measured after its earlier layers were changed; this takes four
            times the forward passes.
        allocation: File of `trainkit allocate`, in place of --sparsity or --bits.
        python: Interpreter that has llmcompressor, which computes `awq`; by default the one that runs trainkit.
        ratio: Share to remove by a structured method: of the weights of each block's linear layers, with `width` of each of
            --dimensions, with `depth` of the blocks.
        bias: Whether the mean contribution of removed heads and neurons becomes a bias; by default with flap, if the layout has
            such biases (Llama).
        dimensions: What to remove: neurons, heads, and with width also channels; by default neurons.
        multiple: The remaining numbers of neurons and channels are rounded to a multiple of this; by default 64.
        calibration: Files, folders or hub names of calibration text, in any format of training text.
        samples: Number of calibration windows, by default 128.
        length: Tokens in a window; by default 2048, or as many as the model covers.
        seed: Seed of the order of calibration rows, and of the draws of structured-random; by default 0.
        columns: Column mapping, from trainkit's names to the files'.
        device: Torch device; `auto` uses a GPU if there is one, under torchrun each process its own.
        dtype: Precision of the computation: float32, bfloat16 or float16. The files keep the model's dtype.
    """
    start = perf_counter()
    quiet_libraries()
    # Check every option before anything is computed
    options = {name: value for name, value in locals().items() if name not in ("start", "target", "out")}
    given = {name for name, value in options.items() if value is not None}
    check_positive(samples=samples, length=length, group=group, multiple=multiple)
    source = check_folders(target, out)
    if source is not None and source.kind not in ("model", "lm"):
        return _compress_drafter(source, target, out, given, options)
    layout = read_layout(target)
    check_options(method, given)
    unread = {"length", "columns", "samples", "seed"} - ({"seed"} if method == "structured-random" else set())
    if not calibration and (wrong := sorted(given & unread)):
        raise UserError(f"--{wrong[0]}: is for calibration text; give --calibration FILE, or leave it out")
    samples, seed = samples or 128, seed or 0
    options |= {name: value for name, value in (("samples", samples), ("seed", seed)) if calibration}
    plan = make_plan(layout, method, given, options) if method in METHODS else None
    grid = awq_grid(layout, given, options) if method == "awq" else None
    if plan is None and grid is None and ratio is None:
        raise UserError(f"--method {method}: removes parts of the model, so give --ratio, such as 0.2")
    if allocation is not None and read_json(Path(allocation)).get("target") not in (None, weights_digest(target)):
        raise UserError(f"{allocation}: is for a model with other weights; run trainkit allocate on {target}")
    chosen: dict[str, Any] = {name: options[name] for name in ("bias", "dimensions", "multiple") if name in given}
    if method in structured.METHODS:
        defaults = {"bias": None, "dimensions": ["neurons"], "multiple": 64}
        structured.check_options(layout, method, ratio or 0, **{**defaults, **chosen}, calibrated=calibration is not None)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: choose from float32, bfloat16, float16")
    placed = start_processes(local_device(device))
    # Read the calibration text; compress, block by block
    text = calibration_text(layout, calibration, samples, length, seed, columns) if calibration else None
    destination = Path(out).resolve()
    computed: dict[str, Any] = {"work": destination.with_name(f"{destination.name}.work"), "dtype": getattr(torch, dtype)}
    computed["device"] = placed
    if plan is not None:
        walked = oneshot(target, text, plan, **computed)
        tensors, config, made = walked.tensors(), quantisation(layout, plan), described(plan, walked)
        table = _table(made["layers"])
    elif grid is not None and text is not None:
        tensors, config, made = awq(layout, text, grid, python=python, **computed)
        table = f"quantised by {made['program']}"
    else:
        tensors, config, made = structured.prune(target, text, method, ratio or 0, seed=seed, **chosen, **computed)
        made |= {"layers": {}}
        table = f"removed: {made['removed']}"
    # Export; a file may mix dtypes, such as norms in float32 beside bfloat16. Codes of float8 stay as they are
    stored = getattr(torch, layout.stored_dtype())
    wide = lambda value: value.is_floating_point() and value.itemsize > 1
    if rank() > 0:
        return ""
    made |= {"commands": [shlex.join(["trainkit", "compress", target, out, *_as_flags(options)])]}
    exported = export_compressed(
        out,
        source=layout.folder,
        tensors=((name, value.to(stored) if wide(value) else value) for name, value in tensors),
        config={"dtype": layout.stored_dtype()} | config,
        compression=made | _described_text(text),
        calibration_fingerprints=text.fingerprints if text else None,
        seed=seed,
        data={"calibration": text.digest} if text else None,
    )
    remove(computed["work"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [table, "", _summary(exported)]
    lines += [f"written to {exported.path} in {perf_counter() - start:.0f} s; peak memory {peak:.1f} GiB"]
    return "\n".join(lines)


def check_folders(target: str, out: str) -> bundle.Bundle | None:
    """Checks that `out` can be written; returns the bundle at `target`, if it is one.

    Raises:
        UserError: `out` is the model's folder, inside it, around it, or holds something else.
    """
    source, destination = Path(target).resolve(), Path(out).resolve()
    if source == destination or source in destination.parents or destination in source.parents:
        raise UserError(f"{out}: is the folder of the model, inside it or around it; choose another OUT")
    bundle.check_replaceable(destination)
    return bundle.read(source, checksums=False) if bundle.is_bundle(source) else None


def _compress_drafter(source: bundle.Bundle, target: str, out: str, given: set[str], options: Mapping[str, Any]) -> str:
    """Compresses a drafter of another kind than `lm`."""
    goal = make_goal(source.kind, options["method"], given, options)
    command = shlex.join(["trainkit", "compress", target, out, *_as_flags(options)])
    exported = compress_drafter(
        source,
        out,
        pattern=goal.pattern,
        grid=goal.grid,
        scope=options["scope"] or "matrix",
        device=find_device(options["device"]),
        method=options["method"],
        commands=[command],
    )
    return f"{_table(exported.extra['compression']['layers'])}\n\n{_summary(exported)}\nwritten to {exported.path}"


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


def _described_text(text: Calibration | None) -> dict[str, Any]:
    """The calibration text, for the card."""
    if text is None:
        return {}
    S, T = text.tokens_ST.shape
    files = [{"name": Path(file).name, "sha256": digest} for file, digest in zip(text.files, text.contents, strict=True)]
    described = {"files": files, "digest": text.digest, "seed": text.seed, "samples": S, "length": T}
    return {"calibration": described | {"tokens": int(text.counted_ST.sum())}}


def _as_flags(values: Mapping[str, Any]) -> Iterable[str]:
    for name, value in values.items():
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            yield from (f"--{name}", item if isinstance(item, str) else json.dumps(item))


def _table(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Means of what was measured over the layers of each kind, such as q_proj."""
    rows, kinds = [("layers", "sparsity", "bits", "output error", "weight error")], dict[str, list[Mapping[str, Any]]]()
    for name, values in layers.items():
        parts = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
        kinds.setdefault(parts[-1], []).append(values)
    for kind, found in kinds.items():
        mean = lambda field, found=found: sum(values[field] for values in found) / len(found)
        error = "not measured" if any(values.get("error") is None for values in found) else f"{mean('error'):.3g}"
        rows.append((kind, f"{mean('sparsity'):.4f}", f"{mean('bits'):g}", error, f"{mean('weight_error'):.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _summary(exported: bundle.Bundle) -> str:
    found = exported.extra["compression"]
    shares, sizes = found["sparsity"], found["bytes"]
    sparsity = f"sparsity {shares['matrices']:.4f} of the compressed matrices, {shares['parameters']:.4f} of all parameters; "
    return (
        f"{sparsity if found['layers'] else ''}{sizes['disk'] / 2**20:.1f} MiB of weights on disk, before "
        f"{sizes['dense'] / 2**20:.1f}"
    )
