"""A bench's summary as a figure: speed of every method, and of fixed drafts tau, roof, speed-up and acceptance by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainkit.eval.bench.table import by_drafter, label, title
from trainkit.files import write_file

Values = dict[str, Any]
Drafts = Sequence[tuple[str, str, list[Values]]]
"""For each drafter its name, its colour, and its methods with a fixed draft."""


def figure(summary: Values, path: str | Path) -> None:
    """Writes a PNG: tokens per second of every method, with the spread of its repeats.

    If there are fixed drafts, also tau, roof and speed-up by depth of the chain, tau by tree size, and acceptance by position.

    Raises:
        UserError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    drafts = []
    for index, drafter in enumerate(summary["drafters"]):
        methods = [method for method in summary["methods"] if "tau" in method and method["drafter"] == drafter["name"]]
        drafts += [(drafter["name"], f"C{index}", methods)] if methods else []
    height = max(4.8, 0.26 * len(summary["methods"]) + 1)
    canvas = Figure(figsize=(14, height + 4.4) if drafts else (7, height), layout="constrained")
    cells = canvas.add_gridspec(2, 3, height_ratios=(height, 4.4)) if drafts else canvas.add_gridspec(1, 1)
    _plot_speeds(canvas.add_subplot(cells[0, :]), summary)
    for column, plot in enumerate((_plot_depths, _plot_sizes, _plot_positions) if drafts else ()):
        axes = canvas.add_subplot(cells[1, column])
        plot(axes, drafts)
        axes.legend(fontsize=7)
    canvas.suptitle(title(summary), fontsize=10, wrap=True)
    write_file(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=130))


def _plot_speeds(axes: Any, summary: Values) -> None:
    colours = {drafter["name"]: f"C{index}" for index, drafter in enumerate(summary["drafters"])}
    methods = [method for _, group in by_drafter(summary) for method in group][::-1]
    rates = [method["tokens_per_second"] for method in methods]
    spread = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    bars = ["tab:gray" if method["family"] == "transformers" else colours.get(method["drafter"], "black") for method in methods]
    names, medians = [method["name"] for method in methods], [rate["median"] for rate in rates]
    axes.barh(names, medians, xerr=spread, color=bars, capsize=3)
    axes.set_xlabel("tokens per second (median; lines: all repeats; grey: transformers)")


def _by_size(methods: Sequence[Values], chains: bool = True) -> list[Values]:
    """The methods that draft chains, or those that draft other trees, smallest first."""
    shown = [method for method in methods if (method["nodes"] == method["depth"] + 1) == chains]
    return sorted(shown, key=lambda method: method["nodes"])


def _plot_depths(axes: Any, drafts: Drafts) -> None:
    for name, colour, methods in drafts:
        chains, suffix = _by_size(methods), f" {name}" if len(drafts) > 1 else ""
        for key, style in (("tau", "o-"), ("roof", "s:"), ("speedup", "d--")):
            points = [chain["depth"] for chain in chains], [chain[key] for chain in chains]
            axes.plot(*points, style, color=colour, markersize=4, label=key + suffix)
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_xticks(sorted({chain["depth"] for _, _, methods in drafts for chain in _by_size(methods)}))
    axes.set(xlabel="depth of the chain", ylabel="times plain decoding (tau: tokens per round)")


def _plot_sizes(axes: Any, drafts: Drafts) -> None:
    for name, colour, methods in drafts:
        for kind, shown, style, size in (("chains", True, "o-", 6), ("trees", False, "*", 12)):
            if points := [(method["nodes"], method["tau"]) for method in _by_size(methods, shown)]:
                axes.plot(*zip(*points, strict=True), style, color=colour, markersize=size, label=f"{name}, {kind}")
    axes.set(xlabel="nodes verified, root included", ylabel="tau: tokens per round")


def _plot_positions(axes: Any, drafts: Drafts) -> None:
    longest = 1
    for name, colour, methods in drafts:
        for chains, style in ((True, "o-"), (False, "*--")):
            if shown := _by_size(methods, chains):
                deepest = max(shown, key=lambda method: (method["depth"], method["nodes"]))
                positions = range(1, len(deepest["alpha_k"]) + 1)
                longest = max(longest, len(positions))
                axes.plot(positions, deepest["alpha_k"], style, color=colour, label=f"{name}, {label(deepest)}")
    axes.set(xticks=range(1, longest + 1), ylim=(0, 1.02), xlabel="position k", ylabel="alpha_k: accepted, given k - 1 were")
