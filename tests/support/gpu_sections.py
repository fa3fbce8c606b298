"""The sections of the GPU report (tests/gpu_report.py), in order of importance."""

# M rows  N outputs  K inputs  B batch  T positions

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: Its name on the command line.
        title: Its heading.
        budget: Seconds after which it is stopped.
        needs: Seconds below which it is not begun.
        run: Fills a table.
    """

    name: str
    title: str
    budget: float
    needs: float
    run: Callable[[Table], None]


class Table:
    """Rows of a section, written to a file after each, so that a stopped section keeps its rows."""

    def __init__(self, file: Path, arguments: argparse.Namespace) -> None:
        self.file, self.arguments = file, arguments
        self.device = torch.device(arguments.device)
        self.small = arguments.device == "cpu"
        self.dtype = torch.float16 if self.small else torch.bfloat16
        self.began = perf_counter()
        self.results: dict[str, Any] = {"failed": False, "tables": []}

    @property
    def left(self) -> float:
        """Seconds left of the section's time."""
        return self.arguments.seconds - (perf_counter() - self.began)

    def begin(self, caption: str, *columns: str) -> None:
        """Begins a table."""
        self.results["tables"].append({"caption": caption, "columns": columns, "rows": []})
        self._save()

    def row(self, *cells: object) -> None:
        """Adds a row."""
        self.results["tables"][-1]["rows"].append(cells)
        self._save()

    def fail(self) -> None:
        """Marks the section as failed."""
        self.results["failed"] = True
        self._save()

    @contextmanager
    def row_or_reason(self, *first: object) -> Iterator[None]:
        """If the row cannot be completed, writes the reason in its place; the section continues."""
        try:
            yield
        except Exception as error:
            self.row(*first, f"failed: {str(error).splitlines()[0][:200] if str(error) else type(error).__name__}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _save(self) -> None:
        self.file.write_text(json.dumps(self.results, default=str))


def milliseconds(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median time of a call."""
    if device.type != "cuda":
        function()
        began = perf_counter()
        function()
        return (perf_counter() - began) * 1e3
    for _ in range(3):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def graphed(function: Callable[[], object], device: torch.device, calls: int = 1, repeats: int = 20) -> float:
    """Median milliseconds of one call, among `calls` in a CUDA graph that is replayed."""
    if device.type != "cuda":
        return milliseconds(function, device)
    from trainkit.runner.graphs import capture

    def several() -> None:
        for _ in range(calls):
            function()

    graph, _ = capture(several, device)
    return milliseconds(graph.replay, device, repeats) / calls


# Sections


def machine(table: Table) -> None:
    """Versions, copy and read bandwidth, clocks."""
    from trainkit.eval.bench.hardware import examine

    found = examine(table.device)
    table.begin("", "what", "value")
    table.row("processor", found.processor)
    for name, version in found.versions.items():
        table.row(name, version)
    table.row("copy bandwidth", f"{found.copy_bandwidth / 1e9:.0f} GB/s")
    if table.device.type == "cuda":
        import triton

        table.row("triton", triton.__version__)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        table.row("driver, clocks", subprocess.run(query, capture_output=True, text=True).stdout.strip())


def tests(table: Table) -> None:
    """Tests marked `gpu`, and the kernels' tests, compiled for the GPU."""
    workers = ["-n", str(table.arguments.workers)] if table.arguments.workers else []
    runs = [("-m", "gpu", *table.arguments.tests)]
    if table.arguments.tests == ["tests"] and not table.small:
        runs.append(("-m", "not gpu and not slow", "tests/layers/kernels", "tests/layers/test_fused.py"))
    table.begin("", "file", "passed", "failed", "skipped")
    with TemporaryDirectory() as folder:
        base = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers]
        reports = [Path(folder) / f"{index}.xml" for index in range(len(runs))]
        with ExitStack() as stack:  # all at once: kernels are compiled while others run
            for selection, report in zip(runs, reports, strict=True):
                command = [*base, "--junitxml", str(report), *selection]
                stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        for report, selection in zip(reports, runs, strict=True):
            if report.is_file():
                _outcomes(table, list(ElementTree.parse(report).iter("testcase")))
            else:
                table.row(f"pytest {' '.join(selection)} wrote no report", "", "", "")
                table.fail()


def _outcomes(table: Table, cases: Sequence[ElementTree.Element]) -> None:
    counts: dict[str, dict[str, int]] = {}
    for case in cases:
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        kind = "passed" if outcome is None else outcome.tag
        row = counts.setdefault(case.get("classname", ""), {})
        row[kind] = row.get(kind, 0) + 1
        if outcome is not None and kind != "skipped":
            table.fail()
            reason = (outcome.get("message") or "").replace("\n", " ").replace("|", "/")[:300]
            table.row(f"FAILED {case.get('classname')}::{case.get('name')}: {reason}", "", 1, "")
    for file, row in sorted(counts.items()):
        passed, skipped = row.get("passed", 0), row.get("skipped", 0)
        table.row(file, passed, sum(row.values()) - passed - skipped, skipped)


def lossless(table: Table) -> None:
    """16-bit texts of a chain against plain decoding, bit for bit: greedy and sampled, several batches."""
    from tests.support.models import noisy_16_bit_pair

    runner = noisy_16_bit_pair(table.device, table.dtype)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(500, (10 + 7 * i,), generator=generator).tolist() for i in range(2 if table.small else 24)]
    table.begin("", "temperature", "depth", "batch", "equal texts", "of", "tau")
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 8 if table.small else 96, "temperature": temperature, "seed": 1, "ignore_end": True}
        plain = [out.tokens for out in runner.generate(prompts, depth=0, **options)]
        for depth, batch in ((4, 1), (3, 3), (4, 6)):
            runner.scheduler.max_batch = batch
            outs = runner.generate(prompts, depth=depth, **options)
            equal = sum(out.tokens == expected for out, expected in zip(outs, plain, strict=True))
            table.row(temperature, depth, batch, equal, len(plain), f"{runner.last.tau:.2f}")
            if equal < len(plain):
                table.fail()


