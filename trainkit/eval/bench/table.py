"""A bench's summary as a text table and as JSON; files are written whole or not at all."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

WIDTH = 100


def table(summary: dict[str, Any]) -> str:
    """The summary for people, within 100 columns."""
    parts = [_head(summary), _speeds(summary)]
    if any("tau" in one for one in summary["contenders"]):
        parts += [_drafting(summary), _positions(summary)]
    if any("paced" in one for one in summary["contenders"]):
        parts.append(_policies(summary))
    parts.append(_closing(summary))
    return "\n\n".join(parts)


def _wrapped(lines: Sequence[str]) -> str:
    return "\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in lines)


# text


def _head(summary: dict[str, Any]) -> str:
    arguments, machine, prompts = summary["arguments"], summary["machine"], summary["prompts"]
    cache, mean = machine["last_level_cache"], prompts["tokens"] / prompts["count"]
    return _wrapped(
        [
            title(summary),
            *_reading(summary),
            f"{machine['processor']}, {machine['threads']} threads, copies {machine['copy_bandwidth'] / 1e9:.1f} GB/s, "
            f"last-level cache {'unknown' if cache is None else f'{cache / 2**20:.0f} MiB'}; {summary['date']}",
            f"{prompts['count']} prompts of {mean:.0f} tokens, {arguments['max_new_tokens']} new "
            f"at most; batch {arguments['batch']}, temperature {arguments['temperature']:g}, "
            f"{arguments['repeats']} interleaved repeats",
        ]
    )


def title(summary: dict[str, Any]) -> str:
    """The target and the drafters, each with its number of parameters."""
    target, drafters = summary["target"], summary["drafters"]
    text = f"target {target['name']} ({_count(target['parameters'])}, {summary['arguments']['dtype']})"
    found = ", ".join(f"{one['name']} ({_count(one['parameters'])})" for one in drafters)
    return text if not drafters else f"{text}, drafter{'s' if len(drafters) > 1 else ''} {found}"


def _reading(summary: dict[str, Any]) -> list[str]:
    """What a draft step of each drafter reads, beside a call of the target."""
    target = summary["target"]["step_bytes"]
    return [
        f"{one['name']}: {_count(one['parameters'])} parameters of its own, a draft step reads "
        f"{one['step_bytes'] / 1e6:.3g} MB, {one['step_bytes'] / target:.2f} of the target's {target / 1e6:.3g} MB"
        for one in summary["drafters"]
    ]


def by_drafter(summary: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Contenders under a heading each drafter, those without one first; all under none where there is a single drafter."""
    ones, names = summary["contenders"], [one["name"] for one in summary["drafters"]]
    if len(names) < 2:
        return [("", ones)]
    return [(name, [one for one in ones if (one["drafter"] or "") == name]) for name in ("", *names)]


def label(one: dict[str, Any]) -> str:
    """A contender's name under its drafter's."""
    name = one["name"].removeprefix("trainkit ").replace("transformers", "transf.")
    return name.replace(f"{one['drafter']} ", "", 1) if one["drafter"] else name


def _speeds(summary: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("decoding", "tokens", "thr", "tok/s", "min..max", "x plain", "x transf.", "bandwidth", "identical")
    ]
    for heading, ones in by_drafter(summary):
        rows += [(f"{heading}:",)] if heading else []
        for one in ones:
            rate = one["tokens_per_second"]
            rows.append(
                (
                    f"  {label(one)}" if heading else one["name"],
                    str(one["tokens"]),
                    str(one["threads"]),
                    _short(rate["median"]),
                    f"{_short(rate['min'])}..{_short(rate['max'])}",
                    _ratio(one["x_plain"]),
                    _ratio(one["x_transformers"]),
                    _bandwidth(one.get("bandwidth")),
                    _identical(one, summary),
                )
            )
    return aligned(rows)


def _drafting(summary: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("draft", "MB read", "tau", "mbsu", "v(T)", "draft", "roof", "speedup", "of roof", "effic.", "cut rounds")
    ]
    for name, one in _drafts(summary, rows):
        rows.append(
            (
                name,
                f"{one['bandwidth']['bytes'] / 1e6:.3g}",
                *(_ratio(one[key]) for key in ("tau", "mbsu", "v", "draft", "roof", "speedup")),
                _percent(one["speedup_over_roof"]),
                _percent(one["efficiency"]),
                str(one["cut_rounds"]),
            )
        )
    return aligned(rows)


