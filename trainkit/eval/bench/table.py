"""A bench's summary as text tables within 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

WIDTH = 100
Values = dict[str, Any]


def table(summary: Values) -> str:
    """The whole summary as text."""
    drafting = [method for method in summary["methods"] if "tau" in method]
    positions = min(12, max((len(method["alpha_k"]) for method in drafting), default=0))
    # with an empty last cell, because `grid` aligns the last column to the left
    position_cells = lambda method: ([f"{alpha:.2f}" for alpha in method["alpha_k"]] + [""] * positions)[:positions] + [""]
    speeds = ("decoding", "tokens", "thr", "tok/s", "min..max", "x plain", "x transf.", "bandwidth", "identical")
    drafts = ("draft", "MB read", "tau", "mbsu", "v(T)", "draft", "roof", "speedup", "of roof", "effic.", "cut rounds")
    # paused: share of all rounds; x fixed: speed over the fastest fixed depth of the same drafter
    policies = ("policy", "tau", "drafted", "wasted", "paused", "speedup", "x fixed", "min..max", "best depth, wasted")
    sections = [
        _head(summary),
        _section(summary, "name", speeds, _speed_cells),
        _section(summary, "tau", drafts, _draft_cells),
        _section(summary, "tau", ("alpha_k, k =", *map(str, range(1, positions + 1)), ""), position_cells),
        _section(summary, "policy", policies, _policy_cells),
        _closing(summary),
    ]
    return "\n\n".join(section for section in sections if section)


def title(summary: Values) -> str:
    """The target and the drafters, each with its number of parameters."""
    target, drafters = summary["target"], summary["drafters"]
    weights = " and ".join([*target.get("packed", ()), summary["arguments"]["dtype"]])
    text = f"target {target['name']} ({_count(target['parameters'])}, {weights})"
    names = ", ".join(f"{drafter['name']} ({_count(drafter['parameters'])})" for drafter in drafters)
    return f"{text}, drafter{'s' if len(drafters) > 1 else ''} {names}" if drafters else text


def by_drafter(summary: Values) -> list[tuple[str, list[Values]]]:
    """Methods under the name of their drafter, those without one first; all under an empty name if there is one drafter."""
    methods, names = summary["methods"], [drafter["name"] for drafter in summary["drafters"]]
    if len(names) < 2:
        return [("", methods)]
    return [(name, [method for method in methods if (method["drafter"] or "") == name]) for name in ("", *names)]


def label(method: Values) -> str:
    """A method's name without the name of its drafter."""
    name = method["name"].removeprefix("trainkit ").replace("transformers", "transf.")
    return name.replace(f"{method['drafter']} ", "", 1) if method["drafter"] else name


def grid(rows: Sequence[Sequence[str] | str]) -> str:
    """Rows of cells as aligned columns: numbers to the right, the first and the last column to the left.

    A row that is a string is a heading, which does not widen a column.
    """
    cells = [row for row in rows if not isinstance(row, str)]
    align = ["left", *["right"] * (len(cells[0]) - 2), "left"]
    text = tabulate(cells, tablefmt="plain", disable_numparse=True, colalign=align, preserve_whitespace=True)
    lines = iter(text.splitlines())
    return "\n".join(row if isinstance(row, str) else next(lines).rstrip() for row in rows)


def _section(summary: Values, key: str, header: Sequence[str], cells: Callable[[Values], Sequence[str]]) -> str:
    """A table of the methods that have `key`, with a heading for each drafter if there are several; empty without a method."""
    rows: list[Sequence[str] | str] = [header]
    for heading, methods in by_drafter(summary):
        shown = [method for method in methods if key in method]
        rows += [f"{heading}:"] if heading and shown else []
        for method in shown:
            name = method["name"] if key == "name" and not heading else label(method)
            rows.append(("  " * bool(heading) + name, *cells(method)))
    return grid(rows) if len(rows) > 1 else ""


def _head(summary: Values) -> str:
    """What was decoded, by which models, on which machine."""
    arguments, machine, prompts = summary["arguments"], summary["machine"], summary["prompts"]
    cache, target_bytes = machine["last_level_cache"], summary["target"]["step_bytes"]
    lines = [title(summary)]
    lines += [
        f"{drafter['name']}: {_count(drafter['parameters'])} parameters of its own, a draft step reads "
        f"{drafter['step_bytes'] / 1e6:.3g} MB, {drafter['step_bytes'] / target_bytes:.2f} of the target's "
        f"{target_bytes / 1e6:.3g} MB"
        for drafter in summary["drafters"]
    ]
    lines += [
        f"{machine['processor']}, {machine['threads']} threads, copies {machine['copy_bandwidth'] / 1e9:.1f} GB/s, "
        f"last-level cache {'unknown' if cache is None else f'{cache / 2**20:.0f} MiB'}; {summary['date']}",
        f"{prompts['count']} prompts of {prompts['tokens'] / prompts['count']:.0f} tokens, at most "
        f"{arguments['max_new_tokens']} new tokens; batch {arguments['batch']}, temperature {arguments['temperature']:g}, "
        f"{arguments['repeats']} interleaved repeats",
    ]
    return _wrap(lines)


