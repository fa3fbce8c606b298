"""A report of everything that needs a GPU: sections in order of importance, each with a time budget.

    python tests/gpu_report.py [--out report.md] [--seconds 460] [--only tests rounds] [--workers 4]

Each section runs in a process of its own. When its budget or the whole time is over it is stopped, and its finished rows are
kept; sections that did not run are named. `--out report.md` writes the report after each section, and report.json beside it.
Without a GPU it prints a line and exits with 0. `--device cpu --shape tiny` runs the same code at small sizes without a
GPU, for tests; kernels then run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.gpu_sections import SECTIONS, Section, Table  # noqa: E402


def main() -> int:
    import torch

    arguments = _arguments()
    if arguments.section:
        return _run_section(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing to report")
        return 0
    began, results = perf_counter(), list[dict[str, Any]]()
    for stop in (signal.SIGTERM, signal.SIGINT):  # the report ends with what it has
        signal.signal(stop, signal.default_int_handler)
    for section in SECTIONS:
        if arguments.only and section.name not in arguments.only:
            continue
        left = arguments.seconds - (perf_counter() - began)
        if left < section.needs:
            results.append({"name": section.name, "state": f"left out: {left:.0f} s are left of {arguments.seconds:.0f}"})
        else:
            results.append(_section(section, min(section.budget, left), arguments))
        if arguments.out:
            _write(Path(arguments.out), results)
    print(_markdown(results))
    return int(any(result.get("failed") for result in results))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="Markdown file for the report, besides stdout; its numbers go to a JSON file beside it")
    parser.add_argument("--seconds", type=float, default=460, help="time limit for the whole report")
    names = [section.name for section in SECTIONS]
    listed = "; ".join(f"{section.name}: {section.title}, {section.budget:.0f} s" for section in SECTIONS)
    parser.add_argument("--only", nargs="+", choices=names, help=f"run these sections only. {listed}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", default="llama3-8b", help="named shape of the target, as in `trainkit bench --synthetic`")
    parser.add_argument("--tests", nargs="*", default=["tests"], help="test files or folders of the section `tests`")
    parser.add_argument("--workers", type=int, default=0, help="processes of the section `tests`, if pytest-xdist is there")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    return parser.parse_args()


def _section(section: Section, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a section in a process of its own; rows that it wrote before a stop are kept."""
    with tempfile.TemporaryDirectory() as folder:
        results, began, state = Path(folder) / "results.json", perf_counter(), ""
        flags = ["--section", section.name, "--results", str(results), "--seconds", str(seconds), "--device", arguments.device]
        flags += ["--shape", arguments.shape, "--workers", str(arguments.workers), "--tests", *arguments.tests]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        command = [sys.executable, str(ROOT / "tests" / "gpu_report.py"), *flags]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process:
            try:
                output, _ = process.communicate(timeout=seconds)
                if process.returncode:
                    state = f"ended with {process.returncode}: {output[-1500:]}"
            except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
                process.kill()
                process.communicate()
                if isinstance(stop, KeyboardInterrupt):
                    arguments.seconds = 0  # no further sections
                state = f"stopped after {perf_counter() - began:.0f} s"
        tables = json.loads(results.read_text()) if results.is_file() else {"failed": True, "tables": []}
    took = perf_counter() - began
    failed = bool(tables["failed"] or state.startswith("ended"))
    return {"name": section.name, "title": section.title, "seconds": took, "state": state, **tables, "failed": failed}


def _run_section(arguments: argparse.Namespace) -> int:
    """The process of one section."""
    section = next(section for section in SECTIONS if section.name == arguments.section)
    table = Table(Path(arguments.results), arguments)
    section.run(table)
    return 0


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    path.write_text(_markdown(results) + "\n", encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def _markdown(results: list[dict[str, Any]]) -> str:
    lines = [f"# GPU report, {datetime.now(UTC):%Y-%m-%d}", ""]
    for result in results:
        lines += [f"## {result.get('title', result['name'])}", ""]
        for table in result.get("tables", []):
            lines += [table["caption"], ""] if table["caption"] else []
            if table["rows"]:
                lines += ["| " + " | ".join(table["columns"]) + " |", "|---" * len(table["columns"]) + "|"]
                lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in table["rows"]]
                lines.append("")
        lines += [*([result["state"], ""] if result["state"] else [])]
        lines += [f"({result['seconds']:.0f} s)", ""] if "seconds" in result else []
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
