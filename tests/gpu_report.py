"""A report of everything that needs a GPU: tests marked `gpu`, decoding speed against copy bandwidth, training losses.

    python tests/gpu_report.py [--out report.md] [--seconds 460]

Without a GPU it prints a line and exits with 0. Parts for which too little time is left are listed as left out. With
`--device cpu --shapes tiny` the same code runs at small sizes, which is how it is tested without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.eager import eager  # noqa: E402
from trainkit.eval.bench.hardware import examine  # noqa: E402
from trainkit.eval.bench.synthetic import SHAPES  # noqa: E402
from trainkit.losses.divergence import ForwardKL, TVDpp  # noqa: E402

Lines = list[str]


def main() -> int:
    arguments = _arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing to report")
        return 0
    began, device = perf_counter(), torch.device(arguments.device)
    left: Callable[[], float] = lambda: arguments.seconds - (perf_counter() - began)
    machine = examine(device)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"# {machine.processor}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"copies {machine.copy_bandwidth / 1e9:.0f} GB/s; {versions}",
        "",
    ]
    failed = False
    parts: list[tuple[str, float, Callable[[], tuple[Lines, bool]]]] = [
        ("tests marked gpu", 60, lambda: _tests(arguments, left())),
        *((f"decoding {shape}", 60, lambda shape=shape: _decoding(arguments, shape, left())) for shape in arguments.shapes),
        ("losses", 30, lambda: (_losses(device, arguments.device == "cpu"), True)),
    ]
    for name, min_seconds, part in parts:
        lines += [f"## {name}", ""]
        if left() < min_seconds:
            lines += [f"left out: {left():.0f} s are left of {arguments.seconds:.0f}", ""]
            continue
        start = perf_counter()
        part_lines, passed = part()
        failed |= not passed
        lines += [*part_lines, "", f"({perf_counter() - start:.0f} s)", ""]
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    return int(failed)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="Markdown file for the report, besides stdout")
    parser.add_argument("--seconds", type=float, default=460, help="time limit for the whole report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["llama3-8b", "llama3-1b"])
    parser.add_argument("--tests", nargs="*", default=["tests"], help="test files or folders")
    return parser.parse_args()


def _tests(arguments: argparse.Namespace, seconds: float) -> tuple[Lines, bool]:
    """Number of passed, failed and skipped tests by file, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--junitxml", str(report), *arguments.tests]
        try:
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds * 0.6)
        except subprocess.TimeoutExpired:
            return ["| not finished in time |", "|---|"], False
        if not report.is_file():
            return [f"pytest ended with {process.returncode}: {process.stdout[-500:]}"], False
        cases = list(ElementTree.parse(report).iter("testcase"))
    counts: dict[str, dict[str, int]] = {}
    failures = []
    for case in cases:
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        row = counts.setdefault(case.get("classname", ""), {})
        row[kind] = row.get(kind, 0) + 1
        if kind in ("failure", "error"):
            failures.append(f"- FAILED {case.get('classname')}::{case.get('name')}")
    lines = ["| file | passed | failed | skipped |", "|---|---|---|---|"]
    for file, row in sorted(counts.items()):
        passed, skipped = row.get("passed", 0), row.get("skipped", 0)
        lines.append(f"| {file} | {passed} | {sum(row.values()) - passed - skipped} | {skipped} |")
    return [*lines, *([""] if failures else []), *failures], not failures


def _decoding(arguments: argparse.Namespace, shape: str, seconds: float) -> tuple[Lines, bool]:
    """Tokens per second and shares of copy bandwidth and byte ceiling: plain decoding, and a scripted drafter of each kind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        small = arguments.device == "cpu"
        flags = {
            "synthetic": shape,
            "device": arguments.device,
            "dtype": "float32" if small else "bfloat16",
            "baselines": "false",
            "depths": "[3,5]",
            "synthetic_tau": 3.4,
            "max_new_tokens": 32 if small else 192,
            "repeats": 3,
            "limit": 2,
            "prompt_length": 32 if small else 512,
            "max_seconds": seconds / 3,
            "json": file,
        }
        command = [sys.executable, "-m", "trainkit.cli", "bench", *(str(p) for k, v in flags.items() for p in (f"--{k}", v))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        try:
            process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, env=environment)
        except subprocess.TimeoutExpired:
            return ["not finished in time"], False
        if not file.is_file():
            return [f"bench ended with {process.returncode}: {process.stderr[-800:]}"], False
        summary: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    lines = ["| decoding | tokens/s | x plain | bandwidth | tau | efficiency | of byte ceiling | identical |", "|---" * 8 + "|"]
    for method in summary["methods"]:
        identical = method["identical"]
        same = "reference" if identical is None else f"{identical['equal'] + identical['ties']}/{identical['total']}"
        draft = "- | - | -"
        if "tau" in method:
            ceiling = 1 / (1 + method["c"] * method["depth"])
            draft = f"{method['tau']:.2f} | {method['efficiency']:.2f} | {method['efficiency'] / ceiling:.0%}"
        rate = method["tokens_per_second"]["median"]
        share = f"{method['bandwidth']['share']:.0%}" if method.get("bandwidth") else "-"
        lines.append(f"| {method['name']} | {rate:.1f} | {method['x_plain']:.2f} | {share} | {draft} | {same} |")
    return lines, process.returncode == 0


def _losses(device: torch.device, small: bool) -> Lines:
    """Time and peak memory of losses with gradient: chunked from hidden states, and from whole logits by autograd."""
    N, V, D = (256, 2048, 64) if small else (4096, 128256, 4096)
    dtype = torch.float32 if small else torch.bfloat16
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

    lines = [f"{N:,} tokens, V {V:,}, d {D:,}, {str(dtype).removeprefix('torch.')}", ""]
    lines += ["| loss | form | tokens/s | peak GiB above weights |", "|---|---|---|---|"]
    for name, loss in (("forward_kl", ForwardKL()), ("tvdpp_position", TVDpp())):
        for form, run in (("chunked", lambda loss=loss: chunked(loss)), ("whole logits", lambda name=name: naive(name))):
            seconds, peak = _timed(run, device, (draft_ND, heads[0]))
            lines.append(f"| {name} | {form} | {N / seconds:,.0f} | {peak} |")
    return lines


def _timed(run: Callable[[], None], device: torch.device, trained: tuple[torch.Tensor, ...]) -> tuple[float, str]:
    def once() -> None:
        for tensor in trained:
            tensor.grad = None
        run()

    try:
        once()
        if device.type != "cuda":
            start = perf_counter()
            once()
            return perf_counter() - start, "-"
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), perf_counter()
        for _ in range(3):
            once()
        torch.cuda.synchronize()
        return (perf_counter() - start) / 3, f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}"
    except torch.OutOfMemoryError:
        return float("inf"), "out of memory"


if __name__ == "__main__":
    sys.exit(main())
