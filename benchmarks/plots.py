"""Draws docs/figures/scaling.svg from the newest result of bench_scaling.py.

Usage: python -m benchmarks.plots

The file holds a digest of the points that it was drawn from, so that a test tells when it is out of
step with the results, whatever the version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from benchmarks.bench_scaling import BASE, DECODE_AXES, DECODE_BASE, SEARCH_AXES
from benchmarks.tables import ROOT, Source
from plum.files import atomic_path

PLOT = ROOT / "docs" / "figures" / "scaling.svg"
# Provider to points (size, seconds).
Curves = dict[str, list[tuple[int, float]]]
_TITLES = {
    "N": "rows",
    "K": "codes a level",
    "D": "width",
    "L": "levels",
    "SIDs": "SIDs of the catalog",
    "W": "beams",
}
_COLORS = {"plum cpu": "#5e35b1", "STATIC": "#d81b60", "torch addmm + argmin": "#ef6c00",
           "faiss ResidualQuantizer": "#00897b", "vector-quantize-pytorch": "#757575"}  # fmt: skip


def curves() -> dict[tuple[str, str], Curves]:
    """Returns the curves of each plot: by op, and the size that changes."""
    found: dict[tuple[str, str], Curves] = {}
    for op, axes in (("search_scaling", SEARCH_AXES), ("decode_scaling", DECODE_AXES)):
        source = Source(op)
        for axis, values in axes.items():
            plot = found.setdefault((op, axis), {})
            for provider, shape in source.figures:
                name, _, value = shape.partition("=")
                if name == axis and int(value) in values:
                    seconds = source.figures[provider, shape]["seconds"]
                    plot.setdefault(provider, []).append((int(value), seconds))
    return found


def digest() -> str:
    """Returns what tells the points of one result from those of another."""
    points = {f"{op} {axis}": plot for (op, axis), plot in curves().items()}
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()


def draw(path: Path) -> None:
    """Draws all curves on logarithmic axes."""
    import matplotlib
    from matplotlib import pyplot as plt

    plots = curves()
    with matplotlib.rc_context({"svg.hashsalt": "plum", "font.size": 8}):
        figure, grid = plt.subplots(2, 4, figsize=(11, 5.2), layout="constrained")
        for axis in grid.flat[len(plots) :]:
            axis.axis("off")
        for axis, ((op, size), plot) in zip(grid.flat, plots.items(), strict=False):
            for provider, points in plot.items():
                x, seconds = zip(*sorted(points), strict=True)
                axis.plot(
                    x, [1e3 * each for each in seconds], "o-", ms=3, label=provider,
                    color=_COLORS[provider], lw=2 if provider.startswith("plum") else 1,
                )  # fmt: skip
            base = BASE if op == "search_scaling" else DECODE_BASE
            others = ", ".join(f"{name}={value:,}" for name, value in base.items() if name != size)
            axis.set(xscale="log", yscale="log", xlabel=f"{_TITLES[size]} ({others})")
            marks = sorted({size for points in plot.values() for size, _ in points})
            axis.set_xticks(marks, [_short(mark) for mark in marks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        for row, title in enumerate(("residual search, ms", "whole decode, 8 requests, ms")):
            grid[row, 0].set_ylabel(title)
        # Of each op one plot, into the corner that is free.
        lines = {line.get_label(): line for row in grid[:, 0] for line in row.get_lines()}
        grid[1, 3].legend(list(lines.values()), list(lines), loc="center", fontsize=8)
        with atomic_path(path) as temporary:
            metadata = {"Date": None, "Description": digest()}
            figure.savefig(temporary, format="svg", metadata=metadata, facecolor="white")
        plt.close(figure)


def _short(value: int) -> str:
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return str(value)


if __name__ == "__main__":
    draw(PLOT)
    print(PLOT)
