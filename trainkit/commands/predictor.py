"""`trainkit predictor`: how well a bundle's acceptance predictor predicts, and whether its probabilities mean what they say."""

# N records

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit import bundle as bundles
from trainkit.data.sets.acceptance import AcceptanceSet, drafter_fingerprint
from trainkit.errors import UserError
from trainkit.eval.calibration import Table, measure, measure_ranks
from trainkit.files import write_file, write_json
from trainkit.models.predictor import load_predictor


def predictor(bundle: Path, *, data: Path, json: str | None = None, plot: str | None = None) -> str:
    """Log-loss (nats a record) and expected calibration error of a bundle's acceptance predictor, by temperature and position.

    Beside it what it has to beat: a constant, the draft's highest probability, and that recalibrated, all fitted on the records
    that the predictor was trained on. Of the set it was trained on only the prompts that were held out are looked at.

    Args:
        bundle: Drafter bundle with a predictor, from `trainkit export`.
        data: Folder that `trainkit acceptance` wrote with this drafter.
        json: File for the figures, reliability included.
        plot: PNG of the reliability.

    Example:
        trainkit predictor models/draft --data acceptance/chats --json predictor.json --plot predictor.png

    Raises:
        UserError: a bundle without a predictor, a set of another drafter, or a file that cannot be written.
    """
    found, records = bundles.read(bundle), AcceptanceSet.read(data)
    if "predictor" not in found.runner:
        raise UserError(f"{bundle}: has no acceptance predictor; train one and `trainkit export CHECKPOINT {bundle}`")
    if records.manifest["drafter"]["files"] != drafter_fingerprint(found)["files"]:
        raise UserError(f"{data}: made with another drafter, {records.manifest['drafter']['name']}; make one with {bundle}")
    network = load_predictor(Path(bundle), found.runner["predictor"])
    if network.hidden_size != records.hidden_size:
        raise UserError(f"{data}: states of {records.hidden_size}, the predictor reads {network.hidden_size}; train it again")
    whole = records.prompts
    if "baselines" not in network.seen:
        raise UserError(f"{bundle}: its predictor says not what it was trained on; train and export it again")
    if network.seen.get("set") == records.manifest["id"]:
        records = records.split(network.seen["validation_share"], network.seen["split_seed"])[1]
    tables = measure(network, records)
    values = {
        "bundle": found.path.resolve().name,
        "kind": found.kind,
        "set": records.manifest["id"],
        "verify": records.manifest["verify"],
        "prompts": records.prompts,
        "held_out": records.prompts < whole,
        "trained_for": network.config()["seen"],
        "groups": tables,
        "ranks": measure_ranks(network, records),
    }
    if json is not None:
        write_json(json, values)
    if plot is not None:
        reliability_figure(values, plot)
    return report(values)


def report(values: Mapping[str, Any]) -> str:
    """The figures as a table: a line for each group, log-loss and calibration error of each source."""
    tables: list[Table] = values["groups"]
    which = "held-out prompts" if values["held_out"] else "prompts"
    lines = [
        f"predictor of {values['bundle']} ({values['kind']}), verification {values['verify']}: {tables[0]['records']:,} draft "
        f"positions of {values['prompts']:,} {which}",
        "",
        "log-loss (nats) / expected calibration error",
        "",
    ]
    lines += _lines(tables)
    if len(values["ranks"]) > 1:
        lines += ["", "the proposals beside it, for trees, and the draft's probability of each", "", *_lines(values["ranks"])]
    trained = values["trained_for"]["verify"]
    if trained != values["verify"]:
        lines += ["", f"note: the predictor was trained for {trained}, this set was decoded with {values['verify']}"]
    return "\n".join(lines)


def _lines(tables: Sequence[Table]) -> list[str]:
    """A heading, and a line for each table."""
    sources = list(tables[0]["log_loss"])
    lines = [f"{'':<16}{'records':>9}{'accepted':>10}" + "".join(f"{name.replace('_', ' '):>16}" for name in sources)]
    for table in tables:
        cells = [f"{table['log_loss'][name]:.4f} / {table['ece'][name]:.3f}" for name in sources]
        start = f"{table['group']:<16}{table['records']:>9,}{table['accepted']:>10.3f}"
        lines.append(start + "".join(f"{cell:>16}" for cell in cells))
    return lines


def reliability_figure(values: Mapping[str, Any], path: str | Path) -> None:
    """Writes a PNG: mean label by mean probability, for each temperature, the area of a point growing with its records.

    Raises:
        UserError: the folder is missing or cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables: list[Table] = values["groups"]
    shown = [table for table in tables if table["group"].startswith("temperature")]
    canvas = Figure(figsize=(4.6 * len(shown), 4.8), layout="constrained")
    FigureCanvasAgg(canvas)
    for axes, table in zip(canvas.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.7)
        for place, name in enumerate(("predictor", "raw", "max_q", "max_q_fitted")):
            points = table["reliability"][name]
            sizes = [8 + 150 * count / table["records"] for _, _, count in points]
            across, up = [p for p, _, _ in points], [label for _, label, _ in points]
            axes.plot(across, up, color=f"C{place}", linewidth=0.8)
            axes.scatter(across, up, sizes, color=f"C{place}", label=f"{name.replace('_', ' ')}, {table['ece'][name]:.3f}")
        axes.set_title(f"{table['group']}, {table['records']:,} draft positions", fontsize=9)
        axes.set_xlabel("probability of acceptance, predicted")
        axes.set_ylabel("share accepted")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.legend(fontsize=7, title="calibration error", title_fontsize=7)
    canvas.suptitle(f"{values['bundle']} ({values['kind']}), verification {values['verify']}", fontsize=10)
    write_file(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=130))
