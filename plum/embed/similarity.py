"""How similar the embeddings of a catalog are to each other, raw and centered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from plum.errors import InvalidArgument, InvalidData, MissingDependency, check_int
from plum.files import atomic_path

HISTOGRAM_BINS = 80
# 4,000,000 bins of 5e-7 over [-1, 1]: a median from them is as good as a float32 cosine.
_FINE_BINS = HISTOGRAM_BINS * 50_000
_CHUNK_PAIRS = 4_000_000


def similarity_report(
    embeddings: np.ndarray,
    *,
    labels: Sequence[set[str]] | None = None,
    num_neighbors: int = 10,
    max_rows: int = 20_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Describes the cosine similarities of all pairs of two different rows.

    A high mean says little by itself: it is mostly one offset common to all rows. So the same
    figures are given after subtracting the mean of the normalized rows, and with labels the
    quality of the nearest neighbors: the mean Jaccard index of the label sets of a row and of its
    nearest rows by (raw) cosine, beside that of a row and as many random others.

    Means and standard deviations are closed forms in float64; medians are exact to 2.5e-7. Above
    ``max_rows`` rows everything is computed on a sample without replacement.

    Args:
        embeddings: float ``[N, D]``, N >= 2, no zero rows.
        labels: One set per row, for example the genres; rows with an empty set are left out as
            queries.
        num_neighbors: Neighbors per row, at most N - 1 are used.
        max_rows: Rows up to which all pairs are counted.
        seed: Of the sample of rows and of the random neighbors, at least 0.
        progress: Called with (blocks of rows done, blocks).

    Returns:
        A dict for JSON: ``num_rows``, ``dim``, ``sampled_rows``, ``num_pairs``, ``mean``,
        ``median``, ``std``, ``centered`` (``mean``, ``median``, ``std``), ``histogram``
        (``edges``, ``raw``, ``centered``: counts of pairs), and where a row that is looked at has
        labels ``neighbor_agreement`` (``neighbors``, ``random``, ``num_neighbors``, ``num_rows``).

    Raises:
        InvalidArgument: a shape, type or number is out of range, or all sets of labels are empty.
        InvalidData: a row is zero or not finite.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2 or len(embeddings) < 2 or embeddings.dtype.kind not in "fiu":
        got = f"{embeddings.dtype} {list(embeddings.shape)}"
        raise InvalidArgument("embeddings", "numbers [N, D] with N >= 2", got)
    check_int("seed", seed, 0)
    if labels is not None and len(labels) != len(embeddings):
        raise InvalidArgument("labels", f"{len(embeddings)} sets, one per row", len(labels))
    check_int("num_neighbors", num_neighbors)
    check_int("max_rows", max_rows, 2)
    rng = np.random.default_rng(seed)
    num_rows = len(embeddings)
    if num_rows > max_rows:
        sample = np.sort(rng.choice(num_rows, max_rows, replace=False))
    else:
        sample = np.arange(num_rows)

    if labels is not None:
        if not any(labels):
            raise InvalidArgument("labels", "at least one set that is not empty", "only empty sets")
        labels = [labels[row] for row in sample]
        # Of a catalog with few labels, a sample may have none.
        labels = labels if any(labels) else None
    rows = _normalized(embeddings[sample], sample)
    centered = rows - rows.mean(axis=0)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    # A row equal to the mean has no direction left; its cosines count as 0.
    centered = np.divide(centered, norms, out=np.zeros_like(centered), where=norms > 1e-6)

    starts = _chunk_starts(len(rows))
    steps = len(starts) * (3 if labels is not None else 2)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    raw_counts = _pair_counts(rows, starts, step)
    centered_counts = _pair_counts(centered, starts, step)
    report: dict[str, Any] = {
        "num_rows": num_rows,
        "dim": int(embeddings.shape[1]),
        "sampled_rows": len(rows),
        "num_pairs": int(raw_counts.sum()),
        **_moments(rows, raw_counts),
        "centered": _moments(centered, centered_counts),
        "histogram": {
            "edges": np.linspace(-1, 1, HISTOGRAM_BINS + 1).round(6).tolist(),
            "raw": raw_counts.reshape(HISTOGRAM_BINS, -1).sum(axis=1).tolist(),
            "centered": centered_counts.reshape(HISTOGRAM_BINS, -1).sum(axis=1).tolist(),
        },
    }
    if labels is not None:
        neighbors = _nearest(rows, min(num_neighbors, len(rows) - 1), starts, step)
        report["neighbor_agreement"] = _agreement(labels, neighbors, rng)
    return report


def plot_similarity(reports: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draws the histograms of several reports over each other, raw on the left, centered right.

    Args:
        reports: Name in the legend to what :func:`similarity_report` returned.
        path: The file to write; its suffix decides the format (svg, png, pdf).

    Raises:
        InvalidArgument: there are no reports, or the format is unknown.
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise MissingDependency("matplotlib", "pipeline", "the plot of similarities") from None
    if not reports:
        raise InvalidArgument("reports", "at least one report", "none")
    path = Path(path)
    with rc_context({"svg.hashsalt": "plum", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        known = FigureCanvasAgg(figure).get_supported_filetypes()
        if path.suffix[1:] not in known:
            raise InvalidArgument("path", f"one of the suffixes {', '.join(known)}", path.name)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, kind in zip(axes, ("raw", "centered"), strict=True):
            for name, report in reports.items():
                counts = np.asarray(report["histogram"][kind])
                edges = report["histogram"]["edges"]
                axis.stairs(counts / counts.sum(), edges, label=name, linewidth=1.5)
            axis.set_title(kind, loc="left")
            axis.set_xlabel("cosine of two items")
            axis.set_xlim(-1, 1)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("share of pairs")
        axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[0].legend(frameon=False, loc="upper left")
        # Without a date the same figures give the same bytes.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, metadata=metadata)


def _normalized(embeddings: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Returns float64 rows of length 1."""
    rows = embeddings.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        what = "only zeros" if norms[bad[0]] == 0 else "NaN or infinity"
        raise InvalidData(f"embeddings[{sample[bad[0]]}]", "finite numbers, not all zero", what)
    return rows / norms[:, None]