def rounds(table: Table) -> None:
    """Milliseconds of a captured round of the target alone, by context and number of rows, against the bytes it must read."""
    from trainkit.eval.bench.hardware import examine

    copy = examine(table.device).copy_bandwidth
    target = _target(table)
    shape = target.shape
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * table.dtype.itemsize
    table.begin(
        f"copies {copy / 1e9:.0f} GB/s; weights {target.step_bytes() / 1e9:.2f} GB; "
        "share = bytes of weights and live keys / time / copies",
        *("batch", "context", "nodes", "ms", "share of copies", "x 1 node", "without dependent launch"),
    )
    contexts, sizes = ((64,), (1, 4)) if table.small else ((512, 2048, 8000), (1, 5, 16, 32, 64))
    one: dict[tuple[int, int], float] = {}
    cases = [(1, context, size) for context in contexts for size in sizes]
    cases += [] if table.small else [(8, 512, 1), (8, 512, 4), (64, 512, 1), (8, 2048, 1)]
    for batch, context, size in cases:
        if table.left < 8:
            break
        with table.row_or_reason(batch, context, size):
            times = _round(table, target, batch, context, size)
            least = target.step_bytes() + batch * context * token_bytes
            one.setdefault((batch, context), times[0])
            cells = f"{times[0]:.3f}", f"{least / times[0] * 1e3 / copy:.1%}", f"{times[0] / one[batch, context]:.3f}"
            table.row(batch, context, size, *cells, f"{times[1]:.3f}" if len(times) > 1 else "-")


def _round(table: Table, target: Any, batch: int, context: int, size: int) -> list[float]:
    """Times of a round that computes `size` nodes and emits one token, with and without dependent launch."""
    from trainkit.models.shape import TargetShape
    from trainkit.runner import Runner

    times = list[float]()
    for dependent in (True, False) if table.device.type == "cuda" and size == 1 else (True,):
        with _dependent_launch(dependent):
            runner = Runner(target, None, TargetShape(target.shape), None, batch, context + 96)
            prompts = [torch.randint(500, (context,)).tolist()] * batch
            options = {"plain": True, "depth": size - 1} if size > 1 else {"depth": 0}
            runner.generate(prompts, max_new_tokens=6, ignore_end=True, **options)
            if table.device.type != "cuda":
                return [1e3 * sum(runner.scheduler.seconds.values()) / 6]
            graphs = runner.scheduler.graphs
            assert graphs is not None
            replay, _, _ = next(reversed(graphs._captured.values()))
            times.append(milliseconds(replay.replay, table.device))
            del replay, graphs, runner
            torch.cuda.empty_cache()
    return times


