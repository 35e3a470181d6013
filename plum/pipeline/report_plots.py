"""The plots of the run report: inline SVG whose text and colors follow the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from plum.errors import MissingDependency

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID = "#2a2430", "#756e7d", "#e6e1ea"
_SERIES = ("#8b3a8f", "#e08a2e", "#2b8a8a", "#4a6fd0", "#c2456b", "#7a8a2f", "#8d8794")
# Colors of the light theme, each replaced by the variable that the page gives both themes.
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    **{color: f"--series-{i + 1}" for i, color in enumerate(_SERIES)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "plum",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}

Points = Sequence[tuple[float, float | None]]


def metric_bars(
    systems: Sequence[str], families: Mapping[str, Mapping[int, Sequence[float | None]]]
) -> Markup:
    """Draws grouped bars.

    Args:
        systems: What is compared, the generator first.
        families: Metric family to cutoff k to one value per system, None where
            it was not measured.
    """
    families = {label: values for label, values in families.items() if values}
    with _figure(9.6, 3.3, len(families)) as (figure, axes):
        width = 0.8 / len(systems)
        for axis, (label, values) in zip(axes, families.items(), strict=True):
            for i, system in enumerate(systems):
                offset = (i - (len(systems) - 1) / 2) * width
                measured = [
                    (x + offset, height)
                    for x, by_system in enumerate(values.values())
                    if (height := by_system[i]) is not None
                ]
                at = [x for x, _ in measured]
                heights = [height for _, height in measured]
                color = _SERIES[i % len(_SERIES)]
                axis.bar(at, heights, width * 0.92, label=system, color=color)
                if len(values) * len(systems) <= 15:
                    for x, height in measured:
                        axis.annotate(
                            f"{height:.3f}".lstrip("0"), (x, height), (0, 2), ha="center",
                            fontsize=7.5, color=_MUTED, textcoords="offset points",
                        )  # fmt: skip
            axis.set_xticks(range(len(values)), [f"@{k}" for k in values])
            axis.set_title(label)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(systems))
        return _svg(figure, "Metrics of the generator and the baselines")


def similarity_histogram(
    edges: Sequence[float], raw: Sequence[int], centered: Sequence[int]
) -> Markup:
    """Draws the shares of pairs per bin of cosine similarity, raw and centered."""
    filled = [i for i, (a, b) in enumerate(zip(raw, centered, strict=True)) if a or b] or [0]
    with _figure(9.6, 3.0, 1) as (figure, (axis,)):
        for counts, label, color in (
            (raw, "raw", _SERIES[0]),
            (centered, "centered", _SERIES[2]),
        ):
            total = sum(counts) or 1
            shares = [count / total for count in counts]
            axis.stairs(shares, edges, fill=True, alpha=0.22, color=color)
            axis.stairs(shares, edges, label=label, color=color, linewidth=1.6)
        axis.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("cosine similarity of two items")
        axis.set_ylabel("share of pairs")
        axis.yaxis.set_major_formatter(_percent())
        axis.legend(loc="upper right")
        return _svg(figure, "Histogram of the cosine similarities of all pairs of items")


def level_usage(usage: Sequence[float], counts: Sequence[Sequence[int] | None]) -> Markup:
    """Draws the share of codes in use per level and, where known, how often each code occurs.

    Args:
        usage: Share of the codes in use, per level.
        counts: Occurrences of the codes per level, sorted downwards; None where unknown.
    """
    with _figure(9.6, 3.1, 2 if any(counts) else 1) as (figure, axes):
        bars = axes[0]
        colors = [_SERIES[level % len(_SERIES)] for level in range(len(usage))]
        names = [f"level {level}" for level in range(len(usage))]
        bars.bar(names, usage, 0.6, color=colors)
        for level, share in enumerate(usage):
            bars.annotate(
                f"{share:.1%}", (level, share), (0, 3), ha="center", fontsize=9,
                textcoords="offset points",
            )  # fmt: skip
        bars.set_ylim(0, 1.1)
        bars.set_yticks([0, 0.25, 0.5, 0.75, 1])
        bars.yaxis.set_major_formatter(_percent())
        bars.set_title("Codes in use")
        if any(counts):
            curve = axes[1]
            for level, occurrences in enumerate(counts):
                if occurrences:
                    curve.plot(
                        range(1, len(occurrences) + 1), occurrences,
                        label=names[level], **_stroke(level),
                    )  # fmt: skip
            curve.set_yscale("symlog", linthresh=1)
            curve.set_ylim(bottom=0)
            curve.yaxis.set_major_formatter("{x:,.0f}")
            curve.set_xlabel("code, the most frequent first")
            curve.set_title("Items per code")
            curve.legend(loc="lower left")
        return _svg(figure, "Usage of the codes per level")


def grouped_bars(
    series: Sequence[str],
    groups: Sequence[str],
    values: Sequence[Sequence[float | None]],
    title: str,
) -> Markup:
    """Draws shares from 0 to 1, one bar per series in each group.

    Args:
        series: What is compared.
        groups: Under which each group of bars stands.
        values: A list per group with one share per series; None draws no bar.
        title: What the shares are of.
    """
    with _figure(4.7, 3.1, 1) as (figure, (axis,)):
        width = 0.8 / len(series)
        for i, name in enumerate(series):
            offset = (i - (len(series) - 1) / 2) * width
            shown = [(x + offset, v) for x, by in enumerate(values) if (v := by[i]) is not None]
            axis.bar(
                [x for x, _ in shown], [v for _, v in shown], width * 0.92,
                label=name, color=_SERIES[i % len(_SERIES)],
            )  # fmt: skip
            if len(series) * len(groups) <= 8:
                for x, share in shown:
                    axis.annotate(
                        f"{share:.0%}", (x, share), (0, 2), ha="center", fontsize=8,
                        color=_MUTED, textcoords="offset points",
                    )  # fmt: skip
        axis.set_ylim(0, 1.1)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axis.yaxis.set_major_formatter(_percent())
        axis.set_xticks(range(len(groups)), groups)
        axis.set_title(title)
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=_legend_columns(series))
        return _svg(figure, title)


def collision_bars(collisions: Sequence[tuple[int, int]]) -> Markup:
    """Draws how many SIDs hold 1, 2, 3, ... items.

    Args:
        collisions: Pairs of a number of items and how many SIDs hold that many.
    """
    most = 12
    heights = dict(collisions)
    names = [str(n) for n in range(1, min(most, max(heights)) + 1)]
    shown = [heights.get(n, 0) for n in range(1, len(names) + 1)]
    if max(heights) > most:
        names[-1] = f"{most}+"
        shown[-1] = sum(count for n, count in heights.items() if n >= most)
    with _figure(9.6, 2.6, 1) as (figure, (axis,)):
        axis.bar(names, shown, 0.6, color=[_SERIES[0], *[_SERIES[1]] * (len(names) - 1)])
        for x, count in enumerate(shown):
            axis.annotate(
                f"{count:,}", (x, count), (0, 3), ha="center", fontsize=9,
                textcoords="offset points",
            )  # fmt: skip
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, max(shown) * 4)
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlim(-0.6, max(3.5, len(names) - 0.4))
        axis.set_xlabel("items on one SID")
        axis.set_title("SIDs that hold one item, and several")
        return _svg(figure, "Number of SIDs by how many items they hold")


def lines(
    series: Mapping[str, Points],
    x_label: str,
    title: str,
    *,
    unit: bool = False,
    log: bool = False,
) -> Markup | None:
    """Draws curves, or returns None when there is nothing to draw.

    Args:
        series: Label to (x, y) points; those without a y are passed over.
        x_label: What x counts.
        title: What y is.
        unit: The y axis is a share from 0 to 1.
        log: The y axis is logarithmic when values are positive and span a factor above 30.
    """
    drawn = {
        label: kept
        for label, points in series.items()
        if (kept := [(x, y) for x, y in points if y is not None])
    }
    if not drawn:
        return None
    with _figure(4.7, 3.1, 1) as (figure, (axis,)):
        from matplotlib.ticker import MaxNLocator

        for i, label in enumerate(series):
            # What has no points keeps its color to itself, as in the other plots of a page.
            if points := drawn.get(label):
                xs, ys = zip(*points, strict=True)
                marker = "o" if len(points) <= 25 else None
                axis.plot(xs, ys, label=label, marker=marker, markersize=3.5, **_stroke(i))
        values = [y for points in drawn.values() for _, y in points]
        if unit:
            axis.set_ylim(0, max(1.03, *values))
            axis.yaxis.set_major_formatter(_percent())
        elif log and min(values) > 0 and max(values) / min(values) > 30:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
        else:
            # Room above the highest point, wherever the others are.
            low, high = min(0, *values), max(0, *values)
            axis.set_ylim(low, high + 0.05 * ((high - low) or 1))
        axis.set_title(title.capitalize())
        axis.set_xlabel(x_label)
        # A single record has one tick: there is no part of an epoch.
        axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        if len(series) > 1:
            figure.legend(loc="outside lower center", ncols=_legend_columns(list(drawn)))
        return _svg(figure, f"{title} by {x_label}")


def _stroke(i: int) -> dict[str, Any]:
    """Returns what tells curve i from the others: its color, and dashes once those run out."""
    again, color = divmod(i, len(_SERIES))
    return {"color": _SERIES[color], "linestyle": ("-", "--", ":")[again % 3]}


def _legend_columns(labels: Sequence[str]) -> int:
    """Returns how many columns of labels fit under half a page."""
    return max(1, min(3, 75 // (max(map(len, labels)) + 5)))


@contextmanager
def _figure(width: float, height: float, panels: int) -> Iterator[tuple[Figure, list[Axes]]]:
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependency("matplotlib", "pipeline", "the plots of the report") from None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=None)


def _svg(figure: Figure, description: str) -> Markup:
    """Returns the figure as an ``<svg>`` element without addresses, fonts or fixed colors."""
    from markupsafe import Markup, escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # In HTML the namespaces of svg and xlink are built in.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Groups are numbered alike in every figure, and an id may occur once in a page.
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
