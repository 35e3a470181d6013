"""Turns pytest-benchmark's JSON files into Markdown: a table an op, a row a provider.

Usage: python benchmarks/report.py benchmarks/results/FILE.json ...

A cell is the provider's rate and how many times as fast plum's fastest kernel is; behind it stands
the ratio that is asked for, where there is one; where plum has several forms of an answer, the
ratio to each that does the same work. plum's own cells give the share of the floor: the time that
the operations would take at the rate of the best matrix product, or the bytes at that of memory,
over the time taken. Ratios that are asked for over a set of shapes follow in a table of
their own, as the geometric mean and the worst.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

_TIMES = "\N{MULTIPLICATION SIGN}"
# The figures of a table: provider, then shape, then what was recorded.
Cells = dict[str, dict[str, dict[str, Any]]]


def read(name: str) -> dict[str, Any]:
    """Reads a file of pytest-benchmark; anything else ends the process with a line that says so."""
    expected = "a JSON file of pytest-benchmark, as plum bench --output writes it"
    try:
        results = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {name}: expected {expected}, got {error}")
    if not isinstance(results, dict) or not {"machine_info", "benchmarks"} <= results.keys():
        got = f"one with {', '.join(results)}" if isinstance(results, dict) else "another one"
        sys.exit(f"error: {name}: expected {expected}, got {got}")
    return results


def report(results: dict[str, Any]) -> str:
    """Returns the facts, one table per op and device or thread count, and who was absent."""
    machine = ", ".join(
        f"{name} {value}" for name, value in results["machine_info"].items() if value
    )
    lines = [machine, ""]
    for place, ceiling in results.get("ceilings", {}).items():
        lines.append(
            f"- best measured here, {place}: matrix product {ceiling['fp32'] / 1e9:,.0f} GFLOP/s in"
            f" fp32, {ceiling['bf16'] / 1e9:,.0f} in bf16; memory"
            f" {ceiling['bandwidth'] / 1e9:,.0f} GB/s"
        )
    tables: dict[str, Cells] = defaultdict(lambda: defaultdict(dict))
    for bench in results["benchmarks"]:
        provider, shape = bench["params"]["provider"], bench["params"]["shape"]
        tables[_title(bench)][provider][shape] = bench["extra_info"]
    for title, cells in tables.items():
        lines += ["", *_table(title, cells), *_table_over_sets(title, cells)]
    absent: dict[str, dict[str, None]] = defaultdict(dict)
    for op, reasons in results.get("absent", {}).items():
        for provider, reason in reasons.items():
            absent[reason][f"{provider} ({op})"] = None
    if absent:
        lines += ["", "Not measured:", ""]
        lines += [f"- {'; '.join(names)}: {reason}" for reason, names in absent.items()]
    return "\n".join(lines)


def _title(bench: dict[str, Any]) -> str:
    op, _, device = bench["name"].split("[")[0].removeprefix("bench_").rpartition("_")
    threads = bench["params"].get("threads")
    place = f"{threads} thread{'s' if threads > 1 else ''}" if threads else device.upper()
    return f"{op}, {place}"


def _table(title: str, cells: Cells) -> list[str]:
    shapes = list(dict.fromkeys(shape for row in cells.values() for shape in row))
    ours: dict[str, float] = {}
    for provider, row in cells.items():
        for shape, figures in row.items():
            if _is_ours(provider) and not _names_its_ratios(figures):
                ours[shape] = max(ours.get(shape, 0.0), figures["rows_per_second"])
    lines = [
        f"| {title} | {' | '.join(shapes)} |",
        f"| --- | {' | '.join('---:' for _ in shapes)} |",
    ]
    for provider in cells:
        texts = [_cell(provider, shape, cells, ours.get(shape)) for shape in shapes]
        lines.append(f"| {provider} | {' | '.join(texts)} |")
    return lines


def _is_ours(provider: str) -> bool:
    return provider.startswith("plum ") and provider != "plum reference"


def _names_its_ratios(figures: dict[str, Any]) -> bool:
    return "against" in figures or "costs" in figures


def _cell(provider: str, shape: str, cells: Cells, ours: float | None) -> str:
    figures = cells[provider].get(shape)
    if figures is None:
        return "-"
    rate = figures["rows_per_second"]
    parts = [_rate(rate)]
    if "target_nanoseconds" in figures:
        nanoseconds, asked = figures["nanoseconds_per_row"], figures["target_nanoseconds"]
        missed = "" if nanoseconds <= asked else ", missed"
        parts.append(f"{nanoseconds:.3g} ns (asked ≤ {asked:g}{missed})")
    if _names_its_ratios(figures):
        parts += [_named(ratio) for ratio in _ratios(provider, shape, cells)]
    elif rate == ours and _is_ours(provider):
        asked = figures.get("target_share")
        of_floor = f"{figures['share_of_floor']:.0%} of the floor"
        parts.append(of_floor + (f" (asked ≥ {asked:.0%})" if asked else ""))
    elif ours is not None:
        parts.append(f"**{_ratio(ours / rate)}**" + _asked(ours / rate, figures.get("target")))
    if "bytes_per_item" in figures:
        peak = figures["peak_bytes_per_item"]
        size = figures["bytes_per_item"]
        parts.insert(1, f"{size:,.{0 if size >= 100 else 1}f} B/item (peak {peak:,.0f})")
    if "target_over" in figures:
        other, asked = figures["target_over"]
        if shape in cells.get(other, {}):
            ratio = rate / cells[other][shape]["rows_per_second"]
            parts.append(f"{_ratio(ratio)} {other}" + _asked(ratio, asked))
    if "share_outside_the_model" in figures:
        outside, saved = figures["share_outside_the_model"], figures["share_of_steps_saved"]
        parts.append(f"{outside:.1%} outside the model, {saved:.0%} of its steps saved")
    return ", ".join(parts)


class _Ratio(NamedTuple):
    """A ratio to one of plum's providers; ``kind`` is against, costs or bytes_against."""

    kind: str
    to: str
    value: float
    asked: float | None