@contextmanager
def _dependent_launch(wanted: bool) -> Iterator[None]:
    from trainkit.layers.kernels import launch

    before = launch.DEPENDENT
    launch.DEPENDENT = wanted
    try:
        yield
    finally:
        launch.DEPENDENT = before


def _target(table: Table) -> Any:
    from trainkit.eval.bench.synthetic import random_target

    return random_target(table.arguments.shape, table.device, table.dtype)


def kernels(table: Table) -> None:
    """Each matrix product at the target's sizes: own kernel and library, dense and packed."""
    from trainkit.eval.bench.synthetic import SHAPES
    from trainkit.layers.packed import VALUES, pack, plane

    shape = SHAPES[table.arguments.shape]
    D, inner, E = shape.hidden_size, shape.intermediate_size, shape.head_dim
    sizes = {
        "qkv": ((shape.num_heads + 2 * shape.num_kv_heads) * E, D, False),
        "out": (D, shape.num_heads * E, False),
        "gate_up": (2 * inner, D, True),
        "down": (D, inner, False),
        "head": (shape.vocab_size, D, False),
    }
    table.begin(
        "microseconds in a graph over several weights (beyond the L2 cache); GB/s of the weight's bytes",
        "product",
        "rows",
        "kind",
        "us",
        "GB/s",
        "library us",
        "x library",
    )
    for name, (N, K, silu) in sizes.items():
        copies = 1 if table.small else max(1, min(12, int(4e8 / (N * K * 2))))
        weights = [torch.randn(N, K, device=table.device, dtype=table.dtype) / K**0.5 for _ in range(copies)]
        for M in (1, 4, 16, 32) if not table.small else (1,):
            x = torch.randn(M, K, device=table.device, dtype=table.dtype)

            library_us = graphed(partial(_library_products, x, weights, silu), table.device) * 1e3 / copies
            for kind in ("dense", *(VALUES if name != "head" else ())):
                if table.left < 3:
                    return
                if kind != "dense" and not plane(K, kind):
                    continue
                with table.row_or_reason(name, M, kind):
                    packed: list[Any] = weights if kind == "dense" else [pack(w, kind) for w in weights]
                    size = weights[0].nbytes if kind == "dense" else packed[0].nbytes

                    us = graphed(partial(_own_products, x, packed, silu), table.device) * 1e3 / copies
                    table.row(
                        name, M, kind, f"{us:.1f}", f"{size / us / 1e3:.0f}", f"{library_us:.1f}", f"{library_us / us:.2f}"
                    )


def _own_products(x: Tensor, weights: Sequence[Any], silu: bool) -> None:
    from trainkit.layers.kernels.few_rows import few_rows

    for weight in weights:
        few_rows(x, weight, silu)


def _library_products(x: Tensor, weights: Sequence[Tensor], silu: bool) -> None:
    for weight in weights:
        y = F.linear(x, weight)
        if silu:
            gate, up = y.chunk(2, dim=-1)
            y = F.silu(gate) * up


def attention(table: Table) -> None:
    """The attention kernel against PyTorch's with and without a bias, one layer of the target."""
    from trainkit.eval.bench.synthetic import SHAPES

    shape = SHAPES[table.arguments.shape]
    G, H, E = shape.num_kv_heads, shape.num_heads, shape.head_dim
    table.begin(
        "microseconds in a graph",
        "batch",
        "queries",
        "cached",
        "of slots",
        "own",
        "library with a bias over the slots",
        "library over live keys",
    )
    for B, T, live, S in (
        (1, 1, 512, 8192),
        (1, 1, 2048, 8192),
        (1, 1, 2048, 2304),
        (1, 1, 8000, 8192),
        (1, 16, 2048, 8192),
        (1, 5, 2048, 8192),
        (8, 1, 2048, 8192),
        (8, 5, 2048, 8192),
    ):
        if table.small:
            B, T, live, S = 1, T, 40, 64
        with table.row_or_reason(B, T, live, S):
            cache = torch.randn(B, 4, 2 * G, S, E, device=table.device, dtype=table.dtype)
            layers = cache.unbind(1)
            q = torch.randn(B, T, H, E, device=table.device, dtype=table.dtype)
            first = torch.full((B,), live, dtype=torch.int32, device=table.device)
            rows = q.unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4).reshape(B, G, -1, E)
            bias = torch.zeros(B, 1, rows.shape[2], S, device=table.device, dtype=table.dtype)

            runs = (
                partial(_own_attention, q, layers, first),
                partial(_library_attention, rows, layers, S, bias),
                partial(_library_attention, rows, layers, live, None),
            )
            times = [graphed(run, table.device) * 1e3 / 4 for run in runs]
            table.row(B, T, live, S, *(f"{time:.1f}" for time in times))


