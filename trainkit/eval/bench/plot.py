"""A bench's summary as a figure: speeds, what they are made of by depth, tau by tree size, acceptance by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainkit.eval.bench.table import by_drafter, label, title
from trainkit.files import write_file


def figure(summary: dict[str, Any], path: str | Path) -> None:
    """Writes a PNG: tokens per second of every contender with the spread of its repeats; and where something drafts, tau, roof
    and speedup by depth of the chain, tau by tree size, and acceptance by position, a colour each drafter.

    Raises:
        UserError: the folder is missing or cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ones = summary["contenders"]
    height = max(4.8, 0.26 * len(ones) + 1)
    drafting = any("tau" in one for one in ones)
    canvas = Figure(figsize=(14 if drafting else 7, height + 4.4 if drafting else height), layout="constrained")
    FigureCanvasAgg(canvas)
    if drafting:
        grid = canvas.add_gridspec(2, 3, height_ratios=(height, 4.4))
        _bars(canvas.add_subplot(grid[0, :]), summary)
        for place, draw in enumerate((_depths, _sizes, _positions)):
            draw(canvas.add_subplot(grid[1, place]), _drafts(summary))
    else:
        _bars(canvas.subplots(1, 1), summary)
    canvas.suptitle(title(summary), fontsize=10, wrap=True)
    write_file(path, lambda temporary: canvas.savefig(temporary, format="png", dpi=130))


def _drafts(summary: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """A name, a colour and the drafting contenders of each drafter that has some."""
    found = []
    for place, drafter in enumerate(summary["drafters"]):
        ones = [one for one in summary["contenders"] if "tau" in one and one["drafter"] == drafter["name"]]
        if ones:
            found.append((drafter["name"], f"C{place}", ones))
    return found


def _is_chain(one: dict[str, Any]) -> bool:
    return one["nodes"] == one["depth"] + 1


def _bars(axes: Any, summary: dict[str, Any]) -> None:
    colours = {one["name"]: f"C{place}" for place, one in enumerate(summary["drafters"])}
    shown = [one for _, ones in by_drafter(summary) for one in ones][::-1]
    rates = [one["tokens_per_second"] for one in shown]
    spread = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    filled = ["tab:gray" if one["family"] == "transformers" else colours.get(one["drafter"], "black") for one in shown]
    axes.barh([one["name"] for one in shown], [rate["median"] for rate in rates], xerr=spread, color=filled, capsize=3)
    axes.set_xlabel("tokens per second (median; lines: all repeats; grey: transformers)")


def _depths(axes: Any, drafts: Sequence[tuple[str, str, list[dict[str, Any]]]]) -> None:
    depths = set()
    for name, colour, ones in drafts:
        chains = sorted((one for one in ones if _is_chain(one)), key=lambda one: one["depth"])
        depths |= {one["depth"] for one in chains}
        of = f" {name}" if len(drafts) > 1 else ""
        for key, style in (("tau", "o-"), ("roof", "s:"), ("speedup", "d--")):
            values = [one[key] for one in chains]
            axes.plot([one["depth"] for one in chains], values, style, color=colour, markersize=4, label=key + of)
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_xticks(sorted(depths))
    axes.set_xlabel("depth of the chain")
    axes.set_ylabel("times plain decoding (tau: tokens per round)")
    axes.legend(fontsize=7)


def _sizes(axes: Any, drafts: Sequence[tuple[str, str, list[dict[str, Any]]]]) -> None:
    for name, colour, ones in drafts:
        chains = sorted((one for one in ones if _is_chain(one)), key=lambda one: one["nodes"])
        trees = sorted((one for one in ones if not _is_chain(one)), key=lambda one: one["nodes"])
        axes.plot([one["nodes"] for one in chains], [one["tau"] for one in chains], "o-", color=colour, label=f"{name}, chains")
        if trees:
            axes.plot(
                [one["nodes"] for one in trees],
                [one["tau"] for one in trees],
                "*",
                color=colour,
                markersize=12,
                label=f"{name}, trees",
            )
    axes.set_xlabel("nodes verified, root included")
    axes.set_ylabel("tau: tokens per round")
    axes.legend(fontsize=7)


def _positions(axes: Any, drafts: Sequence[tuple[str, str, list[dict[str, Any]]]]) -> None:
    longest = 1
    for name, colour, ones in drafts:
        for chain, style in ((True, "o-"), (False, "*--")):
            some = [one for one in ones if _is_chain(one) == chain]
            if some:
                one = max(some, key=lambda one: (one["depth"], one["nodes"]))
                places = range(1, len(one["alpha_k"]) + 1)
                longest = max(longest, len(places))
                axes.plot(places, one["alpha_k"], style, color=colour, label=f"{name}, {label(one)}")
    axes.set_xticks(range(1, longest + 1))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("position k")
    axes.set_ylabel("alpha_k: accepted, given k - 1 were")
    axes.legend(fontsize=7)