def _chunk_starts(num_rows: int) -> range:
    return range(0, num_rows, max(1, _CHUNK_PAIRS // num_rows))


def _pair_counts(rows: np.ndarray, starts: range, step: Callable[[], None]) -> np.ndarray:
    """Returns int64 ``[4,000,000]``: the cosines of all pairs i < j, counted in fine bins."""
    counts = np.zeros(_FINE_BINS, dtype=np.int64)
    rows = rows.astype(np.float32)
    for start in starts:
        block = rows[start : start + starts.step]
        cosines = block @ rows[start:].T
        later = np.arange(cosines.shape[1])[None, :] > np.arange(len(block))[:, None]
        bins = ((cosines[later] + 1) * (_FINE_BINS / 2)).astype(np.int32)
        counts += np.bincount(np.clip(bins, 0, _FINE_BINS - 1), minlength=_FINE_BINS)
        step()
    return counts


def _moments(rows: np.ndarray, counts: np.ndarray) -> dict[str, float]:
    """Returns mean, median and standard deviation over the ordered pairs i != j."""
    num_pairs = len(rows) * (len(rows) - 1)
    # Sums over all (i, j) are |sum of rows|^2 and |rows^T rows|^2; the diagonal is taken off.
    squares = np.einsum("nd,nd->n", rows, rows)
    mean = (np.square(rows.sum(axis=0)).sum() - squares.sum()) / num_pairs
    second = (np.square(rows.T @ rows).sum() - np.square(squares).sum()) / num_pairs
    cumulative = np.cumsum(counts)
    ranks = (int(cumulative[-1] - 1) // 2, int(cumulative[-1]) // 2)
    middle = np.searchsorted(cumulative, ranks, side="right")
    median = ((middle + 0.5) * (2 / _FINE_BINS) - 1).mean()
    std = np.sqrt(max(second - mean**2, 0.0))
    return {"mean": float(mean), "median": float(median), "std": float(std)}


def _nearest(rows: np.ndarray, k: int, starts: range, step: Callable[[], None]) -> np.ndarray:
    """Returns int64 ``[N, k]``: the k other rows of highest cosine, in no order."""
    nearest = np.empty((len(rows), k), dtype=np.int64)
    rows = rows.astype(np.float32)
    for start in starts:
        cosines = rows[start : start + starts.step] @ rows.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        nearest[start : start + len(own)] = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        step()
    return nearest


def _agreement(
    labels: Sequence[set[str]], neighbors: np.ndarray, rng: np.random.Generator
) -> dict[str, float | int]:
    k = neighbors.shape[1]
    queries = [row for row, own in enumerate(labels) if own]
    # Drawn from the N - 1 other rows: what is at or behind the row itself moves up by one.
    random = rng.integers(0, len(labels) - 1, size=(len(queries), k))
    random += random >= np.asarray(queries)[:, None]

    def mean_jaccard(others: np.ndarray) -> float:
        total = 0.0
        for row, near in zip(queries, others.tolist(), strict=True):
            own = labels[row]
            total += sum(len(own & labels[j]) / len(own | labels[j]) for j in near)
        return total / (len(queries) * k)

    return {
        "neighbors": mean_jaccard(neighbors[queries]),
        "random": mean_jaccard(random),
        "num_neighbors": k,
        "num_rows": len(queries),
    }