def _own_attention(q: Tensor, layers: Sequence[Tensor], first: Tensor) -> None:
    from trainkit.layers.kernels.attend import attend

    for layer in layers:
        attend(q, layer, first, None)


def _library_attention(rows: Tensor, layers: Sequence[Tensor], stop: int, bias: Tensor | None) -> None:
    for layer in layers:
        k, v = layer[:, :, :stop].chunk(2, dim=1)
        F.scaled_dot_product_attention(rows, k, v, attn_mask=bias)


def drafters(table: Table) -> None:
    """Tokens per second of whole decoding with a scripted drafter of each kind."""
    trees = json.dumps([_tree(16), _tree(32)])
    runs: list[dict[str, Any]] = [
        {"depths": "[3,5]", "synthetic_tau": 3.4},
        {"depths": "[5]", "synthetic_kinds": "eagle", "synthetic_tau": 4.0, "trees": trees},
    ]
    for index, run in enumerate(runs):
        with TemporaryDirectory() as folder:
            file = Path(folder) / "bench.json"
            flags = {
                "synthetic": table.arguments.shape,
                "device": table.arguments.device,
                "dtype": "float32" if table.small else "bfloat16",
                "baselines": "false",
                "max_new_tokens": 32 if table.small else 192,
                "repeats": 3,
                "limit": 2,
                "prompt_length": 32 if table.small else 512,
                "max_seconds": max(10.0, table.left / (len(runs) - index) - 10),
                "json": file,
                **run,
            }
            command = [
                sys.executable,
                "-m",
                "trainkit.cli",
                "bench",
                *(str(p) for k, v in flags.items() for p in (f"--{k}", v)),
            ]
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            columns = ("decoding", "tokens/s", "x plain", "bandwidth", "tau", "efficiency", "of byte ceiling", "identical")
            table.begin(" ".join(f"--{k} {v}" for k, v in flags.items() if k not in ("json", "trees")), *columns)
            if not file.is_file():
                table.row(f"bench ended with {process.returncode}: {process.stderr[-800:]}")
                table.fail()
                continue
            for method in json.loads(file.read_text(encoding="utf-8"))["methods"]:
                identical, draft = method["identical"], ("-", "-", "-")
                same = "reference" if identical is None else f"{identical['equal'] + identical['ties']}/{identical['total']}"
                if "tau" in method:
                    ceiling = 1 / (1 + method["c"] * method["depth"])
                    draft = f"{method['tau']:.2f}", f"{method['efficiency']:.2f}", f"{method['efficiency'] / ceiling:.0%}"
                share = f"{method['bandwidth']['share']:.0%}" if method.get("bandwidth") else "-"
                rate = method["tokens_per_second"]["median"]
                table.row(method["name"], f"{rate:.1f}", f"{method['x_plain']:.2f}", share, *draft, same)


def _tree(nodes: int, depth: int = 5, width: int = 3) -> list[list[int]]:
    """Rank paths of a tree of so many nodes, the root included: those with the smallest length plus twice their ranks."""
    paths = [path for length in range(1, depth + 1) for path in product(range(width), repeat=length)]
    best = sorted(paths, key=lambda path: (len(path) + 2 * sum(path), path))[: nodes - 1]
    return [list(path) for path in sorted(best, key=lambda path: (len(path), path))]


