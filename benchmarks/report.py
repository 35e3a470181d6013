"""Turns pytest-benchmark's JSON files into Markdown: a table an op, a row a provider.

Usage: python benchmarks/report.py benchmarks/results/FILE.json ...

A cell is the provider's rate and how many times as fast plum's fastest kernel is; behind it stands
the ratio that is asked for, where there is one. plum's own cells give the share of the floor: the
time that the operations would take at the rate of the best bf16 matrix product, or the bytes at
that of memory, over the time taken.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

_TIMES = "\N{MULTIPLICATION SIGN}"
# The figures of a table: provider, then shape, then what was recorded.
Cells = dict[str, dict[str, dict[str, Any]]]


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
        lines += ["", *_table(title, cells)]
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
            if _is_ours(provider):
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
    if rate == ours and _is_ours(provider):
        asked = figures.get("target_share")
        of_floor = f"{figures['share_of_floor']:.0%} of the floor"
        parts.append(of_floor + (f" (asked ≥ {asked:.0%})" if asked else ""))
    elif ours is not None:
        parts.append(f"**{_ratio(ours / rate)}**" + _asked(ours / rate, figures.get("target")))
    if "target_over" in figures:
        other, asked = figures["target_over"]
        if shape in cells.get(other, {}):
            ratio = rate / cells[other][shape]["rows_per_second"]
            parts.append(f"{_ratio(ratio)} {other}" + _asked(ratio, asked))
    if "share_outside_the_model" in figures:
        outside, saved = figures["share_outside_the_model"], figures["share_of_steps_saved"]
        parts.append(f"{outside:.1%} outside the model, {saved:.0%} of its steps saved")
    return ", ".join(parts)


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
    print("\n\n".join(report(json.loads(Path(name).read_text())) for name in sys.argv[1:]))
