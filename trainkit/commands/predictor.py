"""`trainkit predictor`: log-loss, calibration error and AUC of a bundle's acceptance predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit import bundle as bundles
from trainkit.data.sets.acceptance import AcceptanceSet, drafter_fingerprint
from trainkit.errors import UserError
from trainkit.eval.bench.table import grid
from trainkit.eval.calibration import Table, measure, measure_ranks
from trainkit.files import write_file, write_json
from trainkit.models.predictor import load_predictor


def predictor(bundle: Path, *, data: Path, json: str | None = None, plot: str | None = None) -> str:
    """Log-loss (nats per record), calibration error and AUC of a bundle's acceptance predictor, by temperature and position.

    The table also shows baselines that were fitted on the predictor's training records: a constant, the draft's highest
    probability, and that probability recalibrated; and the online logistic model, which learns from each record after it
    has predicted it. If the data is the predictor's training set, only the prompts held out from training
    are used.

    Args:
        bundle: Drafter bundle with a predictor, from `trainkit export`.
        data: Folder that `trainkit acceptance` wrote with this drafter.
        json: File for the figures, reliability curves included.
        plot: File for the reliability curves, PNG.

    Example:
        trainkit predictor models/draft --data acceptance/chats --json predictor.json --plot predictor.png

    Raises:
        UserError: a bundle without a predictor, a set of another drafter, or a file that cannot be written.
    """
    manifest, records = bundles.read(bundle), AcceptanceSet.read(data)
    if "predictor" not in manifest.runner:
        raise UserError(f"{bundle}: has no acceptance predictor; train one and `trainkit export CHECKPOINT {bundle}`")
    if records.manifest["drafter"]["files"] != drafter_fingerprint(manifest)["files"]:
        raise UserError(f"{data}: made with another drafter, {records.manifest['drafter']['name']}; make one with {bundle}")
    network = load_predictor(bundle, manifest.runner["predictor"])
    if network.hidden_size != records.hidden_size:
        sizes = f"hidden states of size {records.hidden_size}, the predictor reads {network.hidden_size}"
        raise UserError(f"{data}: {sizes}; train it again")
    if "baselines" not in network.seen:
        raise UserError(f"{bundle}: its predictor lacks the record of its training data; train and export it again")
    total_prompts = records.prompts
    if network.seen.get("set") == records.manifest["id"]:
        records = records.split(network.seen["validation_share"], network.seen["split_seed"])[1]
    values = {
        "bundle": manifest.path.resolve().name,
        "kind": manifest.kind,
        "set": records.manifest["id"],
        "verify": records.manifest["verify"],
        "prompts": records.prompts,
        "held_out": records.prompts < total_prompts,
        "trained_for": network.config()["seen"],
        "groups": measure(network, records),
        "ranks": measure_ranks(network, records),
    }
    if json is not None:
        write_json(json, values)
    if plot is not None:
        _reliability_figure(values, plot)
    return _report(values)


def _report(values: Mapping[str, Any]) -> str:
    tables: list[Table] = values["groups"]
    lines = [
        f"predictor of {values['bundle']} ({values['kind']}), verification {values['verify']}: {tables[0]['records']:,} draft "
        f"positions of {values['prompts']:,} {'held-out prompts' if values['held_out'] else 'prompts'}",
        "log-loss (nats) / expected calibration error / AUC",
        _rows(tables),
    ]
    if len(values["ranks"]) > 1:
        lines += ["proposals by rank, as trees use them, beside the draft's own probability", _rows(values["ranks"])]
    trained = values["trained_for"]["verify"]
    if trained != values["verify"]:
        lines.append(f"note: the predictor was trained for {trained}, this set was decoded with {values['verify']}")
    return "\n\n".join(lines)


def _rows(tables: Sequence[Table]) -> str:
    """A row for each group of records, with log-loss, calibration error and AUC of each source."""
    sources = list(tables[0]["log_loss"])
    rows = [["", "records", "accepted", *(name.replace("_", " ") for name in sources)]]
    for table in tables:
        qualities = (f"{table['log_loss'][name]:.4f} / {table['ece'][name]:.3f} / {table['auc'][name]:.3f}" for name in sources)
        rows.append([table["group"], f"{table['records']:,}", f"{table['accepted']:.3f}", *qualities])
    return grid(rows)


def _reliability_figure(values: Mapping[str, Any], path: str) -> None:
    """Writes a PNG: mean label by mean probability at each temperature; a point's area grows with its number of records."""
    from matplotlib.figure import Figure

    tables: list[Table] = [table for table in values["groups"] if table["group"].startswith("temperature")]
    canvas = Figure(figsize=(4.6 * len(tables), 4.8), layout="constrained")
    for axes, table in zip(canvas.subplots(1, len(tables), squeeze=False)[0], tables, strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=0.7)
        for index, name in enumerate(("predictor", "logistic", "max_q", "max_q_fitted")):
            probabilities, labels, counts = zip(*table["reliability"][name], strict=True)
            areas = [8 + 150 * count / table["records"] for count in counts]
            legend = f"{name.replace('_', ' ')}, {table['ece'][name]:.3f}"
            axes.plot(probabilities, labels, color=f"C{index}", linewidth=0.8)
            axes.scatter(probabilities, labels, areas, color=f"C{index}", label=legend)
        axes.set_title(f"{table['group']}, {table['records']:,} draft positions", fontsize=9)
        axes.set(xlabel="probability of acceptance, predicted", ylabel="share accepted", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize=7, title="calibration error", title_fontsize=7)
    canvas.suptitle(f"{values['bundle']} ({values['kind']}), verification {values['verify']}", fontsize=10)
    write_file(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=130))
