"""The GPU report: says when there is nothing to report, and its code runs on a CPU in small."""

import os
import subprocess
import sys

import pytest

from tests.support.gpu_sections import SECTIONS


def report(*flags: str) -> subprocess.CompletedProcess[str]:
    """The script's run where no GPU is seen."""
    command, hidden = [sys.executable, "tests/gpu_report.py", *flags], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=hidden)


def test_report_without_a_gpu_says_so():
    """Without a GPU the report says so."""
    done = report()
    assert done.returncode == 0 and "no CUDA device" in done.stdout


@pytest.mark.slow
def test_all_parts_run_at_small_size(tmp_path):
    """All parts of the report run on a CPU at small size."""
    out = tmp_path / "report.md"
    done = report("--device", "cpu", "--shape", "tiny", "--tests", "tests/runner/test_graphs.py", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    text = out.read_text()
    assert (
        "| lm, scripted for tau 3.4 depth 3 |" in text
        and "| tvdpp_position | chunked |" in text
        and "tests.runner.test_graphs" in text
    )


@pytest.mark.slow
def test_parts_beyond_the_time_limit_are_named(tmp_path):
    """Parts that do not fit the time limit are named."""
    done = report("--device", "cpu", "--shape", "tiny", "--seconds", "5")
    assert done.stdout.count("left out:") == len(SECTIONS) and done.returncode == 0