def _ratios(provider: str, shape: str, cells: Cells) -> Iterator[_Ratio]:
    """The ratios of a cell to those of plum's providers that it names and that were measured."""
    figures = cells[provider][shape]
    for kind in ("against", "costs", "bytes_against"):
        for to, asked in figures.get(kind, {}).items():
            theirs = cells.get(to, {}).get(shape)
            if theirs is None:
                continue
            if kind == "bytes_against":
                value = figures["bytes_per_item"] / theirs["bytes_per_item"]
            else:
                value = theirs["rows_per_second"] / figures["rows_per_second"]
            # Of two that ran in turn there is a ratio that no load between them can move.
            yield _Ratio(kind, to, figures.get("times_beside", value), asked)


def _named(ratio: _Ratio) -> str:
    if ratio.kind == "costs":
        return f"{_ratio(ratio.value)} the time of {ratio.to}" + _limit(ratio.value, ratio.asked)
    what = " in bytes" if ratio.kind == "bytes_against" else ""
    return f"**{_ratio(ratio.value)}** {ratio.to}{what}" + _asked(ratio.value, ratio.asked)


def _table_over_sets(title: str, cells: Cells) -> list[str]:
    """Ratios over the shapes that name a set: the geometric mean, and the worst."""
    rows: dict[str, dict[str, list[_Ratio]]] = defaultdict(lambda: defaultdict(list))
    means: dict[tuple[str, str], float] = {}
    for provider, shapes in cells.items():
        for shape, figures in shapes.items():
            if "over" not in figures:
                continue
            for ratio in _ratios(provider, shape, cells):
                row = f"{provider} to {ratio.to}"
                rows[row][figures["over"]].append(ratio)
                if ratio.to in figures.get("mean_against", {}):
                    means[row, figures["over"]] = figures["mean_against"][ratio.to]
    if not rows:
        return []
    sets = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["", f"| {title}, over sets | {' | '.join(sets)} |"]
    lines.append(f"| --- | {' | '.join('---:' for _ in sets)} |")
    for row, found in rows.items():
        texts = [_over_set(found.get(name), means.get((row, name))) for name in sets]
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return lines


def _over_set(ratios: list[_Ratio] | None, mean_asked: float | None) -> str:
    if not ratios:
        return "-"
    values, asked = [ratio.value for ratio in ratios], ratios[0].asked
    mean = f"mean {_ratio(geometric_mean(values))}" + _asked(geometric_mean(values), mean_asked)
    if ratios[0].kind == "costs":
        return f"{mean}, worst {_ratio(max(values))}" + _limit(max(values), asked)
    return f"{mean}, worst {_ratio(min(values))}" + _asked(min(values), asked)


def _limit(ratio: float, asked: float | None) -> str:
    if asked is None:
        return ""
    return f" (asked ≤ {asked:g}{'' if ratio <= asked else ', missed'})"


def _ratio(value: float) -> str:
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + _TIMES


def _asked(ratio: float, asked: float | None) -> str:
    if asked is None:
        return ""
    return f" (asked ≥ {asked:g}{'' if ratio >= asked else ', missed'})"


def _rate(rows_per_second: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rows_per_second >= unit:
            return f"{rows_per_second / unit:.3g} {name}/s"
    return f"{rows_per_second:.3g} /s"


if __name__ == "__main__":
    print("\n\n".join(report(read(name)) for name in sys.argv[1:]))