def _policies(summary: dict[str, Any]) -> str:
    """Policies beside the fastest fixed depth.

    Thrown away: drafted tokens that were not kept, for each token emitted; paused: rounds in which nothing was drafted because
    it would not have paid, of all.
    """
    rows: list[tuple[str, ...]] = [
        ("policy", "tau", "drafted", "thrown away", "paused", "speedup", "x fixed", "min..max", "best depth, thrown")
    ]
    for heading, ones in by_drafter(summary):
        paced = [one for one in ones if "paced" in one]
        rows += [(f"{heading}:",)] if heading and paced else []
        for one in paced:
            values, fixed = one["paced"], one["paced"]["over_best_fixed"]
            beside = ("-", "-", "-")
            if fixed is not None:
                beside = (
                    _ratio(fixed["median"]),
                    f"{_ratio(fixed['min'])}..{_ratio(fixed['max'])}",
                    f"{fixed['depth']}, {_ratio(fixed['wasted'])}",
                )
            tau, drafted, wasted, speedup = (_ratio(values[key]) for key in ("tau", "drafted_per_round", "wasted", "speedup"))
            paused = _percent(values["paused"] / max(1, values["rounds"]))
            name = f"  {label(one)}" if heading else label(one)
            rows.append((name, tau, drafted, wasted, paused, speedup, *beside))
    return aligned(rows)


def _positions(summary: dict[str, Any]) -> str:
    """alpha_k by position k, as many as fit."""
    most = min(12, max(len(one["alpha_k"]) for one in summary["contenders"] if "tau" in one))
    rows: list[tuple[str, ...]] = [("alpha_k, k =", *map(str, range(1, most + 1)), "")]
    for name, one in _drafts(summary, rows):
        cells = [f"{alpha:.2f}" for alpha in one["alpha_k"][:most]]
        rows.append((name, *cells, *[""] * (most - len(cells)), ""))
    return "\n".join(line.rstrip() for line in aligned(rows).splitlines())


def _drafts(summary: dict[str, Any], rows: list[tuple[str, ...]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each drafting contender with its name; a heading goes into `rows` where another drafter begins."""
    for heading, ones in by_drafter(summary):
        drafting = [one for one in ones if "tau" in one]
        if heading and drafting:
            rows.append((f"{heading}:",))
        for one in drafting:
            yield f"  {label(one)}" if heading else label(one), one


def _closing(summary: dict[str, Any]) -> str:
    lines = []
    by_name = {one["name"]: one for one in summary["contenders"]}
    if summary["best"] is not None:
        best = by_name[summary["best"]]
        rate = best["tokens_per_second"]["median"]
        plain = by_name["trainkit plain"]["tokens_per_second"]["median"]
        lines.append(f"best: {best['name']}, {_short(rate)} tokens/s, {best['x_plain']:.2f}x plain decoding ({_short(plain)})")
        theirs = [one for one in summary["contenders"] if one["family"] == "transformers"]
        if theirs:
            rival = max(theirs, key=lambda one: one["tokens_per_second"]["median"])
            speed = rival["tokens_per_second"]["median"]
            lines.append(f"and {rate / speed:.2f}x the fastest of transformers ({rival['name']}, {_short(speed)})")
    lines += _verdict(summary)
    if summary["arguments"]["temperature"] > 0:
        lines.append("transformers draws with its own noise: other texts, compared by speed alone")
    return _wrapped([*lines, *summary["notes"]])


def _verdict(summary: dict[str, Any]) -> list[str]:
    """`identical output: n of n, ties: k`, over every text that was held against plain decoding; mismatches named, loudly."""
    held = [(one["name"], one["identical"]) for one in summary["contenders"] if one["identical"] is not None]
    if not held:
        return ["identical output: nothing to hold against plain decoding"]
    total, equal, ties = (sum(found[key] for _, found in held) for key in ("of", "equal", "ties"))
    lines = [f"identical output: {equal} of {total}, ties: {ties} (score gap below {summary['tie_tolerance']:.2g})"]
    for name, found in held:
        for one in found["differences"]:
            if not one["is_tie"]:
                lines.append(
                    f"MISMATCH: {name}, prompt {one['prompt']}, new token {one['place']}: {one['tokens'][1]} instead of "
                    f"{one['tokens'][0]}, gap {one['gap']:.3g}"
                )
    return lines


def _identical(one: dict[str, Any], summary: dict[str, Any]) -> str:
    found = one["identical"]
    if found is None:
        return "reference" if one["name"] == "trainkit plain" else "other draw"
    extra = f", {found['ties']} tied" if found["ties"] else ""
    return f"{found['equal']}/{found['of']}{extra}" + (f", {found['mismatches']} WRONG" if found["mismatches"] else "")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings: the first and the last to the left, numbers to the right; rows of one cell as they are."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in full) for i in range(len(full[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=False)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]) if len(row) > 1 else row[0])
    return "\n".join(lines)


def _bandwidth(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return "in cache" if found["in_cache"] else _percent(found["share"])


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.2f}M"