def _speed_cells(method: Values) -> Sequence[str]:
    rate, identity, bandwidth = method["tokens_per_second"], method["identical"], method.get("bandwidth")
    if identity is None:
        identical = "reference" if method["name"] == "trainkit plain" else "not compared"
    else:
        ties = f", {identity['ties']} tied" if identity["ties"] else ""
        wrong = f", {identity['mismatches']} WRONG" if identity["mismatches"] else ""
        identical = f"{identity['equal']}/{identity['total']}{ties}{wrong}"
    share = "-" if bandwidth is None else "in cache" if bandwidth["in_cache"] else _percent(bandwidth["share"])
    rates = (_rate(rate["median"]), f"{_rate(rate['min'])}..{_rate(rate['max'])}")
    ratios = (ratio(method["x_plain"]), ratio(method["x_transformers"]))
    return (str(method["tokens"]), str(method["threads"]), *rates, *ratios, share, identical)


def _draft_cells(method: Values) -> Sequence[str]:
    ratios = (ratio(method[key]) for key in ("tau", "mbsu", "v", "draft", "roof", "speedup"))
    shares = (_percent(method[key]) for key in ("speedup_over_roof", "efficiency"))
    return (f"{method['bandwidth']['bytes'] / 1e6:.3g}", *ratios, *shares, str(method["cut_rounds"]))


def _policy_cells(method: Values) -> Sequence[str]:
    values, fixed = method["policy"], method["policy"]["over_best_fixed"]
    over_fixed = ("-", "-", "-")
    if fixed is not None:
        spread = f"{ratio(fixed['min'])}..{ratio(fixed['max'])}"
        over_fixed = (ratio(fixed["median"]), spread, f"{fixed['depth']}, {ratio(fixed['wasted'])}")
    paused = _percent(values["paused"] / max(1, values["rounds"]))
    tau, drafted, wasted, speedup = (ratio(values[key]) for key in ("tau", "drafted_per_round", "wasted", "speedup"))
    return (tau, drafted, wasted, paused, speedup, *over_fixed)


def _closing(summary: Values) -> str:
    """The fastest method, whether all texts are identical, and the notes."""
    lines, methods = [], {method["name"]: method for method in summary["methods"]}
    rates = {name: method["tokens_per_second"]["median"] for name, method in methods.items()}
    if (best := summary["best"]) is not None:
        plain, over_plain = _rate(rates["trainkit plain"]), methods[best]["x_plain"]
        slower = ": plain decoding is faster" if over_plain < 1 else ""
        lines.append(f"best: {best}, {_rate(rates[best])} tokens/s, {over_plain:.2f}x plain decoding ({plain}){slower}")
        baselines = [name for name, method in methods.items() if method["family"] == "transformers"]
        if baselines:
            rival = max(baselines, key=lambda name: rates[name])
            over_rival = rates[best] / rates[rival]
            lines.append(f"and {over_rival:.2f}x the fastest method of transformers ({rival}, {_rate(rates[rival])})")
    # all texts that were compared with plain decoding, and each mismatch
    compared = [(name, method["identical"]) for name, method in methods.items() if method["identical"] is not None]
    if compared:
        total, equal, ties = (sum(identity[key] for _, identity in compared) for key in ("total", "equal", "ties"))
        lines.append(f"identical output: {equal} of {total}, ties: {ties} (score gap below {summary['tie_tolerance']:.2g})")
    else:
        lines.append("identical output: no method to compare with plain decoding")
    lines += [
        f"MISMATCH: {name}, prompt {difference['prompt']}, new token {difference['position']}: {difference['tokens'][1]} "
        f"instead of {difference['tokens'][0]}, gap {difference['gap']:.3g}"
        for name, identity in compared
        for difference in identity["differences"]
        if not difference["is_tie"]
    ]
    if summary["arguments"]["temperature"] > 0:
        lines.append("transformers samples with its own noise: its texts differ and only its speed is compared")
    return _wrap([*lines, *summary["notes"]])


def _wrap(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


def ratio(value: float | None) -> str:
    """Two decimals, or - for None."""
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
