"""The tables of the losses study hold what its rows hold."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location("evidence", Path("recipes/studies/losses/tables.py"))
assert spec is not None and spec.loader is not None
evidence = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evidence)


def write(out: Path, name: str, alphas: list[float], questions: int = 40) -> None:
    """A row of one draft per alpha: every question has 10 tokens and 4 rounds."""
    (out / "rows").mkdir(exist_ok=True)
    for t in (0, 1):
        names = ["agreement@0"] if t == 0 else ["alpha@1", "alpha_coupled@1"]
        taus = ["tau_coupled@0"] if t == 0 else ["tau_coupled@1", "tau_residual@1"]
        drafters = {}
        for seed, alpha in enumerate(alphas):
            values = {"tokens": [10.0] * questions} | {measure: [10 * alpha] * questions for measure in names}
            values |= {measure: [[4 * (1 + alpha)] * questions, [4.0] * questions] for measure in taus}
            drafters[f"{name}-{seed}"] = {"per_question": values}
        (out / "rows" / f"{name}.t{t}.json").write_text(json.dumps({"drafters": drafters}))


def test_table_has_means_and_differences_to_first_row(tmp_path):
    """The table has means over seeds and differences to its first row."""
    write(tmp_path, "forward_kl", [0.5, 0.6])
    write(tmp_path, "tv", [0.55, 0.55, 0.55])
    lines = evidence.table(tmp_path, ("forward_kl", "tv", "lk"))
    assert lines[2].startswith("| forward_kl (target's answers) | 2 | 0.5500 ± 0.0500 |")
    assert lines[3].startswith("| tv | 3 | 0.5500 ± 0.0000 |")
    assert lines[-1] == "| tv | " + " | ".join(["+0.0000 [+0.0000, +0.0000]"] * 6) + " |"
    assert "1.5500 ± 0.0500" in lines[2]


def test_row_without_both_temperatures_is_left_out(tmp_path):
    """A row that was measured at one temperature only is left out."""
    write(tmp_path, "forward_kl", [0.5])
    (tmp_path / "rows" / "forward_kl.t1.json").unlink()
    assert evidence.table(tmp_path, ("forward_kl",)) == ["(not run)"]


def test_scaling_law_is_recovered(tmp_path):
    """The scaling law is recovered from data that follow it."""
    part = tmp_path / "sets" / "target" / "part-00000.jsonl"
    part.parent.mkdir(parents=True)
    part.write_text(json.dumps({"loss_mask": [0] * 5 + [1] * 200_000}) + "\n")
    for layers in (1, 2, 4):
        for share in (4, 2, 1):
            name = "forward_kl" if (layers, share) == (1, 1) else f"layers{layers}_of{share}"
            write(tmp_path, name, [0.5 + 0.03 * np.log2(4 / share) + 0.01 * np.log2(layers)])
    text = "\n".join(evidence.scaling(tmp_path, tmp_path))
    assert "0.5000 + 0.0300 log2(tokens / 50k) + 0.0100 log2(layers); R² 1.000" in text
    assert "| 2 | 100,000 | 0.5400 |" in text and (tmp_path / "scaling.png").stat().st_size > 5000


def test_unfinished_study_has_plots_and_tables(tmp_path, capsys):
    """An unfinished study gives plots and tables of what is there."""
    write(tmp_path, "forward_kl", [0.5])
    write(tmp_path, "tv", [0.6])
    (tmp_path / "sets" / "target").mkdir(parents=True)
    evidence.main(tmp_path, tmp_path / "plots")
    assert capsys.readouterr().out.count("(not run)") == 2
    assert (tmp_path / "plots" / "losses.png").is_file()


@pytest.mark.parametrize("share", [2, 4])
def test_trimmed_row_is_compared_with_the_full_draft(tmp_path, share):
    """A trimmed draft's row is compared with the full draft's."""
    write(tmp_path, "forward_kl", [1.0])
    write(tmp_path, f"trimmed_of{share}", [0.9])
    run = {"depth": 3, "mbsu": 1.5, "speedup": 1.4, "roof": 1.75}
    name = f"speed-forward_kl-0-of{share}.json"
    (tmp_path / "rows" / name).write_text(json.dumps({"methods": [{"depth": 3, "family": "transformers"}, run]}))
    lines = evidence.trimmed(tmp_path)
    assert lines[-1] == f"| 1/{share} | 1.900 | -5.0% | 1.900 | -5.0% | 3 | 1.50 | 1.40 | 1.75 | 80% |"
