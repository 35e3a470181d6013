"""Draws the plots of docs/figures that show results: scaling.svg and recommendation.svg.

Usage: python -m benchmarks.plots

A file holds a digest of the points that it was drawn from, so that a test tells when it is out of
step with the results, whatever the version of matplotlib.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.bench_scaling import BASE, DECODE_AXES, DECODE_BASE, SEARCH_AXES
from benchmarks.quality.recommendation import PUBLISHED
from benchmarks.tables import RESULTS, ROOT, TUNED, Source
from plum.files import atomic_path, read_json

FOLDER = ROOT / "docs" / "figures"
_NAMES = {"generator": "generator", "sasrec": "SASRec", "item_knn": "ItemKNN",
          "popularity": "popularity", "tiger": "TIGER-like"}  # fmt: skip
_DATASETS = {"ml-1m": "MovieLens-1M", "beauty": "Amazon Beauty"}
# Provider to points (size, seconds).
Curves = dict[str, list[tuple[int, float]]]
_TITLES = {
    "N": "rows N",
    "K": "codes a level K",
    "D": "width D",
    "L": "levels L",
    "SIDs": "SIDs of the catalog",
    "W": "beams W",
}
_KINDS = {"generator": "#5e35b1", "baseline": "#00897b", "published": "#bdbdbd"}
_COLORS = {"plum cpu": "#5e35b1", "STATIC": "#d81b60", "torch addmm + argmin": "#ef6c00",
           "faiss ResidualQuantizer": "#00897b", "vector-quantize-pytorch": "#757575"}  # fmt: skip


def curves() -> dict[str, Curves]:
    """Returns the curves of each plot, named by the op and the size that changes.

    A peer that was measured with two settings of its BLAS is shown with the better one.
    """
    found: dict[str, dict[str, dict[int, float]]] = {}
    for op, axes in (("search_scaling", SEARCH_AXES), ("decode_scaling", DECODE_AXES)):
        source = Source(op)
        for axis, values in axes.items():
            plot = found.setdefault(f"{op} {axis}", {})
            for provider, shape in source.figures:
                name, _, value = shape.partition("=")
                if name == axis and int(value) in values:
                    seconds = source.figures[provider, shape]["seconds"]
                    points = plot.setdefault(provider.removesuffix(TUNED), {})
                    points[int(value)] = min(seconds, points.get(int(value), seconds))
    return {
        name: {provider: list(points.items()) for provider, points in plot.items()}
        for name, plot in found.items()
    }


def recalls() -> dict[str, dict[str, float]]:
    """Returns test Recall@10 without seen items: by data set, then by model, published ones too."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in read_json(RESULTS / "quality" / "recommendation.json")["runs"]:
        if "metrics_unseen" in run:
            name = _NAMES[run["model"]] + run["sids"].removeprefix("fused")
            name += f", {run['variant']}" if run["variant"] else ""
            seeds = found.setdefault(run["dataset"], {}).setdefault(name, [])
            seeds.append(run["metrics_unseen"]["recall@10"])
    return {
        dataset: {name: fmean(seeds) for name, seeds in models.items()}
        | {f"published: {name}": float(recall) for name, recall, _ in PUBLISHED[dataset]}
        for dataset, models in found.items()
    }


def draw_scaling(path: Path) -> None:
    """Draws all curves on logarithmic axes."""
    plots = curves()
    with _figure(path, plots, 2, 4, (11, 5.2), sharey="row") as grid:
        for axis in grid.flat[len(plots) :]:
            axis.axis("off")
        for axis, (name, plot) in zip(grid.flat, plots.items(), strict=False):
            op, size = name.split()
            for provider, points in plot.items():
                x, seconds = zip(*sorted(points), strict=True)
                axis.plot(
                    x, [1e3 * each for each in seconds], "o-", ms=3, label=_label(provider),
                    color=_COLORS[provider], lw=2 if provider.startswith("plum") else 1,
                )  # fmt: skip
            base = BASE if op == "search_scaling" else DECODE_BASE
            others = ", ".join(f"{name}={value:,}" for name, value in base.items() if name != size)
            axis.set(xscale="log", yscale="log", xlabel=f"{_TITLES[size]} ({others})")
            marks = sorted({size for points in plot.values() for size, _ in points})
            axis.set_xticks(marks, [_short(mark) for mark in marks])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
            axis.tick_params(labelleft=True)
            axis.grid(alpha=0.3)
        for row, title in enumerate(("residual search, ms", "whole decode, 8 requests, ms")):
            grid[row, 0].set_ylabel(title)
        # Of each op one plot, into the corner that is free.
        lines = {line.get_label(): line for row in grid[:, 0] for line in row.get_lines()}
        grid[1, 3].legend(list(lines.values()), list(lines), loc="center", fontsize=8)


def draw_recommendation(path: Path) -> None:
    """Draws a bar a model, the best on top."""
    from matplotlib.patches import Patch

    plots = recalls()
    with _figure(path, plots, 1, len(plots), (11, 3.6)) as axes:
        for axis, (dataset, models) in zip(axes.flat, plots.items(), strict=True):
            names = sorted(models, key=lambda name: models[name])
            places = range(len(names))
            colors = [_KINDS[_kind(name)] for name in names]
            bars = axis.barh(places, [models[name] for name in names], color=colors)
            spelled = [name.removeprefix("published: ").replace(" (", "\n(") for name in names]
            axis.set_yticks(places, spelled)
            axis.bar_label(bars, fmt="%.4f", padding=2)
            axis.margins(x=0.15)
            axis.set_title(_DATASETS[dataset])
            axis.set_xlabel("test Recall@10, items of the history left out")
            axis.spines[["top", "right"]].set_visible(False)
        shown = [Patch(color=color, label=kind) for kind, color in _KINDS.items()]
        axes[0, 0].legend(handles=shown, loc="lower right", frameon=False)


@contextmanager
def _figure(
    path: Path, points: Any, rows: int, columns: int, size: tuple[float, float], **sharing: str
) -> Iterator[Any]:
    """Gives axes ``[rows, columns]`` to draw on, then writes them with the digest of the points."""
    from matplotlib import pyplot as plt
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": "plum", "font.size": 8}):
        options = {"figsize": size, "layout": "constrained", "squeeze": False, **sharing}
        figure, axes = plt.subplots(rows, columns, **options)
        yield axes
        with atomic_path(path) as temporary:
            metadata = {"Date": None, "Description": digest(points)}
            figure.savefig(temporary, format="svg", metadata=metadata, facecolor="white")
        plt.close(figure)


def digest(points: Any) -> str:
    """Returns what tells the points of one result from those of another."""
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()


def _kind(name: str) -> str:
    """Says which of the kinds of the legend a model is."""
    first = name.split(":")[0].split(",")[0]
    return first if first in _KINDS else "baseline"


def _label(provider: str) -> str:
    return provider.removesuffix(" cpu")


def _short(value: int) -> str:
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if value % unit == 0:
            return f"{value // unit}{name}"
    return f"{value:,}"


# File to its points and how it is drawn.
PLOTS: dict[str, tuple[Callable[[], Any], Callable[[Path], None]]] = {
    "scaling.svg": (curves, draw_scaling),
    "recommendation.svg": (recalls, draw_recommendation),
}


if __name__ == "__main__":
    for name, (_, draw) in PLOTS.items():
        draw(FOLDER / name)
        print(FOLDER / name)