def transformers(table: Table) -> None:
    """`generate` of transformers with a static cache, which compiles the forward, at the target's sizes with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trainkit.eval.bench.synthetic import SHAPES

    shape, context, new = SHAPES[table.arguments.shape], (32 if table.small else 2048), (8 if table.small else 128)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
    )
    torch.set_default_dtype(torch.float32 if table.small else table.dtype)
    with table.device:
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(500, (1, context), device=table.device)
    options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    table.begin(f"context {context}, {new} new tokens; early calls compile", "call", "seconds", "ms a token without prefill")
    with torch.inference_mode():
        prefill = milliseconds(lambda: model(ids), table.device, 3)
        for call in range(4):
            began = perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **options)
            if table.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = perf_counter() - began
            table.row(call + 1, f"{seconds:.2f}", f"{(seconds * 1e3 - prefill) / new:.2f}")


def losses(table: Table) -> None:
    """Time and peak memory of losses with gradient: chunked from hidden states, and from whole logits by autograd."""
    from tests.support.eager import eager
    from trainkit.losses.divergence import ForwardKL, TVDpp

    N, V, D = (256, 2048, 64) if table.small else (4096, 128256, 4096)
    device, dtype = table.device, torch.float32 if table.small else torch.bfloat16
    generator = torch.Generator(device=device).manual_seed(0)
    draft_ND, target_ND = (torch.randn(N, D, device=device, dtype=dtype, generator=generator) for _ in range(2))
    heads = [torch.randn(V, D, device=device, dtype=dtype, generator=generator) / D**0.5 for _ in range(2)]
    draft_ND.requires_grad_(True)
    heads[0].requires_grad_(True)
    draft_head, target_head = (lambda x, W=W: x @ W.T for W in heads)
    labels_N, weight_N = torch.zeros(N, dtype=torch.long, device=device), torch.ones(N, device=device)

    def chunked(loss: Any) -> None:
        loss(draft_ND, draft_head, target_ND, target_head).sum.backward()

    def naive(name: str) -> None:
        with torch.no_grad():
            target_NV = target_head(target_ND).float()
        eager(name, draft_head(draft_ND).float(), target_NV, labels_N, weight_N).backward()

    caption = f"{N:,} tokens, V {V:,}, d {D:,}, {str(dtype).removeprefix('torch.')}"
    table.begin(caption, "loss", "form", "tokens/s", "peak GiB above weights")
    for name, loss in (("forward_kl", ForwardKL()), ("tvdpp_position", TVDpp())):
        for form, run in (("chunked", lambda loss=loss: chunked(loss)), ("whole logits", lambda name=name: naive(name))):
            with table.row_or_reason(name, form):
                seconds, peak = _timed(run, device, (draft_ND, heads[0]))
                table.row(name, form, f"{N / seconds:,.0f}", peak)


def _timed(run: Callable[[], None], device: torch.device, trained: tuple[Tensor, ...]) -> tuple[float, str]:
    def once() -> None:
        for tensor in trained:
            tensor.grad = None
        run()

    once()
    if device.type != "cuda":
        return milliseconds(once, device) / 1e3, "-"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = milliseconds(once, device, 3) / 1e3
    return seconds, f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"


def profile(table: Table) -> None:
    """Time of each kernel in one replay of a plain round at 2,048 tokens."""
    from trainkit.models.shape import TargetShape
    from trainkit.runner import Runner

    if table.device.type != "cuda":
        return
    target, context = _target(table), 2048
    runner = Runner(target, None, TargetShape(target.shape), None, 1, context + 96)
    runner.generate([torch.randint(500, (context,)).tolist()], max_new_tokens=6, ignore_end=True, depth=0)
    graphs = runner.scheduler.graphs
    assert graphs is not None
    replay, _, _ = next(reversed(graphs._captured.values()))
    replay.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        replay.replay()
        torch.cuda.synchronize()
    table.begin("", "kernel", "calls", "total us", "us each")
    for event in sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)[:30]:
        total = event.self_device_time_total
        table.row(event.key[:70].replace("|", "/"), event.count, f"{total:.0f}", f"{total / max(1, event.count):.1f}")


SECTIONS = (
    Section("machine", "Machine", 20, 5, machine),
    Section("tests", "Tests", 120, 20, tests),
    Section("lossless", "16-bit texts, a chain against plain decoding", 40, 10, lossless),
    Section("rounds", "Rounds of the target", 90, 20, rounds),
    Section("profile", "Kernels of a plain round at 2,048 tokens", 30, 10, profile),
    Section("kernels", "Matrix products", 70, 15, kernels),
    Section("attention", "Attention", 30, 10, attention),
    Section("drafters", "Decoding with scripted drafters", 90, 30, drafters),
    Section("transformers", "transformers with a static cache, compiled", 150, 40, transformers),
    Section("losses", "Losses", 30, 15, losses),
)
